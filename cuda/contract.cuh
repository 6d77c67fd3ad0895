// # The arithmetic contract of the CUDA backend (version kContractVersion)
//
// A row's results are a function of that row alone: the same bits in a step of one row and of 64,
// in any split of a prompt, in a graph or not, on the emulator's model of the tensor core or on the
// real one (each with its own bits: see mma). The CPU's contract (engine/cpu/kernels.h) is another;
// where nothing is gained by differing, this one says "as the CPU", and means the same bits.
//
// fma(a, b, c) rounds once; everything else rounds after each operation; the build forbids nvcc to
// contract (-fmad=false) and keeps denormals.
//
// **mma**, d = mma(a[16], b[16], c): what mma.sync.m16n8k16 with f32 accumulation makes of one
// element. NVIDIA does not state the order of its sum; it is one fixed function of its 33 inputs.
//
// **Products**, y[n] = sum over k of w[n][k] x[k]:
//   F32     as the CPU: acc = 0; for k ascending: acc = fma(w[k], x[k], acc)
//   others  K is cut into n_splits(N, K) runs of whole 256s (below). Within a run, acc = 0; for
//           each 16 k ascending, padded with zeros: acc = mma(w, x, acc). y = run 0, + run 1, ...
//           in f32. `accumulate` adds the whole of it to y once. N: the rows of all matrices that
//           prepare() stacked together.
//   x is rounded to bf16 for BF16 weights; for all other types to f16, numbers beyond the largest
//   f16 to +-65504. And w is
//     F16, BF16         as stored
//     Q8_0 Q4_0 Q5_0    f16(d * q)
//     Q4_1 Q5_1         f16(d * q + m), one rounding
//     Q4_K Q5_K         f16(f16(d * scale_j) * q - f16(dmin * min_j)), one rounding
//     Q6_K              f16(f16(d * scale_j) * q)
// **Embedding** as the CPU: dequantize_row().
// **Sums inside a row, RMS norm, exp, SiLU, RoPE** as the CPU.
// **Keys and values** rounded once on append to the type of the cache.
// **Attention**, chunks of kChunk = 256 logical positions, combined ascending as on the CPU:
//   F32 cache  as the CPU
//   F16 cache  q (rotated and scaled) rounded to f16, beyond its range to +-65504. Positions in
//              tiles of 16. score = mma over ascending 16 d, from 0; max, e and sum as the CPU;
//              o = mma over the chunk's tiles ascending of (v, f16(e)), from 0, positions past the
//              row's own with e = 0 and v = 0, tiles past it left out.
// **Sampling** as the CPU (engine/sampler.h).
//
// So with F32 weights and an F32 cache the logits are the CPU's, bit for bit.
#pragma once

#include "cuda/device.cuh"

namespace chimera::cuda {
inline namespace CHIMERA_CUDA_BODY {

inline constexpr int kContractVersion = 3;
inline constexpr int kChunk = 256;
inline constexpr int kSplitUnit =
    256;  // k; a run of a split is whole units (K-quants: blocks of 256)
inline constexpr int kBlockRows = 128;  // weight rows of a thread block, the highest
// Thread blocks that K is cut for: an H100's SMs. Whole units may leave a product with fewer (4096
// rows of 4096 with 128), and short columns with many fewer.
inline constexpr int kSplitBlocks = 132;

// Runs that K is cut into for a product of n rows, and the units of each but the last.
BOTH constexpr int64_t split_units(int64_t n, int64_t k) {
  const int64_t row_blocks = ceil_div<int64_t>(n, kBlockRows),
                units = ceil_div<int64_t>(k, kSplitUnit);
  const int64_t wanted = least(units, ceil_div<int64_t>(kSplitBlocks, row_blocks));
  // Below two units a run is over before its pipeline is full; only short rows are cut so far.
  return units <= 4 ? ceil_div(units, wanted) : most<int64_t>(2, ceil_div(units, wanted));
}
BOTH constexpr int64_t n_splits(int64_t n, int64_t k) {
  return ceil_div(ceil_div<int64_t>(k, kSplitUnit), split_units(n, k));
}

}  // namespace CHIMERA_CUDA_BODY
}  // namespace chimera::cuda
