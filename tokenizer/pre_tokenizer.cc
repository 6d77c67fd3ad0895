#include "tokenizer/pre_tokenizer.h"

#include <cstddef>

#include "tokenizer/unicode.h"

namespace chimera {
namespace {

struct ClassedChar {
  CharClass char_class;
  size_t length;
};

ClassedChar first_char(std::string_view text) {
  const Utf8Char c = first_utf8_char(text);
  return {char_class(c.code_point), c.length};
}

// Bytes of the longest prefix whose characters all satisfy `predicate`.
template <typename Predicate>
size_t prefix_length(std::string_view text, Predicate predicate) {
  size_t length = 0;
  while (length < text.size()) {
    const ClassedChar c = first_char(text.substr(length));
    if (!predicate(c.char_class)) break;
    length += c.length;
  }
  return length;
}

// \s+(?!\S)|\s+ for a text that starts with white space: a run of it leaves its last character to
// the word that follows, unless that character is all there is.
size_t white_space_length(std::string_view text) {
  size_t last = 0, end = 0;
  while (end < text.size()) {
    const ClassedChar c = first_char(text.substr(end));
    if (c.char_class != CharClass::kSpace) return last > 0 ? last : end;
    last = end;
    end += c.length;
  }
  return end;
}

size_t gpt2_word_length(std::string_view text) {
  for (const std::string_view ending : {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"}) {
    if (text.starts_with(ending)) return ending.size();
  }
  const size_t space = text[0] == ' ' ? 1 : 0;
  if (space < text.size()) {
    const CharClass word_class = first_char(text.substr(space)).char_class;
    if (word_class != CharClass::kSpace) {
      return space +
             prefix_length(text.substr(space), [=](CharClass c) { return c == word_class; });
    }
  }
  return white_space_length(text);
}

void split_gpt2(std::string_view text, std::vector<std::string_view>& words) {
  while (!text.empty()) {
    const size_t length = gpt2_word_length(text);
    words.push_back(text.substr(0, length));
    text.remove_prefix(length);
  }
}

void split_smollm(std::string_view text, std::vector<std::string_view>& words) {
  while (!text.empty()) {
    const size_t piece = prefix_length(text, [](CharClass c) { return c != CharClass::kNumber; });
    split_gpt2(text.substr(0, piece), words);
    text.remove_prefix(piece);
    if (text.empty()) return;
    const size_t digit = first_char(text).length;
    words.push_back(text.substr(0, digit));
    text.remove_prefix(digit);
  }
}

}  // namespace

std::vector<std::string_view> split_words(PreTokenizer kind, std::string_view text) {
  std::vector<std::string_view> words;
  switch (kind) {
    case PreTokenizer::kNone:
      if (!text.empty()) words.push_back(text);
      break;
    case PreTokenizer::kGpt2:
      split_gpt2(text, words);
      break;
    case PreTokenizer::kSmolLm:
      split_smollm(text, words);
      break;
  }
  return words;
}

}  // namespace chimera
