// Cross entropy with the target's answer, and its gradient with respect to the logits, in place
// (engine/train/ops.h). A block has a row: its largest logit, the sum of exponentials, then
//   dlogit_c = weight (mass softmax_c - p_c),   mass: the target's probability in the vocabulary
#pragma once

#include "cuda/train_rows.cuh"
#include "engine/train/ops.h"

namespace chimera::cuda {
inline namespace CHIMERA_CUDA_BODY {

using training::SoftTarget;
static_assert(SoftTarget::kMost == kLanes, "a lane has one of the target's tokens");

struct CrossEntropyParams {
  int64_t vocab;
  float* logits;             // (rows, vocab); becomes the gradient, if that is wanted
  const SoftTarget* target;  // tokens: columns of the logits, -1: none
  const int32_t* target_of;  // (rows) -1: does not count
  const float* weight;       // (rows)
  bool want_grad;
  float* loss;       // (rows)
  int32_t* correct;  // (rows)
};
// Shared memory: reduction (4), the target's mass and its mean logit (2).
KERNEL(kReduceThreads, 1) void cross_entropy_kernel(CrossEntropyParams p) {
  wait_for_previous();
  auto* shared = reinterpret_cast<float*>(shared_memory());
  const int row = block_x();
  float* x = p.logits + row * p.vocab;
  const int32_t target = p.target_of[row];
  if (target < 0) {
    if (p.want_grad)
      for (int64_t c = thread_index(); c < p.vocab; c += kReduceThreads) x[c] = 0.0f;
    if (thread_index() == 0) {
      p.loss[row] = 0.0f;
      p.correct[row] = -1;
    }
    return;
  }
  const SoftTarget& t = p.target[target];
  const int32_t token = t.token[lane_index()];
  const float probability = token < 0 ? 0.0f : t.probability[lane_index()];
  if (warp_index() == 0) {
    float mass = probability, expected = token < 0 ? 0.0f : probability * x[token];
    for (int width = kLanes / 2; width > 0; width /= 2) {
      mass = mass + shuffle_xor(mass, width);
      expected = expected + shuffle_xor(expected, width);
    }
    if (lane_index() == 0) {
      shared[4] = mass;
      shared[5] = expected;
    }
  }
  float largest = -infinity();
  for (int64_t c = thread_index(); c < p.vocab; c += kReduceThreads) largest = most(largest, x[c]);
  largest = block_max<kReduceThreads>(shared, largest);
  float sum = 0;
  for (int64_t c = thread_index(); c < p.vocab; c += kReduceThreads)
    sum = sum + exp_contract(x[c] - largest);
  sum = block_sum<kReduceThreads>(shared, sum);
  const float mass = shared[4];
  if (thread_index() == 0) {
    p.loss[row] = mass * (largest + ::logf(sum)) - shared[5];
    p.correct[row] = token >= 0 && x[token] == largest ? 1 : 0;  // lane 0 has the target's first
  }
  if (!p.want_grad) return;
  sync_threads();  // x has been read
  const float factor = divide(p.weight[row] * mass, sum);
  for (int64_t c = thread_index(); c < p.vocab; c += kReduceThreads)
    x[c] = factor * exp_contract(x[c] - largest);
  sync_threads();
  if (warp_index() == 0 && token >= 0) x[token] -= p.weight[row] * probability;
}
inline void cross_entropy(Stream stream, const CrossEntropyParams& p, int64_t rows) {
  if (rows == 0) return;
  launch("cross entropy", cross_entropy_kernel, stream, {rows}, kReduceThreads, 6 * 4, p);
}

}  // namespace CHIMERA_CUDA_BODY
}  // namespace chimera::cuda
