#include "loader/llama_gguf.h"

#include <cstdio>
#include <set>
#include <string_view>

#include "engine/error.h"
#include "loader/llama_config.h"

namespace chimera {
namespace {

constexpr char kConvert[] = "convert the model again";
// Of RoPE's frequencies. Real ones are 1 or more; much smaller ones turn a head so fast that an
// angle is no longer exact (rope.cc).
constexpr double kLeastDivisor = 0.001;

int size_of(const GgufFile& file, const char* key, int64_t max) {
  return checked_size(file.where(key), file.get<int64_t>(key), max);
}

double number_between(const GgufFile& file, const char* key, double value, double low,
                      double high) {
  if (!(value > low && value <= high)) {  // also refuses NaN
    char range[64];
    std::snprintf(range, sizeof range, "a number above %g and up to %g", low, high);
    throw Error(file.where(key), range, std::to_string(value), kConvert);
  }
  return value;
}

void refuse_unsupported(const GgufFile& file) {
  const auto architecture = file.get<std::string>("general.architecture");
  if (architecture != "llama") {
    throw Error(file.where("general.architecture"), "'llama'", in_quotes(architecture),
                "only LLaMA models are supported");
  }
  for (const char* key : {"llama.expert_count", "llama.attention.sliding_window"}) {
    const int64_t value = file.find<int64_t>(key).value_or(0);
    if (value != 0) {
      throw Error(file.where(key), "0", std::to_string(value),
                  "models with this are not supported");
    }
  }
}

int read_head_dim(const GgufFile& file, const LlamaConfig& c) {
  const char* key_length = "llama.attention.key_length";
  int head_dim = 0;
  if (file.has(key_length)) {
    head_dim = size_of(file, key_length, kMaxHeadDim);
  } else {
    if (c.hidden_size % c.n_heads != 0) {
      throw Error(file.where("llama.embedding_length"),
                  "a multiple of the " + std::to_string(c.n_heads) + " heads",
                  std::to_string(c.hidden_size), kConvert);
    }
    head_dim = checked_size(file.name() + ": head size", c.hidden_size / c.n_heads, kMaxHeadDim);
  }
  for (const char* key : {"llama.attention.value_length", "llama.rope.dimension_count"}) {
    const int64_t value = file.find<int64_t>(key).value_or(head_dim);
    if (value != head_dim) {
      throw Error(file.where(key), std::to_string(head_dim) + ", the size of a head",
                  std::to_string(value), "models where they differ are not supported");
    }
  }
  return head_dim;
}

// The factor of linear RoPE scaling; 1: none.
float read_rope_factor(const GgufFile& file) {
  const char* type_key = "llama.rope.scaling.type";
  const char* factor_key = "llama.rope.scaling.factor";
  const char* old_key = "llama.rope.scale_linear";  // files from before there were types
  const char* key = file.has(factor_key) || !file.has(old_key) ? factor_key : old_key;
  const auto type = file.find<std::string>(type_key);
  if (type && *type != "none" && *type != "linear") {
    throw Error(file.where(type_key), "'none' or 'linear'", in_quotes(*type),
                "this RoPE scaling is not supported");
  }
  if (type == "none" || (!type && !file.has(key))) return 1.0f;
  return static_cast<float>(number_between(file, key, file.get<double>(key), kLeastDivisor, 1e6));
}

LlamaConfig read_config(const GgufFile& file) {
  LlamaConfig c;
  c.max_context = size_of(file, "llama.context_length", kMaxContext);
  c.hidden_size = size_of(file, "llama.embedding_length", kMaxHidden);
  c.n_layers = size_of(file, "llama.block_count", kMaxLayers);
  c.ffn_size = size_of(file, "llama.feed_forward_length", kMaxFfn);
  c.n_heads = size_of(file, "llama.attention.head_count", kMaxHeads);
  const char* kv_key = "llama.attention.head_count_kv";
  c.n_kv_heads = file.has(kv_key) ? size_of(file, kv_key, kMaxHeads) : c.n_heads;
  c.head_dim = read_head_dim(file, c);
  check_heads(file.name(), c);

  const char* eps_key = "llama.attention.layer_norm_rms_epsilon";
  c.rms_eps =
      static_cast<float>(number_between(file, eps_key, file.get<double>(eps_key), 0.0, 0.1));
  const char* base_key = "llama.rope.freq_base";
  c.rope_base =
      number_between(file, base_key, file.find<double>(base_key).value_or(10000.0), 1.0, 1e12);
  return c;
}

// Hands out the file's tensors and remembers which.
class TensorReader {
 public:
  explicit TensorReader(const GgufFile& file) : file_(file) {}

  bool has(std::string_view name) const { return file_.find_tensor(name) != nullptr; }

  TensorView matrix(const std::string& name, int64_t rows, int64_t cols) {
    return read(name, 2, rows, cols);
  }

  // A vector of F32, checked to be finite.
  TensorView vector(const std::string& name, int64_t size) {
    TensorView view = read(name, 1, 1, size);
    if (view.type != DType::kF32) {
      throw Error(where(name), "F32", dtype_info(view.type).name, kConvert);
    }
    check_finite(file_.name(), view);
    return view;
  }

