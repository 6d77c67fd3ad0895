#include "tokenizer/unicode.h"

#include <algorithm>

namespace chimera {

Utf8Char first_utf8_char(std::string_view text) {
  const uint32_t lead = static_cast<unsigned char>(text[0]);
  if (lead < 0x80) return {lead, 1, Utf8::kValid};

  // Unicode, table 3-7: after some leads the second byte has a narrower range, which excludes
  // overlong forms, surrogates and what lies beyond U+10FFFF.
  uint32_t length = 0, low = 0x80, high = 0xBF;
  if (lead >= 0xC2 && lead <= 0xDF) {
    length = 2;
  } else if (lead >= 0xE0 && lead <= 0xEF) {
    length = 3;
    if (lead == 0xE0) low = 0xA0;
    if (lead == 0xED) high = 0x9F;
  } else if (lead >= 0xF0 && lead <= 0xF4) {
    length = 4;
    if (lead == 0xF0) low = 0x90;
    if (lead == 0xF4) high = 0x8F;
  } else {
    return {kReplacementCharacter, 1, Utf8::kIllFormed};
  }

  uint32_t code_point = lead & (0x7F >> length);
  for (uint32_t i = 1; i < length; ++i) {
    if (i == text.size()) return {kReplacementCharacter, i, Utf8::kTruncated};
    const uint32_t byte = static_cast<unsigned char>(text[i]);
    if (byte < low || byte > high) return {kReplacementCharacter, i, Utf8::kIllFormed};
    code_point = code_point << 6 | (byte & 0x3F);
    low = 0x80;
    high = 0xBF;
  }
  return {code_point, length, Utf8::kValid};
}

void append_utf8(std::string& text, uint32_t code_point) {
  if (code_point < 0x80) {
    text += static_cast<char>(code_point);
    return;
  }
  const int continuation_bytes = code_point < 0x800 ? 1 : code_point < 0x10000 ? 2 : 3;
  constexpr uint32_t kLead[] = {0, 0xC0, 0xE0, 0xF0};
  text += static_cast<char>(kLead[continuation_bytes] | code_point >> 6 * continuation_bytes);
  for (int i = continuation_bytes - 1; i >= 0; --i) {
    text += static_cast<char>(0x80 | (code_point >> 6 * i & 0x3F));
  }
}

static bool contains(std::span<const CodePointRange> ranges, uint32_t code_point) {
  const auto after = std::upper_bound(
      ranges.begin(), ranges.end(), code_point,
      [](uint32_t value, const CodePointRange& range) { return value < range.first; });
  return after != ranges.begin() && code_point <= (after - 1)->last;
}

CharClass char_class(uint32_t code_point) {
  if (contains(kLetterRanges, code_point)) return CharClass::kLetter;
  if (contains(kNumberRanges, code_point)) return CharClass::kNumber;
  if (contains(kSpaceRanges, code_point)) return CharClass::kSpace;
  return CharClass::kOther;
}

std::string_view trimmed(std::string_view text) {
  constexpr std::string_view kWhiteSpace = " \t\r\n";
  const size_t begin = text.find_first_not_of(kWhiteSpace);
  if (begin == std::string_view::npos) return "";
  return text.substr(begin, text.find_last_not_of(kWhiteSpace) + 1 - begin);
}

}  // namespace chimera
