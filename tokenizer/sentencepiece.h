// SentencePiece BPE: a text is its characters, and any two neighbours whose union is a piece of the
// vocabulary merge, the highest score first. A character that is no piece becomes the tokens of its
// UTF-8 bytes ("<0x0A>"), or the unknown token where a vocabulary has no byte tokens.
//
// Vocabularies write a space as U+2581 (llama2.c's as a space). In here it is a space, in pieces
// and in text; U+2581 in a text therefore comes back as a space, as with SentencePiece itself.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/merge_queue.h"
#include "tokenizer/token_table.h"
#include "tokenizer/vocabulary.h"

namespace chimera {

class SentencePiece {
 public:
  // types: of every token. Only normal and user-defined tokens are pieces.
  // Throws Error for scores that are absent or not finite, for malformed or missing byte tokens,
  // and where there are neither byte tokens nor an unknown token.
  SentencePiece(const Vocabulary& vocabulary, const std::vector<TokenType>& types);

  // Appends the tokens of `text`, which is preceded by a space where the vocabulary asks for it.
  void encode(std::string_view text, std::vector<int32_t>& out) const;

  // The bytes that a token stands for. Throws Error for a malformed byte token.
  static std::string token_bytes(std::string_view token_text, TokenType type);

 private:
  struct Piece {
    int32_t id;
    uint32_t rank;  // 0 for the highest score; equal scores have equal ranks
  };

  const Piece* find(std::string_view text) const;
  void encode_word(std::string_view word, MergeQueue& queue, std::vector<int32_t>& out) const;

  bool add_space_prefix_;
  bool has_byte_tokens_ = false;
  int32_t unknown_;
  std::array<int32_t, 256> byte_ids_;
  TokenTable piece_texts_;
  std::vector<Piece> pieces_;        // in the order of piece_texts_
  size_t longest_piece_ = 0;         // bytes
  bool spaces_start_pieces_ = true;  // no piece has a space behind anything but a space
};

}  // namespace chimera
