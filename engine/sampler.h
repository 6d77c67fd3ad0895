// Sampling is a pure function: token = sample(logits, sampling, position). No state, so a token is
// the same whether its logits come from a step of one row or from a node of a tree.
//
// In this order:
//   1. temperature below kLeastTemperature: the largest logit, ties to the lowest id. Done.
//   2. If there are cuts: e[i] = exp(logit[i] / temperature - max_j (logit[j] / temperature)) in
//      f32, rounded down to a multiple of 2^-34: then every sum below is exact in double (up to
//      2^19 tokens), and so the same in any order.
//   3. top-k: keep the k largest e (0: all).
//   4. top-p: of those, in descending order, keep the shortest run whose sum reaches
//      top_p * (sum of all that are left); 1 keeps all.
//   5. min-p: keep e >= min_p * (largest e) = min_p; 0 keeps all.
//   6. The kept token with the largest logit[i] / temperature + G[i], ties to the lowest id.
//      G[i] is Gumbel noise that belongs to (seed, position, token i): Philox bits through two
//      logarithms (engine/cpu/log.h). The largest sum falls on token i with exactly its probability
//      (the Gumbel-max trick; Maddison et al., arXiv 1411.0030, section 2).
// Ties in 3 and 4 go to the lowest id.
// Tokens with a NaN logit are never chosen.
//
// Why noise for each token, and not one draw through the cumulative distribution? Either gives the
// same distribution, but one draw means another token as soon as any token before it changes its
// share. Noise of its own lets a drafter play the same game: it knows seed, position and noise, so
// it adds them to its own logits, and the tokens that come out on top are those that the target
// would emit if it thought as the draft does. (Daliri, Musco, Suresh, arXiv 2408.07978, couple
// draft and target in this way.) The text is the target's alone: the draft's knowledge only makes
// more of its guesses right.
#pragma once

#include <cstdint>

namespace chimera {

inline constexpr float kLeastTemperature = 1e-3f;  // logits divided by less would overflow

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

// The parts of sampling, and of drafting from logits, that a CPU has faster ways to compute; each
// has one definition.
struct SamplingOps {
  // Index of the largest value, lowest index first; NaN and -infinity never win; 0 if nothing
  // does.
  int32_t (*argmax)(const float* x, int64_t n);
  // out[i] = exp(x[i] / divisor - max / divisor), rounded down to a multiple of 2^-34; NaN -> 0.
  void (*exp_scaled)(const float* x, int64_t n, float max, float divisor, float* out);
  // out[i] = Gumbel noise of token ids[i] (ids null: token first + i, first a multiple of 64) at a
  // position; -2.9 to 21.5.
  void (*gumbel)(const int32_t* ids, int64_t first, int64_t n, uint64_t seed, int64_t position,
                 float* out);
  // Indices of the k largest of x, largest first, of equal ones the lower index first. Returns how
  // many there are: k, or n if that is less. Where x holds NaN, some of them.
  int (*top_k)(const float* x, int64_t n, int k, int32_t* index);
  // Sum over i of exp((x[i] - shift) * scale): 16 sums, of the i that are equal modulo 16, folded.
  float (*sum_of_exp)(const float* x, int64_t n, float shift, float scale);
};
// The fastest of them on this machine (engine/cpu).
const SamplingOps& sampling_ops();

// The most probable tokens of softmax(logits), most probable first, of equal ones the lower id
// first. Probabilities are good to two millionths of them, and not the same bits on all backends.
struct LikelyTokens {
  static constexpr int kMost = 32;
  int32_t token[kMost];  // -1: fewer than kMost
  float probability[kMost];
};
LikelyTokens likely_tokens(const float* logits, int64_t vocab);

// logits: (vocab). position: that of the sampled token in its sequence. scratch is overwritten.
struct SamplerScratch {
  float* e;        // (vocab)
  float* noise;    // (vocab)
  int32_t* order;  // (vocab)
};
int32_t sample(const SamplingOps& ops, const float* logits, int32_t vocab, const Sampling& sampling,
               int64_t position, const SamplerScratch& scratch);

// The same in two parts, of which the first, nearly all of the work, can be divided: noise is added
// to the logits of tokens [begin, end), begin a multiple of 64, and then one of all is chosen.
// Temperature: kLeastTemperature or more.
void add_noise(const SamplingOps& ops, const float* logits, int64_t begin, int64_t end,
               const Sampling& sampling, int64_t position, float* noisy);
// scratch.noise: (vocab) what add_noise() has written.
int32_t choose(const SamplingOps& ops, const float* logits, int32_t vocab, const Sampling& sampling,
               const SamplerScratch& scratch);

}  // namespace chimera
