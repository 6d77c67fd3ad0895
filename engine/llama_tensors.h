// A LLaMA model as a file holds it: the configuration and a view of every tensor. The loader fills
// it in; Llama (llama.h) prepares the weights from it.
#pragma once

#include <string>
#include <vector>

#include "engine/tensor.h"

namespace chimera {

struct LlamaConfig {
  int vocab_size = 0;
  int hidden_size = 0;
  int n_layers = 0;
  int n_heads = 0;
  int n_kv_heads = 0;
  int head_dim = 0;
  int ffn_size = 0;
  int max_context = 0;  // positions the model was trained for
  float rms_eps = 1e-5f;
  double rope_base = 10000.0;
  std::vector<float> rope_divisors;  // (head_dim / 2) divisors of the inverse frequencies; empty: 1

  int q_size() const { return n_heads * head_dim; }
  int kv_size() const { return n_kv_heads * head_dim; }
};

struct LlamaLayerTensors {
  TensorView attn_norm;  // (hidden) F32
  TensorView wq;         // (q_size, hidden)
  TensorView wk;         // (kv_size, hidden)
  TensorView wv;         // (kv_size, hidden)
  TensorView wo;         // (hidden, q_size)
  TensorView ffn_norm;   // (hidden) F32
  TensorView w_gate;     // (ffn, hidden)
  TensorView w_up;       // (ffn, hidden)
  TensorView w_down;     // (hidden, ffn)
};

struct LlamaTensors {
  std::string name;  // general.name or the file's name
  LlamaConfig config;
  TensorView embedding;    // (vocab, hidden)
  TensorView output_norm;  // (hidden) F32
  TensorView head;         // (vocab, hidden); empty: tied to the embedding
  std::vector<LlamaLayerTensors> layers;

  const TensorView& output() const { return head.empty() ? embedding : head; }
};

}  // namespace chimera