  // Refuses the biases among the tensors that were not read, and warns of the others.
  void finish(std::vector<std::string>* warnings) const {
    constexpr size_t kMostNamed = 8;
    size_t extra = 0;
    for (const GgufTensor& t : file_.tensors()) {
      if (used_.contains(t.name)) continue;
      if (t.name.ends_with(".bias")) {
        throw Error(where(t.name), "a model without biases", "a bias", "biases are not supported");
      }
      if (++extra <= kMostNamed)
        warnings->push_back(where(t.name) + ": not used by LLaMA, ignored");
    }
    if (extra > kMostNamed) {
      warnings->push_back(file_.name() + ": " + std::to_string(extra - kMostNamed) +
                          " more unused tensors ignored");
    }
  }

 private:
  std::string where(std::string_view name) const {
    return file_.name() + ": tensor " + in_quotes(name);
  }

  TensorView read(const std::string& name, int max_dims, int64_t rows, int64_t cols) {
    const GgufTensor* t = file_.find_tensor(name);
    if (t == nullptr) throw Error(where(name), "the tensor", "none", kConvert);
    const std::string shape =
        std::to_string(cols) + (max_dims == 2 ? " x " + std::to_string(rows) : "");
    if (t->n_dims != max_dims || t->ne[0] != cols || t->ne[1] != rows) {
      throw Error(where(name), "shape " + shape, t->shape_text(), kConvert);
    }
    if (!t->type) {
      throw Error(where(name), "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K or Q6_K",
                  t->type_name(), "quantise the model to one of these");
    }
    used_.insert(t->name);
    return {.name = name, .type = *t->type, .rows = rows, .cols = cols, .data = t->data};
  }

  const GgufFile& file_;
  std::set<std::string_view> used_;
};

// The rows of the embedding: the vocabulary that the model computes.
int read_vocab_size(const GgufFile& file) {
  const char* name = "token_embd.weight";
  const GgufTensor* embedding = file.find_tensor(name);
  const std::string where = file.name() + ": tensor " + in_quotes(name);
  if (embedding == nullptr) throw Error(where, "the tensor", "none", kConvert);
  const int rows = checked_size(where + ": rows", embedding->ne[1], kMaxVocab);
  const char* key = "llama.vocab_size";
  const int64_t stated = file.find<int64_t>(key).value_or(rows);
  if (stated != rows) {
    throw Error(file.where(key), std::to_string(rows) + ", the rows of token_embd.weight",
                std::to_string(stated), kConvert);
  }
  return rows;
}

std::vector<float> read_rope_divisors(const GgufFile& file, TensorReader& tensors, int head_dim) {
  const float factor = read_rope_factor(file);
  const char* name = "rope_freqs.weight";  // the factors of Llama 3.1's scaling
  std::vector<float> divisors;
  if (tensors.has(name)) {
    const TensorView view = tensors.vector(name, head_dim / 2);
    divisors.resize(static_cast<size_t>(view.cols));
    dequantize_row(view.type, view.data, view.cols, divisors.data());
  } else if (factor != 1.0f) {
    divisors.assign(static_cast<size_t>(head_dim / 2), 1.0f);
  }
  for (float& d : divisors) {
    d *= factor;
    if (!(d >= static_cast<float>(kLeastDivisor)))
      throw Error(file.name() + ": tensor " + in_quotes(name),
                  "factors of 0.001 or more, RoPE's scaling included", std::to_string(d), kConvert);
  }
  return divisors;
}

}  // namespace

LlamaTensors read_gguf_llama(const GgufFile& file, std::vector<std::string>* warnings) {
  refuse_unsupported(file);
  LlamaTensors model;
  const std::string base_name = file.name().substr(file.name().rfind('/') + 1);
  model.name = printable(file.find<std::string>("general.name").value_or(base_name));
  model.config = read_config(file);
  LlamaConfig& c = model.config;
  c.vocab_size = read_vocab_size(file);

  TensorReader tensors(file);
  c.rope_divisors = read_rope_divisors(file, tensors, c.head_dim);
  model.embedding = tensors.matrix("token_embd.weight", c.vocab_size, c.hidden_size);
  model.output_norm = tensors.vector("output_norm.weight", c.hidden_size);
  if (tensors.has("output.weight")) {
    model.head = tensors.matrix("output.weight", c.vocab_size, c.hidden_size);
  }
  for (int i = 0; i < c.n_layers; ++i) {
    const std::string block = "blk." + std::to_string(i) + ".";
    LlamaLayerTensors& layer = model.layers.emplace_back();
    layer.attn_norm = tensors.vector(block + "attn_norm.weight", c.hidden_size);
    layer.wq = tensors.matrix(block + "attn_q.weight", c.q_size(), c.hidden_size);
    layer.wk = tensors.matrix(block + "attn_k.weight", c.kv_size(), c.hidden_size);
    layer.wv = tensors.matrix(block + "attn_v.weight", c.kv_size(), c.hidden_size);
    layer.wo = tensors.matrix(block + "attn_output.weight", c.hidden_size, c.q_size());
    layer.ffn_norm = tensors.vector(block + "ffn_norm.weight", c.hidden_size);
    layer.w_gate = tensors.matrix(block + "ffn_gate.weight", c.ffn_size, c.hidden_size);
    layer.w_up = tensors.matrix(block + "ffn_up.weight", c.ffn_size, c.hidden_size);
    layer.w_down = tensors.matrix(block + "ffn_down.weight", c.hidden_size, c.ffn_size);
    layer.wq.interleaved_head_dim = c.head_dim;
    layer.wk.interleaved_head_dim = c.head_dim;
  }
  tensors.finish(warnings);
  return model;
}

}  // namespace chimera
