// What the commands share: from a path to a model that decodes.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "engine/llama.h"
#include "loader/load.h"
#include "tokenizer/chat.h"
#include "tokenizer/tokenizer.h"

namespace chimera {

// A file that has been opened and checked; its weights are not read yet.
struct Model {
  explicit Model(const std::string& path);  // notes the loader's warnings

  ModelFile file;  // but for its vocabulary: the tokenizer has that
  TokenizerModel tokenizer_model;
  ChatFormat chat_format;
  std::string fingerprint;  // draft_file.h: what a draft model is made for
  Tokenizer tokenizer;
  bool mapped = false;  // prepare_weights(): the weights are read where the file has them

  std::string name() const;  // printable, whatever the file says
};

// The tokens to start from: a conversation in the model's chat format, or just the messages' text,
// each on its own lines, with BOS in front where the model wants it.
std::vector<int32_t> encode(const Model& model, std::span<const Message> messages, bool chat);

// The longest of some prompts, and where it stands.
struct LongestPrompt {
  size_t tokens = 0;
  std::string where = "prompt";
};

// The prompts of a file, `limit` at most, in the model's chat format where it has one.
std::vector<std::vector<int32_t>> encode_file(const Model& model, const std::string& path,
                                              std::optional<int> limit, LongestPrompt* longest);

// Tokens of context for the prompts and `n` new ones each: --ctx if given, else just enough, and no
// more than the model was trained for. Throws Error if there is no room for a single new token.
inline constexpr int kLongestContext = 1 << 20;
int choose_context(const LlamaConfig& config, std::optional<int> ctx, const LongestPrompt& longest,
                   int n);

// Repacks the weights for the backend. The file is no longer needed then, and closed: model->file
// keeps its configuration only. mapped: the backend reads them where the file has them, and the
// model must outlive the result; slower, but nothing is copied and processes share the memory.
Llama prepare_weights(Backend& backend, Model* model, bool mapped = false);

}  // namespace chimera
