// The trainer's products: C (m, n) = A (m, k) B (k, n), or C += A B, f32 in and out. One kernel for
// all three forms (y = x w^T, dx = dy w, dw += dy^T x), and for many small products in one launch
// (the attention's, one for each text and head).
//
// # How it goes
// A block of 4 warps makes a tile of 64 x 64 of C, a warp 32 x 32 of it, in steps of 32 k. Both
// operands come to shared memory as lines (a row of A, a column of B) of 32 k in bf16, two k a
// word, which is what the tensor core reads; a line is 20 words apart from the next, so that the 32
// lanes of a fragment (8 lines, 4 words) find 32 different banks. Whichever way an operand lies in
// memory, neighbouring threads read neighbouring floats. While one step is multiplied, the next is
// on its way to registers; shared memory holds two steps, so there is one barrier a step.
//
// What a block reads for a step, 16 KB, serves 2 x 64 x 64 x 32 FLOPs: 16 a byte. From an H100's L2
// at some 5 TB/s that is 80 TFLOP/s at best, five times what training needs (train_ops.cuh); a
// larger tile would leave most of the GPU without one, since weights are some 576 x 576.
//
// # Precision
// kParts = 1: operands are rounded to bf16. kParts = 3: an operand is the sum of three bf16, 24
// bits, so of all of its f32; the product is the six products of parts that matter, those that are
// not below 2^-24 of it. So f32 needs no kernel of its own, and tests can tell rounding from
// errors.
//
// # Order
// A sum over k is one chain in ascending order, or, where C has few tiles, the sum of a few chains
// (split_run()), added in ascending order by a second kernel: a function of (m, n, k) alone.
#pragma once

#include "cuda/runtime.cuh"

