// The draft's trainable numbers in one array, as the optimiser and checkpoints see them.
#pragma once

#include <string>
#include <vector>

#include "engine/chimera/draft_tensors.h"

namespace chimera::training {

struct Parameter {
  std::string name;  // as in the draft file: "w1", "head_down.0"
  int64_t rows = 0, cols = 0;
  size_t offset = 0;
  bool is_matrix = false;  // not a norm or a scale
  size_t size() const { return static_cast<size_t>(rows * cols); }
};

// Where each tensor of a configuration stands in the array. w1 and w2, w3 and the corrections may
// be absent (rows 0).
struct ParameterLayout {
  explicit ParameterLayout(const DraftConfig& config);

  Parameter w1, w2, w3, key_norm, value_norm, attn_norm, wq, wk, wv, wo, ffn_norm, gate_up, down,
      out_norm, head_scale;
  std::vector<Parameter> head_down, head_up;
  std::vector<Parameter> all;  // in order
  size_t total = 0;
};

std::vector<float> pack_parameters(const DraftTensors& tensors);
void unpack_parameters(const std::vector<float>& values, DraftTensors* tensors);

// What a draft takes from its target: the sizes of its states and heads, and RoPE's base.
DraftConfig config_for(const LlamaConfig& target);

// A draft to start from. target_norm: (d), the target's final norm; the draft's output norm starts
// at 0.3 times it.
DraftTensors initial_draft(const DraftConfig& config, const std::vector<float>& target_norm,
                           uint64_t seed);

}  // namespace chimera::training
