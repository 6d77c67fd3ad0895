#include "tokenizer/pre_tokenizer.h"

#include <algorithm>
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

constexpr std::string_view kContractions[] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};

size_t gpt2_word_length(std::string_view text) {
  for (const std::string_view ending : kContractions) {
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

bool starts_with_any_case(std::string_view text, std::string_view lower) {
  return text.size() >= lower.size() &&
         std::equal(lower.begin(), lower.end(), text.begin(),
                    [](char l, char c) { return l == (c >= 'A' && c <= 'Z' ? c + 32 : c); });
}

bool is_line_end(char c) {
  return c == '\r' || c == '\n';
}

// The alternatives of the expression in turn; the first that matches is the word.
size_t llama3_word_length(std::string_view text) {
  for (const std::string_view ending : kContractions) {
    if (starts_with_any_case(text, ending)) return ending.size();
  }
  const ClassedChar first = first_char(text);
  const bool is_letter = first.char_class == CharClass::kLetter,
             is_number = first.char_class == CharClass::kNumber;
  if (!is_number && !is_line_end(text[0])) {  // letters, with one other character in front
    const size_t before = is_letter ? 0 : first.length;
    const size_t letters =
        prefix_length(text.substr(before), [](CharClass c) { return c == CharClass::kLetter; });
    if (letters > 0) return before + letters;
  }
  if (is_number) {
    int digits = 0;
    return prefix_length(text,
                         [&](CharClass c) { return c == CharClass::kNumber && ++digits <= 3; });
  }
  const size_t space = text[0] == ' ' ? 1 : 0;
  const size_t others =
      prefix_length(text.substr(space), [](CharClass c) { return c == CharClass::kOther; });
  if (others > 0) {
    size_t end = space + others;
    while (end < text.size() && is_line_end(text[end])) ++end;
    return end;
  }
  // White space, as far as its last line end where there is one.
  size_t end = prefix_length(text, [](CharClass c) { return c == CharClass::kSpace; });
  while (end > 0 && !is_line_end(text[end - 1])) --end;
  return end > 0 ? end : white_space_length(text);
}

template <typename WordLength>
void split(std::string_view text, const WordLength& word_length,
           std::vector<std::string_view>& words) {
  while (!text.empty()) {
    const size_t length = word_length(text);
    words.push_back(text.substr(0, length));
    text.remove_prefix(length);
  }
}

void split_smollm(std::string_view text, std::vector<std::string_view>& words) {
  while (!text.empty()) {
    const size_t piece = prefix_length(text, [](CharClass c) { return c != CharClass::kNumber; });
    split(text.substr(0, piece), gpt2_word_length, words);
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
    case PreTokenizer::kGpt2: split(text, gpt2_word_length, words); break;
    case PreTokenizer::kSmolLm: split_smollm(text, words); break;
    case PreTokenizer::kLlama3: split(text, llama3_word_length, words); break;
  }
  return words;
}

}  // namespace chimera
