// Rotary position embedding: the table of cosines and sines.
// Su et al., "RoFormer" (arXiv 2104.09864): pair i of a head at position p turns by the angle
// p * base^(-2 i / head_dim) / divisor[i].
#pragma once

#include <cstdint>

#include "engine/llama_tensors.h"

namespace chimera {

// cos, sin: (positions, head_dim / 2). Computed in double with our own elementary functions and
// rounded once: every machine gets the same table, whatever its libm.
void fill_rope_table(const LlamaConfig& config, int64_t positions, float* cos, float* sin);

}  // namespace chimera
