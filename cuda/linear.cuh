// Products for 1 to Step::kMaxRows tokens: y (tokens, rows) = x (tokens, cols) W^T, W (rows, cols).
//
// # Why it looks like this
// A pass over a few tokens reads every weight once and does little with it: the product is a matter
// of streaming W at the speed of memory. And the bits of a token must not depend on how many others
// there are. Both ask for the same thing: W is the tensor core's wide operand (16 rows), tokens are
// its 8 columns. A column's result is a function of that column alone, so one token and 64 run the
// same instruction on the same weights in the same order; more tokens are more columns. (A usual
// GEMM has it the other way round, and pads tokens to 16, 64 or 128 rows, with another kernel for
// one.)
//
// # The stream
// A block of 4 warps owns 128 rows; a warp 32 of them, two 16-row tiles, for all its columns, so
// that a fragment of x that is read from shared memory serves two tiles. Weights (tape.cuh) and x
// come through a ring of stages filled by cp.async: while a stage is multiplied, the next ones are
// in flight.
//
//   wait until stage i has landed; barrier; start the copy of stage i + S - 1; multiply stage i
//
// One barrier a stage: after it, all have left stage i - 1, whose slot the new copy takes.
//
// A step of LLaMA-2-7B is some 350 kernels, and a graph's next kernel starts about 1 us after the
// last one's end: 0.35 ms beside the 4.4 in which an H100 reads the weights. So a product asks for
// the weights of its first stages before it waits for the kernel that makes its x
// (wait_for_previous()), and matrices that share x share a launch.
//
// Bytes in flight: F16, one token: a stage is 17 KiB, S = 4, 68 KiB a block, so three blocks live
// on an H100's multiprocessor (227 KiB) with 3 x 3 x 17 = 153 KiB in flight; 132 of them 20 MB,
// where 3.35 TB/s x 0.8 us latency asks for 2.7 MB. With 64 tokens: 24 KiB a stage, 96 KiB a block,
// two blocks, 144 KiB. On sm_89 (99 KiB): one block, 51 KiB. Registers allow more blocks than that:
// on sm_90a a thread has 96 to 117 with 8 tokens, 126 to 139 with 32, 156 to 162 with 64, of 128
// threads, so four, three and three blocks; the build refuses a kernel that spills.
//
// x at 64 tokens is read once for each 128 rows: 64 / 128 of F16's weight bytes, from L2.
//
// More tokens than a block has columns for are groups, a block each. The groups of the same rows
// are neighbours in the grid, so they run side by side, and W comes from memory once and from L2
// for the others.
//
// # Few rows
// 4096 rows are 32 blocks, a quarter of an H100. So K is cut in runs, one block each, as a function
// of (rows, cols) only (contract.cuh). Each run leaves its partial result; the last block of a tile
// to arrive, found by an integer counter, adds them in the order of the runs, not in that of their
// arrival.
#pragma once

#include "cuda/contract.cuh"
#include "cuda/numeric.cuh"
#include "cuda/runtime.cuh"
#include "cuda/tape.cuh"
#include "engine/backend.h"
#include "engine/step.h"

