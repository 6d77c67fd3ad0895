#include "engine/llama.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace chimera {

Llama::Llama(Backend& backend, const LlamaTensors& t, const Consumed& consumed)
    : backend_(backend), config_(t.config) {
  const auto hidden = static_cast<size_t>(config_.hidden_size);
  norms_ = backend.allocate((2 * t.layers.size() + 1) * hidden * 4, Memory::kDevice);
  auto* next_norm = static_cast<float*>(norms_.get());
  const auto norm = [&](const TensorView& view) {
    std::vector<float> weight(hidden);
    dequantize_row(view.type, view.data, view.cols, weight.data());
    backend.upload(next_norm, weight.data(), hidden * 4);
    if (consumed) consumed({view.data, view.bytes()});
    return std::exchange(next_norm, next_norm + hidden);
  };
  const auto prepare = [&](std::initializer_list<TensorView> views) {
    auto matrix = backend.prepare({views.begin(), views.size()}, consumed);
    weight_bytes_ += matrix->bytes;
    return matrix;
  };

  if (!t.head.empty()) {
    embedding_ = prepare({t.embedding});
    weight_bytes_ -= embedding_->bytes;  // a pass reads a row of it
  }
  for (const LlamaLayerTensors& l : t.layers) {
    Layer layer;
    layer.attn_norm = norm(l.attn_norm);
    layer.qkv = prepare({l.wq, l.wk, l.wv});
    layer.attn_output = prepare({l.wo});
    layer.ffn_norm = norm(l.ffn_norm);
    layer.gate_up = prepare({l.w_gate, l.w_up});
    layer.down = prepare({l.w_down});
    layers_.push_back(std::move(layer));
  }
  output_norm_ = norm(t.output_norm);
  head_ = prepare({t.output()});
}

// clang-format off
void Llama::forward(const Step* step, const KvCache& kv, const Activations& a) const {
  using Input = Linear::Input;
  const float eps = config_.rms_eps;
  backend_.embed(step, embedding(), a.hidden);
  for (int i = 0; i < config_.n_layers; ++i) {
    const Layer& layer = layers_[static_cast<size_t>(i)];
    backend_.linear(step, {.weights = layer.qkv.get(), .x = a.hidden, .y = a.qkv,
                           .input = Input::kRmsNorm, .norm_weight = layer.attn_norm, .eps = eps});
    backend_.rope_append(step, a.qkv, heads(), a.rope, kv, i);
    backend_.attention(step, a.qkv, heads(), kv, i, a.attended);
    backend_.linear(step, {.weights = layer.attn_output.get(), .x = a.attended, .y = a.hidden, .accumulate = true});
    backend_.linear(step, {.weights = layer.gate_up.get(), .x = a.hidden, .y = a.gate_up,
                           .input = Input::kRmsNorm, .norm_weight = layer.ffn_norm, .eps = eps});
    backend_.linear(step, {.weights = layer.down.get(), .x = a.gate_up, .y = a.hidden,
                           .input = Input::kSwiGlu, .accumulate = true});
  }
  backend_.rms_norm(step, a.hidden, output_norm_, eps, config_.hidden_size, a.states);
  backend_.linear(step, {.weights = head_.get(), .x = a.states, .y = a.logits, .rows = Rows::kLogits});
}
// clang-format on

}  // namespace chimera
