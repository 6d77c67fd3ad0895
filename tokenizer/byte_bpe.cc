#include "tokenizer/byte_bpe.h"

#include <algorithm>
#include <optional>

#include "engine/error.h"
#include "tokenizer/pre_tokenizer.h"
#include "tokenizer/unicode.h"

namespace chimera {
namespace {

constexpr uint32_t kFirstShifted = 0x100;
constexpr uint32_t kShiftedCount = 68;

bool is_printable(uint32_t byte) {
  return (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
}

// The bytes that U+0100 and up stand for.
std::array<uint8_t, kShiftedCount> shifted_bytes() {
  std::array<uint8_t, kShiftedCount> bytes{};
  size_t count = 0;
  for (uint32_t byte = 0; byte < 256; ++byte) {
    if (!is_printable(byte)) bytes[count++] = static_cast<uint8_t>(byte);
  }
  return bytes;
}

std::optional<uint8_t> byte_of(uint32_t code_point) {
  static const std::array<uint8_t, kShiftedCount> shifted = shifted_bytes();
  if (code_point < kFirstShifted) {
    if (!is_printable(code_point)) return std::nullopt;
    return static_cast<uint8_t>(code_point);
  }
  if (code_point - kFirstShifted >= kShiftedCount) return std::nullopt;
  return shifted[code_point - kFirstShifted];
}

// The character that stands for a byte.
uint32_t character_of(uint8_t byte) {
  static const std::array<uint32_t, 256> characters = [] {
    std::array<uint32_t, 256> all{};
    for (uint32_t c = 0; c < kFirstShifted + kShiftedCount; ++c)
      if (const std::optional<uint8_t> b = byte_of(c)) all[*b] = c;
    return all;
  }();
  return characters[byte];
}

uint64_t pair_key(int32_t left, int32_t right) {
  return static_cast<uint64_t>(left) << 32 | static_cast<uint32_t>(right);
}

}  // namespace

ByteBpe::ByteBpe(const Vocabulary& vocabulary, const TokenTable& texts,
                 const std::vector<TokenType>& types)
    : pre_(vocabulary.pre) {
  if (pre_ == PreTokenizer::kNone) {
    throw Error("tokenizer", "a pre-tokenizer for byte-level BPE", "none");
  }
  if (vocabulary.merges.empty()) {
    throw Error("tokenizer", "merges for byte-level BPE", "none",
                "without them every byte would be a token: convert the model again");
  }

  const auto is_control = [&](int32_t id) { return types[id] == TokenType::kControl; };

  byte_ids_.fill(-1);
  for (uint32_t code_point = 0; code_point < kFirstShifted + kShiftedCount; ++code_point) {
    const std::optional<uint8_t> byte = byte_of(code_point);
    if (!byte) continue;
    std::string text;
    append_utf8(text, code_point);
    const int32_t id = texts.find(text);
    if (id >= 0 && !is_control(id)) byte_ids_[*byte] = id;
  }

  merges_.reserve(vocabulary.merges.size());
  for (size_t i = 0; i < vocabulary.merges.size(); ++i) {
    const std::string_view line = vocabulary.merges[i];
    const auto where = [&] { return "tokenizer: merge " + std::to_string(i); };

    const size_t space = line.find(' ');
    if (space == std::string_view::npos || line.find(' ', space + 1) != std::string_view::npos) {
      throw Error(where(), "two tokens with one space between", in_quotes(line));
    }
    const std::string_view left_text = line.substr(0, space), right_text = line.substr(space + 1);
    const int32_t left = texts.find(left_text), right = texts.find(right_text);
    const int32_t merged = texts.find(std::string(left_text) + std::string(right_text));
    if (left < 0 || right < 0 || merged < 0) {
      throw Error(where(), "two tokens whose union is a token", in_quotes(line));
    }
    if (is_control(merged)) continue;
    merges_.push_back({pair_key(left, right), {static_cast<uint32_t>(i), merged}});
  }
  const auto by_pair = [](const PairMerge& a, const PairMerge& b) { return a.pair < b.pair; };
  std::stable_sort(merges_.begin(), merges_.end(), by_pair);  // of equal pairs the first counts
}

Merge ByteBpe::find_merge(int32_t left, int32_t right) const {
  if (left < 0 || right < 0) return kNoMerge;
  const uint64_t pair = pair_key(left, right);
  const auto found =
      std::lower_bound(merges_.begin(), merges_.end(), pair,
                       [](const PairMerge& m, uint64_t wanted) { return m.pair < wanted; });
  return found == merges_.end() || found->pair != pair ? kNoMerge : found->merge;
}

void ByteBpe::encode(std::string_view text, const TokenTable& texts,
                     const std::vector<TokenType>& types, std::vector<int32_t>& out) const {
  MergeQueue queue;
  std::string written;
  for (const std::string_view word : split_words(pre_, text)) {
    if (pre_ == PreTokenizer::kLlama3) {
      written.clear();
      for (const char c : word) append_utf8(written, character_of(static_cast<unsigned char>(c)));
      const int32_t id = texts.find(written);
      if (id >= 0 && types[id] != TokenType::kControl) {
        out.push_back(id);
        continue;
      }
    }
    queue.clear();
    for (size_t i = 0; i < word.size(); ++i) {
      queue.add(byte_ids_[static_cast<unsigned char>(word[i])], static_cast<uint32_t>(i), 1);
    }
    queue.run(
        [&](const Symbol& left, const Symbol& right) { return find_merge(left.id, right.id); });
    queue.for_each([&](const Symbol& symbol) {
      if (symbol.id >= 0) out.push_back(symbol.id);
    });
  }
}

std::string ByteBpe::token_bytes(std::string_view token_text) {
  std::string bytes;
  while (!token_text.empty()) {
    const Utf8Char c = first_utf8_char(token_text);
    if (const std::optional<uint8_t> byte = byte_of(c.code_point);
        byte && c.state == Utf8::kValid) {
      bytes += static_cast<char>(*byte);
    } else {
      bytes += token_text.substr(0, c.length);
    }
    token_text.remove_prefix(c.length);
  }
  return bytes;
}

}  // namespace chimera
