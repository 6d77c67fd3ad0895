// Text to token ids and back, for the two kinds of vocabulary that LLaMA-like models carry.
//
//   Tokenizer tokenizer(load_model(path).vocabulary);  // loader/load.h
//   std::vector<int32_t> ids = tokenizer.encode("Why is the sky blue?", /*parse_special=*/false);
//   std::string text = tokenizer.decode(ids);
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "tokenizer/byte_bpe.h"
#include "tokenizer/sentencepiece.h"
#include "tokenizer/special_tokens.h"
#include "tokenizer/token_table.h"
#include "tokenizer/vocabulary.h"

namespace chimera {

// Immutable once made; any number of threads may use one.
class Tokenizer {
 public:
  // Checks all of `vocabulary`, which comes from a file and may hold anything; throws Error.
  // Of tokens with the same text the first is the one that encode() and find() give.
  explicit Tokenizer(const Vocabulary& vocabulary);

  Tokenizer(Tokenizer&&) = default;
  Tokenizer& operator=(Tokenizer&&) = default;

  // The tokens of `text`, without BOS: put bos() in front where add_bos() says so.
  //
  // With parse_special the texts of control tokens ("<|im_end|>") become those tokens. Without it,
  // which is what anything a user wrote needs, no text ever becomes a control token. User-defined
  // tokens are found either way.
  //
  // `text` should be UTF-8, and may be any bytes. Those that are no UTF-8 are encoded as they are,
  // byte for byte, where the vocabulary has tokens for them; byte_bpe.h and sentencepiece.h say
  // what happens where it does not. Throws Error for a text of 2 GiB or more.
  //
  // Time is O(n log n) whatever the text; memory is some 50 bytes for each byte of its longest
  // word.
  std::vector<int32_t> encode(std::string_view text, bool parse_special) const;

  // The text of `ids`, as bytes: tokens may end in the middle of a character (StreamDecoder is for
  // printing as they come). Control and unknown tokens are nothing. Throws Error for an id outside
  // the vocabulary.
  std::string decode(std::span<const int32_t> ids) const;

  // What one token adds to a text. Throws Error for an id outside the vocabulary.
  std::string token_bytes(int32_t id) const;

  // A token as the vocabulary writes it, control tokens too. Throws like token_bytes().
  std::string_view token_text(int32_t id) const;

  // Throws like token_bytes().
  bool is_control(int32_t id) const;

  // The token with exactly this text in the vocabulary, or -1.
  int32_t find(std::string_view token_text) const { return texts_.find(token_text); }

  int32_t size() const { return texts_.size(); }
  int32_t bos() const { return bos_; }  // -1: none
  int32_t eos() const { return eos_; }  // -1: none
  bool add_bos() const { return add_bos_; }

  // Whether encode() puts a space in front of a text, which decode() takes away again.
  bool adds_space_prefix() const { return adds_space_prefix_; }

 private:
  void check_id(int32_t id) const;
  void encode_ordinary(std::string_view text, std::vector<int32_t>& out) const;

  TokenTable texts_;
  std::vector<TokenType> types_;  // by id
  int32_t bos_, eos_;
  bool add_bos_, adds_space_prefix_;
  SpecialTokens user_defined_, all_special_;
  std::variant<std::monostate, ByteBpe, SentencePiece> model_;
};

}  // namespace chimera
