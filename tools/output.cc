#include "tools/output.h"

#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>

#include "engine/error.h"
#include "loader/output_file.h"

namespace chimera {
namespace {

void expect_another(const std::string& output, const std::string& other) {
  std::error_code error;  // files that are not there can have the same name all the same
  const auto a = std::filesystem::weakly_canonical(output, error),
             b = std::filesystem::weakly_canonical(other, error);
  if ((!a.empty() && a == b) || std::filesystem::equivalent(output, other, error))
    throw Error(printable(output, 4096), "an output with a file of its own",
                "the same file as " + printable(other, 4096), "name another");
}

}  // namespace

void print(std::string_view text) {
  const bool written = std::fwrite(text.data(), 1, text.size(), stdout) == text.size();
  if (written && std::fflush(stdout) == 0) return;
  if (errno == EPIPE) throw OutputClosed();
  throw Error("standard output", "room for the text", std::strerror(errno));
}

void print_json(const nlohmann::ordered_json& object) {
  print(object.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n");
}

void note(const std::string& line) {
  std::fprintf(stderr, "%s\n", line.c_str());
}

Progress::Progress()
    : terminal_(isatty(STDERR_FILENO) != 0), start_(Clock::now()), logged_(start_) {}

void Progress::show(const std::string& line) {
  if (terminal_) std::fprintf(stderr, "\r\033[K%s", line.c_str());
}

void Progress::bar(const std::string& label, double done) {
  constexpr int kWidth = 20;
  const auto full = static_cast<size_t>(done * kWidth);
  const double seconds = seconds_since(start_);
  show(label + " [" + std::string(full, '#') + std::string(kWidth - full, '-') + "] " +
       fixed_text(100 * done, 0) + "%" +
       (done > 0.02 ? ", " + fixed_text(seconds * (1 - done) / done, 0) + " s left" : ""));
}

void Progress::log(const std::string& line) {
  show(line);
  if (terminal_ || seconds_since(logged_) < 60) return;
  note(line);
  logged_ = Clock::now();
}

void expect_writable(const std::string& path) {
  const OutputFile there(path);
}

void expect_other_file(const std::string& output, const std::vector<std::string>& others) {
  for (const std::string& other : others) expect_another(output, other);
}

void expect_other_file(const std::string& output,
                       std::initializer_list<std::optional<std::string>> others) {
  for (const auto& other : others)
    if (other) expect_another(output, *other);
}

std::string xml_text(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '<' || c == '&')
      out += c == '<' ? "&lt;" : "&amp;";
    else
      out += c;
  }
  return out;
}

std::string bytes_text(size_t bytes) {
  const auto b = static_cast<double>(bytes);
  if (bytes < 1000) return std::to_string(bytes) + " bytes";
  if (b < 999.95e3) return fixed_text(b / 1e3, 1) + " kB";
  if (b < 999.95e6) return fixed_text(b / 1e6, 1) + " MB";
  return fixed_text(b / 1e9, 2) + " GB";
}

std::string count_text(int64_t n, const std::string& thing) {
  return std::to_string(n) + " " + thing + (n == 1 ? "" : "s");
}

std::string hash_text(std::string_view bytes) {
  uint64_t h = 0xcbf29ce484222325u;
  for (const char c : bytes) h = (h ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  char hex[17];
  std::snprintf(hex, sizeof hex, "%016llx", static_cast<unsigned long long>(h));
  return hex;
}

std::string number_text(float value) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%g", static_cast<double>(value));
  return buffer;
}

std::string percent_text(int64_t n, int64_t of) {
  return of > 0 ? fixed_text(100 * static_cast<double>(n) / static_cast<double>(of), 1) : "-";
}

std::string fixed_text(double value, int decimals) {
  char buffer[400];
  std::snprintf(buffer, sizeof buffer, "%.*f", decimals, value);
  return buffer;
}

}  // namespace chimera
