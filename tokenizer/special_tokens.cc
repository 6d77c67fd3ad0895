#include "tokenizer/special_tokens.h"

namespace chimera {

static uint64_t child_key(uint32_t node, char byte) {
  return static_cast<uint64_t>(node) << 8 | static_cast<unsigned char>(byte);
}

void SpecialTokens::add(std::string_view text, int32_t id) {
  if (text.empty()) return;
  first_bytes_.set(static_cast<unsigned char>(text[0]));
  uint32_t node = 0;
  for (const char byte : text) {
    const auto [child, inserted] =
        children_.try_emplace(child_key(node, byte), static_cast<uint32_t>(ids_.size()));
    if (inserted) ids_.push_back(-1);
    node = child->second;
  }
  if (ids_[node] < 0) ids_[node] = id;
}

SpecialTokens::Match SpecialTokens::longest_at_start(std::string_view text) const {
  Match longest;
  if (text.empty() || !first_bytes_.test(static_cast<unsigned char>(text[0]))) return longest;
  uint32_t node = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    const auto child = children_.find(child_key(node, text[i]));
    if (child == children_.end()) break;
    node = child->second;
    if (ids_[node] >= 0) longest = {ids_[node], i + 1};
  }
  return longest;
}

}  // namespace chimera
