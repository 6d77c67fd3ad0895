// Pre-tokenizers cut a text into words; byte-level BPE then merges within a word, never across.
//
// Each is published as a regular expression over Unicode classes and hand-written here, because
// std::regex knows no such classes and recurses once per character:
//
//   GPT-2    's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
//   SmolLM   every \p{N} is a word of its own; GPT-2's expression on each piece between them
//            ("a  5" is "a", "  ", "5": the end of a piece counts as the end of the text)
//   LLaMA 3  '(?i:s|t|re|ve|m|ll|d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|
//             ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
#pragma once

#include <string_view>
#include <vector>

#include "tokenizer/vocabulary.h"

namespace chimera {

// The words, in order; together they are `text`. Bytes that are no UTF-8 are characters of no
// class.
std::vector<std::string_view> split_words(PreTokenizer kind, std::string_view text);

}  // namespace chimera
