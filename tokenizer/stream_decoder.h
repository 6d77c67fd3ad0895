// Decoding for a screen: tokens come one at a time and may end in the middle of a character, which
// is then held back until it is whole.
//
//   StreamDecoder decoder(tokenizer);
//   for (...) print(decoder.push(id));
//   print(decoder.finish());
#pragma once

#include <cstdint>
#include <string>

#include "tokenizer/tokenizer.h"

namespace chimera {

// What it returns is always valid UTF-8: all pieces together are Tokenizer::decode() of the ids,
// with U+FFFD in place of what is no UTF-8.
class StreamDecoder {
 public:
  // `tokenizer` must outlive this. `at_text_start` is false for tokens that continue a text already
  // printed, such as a completion of a prompt: SentencePiece's leading space then is a real one.
  explicit StreamDecoder(const Tokenizer& tokenizer, bool at_text_start = true)
      : tokenizer_(&tokenizer), at_text_start_(at_text_start) {}

  // What can be printed now that `id` has come. Throws Error for an id outside the vocabulary.
  std::string push(int32_t id);

  // The rest: U+FFFD if the last character is not whole. The decoder then starts a new text.
  std::string finish();

 private:
  std::string take_whole_characters();

  const Tokenizer* tokenizer_;
  bool at_text_start_;
  std::string pending_;  // after push(): at most the first 3 bytes of a character
};

}  // namespace chimera
