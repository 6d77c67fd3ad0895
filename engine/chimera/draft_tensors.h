// The Chimera draft model as a file holds it and as the trainer moves it: configuration and f32
// tensors. (arXiv 2402.15758, sections 3.1 to 3.3; what we changed and why is in
// tools/train/README.md.)
//
// Notation: d = hidden_size; E = the target's embedding table; LM = its output head; h_i = the
// target's state after the final norm at position i; x_i = the token there, so that x_{i+1} is
// known whenever h_i is. rms(x) = x / sqrt(mean(x^2) + 1e-5). W x is a product with W of shape
// (out, in).
//
// clang-format off
// Trigram encoder: the feature of position i
//   e_j = E[x_j] / sqrt(mean(E[x_j]^2) + 1.2e-7)
//   t   = [e_{i-2}; e_{i-1}; e_i]; the first two positions repeat e_0 for what is not there
//   g_i = w2 SiLU(w1 t) + w3 e_i                       either may be absent: trigram, skip
//                                                      (the paper's form: without skip)
//
// Slot of position i, what the full-context encoder attends to. It knows which token stood here
// (g_i) and what came after it (g_{i+1}), so attention can copy; without slot_features it is made
// of rms(h_i) alone, the paper's form:
//   K_i = wk ([rms(h_i); rms(g_i)] * key_norm)         RoPE at position i, on the first
//   V_i = wv ([rms(h_i); rms(g_{i+1})] * value_norm)   rope_kv_heads KV heads (and their query
//                                                      heads) only
//
// Step k = 0, 1, ... below the root x_{n+1}, whose state is not known yet (the last known is h_n):
//   x  = g_{n+1+k}
//   q  = wq (rms(x) * attn_norm)                       RoPE at position n+1+k, / sqrt(head_dim)
//   attention over the slots 0..n and, for each earlier step j = 1..k, a slot at position n+j made
//   in the same way, with f_{j-1} in the place of h_{n+j}
//   x += wo attention
//   y  = rms(x) * ffn_norm
//   x += down (SiLU(gate y) * (up y))                  gate_up holds gate, then up
//   f_k = rms(x) * out_norm
//
// Residual heads: logits of step k, for the token at position n+2+k, over a part of the vocabulary
//   LM . (head_scale[k] h_n + f_k + head_up[k] SiLU(head_down[k] [h_n; f_k]))
// Steps past the last head use the last head.
//
// RoPE rotates the pairs (i, i + head_dim / 2), as the engine does everywhere.
// clang-format on
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "engine/llama_tensors.h"

namespace chimera {

// How the draft's probabilities are to be read, measured on texts that it has not learnt from
// (chimera train eval --calibrate): p = coverage softmax(logits / temperature), where the target
// samples with its noise (sampler.h) in the logits. Coverage is the share of true tokens that are
// in its vocabulary at all.
struct DraftCalibration {
  static constexpr float kLeast = 0.01f;     // that one of them is
  std::vector<float> temperature, coverage;  // by step, as long as each other; further steps are
                                             // like the last; empty: both are 1
  struct Reading {
    float temperature = 1, coverage = 1;
  };
  Reading at(int step) const;
};

struct DraftConfig {
  int hidden_size = 0;  // the target's
  int n_heads = 0, n_kv_heads = 0, head_dim = 0;
  int ffn_size = 0;
  int n_steps = 4;     // residual heads
  int head_rank = 64;  // of a head's correction; 0: none
  int rope_kv_heads = 1;
  double rope_base = 10000.0;
  bool trigram = true, skip = true;      // w1 and w2 are there; w3 is
  bool slot_features = true;             // slots know their token and its successor
  DraftCalibration greedy{}, sampled{};  // where the target takes its best token, and at
                                         // temperature 1
  // For a text sampled at this temperature T: in between for those between. Above 1 as at 1, but
  // for the coverage, which falls about with 1 / T^2: the draft in models/ had 0.78 at 1, 0.51
  // at 1.25, 0.31 at 1.5 and 0.18 at 2 (train eval --limit 12 -n 96 --temp T, MT-bench, `known` at
  // depth 1).
  DraftCalibration::Reading calibration(int step, float sampling_temperature) const;

  int q_size() const { return n_heads * head_dim; }
  int kv_size() const { return n_kv_heads * head_dim; }
  int slot_size() const { return slot_features ? 2 * hidden_size : hidden_size; }
};

struct DraftTensors {
  DraftConfig config;
  std::vector<float> w1;                      // (d, 3 d) or empty
  std::vector<float> w2;                      // (d, d) or empty
  std::vector<float> w3;                      // (d, d) or empty
  std::vector<float> key_norm;                // (slot_size)
  std::vector<float> value_norm;              // (slot_size)
  std::vector<float> attn_norm;               // (d)
  std::vector<float> wq;                      // (q_size, d)
  std::vector<float> wk;                      // (kv_size, slot_size)
  std::vector<float> wv;                      // (kv_size, slot_size)
  std::vector<float> wo;                      // (d, q_size)
  std::vector<float> ffn_norm;                // (d)
  std::vector<float> gate_up;                 // (2 ffn, d)
  std::vector<float> down;                    // (d, ffn)
  std::vector<float> out_norm;                // (d)
  std::vector<float> head_scale;              // (n_steps)
  std::vector<std::vector<float>> head_down;  // n_steps x (head_rank, 2 d)
  std::vector<std::vector<float>> head_up;    // n_steps x (d, head_rank)

  std::vector<int32_t> vocabulary;  // token ids that the heads choose from, most frequent first

  // What the file's metadata says besides.
  std::string target_name;         // of the model it was trained for
  std::string target_fingerprint;  // hex: of the target's tensors and tokenizer
  std::string training;            // JSON: how it was made
  std::string licence;
};

// Throws Error where the engine cannot run the draft below this target: another hidden size, a size
// that is not a multiple of 32, no encoder, a calibration of two lengths, a token that the target
// does not have.
void check(const DraftTensors& draft, const LlamaConfig& target);

}  // namespace chimera