namespace chimera::cuda {
inline namespace CHIMERA_CUDA_BODY {

// The tokens of an op: token i is row first_row() + i of its buffers (kLogits: output row i).
DEVICE int n_tokens(const Step* step, Rows rows) {
  return rows == Rows::kAll ? step->n_rows - step->first_new : step->n_logits;
}
DEVICE int first_row(const Step* step, Rows rows) {
  return rows == Rows::kAll ? step->first_new : 0;
}

// ---- Input: x as the product wants it ----------------------------------------------------------

// B fragments: (column tile of 8 tokens, 32 k, 32 lanes, 16 bytes): two 16 x 8 tiles of B.
BOTH constexpr int64_t fragment_k32(int64_t cols) { return round_up<int64_t>(cols, 256) / 32; }
BOTH constexpr int64_t fragment_bytes(int64_t tokens, int64_t cols) {
  return ceil_div<int64_t>(tokens, 8) * fragment_k32(cols) * 512;
}

struct InputParams {
  const Step* step;
  Rows rows;
  Linear::Input input;
  const float* x;            // (rows, cols), kSwiGlu: (rows, 2 cols)
  const float* norm_weight;  // (cols), kRmsNorm
  float eps;
  int64_t cols;
  // Written, each if not null, for token i of the op:
  float* f32;      // (tokens, cols)
  std::byte* f16;  // fragments
  std::byte* bf16;
  int64_t x_stride = 0;  // floats; 0: as wide as the input says
};

// The scale of an RMS norm: 1 / sqrt(mean of squares + eps). x: (n) in shared memory. Its sum is 16
// FMA chains, one a virtual lane: 256 dependent steps for 4096 numbers, some 0.6 us, for the CPU's
// bits.
DEVICE float rms_scale(const float* x, int64_t n, float eps, float* result) {
  if (warp_index() == 0) {
    float lane = 0;
    if (lane_index() < 16) {
      UNROLL_BY(32)  // the loads of 32 steps go ahead of their sums
      for (int64_t i = lane_index(); i < n; i += 16) lane = fma(x[i], x[i], lane);
    }
    const float sum = fold_16(lane);
    if (lane_index() == 0)
      *result = divide(1.0f, square_root(divide(sum, static_cast<float>(n)) + eps));
  }
  sync_threads();
  return *result;
}

inline constexpr int kInputThreads = 256;
inline constexpr int kInputPart = 2048;  // k of a block: one block for all of a row would be slow
// Block (token, part). Shared memory: 16 bytes, then (cols) floats for kRmsNorm: every block of a
// row computes its norm.
KERNEL(kInputThreads, 1) void input_kernel(InputParams p) {
  wait_for_previous();
  const int token = block_x();
  if (token >= n_tokens(p.step, p.rows)) return;
  const int64_t row = p.rows == Rows::kAll ? p.step->first_new + token : p.step->logits_row[token];
  const int64_t n = p.cols;
  const int64_t width = p.input == Linear::Input::kSwiGlu ? 2 * n : n;
  const float* x = p.x + row * (p.x_stride > 0 ? p.x_stride : width);
  auto* result = reinterpret_cast<float*>(shared_memory());
  float* staged = result + 4;
  float scale = 1.0f;
  if (p.input == Linear::Input::kRmsNorm) {
    for (int64_t i = thread_index(); i < n; i += block_threads()) staged[i] = x[i];
    sync_threads();
    scale = rms_scale(staged, n, p.eps, result);
  }
  const auto value = [&](int64_t i) {
    if (i >= n) return 0.0f;
    switch (p.input) {
      case Linear::Input::kRmsNorm: return (staged[i] * scale) * p.norm_weight[i];
      case Linear::Input::kSwiGlu: return silu(x[i]) * x[n + i];
      case Linear::Input::kSilu: return silu(x[i]);
      default: return x[i];
    }
  };
  // Two neighbours in k share a register of the fragment.
  const int64_t first = static_cast<int64_t>(block_y()) * kInputPart,
                end = least(first + kInputPart, fragment_k32(n) * 32);
  for (int64_t k = first + 2 * thread_index(); k < end; k += 2 * block_threads()) {
    const float a = value(k), b = value(k + 1);
    const Place16 at = place_b(static_cast<int>(k % 16), token % 8);
    const int64_t offset =
        ((token / 8 * fragment_k32(n) + k / 32) * 32 + at.lane) * 16 + k % 32 / 16 * 8 + at.reg * 4;
    if (p.f16 != nullptr)
      *reinterpret_cast<uint32_t*>(p.f16 + offset) = pack(saturate_f16(a), saturate_f16(b));
    if (p.bf16 != nullptr)
      *reinterpret_cast<uint32_t*>(p.bf16 + offset) = pack(float_to_bf16(a), float_to_bf16(b));
    if (p.f32 != nullptr) {
      if (k < n) p.f32[token * n + k] = a;
      if (k + 1 < n) p.f32[token * n + k + 1] = b;
    }
  }
}

// max_rows: at least the op's tokens; the grid. The same of every launcher below.
inline void prepare_input(Stream stream, const InputParams& p, int max_rows) {
  const size_t shared =
      16 + (p.input == Linear::Input::kRmsNorm ? static_cast<size_t>(p.cols) * 4 : 0);
  const Grid grid{max_rows, ceil_div<int64_t>(fragment_k32(p.cols) * 32, kInputPart)};
  launch("input", input_kernel, stream, grid, kInputThreads, shared, p);
}

// ---- The product -------------------------------------------------------------------------------

// A matrix, or one of those that are stacked and so share x (wq, wk, wv): one launch has them all.
struct LinearSegment {
  const std::byte* tape;  // tape.cuh; 16-byte aligned
  int64_t rows;
  float* y;  // y[(first_row + token) * y_stride + row]
  // Set by linear():
  int first_block = 0;        // of the launch
  int64_t first_partial = 0;  // of p.partials
};
inline constexpr int kMaxSegments = 3;

struct LinearParams {
  const Step* step;
  Rows rows_of;
  const std::byte* x;  // fragments in f16, BF16 weights: in bf16; F32 weights: (tokens, cols) f32
  int64_t cols, y_stride;
  bool accumulate;
  float* partials;  // of each segment (n_splits, partial_tokens, rows), if n_splits(rows, cols) > 1
  int partial_tokens;  // at least the op's tokens
  uint32_t* counters;  // (row blocks, token groups), zero; left zero
  LinearSegment segments[kMaxSegments];
  int n_segments;
  int groups = 1;  // of tokens; set by linear()
};

inline constexpr int kLinearWarps = 4, kWarpTiles = 2, kLinearThreads = kLinearWarps * kLanes;
static_assert(kLinearWarps * kWarpTiles * kTileRows == kBlockRows);
inline constexpr size_t kSharedLimit = 99 * 1024;  // of a block: sm_89's

// A stage of the ring; a function of type and column tiles, and nothing that the bits depend on.
struct StageLayout {
  int slabs;         // of a row tile
  int weight_bytes;  // 8 row tiles
  int k32;           // of x
  int bytes;
  int stages;
};
BOTH constexpr StageLayout stage_layout(DType type, int column_tiles) {
  const SlabLayout l = slab_layout(type);
  const bool wide = type == DType::kF16 || type == DType::kBF16;
  StageLayout s{};
  s.slabs = l.k == 256 ? 1 : wide ? 2 : 4;
  s.weight_bytes = kLinearWarps * kWarpTiles * s.slabs * l.bytes;
  s.k32 = s.slabs * l.k / 32;
  s.bytes = s.weight_bytes + column_tiles * s.k32 * 512;
  s.stages = least(4, static_cast<int>(kSharedLimit) / s.bytes);
  return s;
}
BOTH constexpr int max_column_tiles(DType type) { return slab_layout(type).k == 256 ? 4 : 8; }

template <DType kType, int kColumnTiles>
KERNEL(kLinearThreads, 2)
void linear_kernel(LinearParams p) {
  constexpr SlabLayout l = slab_layout(kType);
  constexpr StageLayout s = stage_layout(kType, kColumnTiles);
  static_assert(s.stages >= 2 && s.weight_bytes % 16 == 0);
  const int group = block_x() % p.groups, row_block = block_x() / p.groups;
  LinearSegment m = p.segments[0];
  UNROLLED_FOR (int i = 1; i < kMaxSegments; ++i)
    if (i < p.n_segments && row_block >= p.segments[i].first_block) m = p.segments[i];

  const int64_t slabs = tape_slabs(kType, p.cols), k32s = fragment_k32(p.cols);
  const int64_t run_slabs = split_units(m.rows, p.cols) * kSplitUnit / l.k;
  const int64_t splits = ceil_div(slabs, run_slabs);
  if (block_y() >= splits) return;  // another segment of the launch has more
  const int64_t first_slab = block_y() * run_slabs, end_slab = least(slabs, first_slab + run_slabs);
  const int n_stages = static_cast<int>(ceil_div<int64_t>(end_slab - first_slab, s.slabs));
  const int64_t row_tiles = ceil_div<int64_t>(m.rows, kTileRows);
  const int64_t first_tile =
      static_cast<int64_t>(row_block - m.first_block) * kLinearWarps * kWarpTiles;
  const int tiles =
      static_cast<int>(least<int64_t>(kLinearWarps * kWarpTiles, row_tiles - first_tile));
  std::byte* ring = shared_memory();

  // Stage i of the run: its place in the ring, and what it holds.
  const auto stage_of = [&](int i) { return ring + i % s.stages * s.bytes; };
  const auto slab_of = [&](int i) { return first_slab + static_cast<int64_t>(i) * s.slabs; };
  const auto slabs_of = [&](int i) {
    return static_cast<int>(least<int64_t>(s.slabs, end_slab - slab_of(i)));
  };
  const auto fetch_weights = [&](int i) {
    if (i >= n_stages) return;
    constexpr int kTileUnits = s.slabs * l.bytes / 16;  // 16 bytes each, of a row tile
    const int units = slabs_of(i) * (l.bytes / 16);     // of them there are
    for (int u = thread_index(); u < tiles * kTileUnits; u += kLinearThreads) {
      const int tile = u / kTileUnits, unit = u % kTileUnits;
      if (unit < units)
        copy_async_16(stage_of(i) + u * 16,
                      m.tape + ((first_tile + tile) * slabs + slab_of(i)) * l.bytes + unit * 16);
    }
  };
  // Weights can be on their way before the kernel that makes x is done: what is launched just
  // before a product is its prepare_input() or another product, and neither writes weights. (A
  // kernel that does, tree.cuh's copy_head_kernel, is further back, and so done; see
  // wait_for_previous().) Groups behind the first may have no tokens: they look first.
  const auto fetch_first = [&] {
    UNROLLED_FOR (int i = 0; i < s.stages - 1; ++i) fetch_weights(i);
  };
  if (group == 0) fetch_first();
  wait_for_previous();
  const int tokens = n_tokens(p.step, p.rows_of);
  const int first_token = group * kColumnTiles * 8;
  if (first_token >= tokens) {
    copy_async_commit();
    copy_async_wait<0>();
    return;
  }
  if (group > 0) fetch_first();
  const int columns = least(kColumnTiles, ceil_div(tokens - first_token, 8));  // live column tiles
  const auto fetch_x = [&](int i) {
    if (i < n_stages) {
      const std::byte* x =
          p.x + ((static_cast<int64_t>(first_token) / 8) * k32s + slab_of(i) * l.k / 32) * 512;
      constexpr int kColumnUnits = s.k32 * 32;
      for (int u = thread_index(); u < columns * kColumnUnits; u += kLinearThreads) {
        const int column = u / kColumnUnits, unit = u % kColumnUnits;
        if (unit < slabs_of(i) * l.k)
          copy_async_16(stage_of(i) + s.weight_bytes + u * 16, x + column * k32s * 512 + unit * 16);
      }
    }
    copy_async_commit();  // also where there is nothing left: wait() counts groups
  };

  float sum[kWarpTiles][kColumnTiles][4] = {};
  const auto multiply = [&](int i) {
    const std::byte* stage = stage_of(i);
    for (int slab = 0; slab < slabs_of(i); ++slab) {
      for (int k32 = 0; k32 < l.k / 32; ++k32) {
        uint32_t a[kWarpTiles][2][4];
        UNROLLED_FOR (int tile = 0; tile < kWarpTiles; ++tile) {
          const int t = warp_index() * kWarpTiles + tile;
          load_fragments<kType>(stage + (t * s.slabs + slab) * l.bytes, k32, a[tile]);
        }
        UNROLLED_FOR (int j = 0; j < kColumnTiles; ++j) {
          if (j >= columns) break;
          const Words4 x = load_16(stage + s.weight_bytes +
                                   (j * s.k32 + slab * (l.k / 32) + k32) * 512 + lane_index() * 16);
          const uint32_t b[2][2] = {{x.word[0], x.word[1]}, {x.word[2], x.word[3]}};
          UNROLLED_FOR (int half = 0; half < 2; ++half)
            UNROLLED_FOR (int tile = 0; tile < kWarpTiles; ++tile) {
              if constexpr (kType == DType::kBF16)
                mma_bf16(sum[tile][j], a[tile][half], b[half]);
              else
                mma_f16(sum[tile][j], a[tile][half], b[half]);
            }
        }
      }
    }
  };

  UNROLLED_FOR (int i = 0; i < s.stages - 1; ++i) fetch_x(i);
  for (int i = 0; i < n_stages; ++i) {
    copy_async_wait<s.stages - 2>();
    sync_threads();
    fetch_weights(i + s.stages - 1);
    fetch_x(i + s.stages - 1);
    multiply(i);
  }

  float* out = m.y + first_row(p.step, p.rows_of) * p.y_stride;
  float* partials = p.partials + m.first_partial;
  const int g = lane_index() / 4, t = lane_index() % 4;
  UNROLLED_FOR (int tile = 0; tile < kWarpTiles; ++tile)
    UNROLLED_FOR (int j = 0; j < kColumnTiles; ++j)
      UNROLLED_FOR (int i = 0; i < 4; ++i) {
        const int64_t row =
            (first_tile + warp_index() * kWarpTiles + tile) * kTileRows + g + 8 * (i / 2);
        const int token = first_token + j * 8 + 2 * t + i % 2;
        if (row >= m.rows || token >= tokens) continue;
        float* y = out + token * p.y_stride + row;
        if (splits > 1)
          partials[(static_cast<int64_t>(block_y()) * p.partial_tokens + token) * m.rows + row] =
              sum[tile][j][i];
        else
          *y = p.accumulate ? *y + sum[tile][j][i] : sum[tile][j][i];
      }
  if (splits == 1) return;

  // The last run to arrive adds all of them, in their order.
  memory_fence();
  sync_threads();  // also: nobody reads the ring any more
  auto* arrived = reinterpret_cast<uint32_t*>(ring);
  uint32_t* counter = p.counters + block_x();
  if (thread_index() == 0) *arrived = atomic_add(counter, 1);
  sync_threads();
  if (*arrived + 1 != static_cast<uint32_t>(splits)) return;
  memory_fence();
  const int64_t block_row = first_tile * kTileRows;
  const int rows = static_cast<int>(least<int64_t>(kBlockRows, m.rows - block_row));
  const int block_tokens = least(kColumnTiles * 8, tokens - first_token);
  for (int i = thread_index(); i < block_tokens * kBlockRows; i += kLinearThreads) {
    const int token = first_token + i / kBlockRows, row = i % kBlockRows;
    if (row >= rows) continue;
    const float* partial = partials + token * m.rows + block_row + row;
    float total = load_fresh(partial);
    for (int64_t rank = 1; rank < splits; ++rank)
      total = total + load_fresh(partial + rank * p.partial_tokens * m.rows);
    float* y = out + token * p.y_stride + block_row + row;
    *y = p.accumulate ? *y + total : total;
  }
  if (thread_index() == 0) *counter = 0;
}

// F32 weights, one segment: one FMA chain for each output, lanes are rows, a warp has 32 rows and
// up to 8 tokens.
inline constexpr int kF32Tokens = 8;
KERNEL(kLinearThreads, 1) void linear_f32_kernel(LinearParams p) {
  wait_for_previous();
  const LinearSegment& m = p.segments[0];
  const int tokens = n_tokens(p.step, p.rows_of), first_token = block_z() * kF32Tokens;
  const int n = least(kF32Tokens, tokens - first_token);
  const int64_t panel = static_cast<int64_t>(block_x()) * kLinearWarps + warp_index();
  const int64_t row = panel * kF32PanelRows + lane_index();
  if (n <= 0 || row >= m.rows) return;
  const auto* w =
      reinterpret_cast<const float*>(m.tape) + panel * p.cols * kF32PanelRows + lane_index();
  const auto* x = reinterpret_cast<const float*>(p.x) + first_token * p.cols;
  float sum[kF32Tokens] = {};
  for (int64_t k = 0; k < p.cols; ++k) {
    const float weight = w[k * kF32PanelRows];
    UNROLLED_FOR (int i = 0; i < kF32Tokens; ++i)
      if (i < n) sum[i] = fma(weight, x[i * p.cols + k], sum[i]);
  }
  UNROLLED_FOR (int i = 0; i < kF32Tokens; ++i) {
    if (i >= n) break;
    float* y = m.y + (first_row(p.step, p.rows_of) + first_token + i) * p.y_stride + row;
    *y = p.accumulate ? *y + sum[i] : sum[i];
  }
}

// Floats of partials, and counters, that a segment needs.
inline int64_t partial_floats(DType type, int64_t rows, int64_t cols, int tokens) {
  return type == DType::kF32 || n_splits(rows, cols) == 1 ? 0
                                                          : n_splits(rows, cols) * tokens * rows;
}
inline int64_t counter_words(int64_t rows, int tokens) {
  return ceil_div<int64_t>(rows, kBlockRows) * ceil_div(tokens, 8);
}

template <DType kType, int kColumnTiles>
void launch_linear(Stream stream, LinearParams p, int max_rows) {
  constexpr StageLayout s = stage_layout(kType, kColumnTiles);
  p.groups = ceil_div(max_rows, kColumnTiles * 8);
  Grid grid{0, 1};
  int64_t partials = 0;
  for (int i = 0; i < p.n_segments; ++i) {
    LinearSegment& m = p.segments[i];
    m.first_block = static_cast<int>(grid.x);
    m.first_partial = partials;
    grid.x += ceil_div<int64_t>(m.rows, kBlockRows);
    grid.y = most(grid.y, n_splits(m.rows, p.cols));
    partials += partial_floats(kType, m.rows, p.cols, p.partial_tokens);
  }
  grid.x *= p.groups;
  launch("linear", linear_kernel<kType, kColumnTiles>, stream, grid, kLinearThreads,
         static_cast<size_t>(s.stages * s.bytes), p);
}
template <DType kType>
void launch_linear(Stream stream, const LinearParams& p, int max_rows) {
  if (max_rows <= 8)
    launch_linear<kType, 1>(stream, p, max_rows);
  else if (max_rows <= 32 || max_column_tiles(kType) == 4)
    launch_linear<kType, 4>(stream, p, max_rows);
  else
    launch_linear<kType, max_column_tiles(kType)>(stream, p, max_rows);
}

inline void linear(Stream stream, DType type, const LinearParams& p, int max_rows) {
  switch (type) {
    case DType::kF32:
      for (int i = 0; i < p.n_segments; ++i) {
        LinearParams one = p;
        one.segments[0] = p.segments[i];
        const int64_t panels = ceil_div<int64_t>(p.segments[i].rows, kF32PanelRows);
        const Grid grid{ceil_div<int64_t>(panels, kLinearWarps), 1, ceil_div(max_rows, kF32Tokens)};
        launch("linear f32", linear_f32_kernel, stream, grid, kLinearThreads, 0, one);
      }
      return;
    case DType::kF16: return launch_linear<DType::kF16>(stream, p, max_rows);
    case DType::kBF16: return launch_linear<DType::kBF16>(stream, p, max_rows);
    case DType::kQ8_0: return launch_linear<DType::kQ8_0>(stream, p, max_rows);
    case DType::kQ4_0: return launch_linear<DType::kQ4_0>(stream, p, max_rows);
    case DType::kQ4_1: return launch_linear<DType::kQ4_1>(stream, p, max_rows);
    case DType::kQ5_0: return launch_linear<DType::kQ5_0>(stream, p, max_rows);
    case DType::kQ5_1: return launch_linear<DType::kQ5_1>(stream, p, max_rows);
    case DType::kQ4_K: return launch_linear<DType::kQ4_K>(stream, p, max_rows);
    case DType::kQ5_K: return launch_linear<DType::kQ5_K>(stream, p, max_rows);
    case DType::kQ6_K: return launch_linear<DType::kQ6_K>(stream, p, max_rows);
  }
}

}  // namespace CHIMERA_CUDA_BODY
}  // namespace chimera::cuda
