#include "tokenizer/token_table.h"

#include <functional>

namespace chimera {

TokenTable::TokenTable(const std::vector<std::string>& texts) {
  size_t bytes = 0, places = 16;
  for (const std::string& text : texts) bytes += text.size();
  while (places < 2 * texts.size()) places *= 2;  // half of them free: a search ends soon
  bytes_.reserve(bytes);
  ends_.reserve(texts.size());
  places_.assign(places, -1);
  for (const std::string& text : texts) {
    const int32_t id = size();
    const bool is_new = find(text) < 0;
    bytes_ += text;
    ends_.push_back(static_cast<uint32_t>(bytes_.size()));
    if (!is_new) continue;
    size_t place = std::hash<std::string_view>()(text) & (places - 1);
    while (places_[place] >= 0) place = (place + 1) & (places - 1);
    places_[place] = id;
  }
}

int32_t TokenTable::find(std::string_view text) const {
  if (places_.empty()) return -1;
  const size_t mask = places_.size() - 1;
  for (size_t place = std::hash<std::string_view>()(text) & mask; places_[place] >= 0;
       place = (place + 1) & mask)
    if ((*this)[places_[place]] == text) return places_[place];
  return -1;
}

}  // namespace chimera
