// The tokenizer.* keys of a GGUF file.
#include <cmath>

#include "engine/error.h"
#include "loader/gguf.h"
#include "loader/mapped_file.h"

namespace chimera {
namespace {

TokenizerModel read_model(const GgufFile& file) {
  const char* key = "tokenizer.ggml.model";
  const auto name = file.get<std::string>(key);
  if (name == "gpt2") return TokenizerModel::kByteBpe;
  if (name == "llama") return TokenizerModel::kSentencePiece;
  throw Error(file.where(key), "'gpt2' or 'llama'", in_quotes(name),
              "this kind of tokenizer is not supported");
}

PreTokenizer read_pre_tokenizer(const GgufFile& file, TokenizerModel model) {
  const char* key = "tokenizer.ggml.pre";
  const auto name = file.find<std::string>(key);
  if (model == TokenizerModel::kSentencePiece) {
    if (!name || *name == "default") return PreTokenizer::kNone;
    throw Error(file.where(key), "'default' or none", in_quotes(*name),
                "this pre-tokenizer is not supported");
  }
  if (name == "smollm") return PreTokenizer::kSmolLm;
  if (name == "gpt-2" || name == "gpt2") return PreTokenizer::kGpt2;
  if (name == "llama-bpe" || name == "llama3" || name == "llama-v3") return PreTokenizer::kLlama3;
  throw Error(file.where(key), "'smollm', 'gpt-2' or 'llama-bpe'",
              name ? in_quotes(*name) : "no such key",
              "another pre-tokenizer would split text differently from the model's training");
}

// An array that must be as long as the vocabulary.
template <class T>
std::vector<T> read_per_token(const GgufFile& file, const char* key, size_t n_tokens) {
  auto values = file.get<std::vector<T>>(key);
  if (values.size() != n_tokens) {
    throw Error(file.where(key), std::to_string(n_tokens) + " elements, one a token",
                std::to_string(values.size()), "convert the model again");
  }
  return values;
}

std::vector<float> read_scores(const GgufFile& file, size_t n_tokens) {
  const char* key = "tokenizer.ggml.scores";
  auto scores = read_per_token<float>(file, key, n_tokens);
  for (size_t i = 0; i < scores.size(); ++i) {
    if (!std::isfinite(scores[i])) {
      throw Error(file.where(key), "finite numbers",
                  std::to_string(scores[i]) + " for token " + std::to_string(i),
                  "convert the model again");
    }
  }
  return scores;
}

std::vector<TokenType> read_types(const GgufFile& file, size_t n_tokens) {
  const char* key = "tokenizer.ggml.token_type";
  const auto numbers = read_per_token<int32_t>(file, key, n_tokens);
  std::vector<TokenType> types;
  types.reserve(numbers.size());
  for (const int32_t number : numbers) {
    if (number < 1 || number > 6) {
      throw Error(file.where(key), "token types from 1 to 6",
                  std::to_string(number) + " for token " + std::to_string(types.size()),
                  "convert the model again");
    }
    types.push_back(static_cast<TokenType>(number));
  }
  return types;
}

int32_t read_id(const GgufFile& file, const char* key, size_t n_tokens) {
  const auto id = file.find<int64_t>(key);
  if (!id) return -1;
  if (*id < 0 || static_cast<uint64_t>(*id) >= n_tokens) {
    throw Error(file.where(key), "a token below " + std::to_string(n_tokens), std::to_string(*id),
                "convert the model again");
  }
  return static_cast<int32_t>(*id);
}

}  // namespace

Vocabulary read_gguf_vocabulary(const GgufFile& file) {
  Vocabulary v;
  v.model = read_model(file);
  v.pre = read_pre_tokenizer(file, v.model);
  const bool bpe = v.model == TokenizerModel::kByteBpe;

  const char* tokens_key = "tokenizer.ggml.tokens";
  v.tokens = file.get<std::vector<std::string>>(tokens_key);
  if (v.tokens.empty()) throw Error(file.where(tokens_key), "tokens", "an empty array");
  const size_t n = v.tokens.size();

  if (bpe) {
    // Converters may leave scores beside the merges; nothing here uses them, so nothing checks
    // them.
    const char* merges_key = "tokenizer.ggml.merges";
    v.merges = file.get<std::vector<std::string>>(merges_key);
    if (v.merges.empty()) {
      throw Error(file.where(merges_key), "merges", "an empty array", "convert the model again");
    }
    if (file.has("tokenizer.ggml.token_type")) v.types = read_types(file, n);
  } else {
    // The types tell byte tokens (<0x0A>) from text: without them, fallback to bytes cannot work.
    v.scores = read_scores(file, n);
    v.types = read_types(file, n);
  }

  v.bos = read_id(file, "tokenizer.ggml.bos_token_id", n);
  v.eos = read_id(file, "tokenizer.ggml.eos_token_id", n);
  v.unk = read_id(file, "tokenizer.ggml.unknown_token_id", n);
  const char* add_bos_key = "tokenizer.ggml.add_bos_token";
  v.add_bos =
      file.find<bool>(add_bos_key).value_or((!bpe || v.pre == PreTokenizer::kLlama3) && v.bos >= 0);
  if (v.add_bos && v.bos < 0) {
    throw Error(file.where(add_bos_key), "false in a file without tokenizer.ggml.bos_token_id",
                "true", "convert the model again");
  }
  if (file.find<bool>("tokenizer.ggml.add_eos_token").value_or(false)) {
    throw Error(file.where("tokenizer.ggml.add_eos_token"), "false", "true",
                "prompts that end with an EOS token are not supported");
  }
  v.add_space_prefix = file.find<bool>("tokenizer.ggml.add_space_prefix").value_or(true);
  v.chat_template = file.find<std::string>("tokenizer.chat_template").value_or("");
  return v;
}

Vocabulary load_gguf_vocabulary(const std::string& path) {
  const MappedFile file(path);
  return read_gguf_vocabulary(GgufFile(file.bytes(), file.name()));
}

}  // namespace chimera
