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
// A block has 4 to 8 warps, and a warp 16 rows for all its columns. Weights (tape.cuh) and x come
// through a ring of stages filled by cp.async: while a stage is multiplied, the next ones are in
// flight.
//
//   wait until stage i has landed; barrier; start the copy of stage i + S - 1; multiply stage i
//
// One barrier a stage: after it, all have left stage i - 1, whose slot the new copy takes.
//
// A multiprocessor's share of an H200's 4.6 TB/s is a stage of 8 KiB every 400 cycles, and of 4-bit
// weights one slab, 288 bytes, every 14 cycles, so there are no instructions to spare. What a look
// at the machine code brought (22016 x 4096 in Q4_0, one token, on an H200: 26.3 us, then 23.7):
// addresses in shared memory are 32-bit numbers (SharedAddress), (x & a) | b is one instruction
// (and_or()), copies move two pointers and nothing else.
//
// Bytes in flight: F16, one token: a stage is 8.5 KiB, 7 ahead are 60 KiB a block, two blocks on a
// multiprocessor: 16 MB in all, where an H200's 4.6 TB/s x 0.8 us latency ask for 3.7. With 64
// tokens x alone goes through the ring. Each warp reads all of it: by count 36 KiB of shared
// memory's 128 bytes a cycle for 8 KiB of weights, 290 of the 400 cycles; through the ring as well,
// weights took another 130. So a warp has its next 4 slabs of 16-bit weights in registers. The
// build refuses a kernel that spills.
//
// More tokens than a block has columns for are groups, a block each. The groups of the same rows
// are neighbours in the grid, so they run side by side, and W comes from memory once and from L2
// for the others.
//
// # How high a block is
// 22016 rows are 172 blocks of 8 warps: two on 40 of 132 multiprocessors, and one on the others,
// which then have nothing to do for half of the time. With 6 warps there are 230, and room for 264.
// So the launch takes the height that is over first (launch_linear()). Nothing but x, which each
// block reads, is lost with more blocks, and no bit depends on it. 22016 x 4096 on an H200, blocks
// of 8, 6 and 4 warps: BF16, 64 tokens 74, 53 and 74 us; Q4_0, one token 23.7, 19.7 and 28.0.
//
// # Few rows
// 4096 rows are 32 blocks, a quarter of an H100. So K is cut in runs, one block each, as a function
// of (rows, cols) only (contract.cuh), whose results are added in the order of the runs. On sm_90
// the runs of a tile are a cluster: each lays its sums down in shared memory and adds its share of
// all. Elsewhere they go through memory, and the last one to arrive, found by an integer counter,
// adds them. Either way all loads are begun before the first sum: the first form's loads waited for
// one another, 0.6 to 0.9 us a token.
//
// # Between kernels
// A step of LLaMA-2-7B is some 350 kernels, and memory should have something to do between them.
// So matrices that share x share a launch, and a product asks for the weights of its first stages
// before its turn: its blocks stand ready, and begin as those of the product ahead leave, while x
// is still to be made (let_next_begin()). A layer's time on an H200, of eight as one graph,
// before and since products, their inputs, RoPE and combine let the next kernel begin at once:
// BF16 130 and 127 us for a token, 183 and 175 for 64; Q4_0 77 and 73; SmolLM2 29.8 and 28.7.
//
// Tried, and slower (H200, a layer of LLaMA-2-7B, BF16):
// * asking for the next product's weights from L2 while norms and attention run: 164 us became
//   167 (32 MB behind the attention) and 171 (and 16 MB of each product)
// * one block of up to 16 row tiles on a multiprocessor, so that the next one's find room beside
//   it: 141 us instead of 132 for one token. Its weights are there too early, and memory waits
//   while x is made. With two row tiles a warp, which halves the reads of x, 233 instead of 176
//   us for 64 tokens: too few warps
// * row tiles dealt out evenly, 3 or 4 to a block, since blocks that share a multiprocessor with
//   two others are done 8 of 41 us after those that share it with one: 134 instead of 127, 199
//   instead of 175 for 64
// And, a plain step of 8 layers of LLaMA-2-7B in BF16 and Q4_0, and of SmolLM2 in Q8_0, ms; as it
// was then 1.08, 0.61 and 0.86:
// * x made by each block of a product, for up to 8 tokens, instead of by a kernel ahead of it:
//   1.21, 0.72 and 1.08; with half as much of that code unrolled 1.24 and, SmolLM2, 0.94. That
//   code which runs once has to be fetched may be why, though a rehearsal did not help:
// * x copied for the tokens there are, not for all 8 of a column: Q4_0 0.62, SmolLM2 0.88
// * with that, a rehearsal before the kernel's turn, so that code is there by then: of the
//   product's loop, on what shared memory holds, 1.10, 0.63 and 0.90; of its input as well 1.12,
//   0.65 and 0.89
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
DEVICE int first_row(const Step* step, Rows rows) {
  return rows == Rows::kAll ? early(step->first_new) : 0;
}
DEVICE int n_tokens(const Step* step, Rows rows) {
  return early(rows == Rows::kAll ? step->n_rows : step->n_logits) - first_row(step, rows);
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
// x (n) to shared memory. Loads are taken together before anything is done with them: a row of 4096
// floats is on its way for one latency, not for sixteen.
DEVICE void stage_row(const float* x, int64_t n, float* staged) {
  constexpr int kTogether = 16;
  for (int64_t from = thread_index(); from < n; from += kTogether * kInputThreads) {
    float part[kTogether];
    UNROLLED_FOR (int i = 0; i < kTogether; ++i)
      if (from + i * kInputThreads < n) part[i] = x[from + i * kInputThreads];
    UNROLLED_FOR (int i = 0; i < kTogether; ++i)
      if (from + i * kInputThreads < n) staged[from + i * kInputThreads] = part[i];
  }
}

// Block (token, part), kPairs pairs of k for each thread. One block for all of a row would be slow;
// of few rows the parts are small, and so is the code, which is read anew in each kernel. Shared
// memory: 16 bytes, then (cols) floats for kRmsNorm: every block of a row computes its norm.
BOTH constexpr int input_part(int pairs) { return 2 * pairs * kInputThreads; }
template <int kPairs>
KERNEL(kInputThreads, 1)
void input_kernel(InputParams p) {
  const int64_t n = p.cols;
  // Two neighbours in k share a register of the fragment.
  const int64_t first_k = static_cast<int64_t>(block_y()) * input_part(kPairs) + 2 * thread_index(),
                end = fragment_k32(n) * 32;
  const auto k_of = [&](int i) { return first_k + i * 2 * kInputThreads; };
  const bool norm = p.input == Linear::Input::kRmsNorm;
  float weight[kPairs][2] = {};
  if (norm)
    UNROLLED_FOR (int i = 0; i < kPairs; ++i)
      UNROLLED_FOR (int j = 0; j < 2; ++j)
        if (k_of(i) + j < n) weight[i][j] = p.norm_weight[k_of(i) + j];
  // The Step is none of what the kernel ahead writes: CudaBackend sees to that.
  let_next_begin();  // a product, which reads weights alone before its turn
  const int token = block_x();
  if (token >= n_tokens(p.step, p.rows)) return leave();
  const int64_t row =
      p.rows == Rows::kAll ? first_row(p.step, p.rows) + token : early(p.step->logits_row[token]);
  wait_alone();
  const bool gated = p.input == Linear::Input::kSwiGlu;
  const float* x = p.x + row * (p.x_stride > 0 ? p.x_stride : gated ? 2 * n : n);
  float value[kPairs][2] = {}, up[kPairs][2] = {};
  UNROLLED_FOR (int i = 0; i < kPairs; ++i)
    UNROLLED_FOR (int j = 0; j < 2; ++j) {
      const int64_t k = k_of(i) + j;
      if (k < n) value[i][j] = x[k];
      if (k < n && gated) up[i][j] = x[n + k];
    }
  if (norm) {
    auto* result = reinterpret_cast<float*>(shared_memory());
    float* staged = result + 4;
    stage_row(x, n, staged);
    sync_threads();
    const float scale = rms_scale(staged, n, p.eps, result);
    UNROLLED_FOR (int i = 0; i < kPairs; ++i)
      UNROLLED_FOR (int j = 0; j < 2; ++j) value[i][j] = (value[i][j] * scale) * weight[i][j];
  } else if (gated || p.input == Linear::Input::kSilu) {
    UNROLLED_FOR (int i = 0; i < kPairs; ++i)
      UNROLLED_FOR (int j = 0; j < 2; ++j) {
        value[i][j] = silu(value[i][j]);
        if (gated) value[i][j] = value[i][j] * up[i][j];
      }
  }
  UNROLLED_FOR (int i = 0; i < kPairs; ++i) {
    const int64_t k = k_of(i);
    if (k >= end) break;
    const float a = value[i][0], b = value[i][1];  // 0 past the row
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
  const int pairs = max_rows <= 8 ? 2 : 4;
  const Grid grid{max_rows, ceil_div<int64_t>(fragment_k32(p.cols) * 32, input_part(pairs))};
  launch("input", pairs == 2 ? input_kernel<2> : input_kernel<4>, stream, grid, kInputThreads,
         shared, p);
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
  int64_t stacked_rows, cols;  // of the matrix, which decide how K is split
  int64_t y_stride;
  bool accumulate;
  float* partials;     // of each segment, if K is split: partial_floats()
  int partial_tokens;  // at least the op's tokens
  uint32_t* counters;  // (row blocks, token groups), zero; left zero
  LinearSegment segments[kMaxSegments];
  int n_segments;
  // Set by linear():
  int groups = 1;                 // of tokens
  int block_tiles = 0;            // row tiles of a block: its height
  int splits = 1, run_slabs = 0;  // of K; divisions are long ways on a GPU
  bool clustered = false;         // the runs of a tile are a cluster
};

// Row tiles of a block, one for each of its warps.
inline constexpr int kLeastTiles = 4, kMostTiles = 8;
static_assert(kMostTiles * kTileRows == kBlockRows);
inline constexpr int kLinearThreads = kMostTiles * kLanes;
inline constexpr int kCopyThreads = kLeastTiles * kLanes;  // copy x: every block has them
// What registers are dealt out for: at most 168 a thread, so that two blocks of 6 warps find room.
inline constexpr int kBoundThreads = 384;

// Slabs of weights that a warp holds in registers ahead of their turn; 0: they come through the
// ring. With 64 tokens of 16-bit weights shared memory has enough to do with x.
BOTH constexpr int slabs_ahead(DType type, int column_tiles) {
  return (type == DType::kF16 || type == DType::kBF16) && column_tiles == 8 ? 4 : 0;
}
// A stage of the ring; a function of type and column tiles, and nothing that the bits depend on.
struct StageLayout {
  int slabs;         // of a row tile
  int weight_bytes;  // kMostTiles row tiles
  int k32;           // of x
  int bytes;
  int stages;
};
// All that sm_89 has; an H100's multiprocessor has room for two. (With 72 KiB for one token, so
// that the next kernel finds room for a third, LLaMA-2-7B took 2.63 ms instead of 2.57 in Q4_0,
// 4.32 instead of 4.34 in BF16, on two H200s.)
inline constexpr int kRingBytes = 99 * 1024, kMostStages = 8;
BOTH constexpr StageLayout stage_layout(DType type, int column_tiles) {
  const SlabLayout l = slab_layout(type);
  const bool wide = type == DType::kF16 || type == DType::kBF16;
  const int ahead = slabs_ahead(type, column_tiles);
  StageLayout s{};
  // Fewer stages, where x leaves room for it: LLaMA-2-7B in Q4_0, plainly, 2.31 ms a step with 4
  // slabs, 2.13 with 8 (H200, bench --shape --type --rounds 2). Q5_0 and Q5_1 were not timed.
  const bool narrow = l.low_bytes == 256 && column_tiles == 1;
  s.slabs = ahead > 0 ? ahead : l.k == 256 || wide ? 1 : narrow ? 8 : 4;
  s.weight_bytes = ahead > 0 ? 0 : kMostTiles * s.slabs * l.bytes;
  s.k32 = s.slabs * l.k / 32;
  s.bytes = s.weight_bytes + column_tiles * s.k32 * 512;
  s.stages = least(kMostStages, kRingBytes / s.bytes);
  return s;
}
BOTH constexpr int max_column_tiles(DType type) { return slab_layout(type).k == 256 ? 4 : 8; }

// The sums of a warp's row tile with the block's column tiles, as C fragments.
template <int kColumnTiles>
using LinearSums = float[kColumnTiles][4];

// A block's part of y.
struct LinearOutput {
  float* y;
  int64_t y_stride, first_row, rows;
  int first_token, tokens;
  bool accumulate;

  // f(y, i) for those of the four sums of a lane's fragment that there are.
  template <typename F>
  DEVICE void each(int j, const F& f) const {
    UNROLLED_FOR (int i = 0; i < 4; ++i) {
      const int64_t row = first_row + warp_index() * kTileRows + lane_index() / 4 + 8 * (i / 2);
      const int token = first_token + j * 8 + lane_index() % 4 * 2 + i % 2;
      if (row < rows && token < tokens) f(y + token * y_stride + row, i);
    }
  }
  // y is read for all sums before any is written: else each load would wait for the store before
  // it.
  template <int kColumnTiles>
  DEVICE void write(LinearSums<kColumnTiles>& sum) const {
    const auto all = [&](const auto& f) {
      UNROLLED_FOR (int j = 0; j < kColumnTiles; ++j)
        each(j, [&](float* to, int i) { f(to, &sum[j][i]); });
    };
    if (accumulate) all([](const float* from, float* x) { *x = *from + *x; });
    all([](float* to, const float* x) { *to = *x; });
  }
};

// The runs of a split that are a cluster lay their sums down in shared memory (the ring's), and
// each adds and writes a share of the fragments, in the order of the runs.
template <int kColumnTiles>
DEVICE void add_in_cluster(const LinearOutput& out, int splits, int columns,
                           const LinearSums<kColumnTiles>& sum) {
  constexpr int kMost = (kColumnTiles + 1) / 2;  // fragments of a run
  float* const mine = reinterpret_cast<float*>(shared_memory()) + thread_index() * 4;
  const auto place = [&](int fragment) { return mine + fragment * block_threads() * 4; };
  sync_threads();  // nobody reads the ring any more
  UNROLLED_FOR (int j = 0; j < kColumnTiles; ++j)
    if (j < columns) store_16(place(j), sum[j]);
  float total[kMost][4] = {};
  const auto fragment_of = [&](int i) { return block_y() + i * splits; };
  const auto each = [&](const auto& f) {  // of the run's fragments: f(i, y, element)
    UNROLLED_FOR (int i = 0; i < kMost; ++i)
      if (const int fragment = fragment_of(i); fragment < columns)
        out.each(fragment, [&](float* y, int e) { f(&total[i][e], y); });
  };
  if (out.accumulate) each([](float* x, const float* y) { *x = *y; });  // on its way meanwhile
  sync_cluster();
  UNROLLED_FOR (int i = 0; i < kMost; ++i) {
    const int fragment = fragment_of(i);
    if (fragment >= columns) break;
    float part[kLargestCluster][4];
    UNROLLED_FOR (int rank = 0; rank < kLargestCluster; ++rank)
      if (rank < splits) load_cluster_16(place(fragment), rank, part[rank]);
    UNROLLED_FOR (int e = 0; e < 4; ++e) {
      float y = part[0][e];
      UNROLLED_FOR (int rank = 1; rank < kLargestCluster; ++rank)
        if (rank < splits) y = y + part[rank][e];
      total[i][e] = out.accumulate ? total[i][e] + y : y;
    }
  }
  each([](const float* x, float* y) { *y = *x; });
  sync_cluster();
}

// Elsewhere, or of more runs than a cluster has, they leave their sums in memory as they stand in
// registers, 16 bytes a lane; the last one to arrive has all of them in `sum`, and true.
// partials: of the block (columns, kBlockRows, 8), rank_floats from one run to the next.
template <int kColumnTiles>
DEVICE bool add_in_memory(float* partials, int64_t rank_floats, uint32_t* counter, int splits,
                          int columns, LinearSums<kColumnTiles>& sum) {
  partials += thread_index() * 4;
  const auto at = [](int j) { return j * kBlockRows * 8; };
  UNROLLED_FOR (int j = 0; j < kColumnTiles; ++j)
    if (j < columns) store_16(partials + block_y() * rank_floats + at(j), sum[j]);
  sync_threads();  // also: nobody reads the ring any more
  auto* arrived = reinterpret_cast<uint32_t*>(shared_memory());
  if (thread_index() == 0) *arrived = arrive(counter);
  sync_threads();
  if (*arrived + 1 != static_cast<uint32_t>(splits)) return false;
  if (thread_index() == 0) *counter = 0;
  // Loads of several runs go ahead of their sums: they need not wait for one another.
  constexpr int kAhead = 16 / kColumnTiles < 8 ? 16 / kColumnTiles : 8;
  for (int first = 0; first < splits; first += kAhead) {
    float part[kAhead][kColumnTiles][4];
    UNROLLED_FOR (int r = 0; r < kAhead; ++r)
      UNROLLED_FOR (int j = 0; j < kColumnTiles; ++j)
        if (first + r < splits && j < columns)
          load_fresh_16(partials + (first + r) * rank_floats + at(j), part[r][j]);
    UNROLLED_FOR (int r = 0; r < kAhead; ++r)
      UNROLLED_FOR (int j = 0; j < kColumnTiles; ++j)
        UNROLLED_FOR (int i = 0; i < 4; ++i)
          if (first + r < splits && j < columns)
            sum[j][i] = first + r == 0 ? part[r][j][i] : sum[j][i] + part[r][j][i];
  }
  return true;
}

template <DType kType, int kColumnTiles>
KERNEL(kBoundThreads, kColumnTiles == 1 ? 2 : 1)
void linear_kernel(LinearParams p) {
  constexpr SlabLayout l = slab_layout(kType);
  constexpr StageLayout s = stage_layout(kType, kColumnTiles);
  static_assert(s.stages >= 2 && s.weight_bytes % 16 == 0);
  static_assert(s.stages * s.bytes >= kLinearThreads * kColumnTiles * 16);  // add_in_cluster()
  const int group = block_x() % p.groups, row_block = block_x() / p.groups;
  LinearSegment m = p.segments[0];
  UNROLLED_FOR (int i = 1; i < kMaxSegments; ++i)
    if (i < p.n_segments && row_block >= p.segments[i].first_block) m = p.segments[i];

  const int64_t slabs = tape_slabs(kType, p.cols), k32s = fragment_k32(p.cols);
  const int64_t first_slab = static_cast<int64_t>(block_y()) * p.run_slabs;
  int slabs_left = static_cast<int>(least<int64_t>(slabs - first_slab, p.run_slabs));
  const int n_stages = ceil_div(slabs_left, s.slabs);
  const int64_t first_tile = static_cast<int64_t>(row_block - m.first_block) * p.block_tiles;
  const SharedAddress ring = shared_address();

  // A loop that streams has few instructions to spare: what each thread copies in a stage is at the
  // same place of the next one, so that nothing but two pointers moves.
  //
  // Weights: a warp copies what it multiplies, its row tile, which is a run of bytes on the tape.
  constexpr int kTileBytes = s.slabs * l.bytes, kTileUnits = kTileBytes / 16;
  const int64_t tile = first_tile + warp_index();
  const std::byte* tape = m.tape + (tile * slabs + first_slab) * l.bytes + lane_index() * 16;
  // Of 16 bytes, from this lane's first one on.
  int units_left = tile * kTileRows < m.rows ? slabs_left * (l.bytes / 16) - lane_index() : 0;
  const SharedAddress weights = ring + warp_index() * kTileBytes + lane_index() * 16;
  const auto fetch_weights = [&](int slot) {
    UNROLLED_FOR (int u = 0; u < kTileUnits; u += kLanes)
      if (u < units_left && (u + kLanes <= kTileUnits || u + lane_index() < kTileUnits))
        copy_async_16(weights + slot + u * 16, tape + u * 16);
    tape += kTileBytes;
    units_left -= kTileUnits;
  };
  constexpr int kAhead = slabs_ahead(kType, kColumnTiles);
  uint32_t held[most(kAhead, 1)][2][4] = {};
  const auto hold = [&](uint32_t(&a)[2][4]) {  // the next slab
    if (units_left > 0)
      UNROLLED_FOR (int half = 0; half < 2; ++half) {
        const Words4 w = load_once_16(tape + half * 512);
        UNROLLED_FOR (int r = 0; r < 4; ++r) a[half][r] = w.word[r];
      }
    tape += l.bytes;
    units_left -= l.bytes / 16;
  };
  // Weights can be on their way before the kernel that makes x is done: see let_next_begin().
  // Groups behind the first may have no tokens: they look first.
  const auto fetch_first = [&] {
    if constexpr (kAhead > 0) {
      UNROLLED_FOR (int i = 0; i < kAhead; ++i) hold(held[i]);
    } else {
      UNROLLED_FOR (int i = 0; i < s.stages - 1; ++i) fetch_weights(i * s.bytes);
    }
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
  // x: the first warps copy it. Columns without a token are not copied, and multiplied like the
  // others: nobody sees their sums.
  const int columns = least(kColumnTiles, ceil_div(tokens - first_token, 8));  // live column tiles
  constexpr int kColumnUnits = s.k32 * 32;
  const bool copies_x = thread_index() < kCopyThreads;
  const std::byte* x = p.x + (first_token / 8 * k32s + first_slab * l.k / 32) * 512 +
                       thread_index() / kColumnUnits * k32s * 512 +
                       thread_index() % kColumnUnits * 16;
  const SharedAddress x_ring = ring + s.weight_bytes + thread_index() * 16;
  int stages_to_fetch = n_stages;
  const auto fetch_x = [&](int slot) {
    if (copies_x && stages_to_fetch > 0) {
      UNROLLED_FOR (int u = 0; u < kColumnTiles * kColumnUnits; u += kCopyThreads) {
        // u is a multiple of kColumnUnits, or less than a column.
        const int column = u / kColumnUnits, rest = u % kColumnUnits;
        if (column + thread_index() / kColumnUnits < columns)
          copy_async_16(x_ring + slot + u * 16, x + column * k32s * 512 + rest * 16);
      }
    }
    x += s.k32 * 512;
    --stages_to_fetch;
    copy_async_commit();  // also where there is nothing left: wait() counts groups
  };

  LinearSums<kColumnTiles> sum = {};
  // 32 k: a from the tape, b: the columns' fragments of them.
  const auto multiply = [&](const uint32_t(&a)[2][4], SharedAddress b_of) {
    UNROLLED_FOR (int j = 0; j < kColumnTiles; ++j) {
      const Words4 w = load_shared_16(b_of + j * s.k32 * 512);
      const uint32_t b[2][2] = {{w.word[0], w.word[1]}, {w.word[2], w.word[3]}};
      UNROLLED_FOR (int half = 0; half < 2; ++half) {
        if constexpr (kType == DType::kBF16)
          mma_bf16(sum[j], a[half], b[half]);
        else
          mma_f16(sum[j], a[half], b[half]);
      }
    }
  };
  const auto multiply_slab = [&](SharedAddress stage, int slab) {
    const SharedAddress a_of = stage + (warp_index() * s.slabs + slab) * l.bytes;
    const SharedAddress b_of = stage + s.weight_bytes + slab * l.k * 16 + lane_index() * 16;
    UNROLLED_FOR (int k32 = 0; k32 < l.k / 32; ++k32) {
      uint32_t a[2][4];
      load_fragments<kType>(a_of, k32, a);
      multiply(a, b_of + k32 * 512);
    }
  };

  UNROLLED_FOR (int i = 0; i < s.stages - 1; ++i) fetch_x(i * s.bytes);
  int reads = 0, writes = (s.stages - 1) * s.bytes;  // slots of the ring
  const auto next = [&](int slot) { return slot == (s.stages - 1) * s.bytes ? 0 : slot + s.bytes; };
  const auto begin_stage = [&] {
    copy_async_wait<s.stages - 2>();
    sync_threads();
  };
  const auto end_stage = [&] {
    slabs_left -= s.slabs;
    reads = next(reads);
    writes = next(writes);
  };
  if constexpr (kAhead > 0) {
    for (int i = 0; i < n_stages; ++i) {
      begin_stage();
      fetch_x(writes);
      UNROLLED_FOR (int slab = 0; slab < s.slabs; ++slab) {
        if (slab >= slabs_left) break;
        multiply(held[slab], ring + reads + slab * 512 + lane_index() * 16);
        hold(held[slab]);
      }
      end_stage();
    }
  } else {
    for (int i = 0; i < n_stages; ++i) {
      begin_stage();
      fetch_weights(writes);
      fetch_x(writes);
      if (s.slabs == 1 || slabs_left >= s.slabs) {
        UNROLLED_FOR (int slab = 0; slab < s.slabs; ++slab) multiply_slab(ring + reads, slab);
      } else {
        UNROLL_BY(1)
        for (int slab = 0; slab < slabs_left; ++slab) multiply_slab(ring + reads, slab);
      }
      end_stage();
    }
  }

  const LinearOutput out{m.y + first_row(p.step, p.rows_of) * p.y_stride,
                         p.y_stride,
                         first_tile * kTileRows,
                         m.rows,
                         first_token,
                         tokens,
                         p.accumulate};
  if (p.clustered) return add_in_cluster<kColumnTiles>(out, p.splits, columns, sum);
  if (p.splits > 1) {
    const int64_t all_columns = ceil_div(p.partial_tokens, 8),
                  row_blocks = ceil_div<int64_t>(m.rows, kBlockRows);
    const int64_t block = (row_block - m.first_block) * all_columns + first_token / 8;
    if (!add_in_memory<kColumnTiles>(p.partials + m.first_partial + block * kBlockRows * 8,
                                     row_blocks * all_columns * kBlockRows * 8,
                                     p.counters + block_x(), p.splits, columns, sum))
      return;
  }
  out.write<kColumnTiles>(sum);
}

// F32 weights, one segment: one FMA chain for each output, lanes are rows, a warp has 32 rows and
// up to 8 tokens.
inline constexpr int kF32Tokens = 8, kF32Warps = 4;
KERNEL(kF32Warps* kLanes, 1) void linear_f32_kernel(LinearParams p) {
  wait_alone();
  const LinearSegment& m = p.segments[0];
  const int tokens = n_tokens(p.step, p.rows_of), first_token = block_z() * kF32Tokens;
  const int n = least(kF32Tokens, tokens - first_token);
  const int64_t panel = static_cast<int64_t>(block_x()) * kF32Warps + warp_index();
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

// Floats of partials, and counters, that a segment of a stack needs.
inline int64_t partial_floats(DType type, int64_t rows, int64_t stacked_rows, int64_t cols,
                              int tokens) {
  const int64_t splits = type == DType::kF32 ? 1 : n_splits(stacked_rows, cols);
  return splits == 1 ? 0 : splits * round_up<int64_t>(rows, kBlockRows) * round_up(tokens, 8);
}
inline int64_t counter_words(int64_t rows, int tokens) {
  return ceil_div<int64_t>(rows, kBlockRows) * ceil_div(tokens, 8);
}

template <DType kType, int kColumnTiles>
void launch_linear(Stream stream, LinearParams p, int max_rows) {
  constexpr StageLayout s = stage_layout(kType, kColumnTiles);
  constexpr size_t kShared = static_cast<size_t>(s.stages * s.bytes);
  const auto kernel = linear_kernel<kType, kColumnTiles>;
  p.groups = ceil_div(max_rows, kColumnTiles * 8);
  p.splits = static_cast<int>(n_splits(p.stacked_rows, p.cols));
  p.run_slabs =
      static_cast<int>(split_units(p.stacked_rows, p.cols) * kSplitUnit / slab_layout(kType).k);
  p.clustered = p.splits > 1 && p.splits <= largest_cluster() &&
                resident_blocks(kernel, kMostTiles * kLanes, kShared, p.splits) > 0;
  const int cluster = p.clustered ? p.splits : 1;
  const auto row_blocks = [&](int tiles) {
    int64_t blocks = 0;
    for (int i = 0; i < p.n_segments; ++i)
      blocks += ceil_div<int64_t>(p.segments[i].rows, tiles * kTileRows);
    return blocks;
  };
  // The height of a block that takes the fewest tiles' time: as many blocks as are there at once
  // take that of one. Of equals the highest, for each block reads x. (Partial sums in memory lie by
  // kBlockRows.)
  p.block_tiles = kMostTiles;
  int64_t best = 0;
  for (int tiles = kMostTiles; tiles >= kLeastTiles && (p.splits == 1 || p.clustered); --tiles) {
    const int64_t time =
        tiles * ceil_div(row_blocks(tiles) * p.groups * p.splits,
                         resident_blocks(kernel, tiles * kLanes, kShared, cluster));
    if (best > 0 && time >= best) continue;
    best = time;
    p.block_tiles = tiles;
  }
  int64_t first_block = 0, partials = 0;
  for (int i = 0; i < p.n_segments; ++i) {
    LinearSegment& m = p.segments[i];
    m.first_block = static_cast<int>(first_block);
    m.first_partial = partials;
    first_block += ceil_div<int64_t>(m.rows, p.block_tiles * kTileRows);
    partials += partial_floats(kType, m.rows, p.stacked_rows, p.cols, p.partial_tokens);
  }
  launch("linear", kernel, stream, {first_block * p.groups, p.splits, 1, cluster},
         p.block_tiles * kLanes, kShared, p);
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
        const Grid grid{ceil_div<int64_t>(panels, kF32Warps), 1, ceil_div(max_rows, kF32Tokens)};
        launch("linear f32", linear_f32_kernel, stream, grid, kF32Warps * kLanes, 0, one);
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
