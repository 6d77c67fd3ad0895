#include "loader/output_file.h"

#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>

#include "engine/error.h"
#include "loader/mapped_file.h"

namespace chimera {
namespace {

// The file to replace: for /dev/stdout, where that goes into a file, not the link in /dev.
std::string regular_file(const std::string& path) {
  const std::string special = special_file(path);
  if (!special.empty()) throw Error(printable(path, 4096), "a file that can be written", special);
  std::error_code error;
  const std::filesystem::path real = std::filesystem::canonical(path, error);
  return error ? path : real.string();
}

}  // namespace

OutputFile::OutputFile(const std::string& path)
    : path_(regular_file(path)),
      temporary_(path_ + "." + std::to_string(getpid()) + ".part"),
      file_(std::fopen(temporary_.c_str(), "wb"), std::fclose) {
  if (!file_)
    throw Error(printable(path_, 4096), "a file that can be written", std::strerror(errno));
}

OutputFile::~OutputFile() {
  if (!file_) return;
  file_.reset();
  std::remove(temporary_.c_str());
}

void OutputFile::write(const void* bytes, size_t n) {
  if (std::fwrite(bytes, 1, n, file_.get()) != n) fail(errno);
}

void OutputFile::commit() {
  if (std::fflush(file_.get()) != 0 || fsync(fileno(file_.get())) != 0) fail(errno);
  if (std::rename(temporary_.c_str(), path_.c_str()) != 0) fail(errno);
  file_.reset();
}

void OutputFile::fail(int error) const {
  throw Error(printable(path_, 4096), "a file that can be written", std::strerror(error),
              "free some space; what was there before is untouched");
}

}  // namespace chimera
