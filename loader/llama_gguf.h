// A LLaMA model in a GGUF file.
#pragma once

#include <string>
#include <vector>

#include "engine/llama_tensors.h"
#include "loader/gguf.h"

namespace chimera {

// Configuration and tensors of `file`; the views point into the bytes that `file` was made of.
// GGUF stores the rows of attn_q and attn_k for pairs (2i, 2i+1); the views say so.
//
// Throws Error for another architecture, for what this engine does not compute (biases, experts,
// sliding windows, RoPE scaling other than linear or rope_freqs.weight), for values that make no
// sense, for tensors that are missing or of the wrong shape or type, and for norm weights that are
// not finite. Tensors that LLaMA does not have are not read: `warnings` gets their names.
LlamaTensors read_gguf_llama(const GgufFile& file, std::vector<std::string>* warnings);

}  // namespace chimera
