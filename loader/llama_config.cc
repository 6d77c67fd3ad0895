#include "loader/llama_config.h"

#include <cmath>
#include <cstring>

#include "engine/error.h"

namespace chimera {

int checked_size(const std::string& where, int64_t value, int64_t max) {
  if (value < 1 || value > max) {
    throw Error(where, "a number from 1 to " + std::to_string(max), std::to_string(value),
                "the file is damaged or not a LLaMA model");
  }
  return static_cast<int>(value);
}

void check_heads(const std::string& file, const LlamaConfig& config) {
  if (config.n_heads % config.n_kv_heads != 0) {
    throw Error(file, "heads that are a multiple of the KV heads",
                std::to_string(config.n_heads) + " heads and " + std::to_string(config.n_kv_heads) +
                    " KV heads");
  }
  if (config.head_dim % 2 != 0) {
    throw Error(file, "an even head size (RoPE turns pairs)", std::to_string(config.head_dim));
  }
}

void check_finite(const std::string& file, const TensorView& tensor) {
  for (int64_t i = 0; i < tensor.rows * tensor.cols; ++i) {
    float value;
    std::memcpy(&value, tensor.data + static_cast<size_t>(i) * sizeof(float), sizeof(float));
    if (!std::isfinite(value)) {
      throw Error(file + ": tensor " + in_quotes(tensor.name), "finite weights",
                  std::to_string(value) + " at " + std::to_string(i),
                  "the file is damaged: download it again");
    }
  }
}

}  // namespace chimera
