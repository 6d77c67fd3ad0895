// What every format's reader checks about a LLaMA model before it believes the file.
#pragma once

#include <cstdint>
#include <string>

#include "engine/llama_tensors.h"

namespace chimera {

// Far above any real model; within them no product of two overflows an int64_t, and q_size() and
// kv_size() fit an int.
inline constexpr int64_t kMaxHidden = int64_t{1} << 20;
inline constexpr int64_t kMaxFfn = int64_t{1} << 22;
inline constexpr int64_t kMaxLayers = 1024;
inline constexpr int64_t kMaxHeads = 4096;
inline constexpr int64_t kMaxVocab = int64_t{1} << 24;
inline constexpr int64_t kMaxContext = int64_t{1} << 28;

// `value` as an int. Throws Error, which begins with `where`, unless 1 <= value <= max.
int checked_size(const std::string& where, int64_t value, int64_t max);

// Throws Error unless query heads divide evenly among KV heads and a head's size is even (RoPE
// turns pairs).
void check_heads(const std::string& file, const LlamaConfig& config);

// Throws Error at the first value of an F32 tensor that is not finite.
void check_finite(const std::string& file, const TensorView& tensor);

}  // namespace chimera
