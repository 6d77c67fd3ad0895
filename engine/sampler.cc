#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "engine/error.h"

namespace chimera {

void check(const Sampling& s) {
  const auto require = [](bool ok, const char* name, const char* expected, double found) {
    if (!ok) throw Error(name, expected, std::to_string(found));
  };
  require(s.temperature >= 0 && s.temperature <= 1e6f, "temperature", "0 (greedy) to 1000000",
          s.temperature);
  require(s.top_k >= 0, "top-k", "0 (off) or more", s.top_k);
  require(s.top_p > 0 && s.top_p <= 1, "top-p", "more than 0, at most 1 (off)", s.top_p);
  require(s.min_p >= 0 && s.min_p <= 1, "min-p", "0 (off) to 1", s.min_p);
}

namespace {

// Keeps the first k of `order` by descending e, ties to the lowest id; the rest is in any order.
void select_largest(const float* e, int32_t* order, int32_t n, int32_t k) {
  const auto before = [e](int32_t a, int32_t b) { return e[a] != e[b] ? e[a] > e[b] : a < b; };
  if (k < n) std::nth_element(order, order + k, order + n, before);
  std::sort(order, order + k, before);
}

// The shortest run of the n tokens in `order`, by descending e, that holds `wanted` of their sum.
// Sorts a growing head of the list instead of all of it: the run is a few tokens as a rule.
int32_t nucleus(const float* e, int32_t* order, int32_t n, double wanted) {
  for (int32_t head = std::min(n, 64);;
       head = static_cast<int32_t>(std::min<int64_t>(n, int64_t{head} * 16))) {
    select_largest(e, order, n, head);
    double sum = 0;
    for (int32_t i = 0; i < head; ++i) {
      sum += static_cast<double>(e[order[i]]);
      if (sum >= wanted) return i + 1;
    }
    if (head == n) return n;
  }
}

// Steps 2 to 5: what is cut has e = 0 afterwards, what is kept has more.
void cut(const SamplingOps& ops, const float* logits, int32_t vocab, float largest,
         const Sampling& s, float* e, int32_t* order) {
  ops.exp_scaled(logits, vocab, largest, s.temperature, e);
  const bool top_k = s.top_k > 0 && s.top_k < vocab, top_p = s.top_p < 1.0f;
  if (top_k || top_p) {
    int32_t n = 0;
    for (int32_t i = 0; i < vocab; ++i)
      if (e[i] > 0) order[n++] = i;
    int32_t kept = n;
    if (top_k && s.top_k < n) select_largest(e, order, n, kept = s.top_k);
    if (top_p) {
      double sum = 0;
      for (int32_t i = 0; i < kept; ++i) sum += static_cast<double>(e[order[i]]);
      const int32_t run = nucleus(e, order, kept, static_cast<double>(s.top_p) * sum);
      for (int32_t i = run; i < kept; ++i) e[order[i]] = 0;
    }
    for (int32_t i = kept; i < n; ++i) e[order[i]] = 0;
  }
  if (s.min_p > 0)
    for (int32_t i = 0; i < vocab; ++i) e[i] = e[i] < s.min_p ? 0 : e[i];
}

}  // namespace

void add_noise(const SamplingOps& ops, const float* logits, int64_t begin, int64_t end,
               const Sampling& s, int64_t position, float* noisy) {
  ops.gumbel(nullptr, begin, end - begin, s.seed, position, noisy + begin);
  for (int64_t i = begin; i < end; ++i) noisy[i] = logits[i] / s.temperature + noisy[i];
}

int32_t choose(const SamplingOps& ops, const float* logits, int32_t vocab, const Sampling& s,
               const SamplerScratch& scratch) {
  float* noisy = scratch.noise;
  if ((s.top_k > 0 && s.top_k < vocab) || s.top_p < 1.0f || s.min_p > 0) {
    const float largest = logits[ops.argmax(logits, vocab)];
    cut(ops, logits, vocab, largest, s, scratch.e, scratch.order);
    for (int32_t i = 0; i < vocab; ++i)
      if (!(scratch.e[i] > 0)) noisy[i] = -std::numeric_limits<float>::infinity();
  }
  return ops.argmax(noisy, vocab);
}

int32_t sample(const SamplingOps& ops, const float* logits, int32_t vocab, const Sampling& s,
               int64_t position, const SamplerScratch& scratch) {
  if (s.temperature < kLeastTemperature) return ops.argmax(logits, vocab);
  add_noise(ops, logits, 0, vocab, s, position, scratch.noise);
  return choose(ops, logits, vocab, s, scratch);
}

LikelyTokens likely_tokens(const float* logits, int64_t vocab) {
  LikelyTokens likely;
  const int n = sampling_ops().top_k(logits, vocab, LikelyTokens::kMost, likely.token);
  const float largest = logits[likely.token[0]],
              sum = sampling_ops().sum_of_exp(logits, vocab, largest, 1);
  for (int j = 0; j < LikelyTokens::kMost; ++j) {
    if (j >= n) likely.token[j] = -1;
    likely.probability[j] = j < n ? std::exp(logits[likely.token[j]] - largest) / sum : 0.0f;
  }
  return likely;
}

}  // namespace chimera
