// The LLaMA decoder: weights prepared for a backend, and the one forward pass.
#pragma once

#include <memory>
#include <vector>

#include "engine/backend.h"
#include "engine/llama_tensors.h"

namespace chimera {

// What a forward pass works in; carved by the Session. R = rows of a step, L = rows with logits.
struct Activations {
  float* hidden = nullptr;    // (R, hidden)   the residual stream
  float* qkv = nullptr;       // (R, (n_heads + 2 n_kv_heads) * head_dim)
  float* attended = nullptr;  // (R, n_heads * head_dim)
  float* gate_up = nullptr;   // (R, 2 * ffn)
  float* states = nullptr;    // (R, hidden)   after the final norm: what a draft model reads
  float* logits = nullptr;    // (L, vocab)
  RopeTable rope;
};

// Weights are immutable and shared by sessions.
class Llama {
 public:
  // Prepares every weight, in the order of execution. consumed: see Backend::prepare().
  Llama(Backend& backend, const LlamaTensors& tensors, const Consumed& consumed = nullptr);

  // One pass over the step's rows: fills states for all of them and logits for those that want
  // them; appends their keys and values.
  void forward(const Step* step, const KvCache& kv, const Activations& a) const;

  Backend& backend() const { return backend_; }
  const LlamaConfig& config() const { return config_; }
  Heads heads() const { return {config_.n_heads, config_.n_kv_heads, config_.head_dim}; }
  // (vocab, hidden), rows to be read with Backend::embed().
  const Matrix& embedding() const { return embedding_ ? *embedding_ : *head_; }
  const Matrix& head() const { return *head_; }
  size_t weight_bytes() const { return weight_bytes_; }  // read by one pass that wants logits

 private:
  struct Layer {
    const float* attn_norm;               // (hidden)
    std::unique_ptr<Matrix> qkv;          // ((n_heads + 2 n_kv_heads) * head_dim, hidden)
    std::unique_ptr<Matrix> attn_output;  // (hidden, n_heads * head_dim)
    const float* ffn_norm;                // (hidden)
    std::unique_ptr<Matrix> gate_up;      // (2 * ffn, hidden)
    std::unique_ptr<Matrix> down;         // (hidden, ffn)
  };

  Backend& backend_;
  LlamaConfig config_;
  std::unique_ptr<Matrix> embedding_;  // (vocab, hidden); null: rows are read from the head
  std::vector<Layer> layers_;
  const float* output_norm_ = nullptr;  // (hidden)
  std::unique_ptr<Matrix> head_;        // (vocab, hidden)
  std::shared_ptr<void> norms_;         // all norm weights
  size_t weight_bytes_ = 0;
};

}  // namespace chimera
