#include "tools/model.h"

#include <algorithm>

#include "engine/error.h"
#include "loader/draft_file.h"
#include "tools/machine.h"
#include "tools/output.h"
#include "tools/prompts.h"

namespace chimera {

Model::Model(const std::string& path)
    : file(load_model(path)),
      tokenizer_model(file.vocabulary.model),
      chat_format(detect_chat_format(file.vocabulary)),
      fingerprint(chimera::fingerprint(file.tensors, file.vocabulary)),
      tokenizer(file.vocabulary) {
  file.vocabulary = {};
  for (const std::string& warning : file.warnings) note("warning: " + warning);
}

std::string Model::name() const {
  return printable(file.tensors.name);
}

std::vector<int32_t> encode(const Model& model, std::span<const Message> messages, bool chat) {
  const Tokenizer& tokenizer = model.tokenizer;
  if (chat) return encode_chat(tokenizer, model.chat_format, messages, "assistant");
  std::string text;
  for (const Message& message : messages) text += (text.empty() ? "" : "\n") + message.content;
  std::vector<int32_t> ids = tokenizer.encode(text, /*parse_special=*/false);
  if (tokenizer.add_bos() && tokenizer.bos() >= 0) ids.insert(ids.begin(), tokenizer.bos());
  return ids;
}

std::vector<std::vector<int32_t>> encode_file(const Model& model, const std::string& path,
                                              std::optional<int> limit, LongestPrompt* longest) {
  std::vector<std::vector<int32_t>> prompts;
  for (const Prompt& prompt : load_prompts(path)) {
    if (limit && prompts.size() == static_cast<size_t>(*limit)) break;
    prompts.push_back(encode(model, prompt.messages, model.chat_format != ChatFormat::kNone));
    if (prompts.back().size() > longest->tokens)
      *longest = {prompts.back().size(),
                  printable(path, 4096) + ": line " + std::to_string(prompt.line)};
  }
  return prompts;
}

int choose_context(const LlamaConfig& config, std::optional<int> ctx, const LongestPrompt& longest,
                   int n) {
  const auto enough = static_cast<int64_t>(longest.tokens) + n;
  const int trained = std::min(config.max_context, kLongestContext);
  const int context = ctx ? *ctx : static_cast<int>(std::min<int64_t>(trained, enough));
  if (context > config.max_context) {
    note("warning: the model was trained for " + std::to_string(config.max_context) +
         " tokens; expect nonsense beyond");
  }
  if (longest.tokens >= static_cast<size_t>(context)) {
    throw Error(longest.where, "fewer than " + std::to_string(context) + " tokens (the context)",
                std::to_string(longest.tokens),
                ctx ? "shorten it or raise --ctx"
                    : "shorten it, or go beyond what the model was trained for with --ctx");
  }
  return context;
}

Llama prepare_weights(Backend& backend, Model* model, bool mapped) {
  const MappedFile& file = model->file.file;
  return_freed_memory();  // what reading the file has needed
  model->mapped = mapped;
  LlamaTensors& tensors = model->file.tensors;
  tensors.embedding.lasting = tensors.head.lasting = mapped;
  for (LlamaLayerTensors& l : tensors.layers)
    for (TensorView* w : {&l.wq, &l.wk, &l.wv, &l.wo, &l.w_gate, &l.w_up, &l.w_down})
      w->lasting = mapped;
  Llama llama(backend, tensors, [&](std::span<const std::byte> bytes) { file.drop(bytes); });
  if (mapped) {  // nobody reads the file's head again: the vocabulary is copied
    const std::byte* first = tensors.embedding.data;
    for (const LlamaLayerTensors& l : tensors.layers)
      for (const TensorView* w : {&l.wq, &l.wk, &l.wv, &l.wo, &l.w_gate, &l.w_up, &l.w_down})
        first = std::min(first, w->data);
    if (!tensors.head.empty()) first = std::min(first, tensors.head.data);
    file.drop({file.bytes().data(), first});
  }
  tensors.embedding = tensors.output_norm = tensors.head = {};
  tensors.layers.clear();
  if (!mapped) model->file.file = MappedFile();
  return llama;
}

}  // namespace chimera
