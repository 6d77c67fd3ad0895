// The CPU kernels: one table of functions for each instruction set, all of them computing the same
// bits. `reference.cc` and `product_reference.cc` (plain loops, "scalar") say what every entry
// means; the other tables are faster ways to the same bits. The tests compare every entry with the
// reference.
//
// # The arithmetic contract (version kContractVersion)
// Each number below is one fixed sequence of IEEE operations, whatever the number of rows, threads
// and lanes. fma(a, b, c) rounds once; everything else rounds after each operation.
//
// **Products**, y[n] = sum over k of w[n][k] x[k]:
//   F32, F16    acc = 0; for k ascending: acc = fma(w[k], x[k], acc)
//   BF16        x rounded to bf16. acc = 0; for each step of 32 k (the last one padded with zeros):
//                 even = 0; for even k ascending: even = fma(w[k], x[k], even)
//                 odd  = 0; for odd  k ascending: odd  = fma(w[k], x[k], odd)
//                 acc = acc + (even + odd)
//               with denormals flushed to zero, on input and output. (This is what the AMX
//               instruction TDPBF16PS computes.)
//   quantised   x in int8 blocks of 32: bits = max |x[i]|; scale_x = max / 127;
//               a[i] = round_to_nearest_even(x[i] * (127 / max)); max < 2^-100 counts as 0 (scale_x
//               = 0, a = 0); a block with an infinity or NaN has a = 0 and scale_x = NaN.
//               sum_x = sum of a[i]. acc = 0; for each block of 32 ascending, with its
//               CanonicalBlock {q, scale, min} of the weights (dtype.h):
//                 u = 0                                 (types without a minimum)
//                 u = min * float(sum_x)                (types with one)
//                 u = fma(scale, float(sum q[i] a[i]), u)        (Q6_K: first half of the block,
//                 u = fma(scale[1], float(second half), u)        then the second; others: one dot)
//                 acc = fma(scale_x, u, acc)
//               For a type without a minimum "fma(scale, dot, 0)" is the product rounded once.
// **Sums inside a row** (norms, softmax): 16 virtual lanes; element i is added to lane i mod 16 in
//   ascending order, then lanes j and j+8 are added, j and j+4, j and j+2, j and j+1.
// **RMS norm**: lane sums of fma(x, x, lane); r = 1 / sqrt(sum / n + eps); y = (x * r) * weight.
// **exp**: see exp.h; one polynomial, no libm. **SiLU**: x / (1 + exp(-x)).
// **RoPE**: y[i] = fma(x[i], cos, -(x[j] * sin)), y[j] = fma(x[j], cos, x[i] * sin),
//   j = i + dim / 2.
// **Attention**: see AttentionChunk below.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine/dtype.h"
#include "engine/sampler.h"
#include "engine/tensor.h"