namespace chimera::cuda {
inline namespace CHIMERA_CUDA_BODY {

inline constexpr int kProductThreads = 128, kProductTile = 64, kProductK = 32;
inline constexpr int kLineWords = kProductK / 2 + 4;  // of a line in shared memory
inline constexpr int kPanelWords = kProductTile * kLineWords;
inline constexpr int kFetchWords = kProductTile * kProductK / 2 / kProductThreads;

// One product of a launch. a, b, c: where it begins, in floats, from the launch's pointers; lda,
// ldb, ldc: the distance of two rows there.
struct ProductTask {
  int64_t a, b, c;
  int64_t lda, ldb, ldc;
  int64_t m, n, k;
};

struct ProductParams {
  const float *a, *b;
  float* c;
  bool a_by_k;  // A lies as (m, k), else as (k, m)
  bool b_by_k;  // B lies as (n, k), else as (k, n)
  bool accumulate;
  ProductTask task;          // the only one, or, if tasks is not null, as large as the largest
  const ProductTask* tasks;  // (n_tasks)
  int n_tasks;
  // Set by product():
  int m_tiles;
  int64_t run;      // k of a chain
  float* partials;  // (chains, m, n), where there are several; one task
};

// The k of a chain. Enough chains for two blocks on each of an H100's 132 multiprocessors, but none
// shorter than 256.
BOTH constexpr int64_t split_run(int64_t m, int64_t n, int64_t k) {
  const int64_t tiles = ceil_div<int64_t>(m, kProductTile) * ceil_div<int64_t>(n, kProductTile);
  const int64_t chains = most<int64_t>(1, least(k / 256, 264 / most<int64_t>(tiles, 1)));
  return round_up<int64_t>(ceil_div(k, chains), kProductK);
}
BOTH constexpr int64_t n_chains(int64_t m, int64_t n, int64_t k) {
  return k == 0 ? 1 : ceil_div(k, split_run(m, n, k));
}

// A step's lines of one operand, on their way: two k of each of a thread's words.
struct Fetched {
  float x[kFetchWords][2];
};
// Word u of a thread's: neighbouring threads have what is neighbouring in memory.
DEVICE int line_of(int u, bool by_k) { return by_k ? u / (kProductK / 2) : u % kProductTile; }
DEVICE int word_of(int u, bool by_k) { return by_k ? u % (kProductK / 2) : u / kProductTile; }

// x: element (line, k) is x[line * ld + k] if by_k, else x[k * ld + line]; 0 beyond the ends.
DEVICE void fetch_lines(const float* x, bool by_k, int64_t ld, int64_t first_line, int64_t lines,
                        int64_t first_k, int64_t k_end, Fetched* to) {
  UNROLLED_FOR (int i = 0; i < kFetchWords; ++i) {
    const int u = thread_index() + i * kProductThreads;
    const int64_t line = first_line + line_of(u, by_k), k = first_k + 2 * word_of(u, by_k);
    UNROLLED_FOR (int half = 0; half < 2; ++half) {
      const int64_t at = by_k ? line * ld + k + half : (k + half) * ld + line;
      to->x[i][half] = line < lines && k + half < k_end ? x[at] : 0.0f;
    }
  }
}
// panels: (kParts, kPanelWords)
template <int kParts>
DEVICE void store_lines(const Fetched& from, bool by_k, uint32_t* panels) {
  UNROLLED_FOR (int i = 0; i < kFetchWords; ++i) {
    const int u = thread_index() + i * kProductThreads;
    uint32_t* word = panels + line_of(u, by_k) * kLineWords + word_of(u, by_k);
    float x = from.x[i][0], y = from.x[i][1];
    UNROLLED_FOR (int part = 0; part < kParts; ++part) {
      const uint16_t bx = float_to_bf16(x), by = float_to_bf16(y);
      word[part * kPanelWords] = pack(bx, by);
      x = x - bf16_to_float(bx);  // exact
      y = y - bf16_to_float(by);
    }
  }
}

template <int kParts>
constexpr size_t product_shared() {
  return size_t{2} * 2 * kParts * kPanelWords * 4;  // steps, operands
}

// Block (m tile of a task, n tile, chain).
template <int kParts>
KERNEL(kProductThreads, kParts == 1 ? 3 : 2)
void product_kernel(ProductParams p) {
  wait_for_previous();
  const ProductTask t = p.tasks == nullptr ? p.task : p.tasks[block_x() / p.m_tiles];
  const int64_t m0 = static_cast<int64_t>(block_x() % p.m_tiles) * kProductTile,
                n0 = static_cast<int64_t>(block_y()) * kProductTile;
  if (m0 >= t.m || n0 >= t.n) return;
  const int64_t k_begin = block_z() * p.run, k_end = least(t.k, k_begin + p.run);
  auto* shared = reinterpret_cast<uint32_t*>(shared_memory());
  const int warp_m = warp_index() / 2 * 32, warp_n = warp_index() % 2 * 32;
  const bool live = m0 + warp_m < t.m && n0 + warp_n < t.n;
  const int g = lane_index() / 4, word = lane_index() % 4;

  Fetched a, b;
  const auto fetch = [&](int64_t k) {
    fetch_lines(p.a + t.a, p.a_by_k, t.lda, m0, t.m, k, k_end, &a);
    fetch_lines(p.b + t.b, p.b_by_k, t.ldb, n0, t.n, k, k_end, &b);
  };
  float sum[2][4][4] = {};
  const auto multiply = [&](const uint32_t* panels_a, const uint32_t* panels_b) {
    UNROLLED_FOR (int k16 = 0; k16 < kProductK / 16; ++k16) {
      uint32_t fa[kParts][2][4], fb[kParts][4][2];
      UNROLLED_FOR (int part = 0; part < kParts; ++part) {
        const int at = part * kPanelWords + k16 * 8 + word;
        UNROLLED_FOR (int i = 0; i < 2; ++i)
          UNROLLED_FOR (int r = 0; r < 4; ++r)
            fa[part][i][r] =
                panels_a[at + (warp_m + i * 16 + g + 8 * (r % 2)) * kLineWords + 4 * (r / 2)];
        UNROLLED_FOR (int j = 0; j < 4; ++j)
          UNROLLED_FOR (int r = 0; r < 2; ++r)
            fb[part][j][r] = panels_b[at + (warp_n + j * 8 + g) * kLineWords + 4 * r];
      }
      UNROLLED_FOR (int small = kParts - 1; small >= 0; --small)  // the least products first
        UNROLLED_FOR (int part = 0; part <= small; ++part)
          UNROLLED_FOR (int i = 0; i < 2; ++i)
            UNROLLED_FOR (int j = 0; j < 4; ++j)
              mma_bf16(sum[i][j], fa[part][i], fb[small - part][j]);
    }
  };

  fetch(k_begin);
  int step = 0;
  for (int64_t k = k_begin; k < k_end; k += kProductK, step ^= 1) {
    uint32_t *panels_a = shared + step * 2 * kParts * kPanelWords,
             *panels_b = panels_a + kParts * kPanelWords;
    store_lines<kParts>(a, p.a_by_k, panels_a);
    store_lines<kParts>(b, p.b_by_k, panels_b);
    sync_threads();
    if (k + kProductK < k_end) fetch(k + kProductK);
    if (live) multiply(panels_a, panels_b);
  }

  UNROLLED_FOR (int i = 0; i < 2; ++i)
    UNROLLED_FOR (int j = 0; j < 4; ++j)
      UNROLLED_FOR (int r = 0; r < 4; ++r) {
        const int64_t row = m0 + warp_m + i * 16 + g + 8 * (r / 2),
                      column = n0 + warp_n + j * 8 + 2 * word + r % 2;
        if (row >= t.m || column >= t.n) continue;
        if (p.partials != nullptr) {
          p.partials[(block_z() * t.m + row) * t.n + column] = sum[i][j][r];
        } else {
          float* c = p.c + t.c + row * t.ldc + column;
          *c = p.accumulate ? *c + sum[i][j][r] : sum[i][j][r];
        }
      }
}

inline constexpr int kChainThreads = 128;
// Block: a row of C.
KERNEL(kChainThreads, 1) void add_chains_kernel(ProductParams p) {
  wait_for_previous();
  const ProductTask& t = p.task;
  const int64_t chains = ceil_div(t.k, p.run);
  for (int64_t i = thread_index(); i < t.n; i += block_threads()) {
    const float* from = p.partials + block_x() * t.n + i;
    float total = from[0];
    for (int64_t chain = 1; chain < chains; ++chain) total = total + from[chain * t.m * t.n];
    float* c = p.c + t.c + block_x() * t.ldc + i;
    *c = p.accumulate ? *c + total : total;
  }
}

// Floats of partials that one task of this size needs.
inline int64_t product_partials(const ProductTask& t) {
  const int64_t chains = n_chains(t.m, t.n, t.k);
  return chains == 1 ? 0 : chains * t.m * t.n;
}
// parts: 1 or 3. partials: product_partials(), for one task.
inline void product(Stream stream, int parts, ProductParams p, float* partials) {
  const ProductTask& t = p.task;
  const int64_t m_tiles = ceil_div<int64_t>(t.m, kProductTile);
  const int64_t tasks = p.tasks == nullptr ? 1 : p.n_tasks;
  const int64_t chains = p.tasks == nullptr ? n_chains(t.m, t.n, t.k) : 1;
  if (t.m == 0 || t.n == 0 || tasks == 0) return;
  p.m_tiles = static_cast<int>(m_tiles);
  p.run = chains == 1 ? most<int64_t>(t.k, 1) : split_run(t.m, t.n, t.k);
  p.partials = chains == 1 ? nullptr : partials;
  const Grid grid{m_tiles * tasks, ceil_div<int64_t>(t.n, kProductTile), chains};
  if (parts == 1)
    launch("product", product_kernel<1>, stream, grid, kProductThreads, product_shared<1>(), p);
  else
    launch("product f32", product_kernel<3>, stream, grid, kProductThreads, product_shared<3>(), p);
  if (chains > 1) launch("add chains", add_chains_kernel, stream, {t.m}, kChainThreads, 0, p);
}

}  // namespace CHIMERA_CUDA_BODY
}  // namespace chimera::cuda
