// The ops that work on rows one by one: embedding, norm, RoPE and append, copies, keep. All of them
// are short; a block has a row or a part of one (`keep`: a head of a layer), over which its threads
// stride.
#pragma once

#include "cuda/kv.cuh"
#include "cuda/linear.cuh"

namespace chimera::cuda {
inline namespace CHIMERA_CUDA_BODY {

inline constexpr int kRowThreads = 128;

// ---- Embedding ---------------------------------------------------------------------------------

struct EmbedParams {
  const Step* step;
  DType type;
  const std::byte* tape;  // (vocab, cols)
  int64_t cols;
  float* out;  // (rows, cols)
};
// Block (row, part).
KERNEL(kRowThreads, 1) void embed_kernel(EmbedParams p) {
  wait_for_previous();
  const int row = p.step->first_new + block_x();
  const int64_t k = static_cast<int64_t>(block_y()) * kRowThreads + thread_index();
  if (row >= p.step->n_rows || k >= p.cols) return;
  p.out[row * p.cols + k] = tape_weight(p.type, p.tape, p.cols, p.step->token[row], k);
}
inline void embed(Stream stream, const EmbedParams& p, int max_rows) {
  launch("embed", embed_kernel, stream, {max_rows, ceil_div<int64_t>(p.cols, kRowThreads)},
         kRowThreads, 0, p);
}

// ---- RMS norm ----------------------------------------------------------------------------------

struct RmsNormParams {
  const Step* step;
  const float* x;       // (rows, n)
  const float* weight;  // (n)
  float eps;
  int64_t n;
  float* y;  // (rows, n)
};
// Shared memory: 16 bytes, then (n) floats.
KERNEL(kInputThreads, 1) void rms_norm_kernel(RmsNormParams p) {
  wait_for_previous();
  const int row = p.step->first_new + block_x();
  if (row >= p.step->n_rows) return;
  auto* result = reinterpret_cast<float*>(shared_memory());
  float* staged = result + 4;
  stage_row(p.x + row * p.n, p.n, staged);
  sync_threads();
  const float scale = rms_scale(staged, p.n, p.eps, result);
  for (int64_t i = thread_index(); i < p.n; i += block_threads())
    p.y[row * p.n + i] = (staged[i] * scale) * p.weight[i];
}
inline void rms_norm(Stream stream, const RmsNormParams& p, int max_rows) {
  launch("rms_norm", rms_norm_kernel, stream, {max_rows}, kInputThreads,
         16 + static_cast<size_t>(p.n) * 4, p);
}

// ---- RoPE and append ---------------------------------------------------------------------------

struct RopeAppendParams {
  const Step* step;
  float* qkv;  // (rows, (n_heads + 2 n_kv_heads) * head_dim); q and k are rotated in place
  Heads heads;
  RopeTable rope;
  float q_scale;  // 1 / sqrt(head_dim)
  KvLayer kv;
};
// Block (row, part): pairs of coordinates of the query heads, then of the KV heads. Always behind a
// product, which does not write the Step.
KERNEL(kInputThreads, 1) void rope_append_kernel(RopeAppendParams p) {
  let_next_begin();  // attention
  const int row = early(p.step->first_new) + block_x(), dim = p.heads.head_dim, half = dim / 2;
  const int head = (block_y() * kInputThreads + thread_index()) / half,
            i = (block_y() * kInputThreads + thread_index()) % half;
  if (row >= early(p.step->n_rows) || head >= p.heads.n_heads + p.heads.n_kv_heads)
    return leave();
  float* x =
      p.qkv + (static_cast<int64_t>(row) * (p.heads.n_heads + 2 * p.heads.n_kv_heads) + head) * dim;
  const bool is_key = head >= p.heads.n_heads;
  const int kv_head =
      is_key ? head - p.heads.n_heads : head / (p.heads.n_heads / p.heads.n_kv_heads);
  const bool turns = p.heads.rope_kv_heads < 0 || kv_head < p.heads.rope_kv_heads;
  const float scale = is_key ? 1.0f : p.q_scale;
  const int64_t angle =
      static_cast<int64_t>(early(p.step->position[row]) + (is_key ? 0 : p.rope.query_shift)) * half;
  const float cos = turns ? p.rope.cos[angle + i] : 1, sin = turns ? p.rope.sin[angle + i] : 0;
  const int slot = early(p.step->slot[row]), sequence = early(p.step->sequence[row]);
  wait_alone();
  const float a = x[i], b = x[half + i];
  float first = a, second = b;
  if (turns) {
    first = fma(a, cos, -(b * sin));
    second = fma(b, cos, a * sin);
  }
  first = first * scale;
  second = second * scale;
  x[i] = first;
  x[half + i] = second;
  if (!is_key) return;
  const int64_t base = p.kv.head_offset(sequence, kv_head);
  const float* v = x + p.heads.n_kv_heads * dim;
  UNROLLED_FOR (int d = i; d < dim; d += half) {
    store_kv(p.kv.type, p.kv.k, base + p.kv.k_index(slot, d), d == i ? first : second);
    store_kv(p.kv.type, p.kv.v, base + p.kv.v_index(slot, d), v[d]);
  }
}
inline void rope_append(Stream stream, const RopeAppendParams& p, int max_rows) {
  const int pairs = (p.heads.n_heads + p.heads.n_kv_heads) * p.heads.head_dim / 2;
  launch("rope_append", rope_append_kernel, stream, {max_rows, ceil_div(pairs, kInputThreads)},
         kInputThreads, 0, p);
}

// ---- Copies ------------------------------------------------------------------------------------

struct CopyRowsParams {
  const Step* step;
  RowCopy op;
};
KERNEL(kRowThreads, 1) void copy_rows_kernel(CopyRowsParams p) {
  wait_for_previous();
  const int row = p.step->first_new + block_x();
  if (row >= p.step->n_rows) return;
  const RowCopy& op = p.op;
  const int from = op.from != nullptr ? op.from[row] : row;
  const float* x = op.x + from * (op.x_stride > 0 ? op.x_stride : op.width);
  float* y = op.y + row * (op.y_stride > 0 ? op.y_stride : op.width);
  for (int64_t i = thread_index(); i < op.width; i += block_threads()) y[i] = x[i];
}
inline void copy_rows(Stream stream, const CopyRowsParams& p, int max_rows) {
  launch("copy_rows", copy_rows_kernel, stream, {max_rows}, kRowThreads, 0, p);
}

// joined[r] = [h; f[r]], sum[r] = scale * h + f[r]
struct JoinRowsParams {
  const Step* step;
  const float* h;  // (width)
  float scale;
  const float* f;  // (rows, width)
  int64_t width;
  float* joined;  // (rows, 2 width)
  float* sum;     // (rows, width)
};
KERNEL(kRowThreads, 1) void join_rows_kernel(JoinRowsParams p) {
  wait_for_previous();
  const int64_t row = p.step->first_new + block_x();
  if (row >= p.step->n_rows) return;
  for (int64_t i = thread_index(); i < p.width; i += block_threads()) {
    const float h = p.h[i], f = p.f[row * p.width + i];
    p.joined[2 * row * p.width + i] = h;
    p.joined[(2 * row + 1) * p.width + i] = f;
    p.sum[row * p.width + i] = p.scale * h + f;
  }
}
inline void join_rows(Stream stream, const JoinRowsParams& p, int max_rows) {
  launch("join_rows", join_rows_kernel, stream, {max_rows}, kRowThreads, 0, p);
}

// Moves kept keys and values to their positions. A thread owns coordinates of one head of one layer
// and takes the rows in order, parents first, so that no row lands on one that is still to move.
struct KeepParams {
  const Step* step;
  KvLayer kv;            // of layer 0
  int64_t layer_stride;  // elements
};
KERNEL(kRowThreads, 1) void keep_kernel(KeepParams p) {
  wait_for_previous();
  const Step* step = p.step;
  const int64_t layer = block_x() * p.layer_stride;
  for (int row = 0; row < step->n_rows; ++row) {
    const int from = step->slot[row], to = step->kept_at[row];
    if (to < 0 || to == from) continue;
    const int64_t base = layer + p.kv.head_offset(step->sequence[row], block_y());
    for (int i = thread_index(); i < p.kv.head_dim; i += block_threads()) {
      move_kv(p.kv.type, p.kv.k, base + p.kv.k_index(from, i), base + p.kv.k_index(to, i));
      move_kv(p.kv.type, p.kv.v, base + p.kv.v_index(from, i), base + p.kv.v_index(to, i));
    }
  }
}
inline void keep(Stream stream, const KeepParams& p, int n_layers) {
  launch("keep", keep_kernel, stream, {n_layers, p.kv.n_kv_heads}, kRowThreads, 0, p);
}

// Moves kept rows of x to the first rows of their sequence, in order; a thread owns columns.
struct KeepRowsParams {
  const Step* step;
  int64_t width;
  float* x;  // (rows, width)
};
KERNEL(kRowThreads, 1) void keep_rows_kernel(KeepRowsParams p) {
  wait_for_previous();
  if (block_y() >= p.step->n_sequences) return;
  const Step::Sequence& s = p.step->sequences[block_y()];
  const int64_t column = static_cast<int64_t>(block_x()) * block_threads() + thread_index();
  if (column >= p.width) return;
  int to = s.first_row;
  for (int row = s.first_row; row < s.first_row + s.n_rows; ++row) {
    if (p.step->kept_at[row] < 0) continue;
    if (row != to) p.x[to * p.width + column] = p.x[row * p.width + column];
    ++to;
  }
}
inline void keep_rows(Stream stream, const KeepRowsParams& p, int n_sequences) {
  launch("keep_rows", keep_rows_kernel, stream,
         {ceil_div<int64_t>(p.width, kRowThreads), n_sequences}, kRowThreads, 0, p);
}

}  // namespace CHIMERA_CUDA_BODY
}  // namespace chimera::cuda
