// A tokenizer's data as a model file holds it. The loader fills it in; Tokenizer reads it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace chimera {

enum class TokenizerModel : uint8_t {
  kByteBpe,        // GPT-2 style byte-level BPE with a list of merges  (GGUF "gpt2")
  kSentencePiece,  // SentencePiece BPE by score with byte fallback     (GGUF "llama", llama2.c)
};

enum class PreTokenizer : uint8_t { kNone, kGpt2, kSmolLm, kLlama3 };

// GGUF's tokenizer.ggml.token_type.
enum class TokenType : uint8_t {
  kNormal = 1,
  kUnknown = 2,
  kControl = 3,
  kUserDefined = 4,
  kUnused = 5,
  kByte = 6
};

struct Vocabulary {
  TokenizerModel model = TokenizerModel::kByteBpe;
  PreTokenizer pre = PreTokenizer::kNone;
  std::vector<std::string> tokens;
  std::vector<float> scores;             // SentencePiece only; as long as tokens
  std::vector<TokenType> types;          // as long as tokens; empty: all normal
  std::vector<std::string> merges;       // byte BPE only: "left right", most important first
  int32_t bos = -1, eos = -1, unk = -1;  // -1: none
  bool add_bos = false;
  bool add_space_prefix = true;  // SentencePiece only
  std::string chat_template;  // Jinja source from the file: matched against known ones, never run
};

}  // namespace chimera
