// UTF-8, and the three character classes that pre-tokenizers ask about.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace chimera {

enum class Utf8 : uint8_t {
  kValid,
  kIllFormed,
  kTruncated,  // the text ends inside a character that is valid so far
};

// The character at the start of a text. Bytes that are no UTF-8 count as one U+FFFD, and `length`
// is then that of their longest prefix that could have begun a character (Unicode, section 3.9), so
// that every text, whatever its bytes, is a sequence of characters.
struct Utf8Char {
  uint32_t code_point;
  uint32_t length;  // bytes, 1 to 4
  Utf8 state;
};

inline constexpr uint32_t kReplacementCharacter = 0xFFFD;

// `text` must not be empty.
Utf8Char first_utf8_char(std::string_view text);

void append_utf8(std::string& text, uint32_t code_point);

enum class CharClass : uint8_t { kLetter, kNumber, kSpace, kOther };

// Unicode's \p{L}, \p{N} and White_Space.
CharClass char_class(uint32_t code_point);

// Without spaces, tabs and line ends around it.
std::string_view trimmed(std::string_view text);

// unicode_tables.cc: sorted, disjoint, both ends included.
struct CodePointRange {
  uint32_t first, last;
};
extern const std::span<const CodePointRange> kLetterRanges, kNumberRanges, kSpaceRanges;

}  // namespace chimera