namespace chimera::cpu {

inline constexpr int kContractVersion = 2;

enum class Isa : uint8_t { kScalar, kAvx2, kAvxVnni, kAvx512, kAmx, kNeon };

// ---- Products ---------------------------------------------------------------------------------

// Activations, m rows of them, in the form that a weight type asks for (activation_for in dtype.h).
// Only the arrays of that form are set. Rows are contiguous; cols is a multiple of 32 for kQ8.
struct ProductInput {
  const float* f32 = nullptr;      // (m, cols)
  const uint16_t* bf16 = nullptr;  // (m, cols rounded up to 32), zero padded
  const int8_t* q8 = nullptr;      // (m, cols)
  const float* scale = nullptr;    // (m, cols / 32)
  const int32_t* sum = nullptr;    // (m, cols / 32)
};

// Weight rows are repacked in panels of kPanelRows (panels.h), so that lanes are rows.
inline constexpr int kPanelRows = 16;

struct Product {
  const std::byte* panels;         // panels.h
  int64_t rows, cols;              // of the matrix; a last panel is padded with zero weights
  int64_t panel_begin, panel_end;  // the panels to compute: rows [16 begin, min(16 end, rows))
  ProductInput x;
  int m;     // rows of x: 1 or more
  float* y;  // y[t * y_stride + n], t < m, n < rows
  int64_t y_stride;
  bool accumulate;  // y += result (one add) instead of y = result
};

using ProductFunction = void (*)(const Product&);

// The contract as plain loops over the file's own layout, rows [row_begin, row_end) of y only.
// Every type; the oracle of all others, and what runs where a type has no faster product.
void product_reference(const TensorView& w, int64_t row_begin, int64_t row_end,
                       const ProductInput& x, int m, float* y, int64_t y_stride, bool accumulate);

// The products over panels of one instruction set, by DType; nullptr where there is none.
extern const ProductFunction kProductsAvx2[kDTypeCount];
extern const ProductFunction kProductsAvxVnni[kDTypeCount];
extern const ProductFunction kProductsAvx512[kDTypeCount];
extern const ProductFunction kProductsAmx[kDTypeCount];
extern const ProductFunction kProductsNeon[kDTypeCount];

// ---- Rows -------------------------------------------------------------------------------------

// Keys and values are cut into chunks of kChunk logical positions; a chunk's result is a function
// of its query and its keys in logical order alone, and chunks are combined in ascending order.
inline constexpr int kChunk = 256;
// Keys stand transposed in blocks of kKeyBlock slots, so that lanes are keys and a score needs no
// horizontal sum: it is the same wherever its key stands.
inline constexpr int kKeyBlock = 16;
inline constexpr int kMaxQueries = 8;

// One chunk of the attention of up to kMaxQueries queries (rows x query heads) that share a KV
// head.
//   score(p) = fma chain over ascending d of q[d] * k[d], from 0; q is already scaled
//   max      = the largest score of the chunk
//   e(p)     = exp(score(p) - max)
//   sum      = sum of e(p) in 16 virtual lanes by p mod 16
//   o[d]     = fma chain over ascending p of e(p) * v(p)[d], from 0
struct AttentionChunk {
  DType type;  // of keys and values: kF16 or kF32
  // Keys (kChunk / 16, head_dim, 16) and values (kChunk, padded_dim) of slots [0, kChunk); those of
  // the next kChunk slots stand k_stride, v_stride elements further on.
  const void* k;
  const void* v;
  int64_t k_stride, v_stride;
  int head_dim;
  int padded_dim;  // head_dim rounded up to 16; the padding of v is zero
  int begin;       // first logical position of the chunk, a multiple of kChunk
  int committed;   // path[i] is the slot of position committed + i
  int n_queries;
  struct Query {
    const float* q;  // (head_dim)
    const int32_t* path;
    int direct;      // positions below stand in the slot of the same number
    int length;      // it sees positions [0, length); length > begin
    float* partial;  // written: max, sum, o[padded_dim]
  } query[kMaxQueries];
  // The keys that the next call is likely to read, kChunk slots, to be fetched in time; or nullptr.
  const void* next_k = nullptr;
};
inline int partial_size(int padded_dim) {
  return 2 + padded_dim;
}

struct Kernels {
  Isa isa;
  const char* name;
  const ProductFunction*
      products;  // by DType, over panels; nullptr: product_reference over the file

  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, float* y);
  // y = silu(gate) * up; gate_up: (2, n)
  void (*swiglu)(const float* gate_up, int64_t n, float* y);
  void (*silu)(const float* x, int64_t n, float* y);
  void (*quantize_q8)(const float* x, int64_t n, int8_t* q, float* scale, int32_t* sum);
  // y: n rounded up to 32, padded with zeros
  void (*round_bf16)(const float* x, int64_t n, uint16_t* y);
  void (*round_f16)(const float* x, int64_t n, uint16_t* y);
  // RoPE of one head in place, times `scale` afterwards; cos, sin: (head_dim / 2)
  void (*rotate)(float* x, const float* cos, const float* sin, int head_dim, float scale);
  void (*attention)(const AttentionChunk& chunk);
  // out[d] = O[d] / L after combining n partials, ascending, with (M, L, O) = the first and then
  //   M' = max(M, max); a = exp(M - M'); b = exp(max - M');
  //   L = fma(L, a, sum * b); O = fma(O, a, o * b)
  // partials: n of them, `stride` floats apart.
  void (*combine)(const float* partials, int n, int64_t stride, int head_dim, int padded_dim,
                  float* out);
  SamplingOps sampling;
};

extern const Kernels kScalarKernels, kAvx2Kernels, kAvxVnniKernels, kAvx512Kernels, kAmxKernels,
    kNeonKernels;

// The best table that this machine can run, or the one that
// CHIMERA_ISA=scalar|avx2|avxvnni|avx512|amx|neon asks for. Throws Error if the name is unknown or
// the machine cannot run it.
const Kernels& select_kernels();
bool machine_has(Isa isa);

}  // namespace chimera::cpu
