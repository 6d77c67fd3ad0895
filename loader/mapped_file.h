// A file's bytes in memory, read-only and without a copy.
#pragma once

#include <cstddef>
#include <span>
#include <string>

namespace chimera {

// What is at the path: "a directory", "a FIFO", "a socket" or "a device". Empty for a regular file,
// and where nothing is.
std::string special_file(const std::string& path);

// Owns one mapping. Moving it moves the ownership; the bytes stay where they are, so pointers into
// them remain valid until the last owner goes.
//
// The size is taken once, when the file is opened. A file that another process shortens afterwards
// cannot be detected: reading past its new end stops the program with SIGBUS, as with every
// mapping.
class MappedFile {
 public:
  MappedFile() = default;

  // Throws Error if the path cannot be opened, is not a regular file (directory, FIFO, device) or
  // is empty. Never waits for a writer of a FIFO.
  explicit MappedFile(const std::string& path);
  ~MappedFile();

  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;

  const std::string& name() const { return name_; }  // the path, printable: for messages
  std::span<const std::byte> bytes() const { return {data_, size_}; }

  // Gives the memory of the pages that lie wholly in `range` back to the system. The bytes may
  // still be read afterwards, at the cost of reading them from the file again.
  void drop(std::span<const std::byte> range) const;

 private:
  std::string name_;
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace chimera
