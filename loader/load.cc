#include "loader/load.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string_view>

#include "engine/error.h"
#include "loader/gguf.h"
#include "loader/llama2c.h"
#include "loader/llama_gguf.h"
#include "loader/safetensors.h"

namespace chimera {
namespace {

constexpr char kUseGguf[] = "use a GGUF file of the model";

// u64 length of the header, at most 100,000,000, and the header, which begins with '{'. Empty: this
// is no safetensors file.
std::string_view safetensors_header(std::span<const std::byte> bytes) {
  if (bytes.size() < 9 || static_cast<char>(bytes[8]) != '{') return {};
  uint64_t header_bytes;
  std::memcpy(&header_bytes, bytes.data(), sizeof header_bytes);
  if (header_bytes > 100'000'000) return {};
  return {reinterpret_cast<const char*>(bytes.data()) + 8,
          std::min<size_t>(header_bytes, bytes.size() - 8)};
}

void refuse_known_formats(std::span<const std::byte> bytes, const std::string& name) {
  const std::string_view start(reinterpret_cast<const char*>(bytes.data()),
                               bytes.size() < 16 ? bytes.size() : 16);
  const char* expected = "a GGUF or llama2.c model";
  refuse_pickle(bytes, name, expected, "a GGUF or safetensors file of the model");
  if (const std::string_view header = safetensors_header(bytes); !header.empty()) {
    if (header.find("\"chimera_draft\"") != std::string_view::npos)
      throw Error(name, expected, "a draft model", "give it with --draft, and its target with -m");
    throw Error(name, expected, "a safetensors file",
                "not supported yet: convert it to GGUF with llama.cpp's convert_hf_to_gguf.py");
  }
  if (start.starts_with("24ka")) {
    throw Error(name, "version 0 of llama2.c's format", "version 1 or 2",
                "export the model with --version 0");
  }
  if (start.starts_with("lmgg") || start.starts_with("fmgg") || start.starts_with("tjgg")) {
    throw Error(name, expected, "a file of the formats before GGUF", kUseGguf);
  }
}

// Embeddings are often padded to a round number of rows. The model can choose such a row like any
// other, so each gets a token, without text.
void match_vocabulary(ModelFile* model) {
  Vocabulary& vocabulary = model->vocabulary;
  const auto tokens = vocabulary.tokens.size();
  const auto rows = static_cast<size_t>(model->tensors.config.vocab_size);
  const std::string& name = model->file.name();
  if (tokens > rows) {
    throw Error(name + ": tokenizer",
                "at most " + std::to_string(rows) + " tokens, the rows of the embedding",
                std::to_string(tokens), "convert the model again");
  }
  if (tokens < rows) {
    model->warnings.push_back(name + ": the tokenizer has " + std::to_string(tokens) +
                              " tokens for " + std::to_string(rows) +
                              " rows of the embedding: the last rows have no text");
    if (vocabulary.types.empty()) vocabulary.types.assign(tokens, TokenType::kNormal);
    vocabulary.types.resize(rows, TokenType::kUnused);
    vocabulary.tokens.resize(rows);
    if (!vocabulary.scores.empty()) vocabulary.scores.resize(rows);
  }
}

}  // namespace

ModelFile load_model(const std::string& path) {
  ModelFile model;
  model.file = MappedFile(path);
  const std::span<const std::byte> bytes = model.file.bytes();
  const std::string& name = model.file.name();
  const bool gguf = bytes.size() >= 4 && (std::memcmp(bytes.data(), "GGUF", 4) == 0 ||
                                          std::memcmp(bytes.data(), "FUGG", 4) == 0);
  if (gguf) {
    const GgufFile file(bytes, name);
    model.format = "GGUF v" + std::to_string(file.version());
    model.tensors = read_gguf_llama(file, &model.warnings);
    model.vocabulary = read_gguf_vocabulary(file);
  } else {
    refuse_known_formats(bytes, name);
    if (!looks_like_llama2c(bytes)) {
      throw Error(name, "a GGUF or llama2.c model", "neither", kUseGguf);
    }
    model.format = "llama2.c";
    model.tensors = read_llama2c(bytes, name);
    model.vocabulary = load_llama2c_vocabulary(path, model.tensors.config.vocab_size);
  }
  match_vocabulary(&model);
  return model;
}

}  // namespace chimera
