// The tokens that are cut out of a text before it is encoded: a set of texts, and the longest of
// them at any place.
#pragma once

#include <bitset>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace chimera {

class SpecialTokens {
 public:
  struct Match {
    int32_t id = -1;    // -1: none
    size_t length = 0;  // bytes
  };

  // Of equal texts the first stays; an empty text is ignored.
  void add(std::string_view text, int32_t id);

  Match longest_at_start(std::string_view text) const;

 private:
  // A trie over bytes. Node 0 is the root.
  std::vector<int32_t> ids_ = {-1};                  // the token that ends at a node; -1: none
  std::unordered_map<uint64_t, uint32_t> children_;  // by node << 8 | byte
  std::bitset<256> first_bytes_;  // most places of a text are dismissed by this alone
};

}  // namespace chimera
