#include "engine/sampler.h"

#include <algorithm>
#include <string>

#include "engine/error.h"
#include "engine/philox.h"

namespace chimera {

void check(const Sampling& s) {
  const auto require = [](bool ok, const char* name, const char* expected, double found) {
    if (!ok) throw Error(name, expected, std::to_string(found));
  };
  require(s.temperature >= 0 && s.temperature <= 1e6f, "temperature",
          "0 (greedy) or a positive number", s.temperature);
  require(s.top_k >= 0, "top-k", "0 (off) or more", s.top_k);
  require(s.top_p > 0 && s.top_p <= 1, "top-p", "more than 0, at most 1 (off)", s.top_p);
  require(s.min_p >= 0 && s.min_p <= 1, "min-p", "0 (off) to 1", s.min_p);
}

namespace {

constexpr int32_t kBlock = 256;

double block_sum(const float* e, int32_t n) {
  double lane[4] = {};
  int32_t i = 0;
  for (; i + 4 <= n; i += 4)
    for (int32_t j = 0; j < 4; ++j) lane[j] += static_cast<double>(e[i + j]);
  for (; i < n; ++i) lane[0] += static_cast<double>(e[i]);
  return lane[0] + lane[1] + lane[2] + lane[3];
}

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

}  // namespace

int32_t sample(const SamplingOps& ops, const float* logits, int32_t vocab, const Sampling& s,
               int64_t position, const SamplerScratch& scratch) {
  const int32_t best = ops.argmax(logits, vocab);
  if (s.temperature < 1e-3f) return best;  // logits divided by less would overflow

  float* e = scratch.e;
  ops.exp_scaled(logits, vocab, logits[best], s.temperature, e);

  // Cuts set e to zero. 49,152 ids are listed only if a cut asks for their order.
  const bool top_k = s.top_k > 0 && s.top_k < vocab, top_p = s.top_p < 1.0f;
  if (top_k || top_p) {
    int32_t* order = scratch.order;
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
  // Sums are exact, so they are taken block by block: first all, then up to the block that the draw
  // falls into.
  double total = 0;
  for (int32_t i = 0; i < vocab; i += kBlock)
    total += block_sum(e + i, std::min(kBlock, vocab - i));
  const double target = philox_uniform(s.seed, static_cast<uint64_t>(position)) * total;
  double running = 0;
  for (int32_t i = 0; i < vocab; i += kBlock) {
    const int32_t n = std::min(kBlock, vocab - i);
    const double sum = block_sum(e + i, n);
    if (running + sum > target)
      for (int32_t j = i; j < i + n; ++j)
        if ((running += static_cast<double>(e[j])) > target) return j;
    running += sum;
  }
  return best;  // unreachable but for NaN: target < total
}

}  // namespace chimera
