// chimera info: what is in a model file, and what it will need.
#include <algorithm>
#include <array>

#include "engine/chimera/draft_model.h"
#include "engine/session.h"
#include "tools/commands.h"
#include "tools/drafters.h"
#include "tools/flags.h"
#include "tools/model.h"
#include "tools/output.h"

namespace chimera {
namespace {

struct WeightType {
  int tensors = 0;
  int64_t parameters = 0;
  size_t bytes = 0;
};

std::array<WeightType, kDTypeCount> count_weights(const LlamaTensors& t) {
  std::array<WeightType, kDTypeCount> types;
  const auto add = [&](std::initializer_list<TensorView> views) {
    for (const TensorView& view : views) {
      if (view.empty()) continue;
      WeightType& type = types[static_cast<size_t>(view.type)];
      ++type.tensors;
      type.parameters += view.rows * view.cols;
      type.bytes += view.bytes();
    }
  };
  add({t.embedding, t.output_norm, t.head});
  for (const LlamaLayerTensors& l : t.layers) {
    add({l.attn_norm, l.wq, l.wk, l.wv, l.wo, l.ffn_norm, l.w_gate, l.w_up, l.w_down});
  }
  return types;
}

std::string row(std::string label, const std::string& value) {
  label.resize(std::max<size_t>(label.size() + 1, 18), ' ');
  return label + value + "\n";
}

std::string parameters_text(int64_t n) {
  return n < 1000000 ? std::to_string(n) : fixed_text(static_cast<double>(n) / 1e6, 1) + " million";
}

}  // namespace

int info(const std::vector<std::string>& args) {
  std::optional<std::string> path, model_path, draft_path;
  std::optional<int> ctx, nodes;
  std::string kv = "f16";
  bool json = false;
  const Command command{"info",
                        "MODEL | -m MODEL [FLAGS]",
                        "Shows what is in a model file, and the memory that `run` needs for it.\n",
                        {{'m', "model", "MODEL", "a GGUF or llama2.c file", file(&model_path)},
                         {0, "ctx", "N",
                          "plan the memory for N tokens of prompt and text\n(default: 2048, and no "
                          "more than the model was trained for)",
                          integer(&ctx, 1, kLongestContext)},
                         {0, "kv", "TYPE", "... for keys and values of this type (default: f16)",
                          choice(&kv, {"f16", "f32"})},
                         {0, "nodes", "N",
                          "... for passes that check N guesses (default: " +
                              std::to_string(DrafterFlags::kMostNodes) + ")",
                          integer(&nodes, 1, 255)},
                         {0, "draft", "FILE", "... and for a draft model", file(&draft_path)},
                         {0, "json", "", "print one JSON object instead", on(&json)}},
                        &path};
  if (!parse(command, args)) return 0;
  if (path.has_value() == model_path.has_value())
    throw UsageError("info", "MODEL or -m MODEL", path ? "both" : "none",
                     "see chimera info --help");

  const auto backend = make_backend("cpu", {});
  const Model model(path ? *path : *model_path);
  const LlamaConfig& c = model.file.tensors.config;
  const SessionOptions options{.context = ctx.value_or(std::min(c.max_context, 2048)),
                               .max_nodes = nodes.value_or(DrafterFlags::kMostNodes),
                               .kv_type = kv == "f32" ? DType::kF32 : DType::kF16};
  MemoryPlan plan = Session::plan(c, *backend, options);
  Session::reserve(c, *backend, options);
  if (draft_path) {
    const DraftTensors draft = *load_draft_for(model, {.draft = draft_path});
    check(draft, c);
    plan.add("draft model", "", DraftModel::plan(draft, *backend, 1, options.context));
    DraftModel::reserve(draft.config, *backend, options.context);
  }
  const size_t scratch = backend->reserved_bytes();

  const auto types = count_weights(model.file.tensors);
  int64_t parameters = 0;
  size_t weight_bytes = 0;
  for (const WeightType& type : types) {
    parameters += type.parameters;
    weight_bytes += type.bytes;
  }
  const char* tokenizer =
      model.tokenizer_model == TokenizerModel::kByteBpe ? "byte-level BPE" : "SentencePiece BPE";
  const bool tied = model.file.tensors.head.empty();

  if (json) {
    using nlohmann::ordered_json;
    ordered_json weights, memory;
    for (int i = 0; i < kDTypeCount; ++i) {
      const WeightType& type = types[static_cast<size_t>(i)];
      if (type.tensors == 0) continue;
      weights[dtype_info(static_cast<DType>(i)).name] = {
          {"tensors", type.tensors}, {"parameters", type.parameters}, {"bytes", type.bytes}};
    }
    for (const MemoryPlan::Entry& entry : plan.entries()) {
      memory.push_back({{"name", entry.name}, {"shape", entry.shape}, {"bytes", entry.bytes}});
    }
    print_json({{"model", model.name()},
                {"format", model.file.format},
                {"config",
                 {{"vocab_size", c.vocab_size},
                  {"hidden_size", c.hidden_size},
                  {"n_layers", c.n_layers},
                  {"n_heads", c.n_heads},
                  {"n_kv_heads", c.n_kv_heads},
                  {"head_dim", c.head_dim},
                  {"ffn_size", c.ffn_size},
                  {"max_context", c.max_context},
                  {"rms_eps", std::stod(number_text(c.rms_eps))},
                  {"rope_base", c.rope_base},
                  {"tied_embedding", tied}}},
                {"parameters", parameters},
                {"weights", weights},
                {"tokenizer",
                 {{"kind", tokenizer},
                  {"tokens", model.tokenizer.size()},
                  {"bos", model.tokenizer.bos()},
                  {"eos", model.tokenizer.eos()},
                  {"add_bos", model.tokenizer.add_bos()}}},
                {"chat_format", name(model.chat_format)},
                {"context", options.context},
                {"memory", memory},
                {"weight_bytes", weight_bytes},
                {"session_bytes", plan.total()},
                {"scratch_bytes", scratch},
                {"total_bytes", weight_bytes + plan.total() + scratch},
                {"device", backend->name()},
                {"isa", backend->isa()},
                {"contract_version", backend->contract_version()},
                {"cuda", cuda_available()}});
    return 0;
  }

  std::string out = row("model", model.name() + " (" + model.file.format + ")");
  out += row("parameters", parameters_text(parameters));
  for (int i = 0; i < kDTypeCount; ++i) {
    const WeightType& type = types[static_cast<size_t>(i)];
    if (type.tensors == 0) continue;
    out += row(std::string("  ") + dtype_info(static_cast<DType>(i)).name,
               count_text(type.tensors, "tensor") + ", " + parameters_text(type.parameters) + ", " +
                   bytes_text(type.bytes));
  }
  out += row("vocabulary",
             std::to_string(c.vocab_size) + (tied ? ", embedding tied to the head" : ""));
  out += row("hidden", std::to_string(c.hidden_size));
  out += row("layers", std::to_string(c.n_layers));
  out += row("heads", std::to_string(c.n_heads) + " for queries, " + std::to_string(c.n_kv_heads) +
                          " for keys and values, each of " + std::to_string(c.head_dim));
  out += row("ffn", std::to_string(c.ffn_size));
  out += row("context", std::to_string(c.max_context) + " tokens in training");
  out += row("rope base", fixed_text(c.rope_base, 0) + (c.rope_divisors.empty() ? "" : ", scaled"));
  out += row("norm epsilon", number_text(c.rms_eps));
  out += row("tokenizer",
             std::string(tokenizer) + ", " + std::to_string(model.tokenizer.size()) + " tokens");
  out += row("chat format", std::string(name(model.chat_format)));
  out += "\n" + row("memory", "for " + std::to_string(options.context) + " tokens of context");
  for (const MemoryPlan::Entry& entry : plan.entries()) {
    if (entry.bytes > 0)
      out += row("  " + entry.name, bytes_text(entry.bytes) + "  " + entry.shape);
  }
  out += row("  scratch", bytes_text(scratch));
  out += row("  weights", bytes_text(weight_bytes));
  out += row("  in all", bytes_text(weight_bytes + plan.total() + scratch));
  out += "\n" + row("device", backend->description() + ", arithmetic contract version " +
                                  std::to_string(backend->contract_version()));
  out += row("cuda", cuda_available() ? "available" : "not available");
  print(out);
  return 0;
}

}  // namespace chimera
