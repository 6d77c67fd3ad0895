// Byte-level BPE (GPT-2): a text is its bytes, each byte is a token, and merges join neighbours.
//
// Vocabularies write each byte as one printable character, so that tokens are readable text: bytes
// 33-126, 161-172 and 174-255 stand for themselves, the other 68 are U+0100 and up in byte order
// (a space is U+0120, 'Ġ').
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/merge_queue.h"
#include "tokenizer/token_table.h"
#include "tokenizer/vocabulary.h"

namespace chimera {

class ByteBpe {
 public:
  // texts, types: of every token. Throws Error where the merges are absent or name what is no
  // token. A merge that makes a control token is left out: ordinary text must not reach it.
  ByteBpe(const Vocabulary& vocabulary, const TokenTable& texts,
          const std::vector<TokenType>& types);

  // Appends the tokens of `text`. A byte that the vocabulary lacks (SmolLM2's lacks 21, such as
  // 0x04 and those that no UTF-8 contains) is dropped, as the published tokenizers do. With LLaMA
  // 3's pre-tokenizer a word that is a token is that token, whether merges lead to it or not.
  // texts, types: as above.
  void encode(std::string_view text, const TokenTable& texts, const std::vector<TokenType>& types,
              std::vector<int32_t>& out) const;

  // The bytes that a token stands for.
  static std::string token_bytes(std::string_view token_text);

 private:
  PreTokenizer pre_;
  struct PairMerge {
    uint64_t pair;  // left id << 32 | right id
    Merge merge;
  };
  Merge find_merge(int32_t left, int32_t right) const;

  std::array<int32_t, 256> byte_ids_;  // -1: not in the vocabulary
  std::vector<PairMerge> merges_;      // by pair
};

}  // namespace chimera
