// The attention of a rollout, and its gradient (engine/train/ops.h). Its large parts are products
// of each (text, head), so the product kernel makes them, all in one launch:
//
//   begin       scores  (queries, slots)  = q k^T
//   step        out     (rows, dim)      += weights v          weights: softmax of a step, below
//   step, back  dweights (rows, slots)    = dout v^T
//               dv      (slots, dim)     += weights^T dout     a launch for each query head of a
//               dk      (slots, dim)     += dscores^T q        group: they share dv and dk
//   end, back   dq      (queries, dim)   += dscores k
//
// What remains is the softmax over a row's slots and its own ones, and its gradient: two kernels
// here, which wait for memory.
#pragma once

#include <algorithm>
#include <span>
#include <vector>

#include "cuda/train_product.cuh"
#include "cuda/train_rows.cuh"
#include "engine/train/ops.h"

namespace chimera::cuda {
inline namespace CHIMERA_CUDA_BODY {

using training::AttentionShape;
using training::AttentionText;
using training::kMaxSteps;

// A text, and where its scores (heads, n_queries, n_slots) and weights (heads, n_rows, width)
// begin; a row of weights is those of n_slots slots, 0 where it does not see them, then of its own
// slots.
struct RolloutText : AttentionText {
  int64_t scores, weights;
  BOTH int64_t width() const { return n_slots + kMaxSteps; }
};

struct RolloutParams {
  AttentionShape shape;
  const RolloutText* texts;
  const int32_t* text_of;       // (N) of a row
  const int32_t *query, *seen;  // (N) of the step
  int step;
  const float *q, *k, *v;                            // (.., q size), (.., kv size)
  const float *own_k[kMaxSteps], *own_v[kMaxSteps];  // (N, kv size), [1..step]
  const float* scores;
  float* weights;  // of the step
  float* out;      // (N, q size)
  // The gradient:
  const float *dout, *dweights;
  float *dscores, *dq;
  float *own_dk[kMaxSteps], *own_dv[kMaxSteps];
};

// Block (row, head): the weights, and out = that of the own slots. Shared memory: reduction (4),
// own scores (kMaxSteps).
KERNEL(kReduceThreads, 1) void rollout_step_kernel(RolloutParams p) {
  wait_for_previous();
  auto* shared = reinterpret_cast<float*>(shared_memory());
  float* own = shared + 4;
  const RolloutText t = p.texts[p.text_of[block_x()]];
  const int dim = p.shape.head_dim, head = block_y();
  const int64_t q_size = static_cast<int64_t>(p.shape.n_heads) * dim,
                kv_size = static_cast<int64_t>(p.shape.n_kv_heads) * dim,
                own_at = block_x() * kv_size + head / (p.shape.n_heads / p.shape.n_kv_heads) * dim;
  const int64_t query = p.query[block_x()], seen = p.seen[block_x()];
  const float* scores =
      p.scores + t.scores + (head * t.n_queries + query - t.first_query) * t.n_slots;
  float* w = p.weights + t.weights + (head * t.n_rows + block_x() - t.first_row) * t.width();
  const float* q = p.q + query * q_size + head * dim;

  for (int j = 1 + warp_index(); j <= p.step; j += kReduceThreads / kLanes) {
    float dot = 0;
    for (int d = lane_index(); d < dim; d += kLanes) dot = fma(q[d], p.own_k[j][own_at + d], dot);
    for (int width = kLanes / 2; width > 0; width /= 2) dot = dot + shuffle_xor(dot, width);
    if (lane_index() == 0) own[j - 1] = dot;
  }
  sync_threads();
  float largest = -infinity();
  for (int64_t i = thread_index(); i < seen; i += kReduceThreads)
    largest = most(largest, scores[i]);
  largest = block_max<kReduceThreads>(shared, largest);
  for (int j = 0; j < p.step; ++j) largest = most(largest, own[j]);
  float sum = 0;
  for (int64_t i = thread_index(); i < seen; i += kReduceThreads) {
    w[i] = exp_contract(scores[i] - largest);
    sum = sum + w[i];
  }
  sum = block_sum<kReduceThreads>(shared, sum);
  for (int j = 0; j < p.step; ++j) sum = sum + exp_contract(own[j] - largest);
  for (int64_t i = thread_index(); i < t.n_slots; i += kReduceThreads)
    w[i] = i < seen ? divide(w[i], sum) : 0.0f;
  if (thread_index() < p.step)
    w[t.n_slots + thread_index()] = divide(exp_contract(own[thread_index()] - largest), sum);
  for (int d = thread_index(); d < dim; d += kReduceThreads) {
    float o = 0;
    for (int j = 1; j <= p.step; ++j)
      o = fma(divide(exp_contract(own[j - 1] - largest), sum), p.own_v[j][own_at + d], o);
    p.out[block_x() * q_size + head * dim + d] = o;
  }
}

// With w = softmax(score), o = sum w v: dw = do . v, dscore = w (dw - do . o). Block (row, KV
// head): it adds up the rows that ask with the same query as its own, which is the first of them,
// so no two blocks write to the same place. Shared memory: reduction (4), do . own_v (kMaxSteps).
KERNEL(kReduceThreads, 1) void rollout_step_grad_kernel(RolloutParams p) {
  wait_for_previous();
  auto* shared = reinterpret_cast<float*>(shared_memory());
  float* dw_own = shared + 4;
  const RolloutText t = p.texts[p.text_of[block_x()]];
  const int dim = p.shape.head_dim, group = p.shape.n_heads / p.shape.n_kv_heads;
  const int64_t q_size = static_cast<int64_t>(p.shape.n_heads) * dim,
                kv_size = static_cast<int64_t>(p.shape.n_kv_heads) * dim;
  const int64_t query = p.query[block_x()], end = t.first_row + t.n_rows;
  if (block_x() > t.first_row && p.query[block_x() - 1] == query) return;
  for (int head = block_y() * group; head < (block_y() + 1) * group; ++head) {
    const int64_t q_at = query * q_size + head * dim;
    float* dscores =
        p.dscores + t.scores + (head * t.n_queries + query - t.first_query) * t.n_slots;
    for (int64_t row = block_x(); row < end && p.query[row] == query; ++row) {
      const int64_t w_at = t.weights + (head * t.n_rows + row - t.first_row) * t.width();
      const float *w = p.weights + w_at, *dw = p.dweights + w_at;
      const float* dout = p.dout + row * q_size + head * dim;
      const float* out = p.out + row * q_size + head * dim;
      const int64_t own_at = row * kv_size + static_cast<int64_t>(block_y()) * dim;
      for (int j = 1 + warp_index(); j <= p.step; j += kReduceThreads / kLanes) {
        float dot = 0;
        for (int d = lane_index(); d < dim; d += kLanes)
          dot = fma(dout[d], p.own_v[j][own_at + d], dot);
        for (int width = kLanes / 2; width > 0; width /= 2) dot = dot + shuffle_xor(dot, width);
        if (lane_index() == 0) dw_own[j - 1] = dot;
      }
      float mean = 0;
      for (int d = thread_index(); d < dim; d += kReduceThreads) mean = fma(dout[d], out[d], mean);
      mean = block_sum<kReduceThreads>(shared, mean);  // (its barriers are those of dw_own, too)
      for (int64_t i = thread_index(); i < p.seen[row]; i += kReduceThreads)
        dscores[i] += w[i] * (dw[i] - mean);
      for (int j = 1; j <= p.step; ++j) {
        const float weight = w[t.n_slots + j - 1], dscore = weight * (dw_own[j - 1] - mean);
        for (int d = thread_index(); d < dim; d += kReduceThreads) {
          p.own_dv[j][own_at + d] += weight * dout[d];
          p.own_dk[j][own_at + d] += dscore * p.q[q_at + d];
          p.dq[q_at + d] += dscore * p.own_k[j][own_at + d];
        }
      }
      sync_threads();  // dw_own is free again
    }
  }
}

// ---- The products ------------------------------------------------------------------------------

// The batch's texts, and the tasks of every kind of product, by query head of a group, then by text
// and KV head.
struct RolloutPlan {
  enum Kind { kScores, kOut, kDWeights, kDV, kDQ, kDK, kKinds };
  std::vector<RolloutText> texts;
  std::vector<int32_t> text_of;
  std::vector<ProductTask> tasks[kKinds];
  ProductTask largest[kKinds] = {};
  int64_t n_scores = 0, n_weights = 0;
  int group = 0;  // query heads of a KV head

  RolloutPlan() = default;
  RolloutPlan(std::span<const AttentionText> from, const AttentionShape& shape)
      : group(shape.n_heads / shape.n_kv_heads) {
    for (const AttentionText& t : from) {
      texts.push_back({t, n_scores, n_weights});
      text_of.insert(text_of.end(), static_cast<size_t>(t.n_rows),
                     static_cast<int32_t>(texts.size()) - 1);
      n_scores += shape.n_heads * t.n_queries * t.n_slots;
      n_weights += shape.n_heads * t.n_rows * texts.back().width();
    }
    const int64_t dim = shape.head_dim;
    const int64_t qs = shape.n_heads * dim, kvs = shape.n_kv_heads * dim;
    const auto add = [this](Kind kind, const ProductTask& t) {
      tasks[kind].push_back(t);
      largest[kind].m = std::max(largest[kind].m, t.m);
      largest[kind].n = std::max(largest[kind].n, t.n);
      largest[kind].k = std::max(largest[kind].k, t.k);
    };
    for (int64_t g = 0; g < group; ++g) {
      for (const RolloutText& t : texts) {
        for (int64_t kv_head = 0; kv_head < shape.n_kv_heads; ++kv_head) {
          const int64_t head = kv_head * group + g, slots = t.n_slots;
          const int64_t rows = t.n_rows, queries = t.n_queries;
          const int64_t q = t.first_query * qs + head * dim, row = t.first_row * qs + head * dim,
                        kv = t.first_slot * kvs + kv_head * dim,
                        s = t.scores + head * queries * slots,
                        w = t.weights + head * rows * t.width();
          add(kScores, {q, kv, s, qs, kvs, slots, queries, slots, dim});
          add(kOut, {w, kv, row, t.width(), kvs, qs, rows, dim, slots});
          add(kDWeights, {row, kv, w, qs, kvs, t.width(), rows, slots, dim});
          add(kDV, {w, row, kv, t.width(), qs, kvs, slots, dim, rows});
          add(kDQ, {s, kv, q, slots, kvs, qs, queries, dim, slots});
          add(kDK, {s, q, kv, slots, qs, kvs, slots, dim, queries});
        }
      }
    }
  }
};

inline void rollout_step(Stream stream, const RolloutParams& p, int64_t rows) {
  if (rows == 0) return;
  launch("rollout step", rollout_step_kernel, stream, {rows, p.shape.n_heads}, kReduceThreads,
         (4 + kMaxSteps) * 4, p);
}
inline void rollout_step_grad(Stream stream, const RolloutParams& p, int64_t rows) {
  if (rows == 0) return;
  launch("rollout step's gradient", rollout_step_grad_kernel, stream, {rows, p.shape.n_kv_heads},
         kReduceThreads, (4 + kMaxSteps) * 4, p);
}

}  // namespace CHIMERA_CUDA_BODY
}  // namespace chimera::cuda
