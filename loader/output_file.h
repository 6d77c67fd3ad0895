// A file that is there whole or not at all: written beside its place under another name, then
// renamed. What was there before is untouched until then. Only a regular file is ever replaced: no
// device, no FIFO, and of a link what it points to.
#pragma once

#include <cstdio>
#include <memory>
#include <string>
#include <string_view>

namespace chimera {

class OutputFile {
 public:
  // Throws Error, here and below, if the file cannot be written.
  explicit OutputFile(const std::string& path);
  ~OutputFile();  // without commit(): nothing was written
  void write(const void* bytes, size_t n);
  void write(std::string_view text) { write(text.data(), text.size()); }
  void commit();

 private:
  [[noreturn]] void fail(int error) const;

  std::string path_, temporary_;
  std::unique_ptr<std::FILE, int (*)(std::FILE*)> file_;
};

}  // namespace chimera
