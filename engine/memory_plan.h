// Memory is planned, allocated once and carved: a plan lists what will be needed, with names and
// shapes, so that it can be printed before anything is taken.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace chimera {

class MemoryPlan {
 public:
  struct Entry {
    std::string name, shape;
    size_t offset, bytes;
  };

  // Adds an entry and returns its offset, a multiple of 64.
  size_t add(const std::string& name, const std::string& shape, size_t bytes) {
    const size_t offset = total_;
    entries_.push_back({name, shape, offset, bytes});
    total_ += (bytes + 63) / 64 * 64;
    return offset;
  }
  // rows * cols floats.
  size_t add_f32(const std::string& name, int64_t rows, int64_t cols) {
    return add(name, "(" + std::to_string(rows) + ", " + std::to_string(cols) + ") f32",
               static_cast<size_t>(rows * cols) * 4);
  }
  size_t total() const { return total_; }
  const std::vector<Entry>& entries() const { return entries_; }

 private:
  std::vector<Entry> entries_;
  size_t total_ = 0;
};

}  // namespace chimera
