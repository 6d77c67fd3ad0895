// Sampling is a pure function: token = sample(logits, sampling, position). No state, so a token is
// the same whether its logits come from a step of one row or from a node of a tree.
//
// In this order:
//   1. temperature below 0.001: the largest logit, ties to the lowest id. Done.
//   2. e[i] = exp(logit[i] / temperature - max_j (logit[j] / temperature)) in f32, rounded down
//      to a multiple of 2^-34: then every sum below is exact in double (up to 2^19 tokens), and so
//      the same in any order.
//   3. top-k: keep the k largest e (0: all).
//   4. top-p: of those, in descending order, keep the shortest run whose sum reaches
//      top_p * (sum of all that are left); 1 keeps all.
//   5. min-p: keep e >= min_p * (largest e) = min_p; 0 keeps all.
//   6. inverse CDF over the kept tokens, ids ascending: u = Philox(seed, position) in [0, 1); the
//      first token at which the running sum exceeds u * (sum of kept).
// Ties in 3 and 4 go to the lowest id.
// Tokens with a NaN logit are never chosen.
#pragma once

#include <cstdint>

namespace chimera {

struct Sampling {
  float temperature = 0.0f;  // 0: greedy
  int32_t top_k = 0;         // 0: off
  float top_p = 1.0f;        // 1: off
  float min_p = 0.0f;        // 0: off
  uint64_t seed = 0;
};

// Throws Error naming the parameter that is out of range (temperature >= 0, top_k >= 0,
// 0 < top_p <= 1, 0 <= min_p <= 1; NaN is out of range).
void check(const Sampling& sampling);

// The parts of sampling that a backend has faster ways to compute; each has one definition.
struct SamplingOps {
  // Index of the largest value, lowest index first; NaN never wins; 0 if there is none.
  int32_t (*argmax)(const float* x, int64_t n);
  // out[i] = exp(x[i] / divisor - max / divisor), rounded down to a multiple of 2^-34; NaN -> 0.
  void (*exp_scaled)(const float* x, int64_t n, float max, float divisor, float* out);
};

// logits: (vocab). position: that of the sampled token in its sequence. scratch: vocab floats and
// vocab ids, overwritten.
struct SamplerScratch {
  float* e;        // (vocab)
  int32_t* order;  // (vocab)
};
int32_t sample(const SamplingOps& ops, const float* logits, int32_t vocab, const Sampling& sampling,
               int64_t position, const SamplerScratch& scratch);

}  // namespace chimera
