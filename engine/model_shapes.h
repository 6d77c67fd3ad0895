// The sizes of models that benchmarks run with random weights.
#pragma once

namespace chimera {

struct ModelShape {
  const char* name;
  int vocab, hidden, layers, heads, kv_heads, ffn;
  bool tied;  // the head is the embedding

  constexpr int head_dim() const { return hidden / heads; }
};
inline constexpr ModelShape kTinyShape = {"tiny", 512, 64, 2, 4, 2, 160, true};  // for tests
inline constexpr ModelShape kModelShapes[] = {
    kTinyShape,
    {"smollm2-135m", 49152, 576, 30, 9, 3, 1536, true},
    {"llama-2-7b", 32000, 4096, 32, 32, 32, 11008, false},
    {"llama-2-13b", 32000, 5120, 40, 40, 40, 13824, false}};

}  // namespace chimera
