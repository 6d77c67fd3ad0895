// The likeliest tokens of the rows that want logits: what a draft model learns from. Only they
// leave the device; a row of logits is a thousand times as long.
#pragma once

#include "cuda/numeric.cuh"
#include "cuda/reduce.cuh"
#include "cuda/runtime.cuh"
#include "engine/backend.h"
#include "engine/step.h"

namespace chimera::cuda {
inline namespace CHIMERA_CUDA_BODY {

inline constexpr int kLikelyThreads = 256;

struct LikelyParams {
  const Step* step;
  const float* logits;  // (n_logits, vocab)
  int64_t vocab;
  LikelyTokens* out;  // (n_logits); may be the host's
};
// A block has a row.
KERNEL(kLikelyThreads, 1) void likely_kernel(LikelyParams p) {
  wait_for_previous();
  const int row = block_x();
  if (row >= p.step->n_logits) return;
  auto* scratch = reinterpret_cast<uint64_t*>(shared_memory());
  const float* logits = p.logits + row * p.vocab;
  const auto n = static_cast<int>(p.vocab);
  uint64_t top[LikelyTokens::kMost];
  block_top<kLikelyThreads>(
      scratch, n, [&](int i) { return logits[i]; }, top);
  const float largest = logits[key_index(top[0])];
  float sum = 0;
  for (int i = thread_index(); i < n; i += kLikelyThreads)
    sum = sum + exp_contract(logits[i] - largest);
  sum = block_sum<kLikelyThreads>(reinterpret_cast<float*>(scratch), sum);
  if (thread_index() > 0) return;
  UNROLLED_FOR (int j = 0; j < LikelyTokens::kMost; ++j) {
    const int32_t token = j < n ? key_index(top[j]) : -1;
    p.out[row].token[j] = token;
    p.out[row].probability[j] =
        token >= 0 ? divide(exp_contract(logits[token] - largest), sum) : 0.0f;
  }
}
inline void likely_tokens(Stream stream, const LikelyParams& p, int max_logits) {
  launch("likely tokens", likely_kernel, stream, {max_logits}, kLikelyThreads,
         kLikelyThreads / kLanes * 8, p);
}

}  // namespace CHIMERA_CUDA_BODY
}  // namespace chimera::cuda
