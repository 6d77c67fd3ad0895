// The texts of a vocabulary in one block of memory, and the way back from a text to its id. With
// strings in maps SmolLM2's 49,152 tokens took a run 7 to 9 MB more (peak_memory_bytes of run
// --json).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace chimera {

class TokenTable {
 public:
  TokenTable() = default;
  // At most 2^31 - 1 texts, of fewer than 2^32 bytes together.
  explicit TokenTable(const std::vector<std::string>& texts);

  int32_t size() const { return static_cast<int32_t>(ends_.size()); }
  std::string_view operator[](int32_t id) const {
    const uint32_t begin = id == 0 ? 0 : ends_[static_cast<size_t>(id) - 1];
    return std::string_view(bytes_).substr(begin, ends_[static_cast<size_t>(id)] - begin);
  }
  // The first with exactly this text, -1 if there is none.
  int32_t find(std::string_view text) const;

 private:
  std::string bytes_;
  std::vector<uint32_t> ends_;   // by id
  std::vector<int32_t> places_;  // open addressing, a power of two; -1: free
};

}  // namespace chimera
