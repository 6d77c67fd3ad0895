// Products over panels with AVX2 and FMA, and, in a file that may use it, VPDPBUSD on the same
// vectors (AVX-VNNI): processors for desktops have it, and no AVX-512.
//
// A tile is one panel (16 rows: two vectors of 8 lanes) times up to kTile tokens. It goes over the
// columns once; every vector of weights that it loads meets all its tokens. The tiles of a panel
// follow each other, so that the panel comes from memory once, during the first tile, and from the
// cache after that.
//
// Nothing in this file may have linkage but the table at its end: an inline function of this file,
// compiled for AVX2, could otherwise be the copy that the linker keeps for the whole program.
#pragma once

#include <immintrin.h>

#include "engine/cpu/kernels.h"
#include "engine/cpu/panels.h"

namespace chimera::cpu {
namespace {

#ifdef __AVXVNNI__
constexpr bool kVnni = true;
// sum + the products of unsigned and signed bytes, four neighbours in each of 8 lanes. Exact.
__m256i dot_bytes(__m256i sum, __m256i u, __m256i s) {
  return _mm256_dpbusd_avx_epi32(sum, u, s);
}
#else
constexpr bool kVnni = false;
[[maybe_unused]] __m256i dot_bytes(__m256i, __m256i, __m256i) {
  __builtin_unreachable();
}
#endif

// Tokens of a tile. Their 8 integer sums stay in registers, beside two vectors of weights, the
// activation and the product in flight; the f32 sums, used once a block, live on the stack.
constexpr int kTile = 4;

// The hardware's prefetchers stop at the end of a page; the first tile of a panel asks for the
// bytes that are this far ahead, which are those of the next panels. They go to L2: L1 can wait for
// fewer lines at a time, and its own prefetcher fetches them from there.
constexpr int kPrefetchBytes = 8192;
// One or two tokens wait for memory alone, and the hardware has seen their stream: requests beside
// its own only stand in the same queue. (Zen 4, a pass of Q4_1 without them and with: one token
// 0.89 to 0.97, two 0.91 to 1.00 of the time, three 1.07, eight 1.12 to 1.17.)
constexpr int kFewTokens = 2;

// Inlined by force: g++ drops calls of a function that does nothing but prefetch.
template <int kBytes>
[[gnu::always_inline]] inline void prefetch(const std::byte* p) {
#pragma GCC unroll 9
  for (int i = 0; i < kBytes; i += 64)
    _mm_prefetch(reinterpret_cast<const char*>(p + kPrefetchBytes + i), _MM_HINT_T1);
}

// ---- Weights: how each type's panel gives up its scales and quants -----------------------------
//
// A reader stands on one block of 32 columns. group(g, half) is the vector [8 rows][4 k] of column
// group g = 0..7, rows 8 half and up. scale(s, half), s < kScales, are these rows' scales (of half
// s of the block's columns where there are two); min(half) their minima if kHasMin.
//
// Integer products. VPMADDUBSW multiplies unsigned by signed bytes and adds neighbours into 16
// bits, saturating; VPMADDWD with ones then adds neighbours into 32 bits. The second is not needed
// for each group: kRun says how many groups may be summed in 16 bits first. With |a| <= 127 and two
// products in a lane,
//   4 bits    8 groups * 2 * 15 * 127 = 30480     the whole block
//   5 bits    4 groups * 2 * 31 * 127 = 31496
//   Q6_K      4 groups * 2 * 32 * 127 = 32512     signed
//   Q8_0      1 group  * 2 * 128 * 127 = 32512    signed
// all below 32767, so that nothing ever saturates. Signed quants (kSigned) give their sign to the
// activation, q a = |q| * (sign(q) a), with VPABSB and VPSIGNB; |-128| is 128 as an unsigned byte.
// An offset that is still in the quants (kOffset) is taken out of the dot with the activations'
// sum.
//
// VPDPBUSD does all of it at once, in 32 bits. It takes unsigned weights as well, so Q8_0 comes as
// it is stored, with an offset of 128.

__m256 load_halves(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

__m256i load_bytes(const uint8_t* p) {  // 8 bytes, zero extended
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}

__m256i load_vector(const void* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

__m256i nibbles(const uint8_t (*quants)[64], int group, int half) {
  const __m256i v = load_vector(quants[group % 4] + 32 * half);
  return _mm256_and_si256(group < 4 ? v : _mm256_srli_epi16(v, 4), _mm256_set1_epi8(15));
}

// Adds bit `group` of every byte of `high` as the fifth bit. Bytes shift as parts of wider lanes,
// and the mask drops what has crossed from a neighbour.
__m256i with_fifth_bit(__m256i low, const uint8_t* high, int group, int half) {
  const __m256i v = load_vector(high + 32 * half);
  const __m256i bit = group < 4 ? _mm256_slli_epi16(v, 4 - group) : _mm256_srli_epi16(v, group - 4);
  return _mm256_or_si256(low, _mm256_and_si256(bit, _mm256_set1_epi8(16)));
}

struct ReadQ8_0 {
  static constexpr int kBytes = sizeof(PanelQ8_0), kOffset = kVnni ? 128 : 0, kScales = 1, kRun = 1;
  static constexpr bool kHasMin = false, kSigned = !kVnni;
  const PanelQ8_0* p;
  ReadQ8_0(const std::byte* panel, int64_t block)
      : p(reinterpret_cast<const PanelQ8_0*>(panel) + block) {}
  __m256 scale(int, int half) const { return load_halves(p->scale + 8 * half); }
  __m256 min(int) const { return _mm256_setzero_ps(); }
  __m256i group(int g, int half) const {
    const __m256i v = load_vector(p->quants[g] + 32 * half);
    return kVnni ? v : _mm256_xor_si256(v, _mm256_set1_epi8(-128));
  }
};

struct ReadQ4_0 {
  static constexpr int kBytes = sizeof(PanelQ4_0), kOffset = 8, kScales = 1, kRun = 8;
  static constexpr bool kHasMin = false, kSigned = false;
  const PanelQ4_0* p;
  ReadQ4_0(const std::byte* panel, int64_t block)
      : p(reinterpret_cast<const PanelQ4_0*>(panel) + block) {}
  __m256 scale(int, int half) const { return load_halves(p->scale + 8 * half); }
  __m256 min(int) const { return _mm256_setzero_ps(); }
  __m256i group(int g, int half) const { return nibbles(p->quants, g, half); }
};

struct ReadQ4_1 {
  static constexpr int kBytes = sizeof(PanelQ4_1), kOffset = 0, kScales = 1, kRun = 8;
  static constexpr bool kHasMin = true, kSigned = false;
  const PanelQ4_1* p;
  ReadQ4_1(const std::byte* panel, int64_t block)
      : p(reinterpret_cast<const PanelQ4_1*>(panel) + block) {}
  __m256 scale(int, int half) const { return load_halves(p->scale + 8 * half); }
  __m256 min(int half) const { return load_halves(p->min + 8 * half); }
  __m256i group(int g, int half) const { return nibbles(p->quants, g, half); }
};

struct ReadQ5_0 {
  static constexpr int kBytes = sizeof(PanelQ5_0), kOffset = 16, kScales = 1, kRun = 4;
  static constexpr bool kHasMin = false, kSigned = false;
  const PanelQ5_0* p;
  ReadQ5_0(const std::byte* panel, int64_t block)
      : p(reinterpret_cast<const PanelQ5_0*>(panel) + block) {}
  __m256 scale(int, int half) const { return load_halves(p->scale + 8 * half); }
  __m256 min(int) const { return _mm256_setzero_ps(); }
  __m256i group(int g, int half) const {
    return with_fifth_bit(nibbles(p->quants, g, half), p->high, g, half);
  }
};

struct ReadQ5_1 {
  static constexpr int kBytes = sizeof(PanelQ5_1), kOffset = 0, kScales = 1, kRun = 4;
  static constexpr bool kHasMin = true, kSigned = false;
  const PanelQ5_1* p;
  ReadQ5_1(const std::byte* panel, int64_t block)
      : p(reinterpret_cast<const PanelQ5_1*>(panel) + block) {}
  __m256 scale(int, int half) const { return load_halves(p->scale + 8 * half); }
  __m256 min(int half) const { return load_halves(p->min + 8 * half); }
  __m256i group(int g, int half) const {
    return with_fifth_bit(nibbles(p->quants, g, half), p->high, g, half);
  }
};

// Scale and minimum of Q4_K and Q5_K: 6-bit numbers times d and -dmin, one rounding each.
template <typename Panel>
[[gnu::always_inline]] inline __m256 k_scale(const Panel& p, int block, int half) {
  const __m256i number = load_bytes(p.six_bits[block / 2][block % 2 * 2] + 8 * half);
  return _mm256_mul_ps(load_halves(p.d + 8 * half),
                       _mm256_cvtepi32_ps(_mm256_and_si256(number, _mm256_set1_epi32(63))));
}

template <typename Panel>
[[gnu::always_inline]] inline __m256 k_min(const Panel& p, int block, int half) {
  const auto& bytes = p.six_bits[block / 2];
  __m256i number;
  if (block % 2 == 0) {
    number = _mm256_and_si256(load_bytes(bytes[1] + 8 * half), _mm256_set1_epi32(63));
  } else {  // the upper two bits of three bytes
    const __m256i b0 = _mm256_srli_epi32(load_bytes(bytes[0] + 8 * half), 6);
    const __m256i b1 = _mm256_srli_epi32(load_bytes(bytes[1] + 8 * half), 6);
    const __m256i b2 = _mm256_srli_epi32(load_bytes(bytes[2] + 8 * half), 6);
    number =
        _mm256_or_si256(b0, _mm256_or_si256(_mm256_slli_epi32(b1, 2), _mm256_slli_epi32(b2, 4)));
  }
  return _mm256_mul_ps(load_halves(p.minus_dmin + 8 * half), _mm256_cvtepi32_ps(number));
}

struct ReadQ4_K {
  static constexpr int kBytes = sizeof(PanelQ4_K) / 8, kOffset = 0, kScales = 1, kRun = 8;
  static constexpr bool kHasMin = true, kSigned = false;
  const PanelQ4_K* p;
  int block;
  ReadQ4_K(const std::byte* panel, int64_t b)
      : p(reinterpret_cast<const PanelQ4_K*>(panel) + b / 8), block(static_cast<int>(b % 8)) {}
  __m256 scale(int, int half) const { return k_scale(*p, block, half); }
  __m256 min(int half) const { return k_min(*p, block, half); }
  __m256i group(int g, int half) const { return nibbles(p->quants[block], g, half); }
};

struct ReadQ5_K {
  static constexpr int kBytes = sizeof(PanelQ5_K) / 8, kOffset = 0, kScales = 1, kRun = 4;
  static constexpr bool kHasMin = true, kSigned = false;
  const PanelQ5_K* p;
  int block;
  ReadQ5_K(const std::byte* panel, int64_t b)
      : p(reinterpret_cast<const PanelQ5_K*>(panel) + b / 8), block(static_cast<int>(b % 8)) {}
  __m256 scale(int, int half) const { return k_scale(*p, block, half); }
  __m256 min(int half) const { return k_min(*p, block, half); }
  __m256i group(int g, int half) const {
    return with_fifth_bit(nibbles(p->quants[block], g, half), p->high[block], g, half);
  }
};

struct ReadQ6_K {
  static constexpr int kBytes = sizeof(PanelQ6_K) / 8, kOffset = 0, kScales = 2, kRun = 4;
  static constexpr bool kHasMin = false, kSigned = true;
  const PanelQ6_K* p;
  int block;
  ReadQ6_K(const std::byte* panel, int64_t b)
      : p(reinterpret_cast<const PanelQ6_K*>(panel) + b / 8), block(static_cast<int>(b % 8)) {}
  __m256 scale(int s, int half) const {
    const auto* bytes = reinterpret_cast<const __m128i*>(p->scale[block][s] + 8 * half);
    return _mm256_mul_ps(load_halves(p->d + 8 * half),
                         _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(bytes))));
  }
  __m256 min(int) const { return _mm256_setzero_ps(); }
  __m256i group(int g, int half) const {  // bits 2 (g % 4) and up of `high` become bits 4 and 5
    const __m256i v = load_vector(p->high[block][g / 4] + 32 * half);
    const int to = 4 - 2 * (g % 4);
    const __m256i bits = to > 0 ? _mm256_slli_epi16(v, to) : _mm256_srli_epi16(v, -to);
    const __m256i q = _mm256_or_si256(nibbles(p->quants[block], g, half),
                                      _mm256_and_si256(bits, _mm256_set1_epi8(0x30)));
    return _mm256_sub_epi8(q, _mm256_set1_epi8(32));
  }
};

// ---- Tiles ------------------------------------------------------------------------------------

// One panel times T tokens.
struct Tile {
  const Product& p;
  const std::byte* panel;
  int token;   // the first
  bool ahead;  // whether it fetches what comes after its panel
  int rows;    // that exist: 1..16
  float* y;    // of the first row and token
};

// y of the tile's rows and tokens. Inlined, because an array that is handed to a function has to
// stand in memory, and the compiler would then write the sums back there after every step.
template <int T>
[[gnu::always_inline]] inline void store(const Tile& tile, const __m256 (&acc)[T][2]) {
  const bool accumulate = tile.p.accumulate;
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) {
    float* y = tile.y + t * tile.p.y_stride;
    if (tile.rows == kPanelRows) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        __m256 v = acc[t][half];
        if (accumulate) v = _mm256_add_ps(_mm256_loadu_ps(y + 8 * half), v);
        _mm256_storeu_ps(y + 8 * half, v);
      }
    } else {
      float v[kPanelRows];
      _mm256_storeu_ps(v, acc[t][0]);
      _mm256_storeu_ps(v + 8, acc[t][1]);
      for (int r = 0; r < tile.rows; ++r) y[r] = accumulate ? y[r] + v[r] : v[r];
    }
  }
}

// A token's four bytes of one group, in every lane.
__m256i broadcast(const int8_t* q) {
  return _mm256_set1_epi32(*reinterpret_cast<const int __attribute__((may_alias, aligned(1)))*>(q));
}

// Integer adds are associative and the compiler knows it: left alone, it gathers a token's products
// over all groups into a tree of adds, which keeps them all alive and spills most of them (twice
// the time). An empty statement that claims to change the sum has it made here and now, in a
// register.
__m256i pin(__m256i sum) {
  asm("" : "+x"(sum));
  return sum;
}

// dot[t][half] = sum over the columns of scale s of stored quants * activations, in integers.
// q8: the first token's activations of this block, the next token's `stride` bytes on.
template <typename Reader, int T>
[[gnu::always_inline]] inline void integer_dots(const Reader& w, int s, const int8_t* q8,
                                                int64_t stride, __m256i (&dot)[T][2]) {
  constexpr int kGroups = 8 / Reader::kScales, kRun = kVnni ? kGroups : Reader::kRun;
#pragma GCC unroll 8
  for (int run = 0; run < kGroups; run += kRun) {
    __m256i sum[T][2];  // in 16 bits
#pragma GCC unroll 8
    for (int g = 0; g < kRun; ++g) {
      const int group = s * kGroups + run + g;
      const __m256i w0 = w.group(group, 0), w1 = w.group(group, 1);
      const __m256i abs0 = Reader::kSigned ? _mm256_abs_epi8(w0) : w0;
      const __m256i abs1 = Reader::kSigned ? _mm256_abs_epi8(w1) : w1;
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const __m256i x = broadcast(q8 + t * stride + group * 4);
        const __m256i x0 = Reader::kSigned ? _mm256_sign_epi8(x, w0) : x;
        const __m256i x1 = Reader::kSigned ? _mm256_sign_epi8(x, w1) : x;
        if constexpr (kVnni) {
          dot[t][0] = pin(dot_bytes(g == 0 ? _mm256_setzero_si256() : dot[t][0], abs0, x0));
          dot[t][1] = pin(dot_bytes(g == 0 ? _mm256_setzero_si256() : dot[t][1], abs1, x1));
          continue;
        }
        const __m256i product0 = _mm256_maddubs_epi16(abs0, x0);
        const __m256i product1 = _mm256_maddubs_epi16(abs1, x1);
        sum[t][0] = g == 0 ? product0 : pin(_mm256_add_epi16(sum[t][0], product0));
        sum[t][1] = g == 0 ? product1 : pin(_mm256_add_epi16(sum[t][1], product1));
      }
    }
    if constexpr (kVnni) continue;
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m256i wide = _mm256_madd_epi16(sum[t][half], _mm256_set1_epi16(1));
        dot[t][half] = run == 0 ? wide : pin(_mm256_add_epi32(dot[t][half], wide));
      }
    }
  }
}

template <typename Reader, int T>
void quantised_tile(const Tile& tile) {
  const Product& p = tile.p;
  const int64_t blocks = p.cols / 32;
  const int8_t* q8 = p.x.q8 + tile.token * p.cols;
  const float* scale_x = p.x.scale + tile.token * blocks;
  const int32_t* sum_x = p.x.sum + tile.token * blocks;
  constexpr int kOffsetLog2 = Reader::kOffset == 0 ? 0 : __builtin_ctz(Reader::kOffset);
  __m256 acc[T][2];
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) acc[t][0] = acc[t][1] = _mm256_setzero_ps();

  for (int64_t b = 0; b < blocks; ++b, q8 += 32, ++scale_x, ++sum_x) {
    if (tile.ahead) prefetch<Reader::kBytes>(tile.panel + b * Reader::kBytes);
    const Reader w(tile.panel, b);
    __m256 u[T][2];
#pragma GCC unroll 2
    for (int s = 0; s < Reader::kScales; ++s) {
      __m256i dot[T][2];
      integer_dots(w, s, q8, p.cols, dot);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m256 scale = w.scale(s, half);
        const __m256 min = w.min(half);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
          const __m256i sum = _mm256_set1_epi32(sum_x[t * blocks]);
          __m256i d = dot[t][half];
          if (Reader::kOffset != 0) d = _mm256_sub_epi32(d, _mm256_slli_epi32(sum, kOffsetLog2));
          if (s == 0) {
            u[t][half] =
                Reader::kHasMin ? _mm256_mul_ps(min, _mm256_cvtepi32_ps(sum)) : _mm256_setzero_ps();
          }
          u[t][half] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(d), u[t][half]);
        }
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const __m256 scale = _mm256_broadcast_ss(scale_x + t * blocks);
      acc[t][0] = _mm256_fmadd_ps(scale, u[t][0], acc[t][0]);
      acc[t][1] = _mm256_fmadd_ps(scale, u[t][1], acc[t][1]);
    }
  }
  store(tile, acc);
}

__m256 load_column(const float* p) {
  return _mm256_loadu_ps(p);
}
__m256 load_column(const uint16_t* p) {
  return load_halves(p);
}

// F32 and F16: a multiply-add for every column.
template <typename Weight, int T>
void float_tile(const Tile& tile) {
  const Product& p = tile.p;
  const auto* w = reinterpret_cast<const Weight*>(tile.panel);
  const int64_t cols = p.cols;
  const float* x = p.x.f32 + tile.token * cols;
  __m256 acc[T][2];
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) acc[t][0] = acc[t][1] = _mm256_setzero_ps();
  for (int64_t k = 0; k < cols; ++k, w += 16, ++x) {
    if (tile.ahead) prefetch<16 * sizeof(Weight)>(reinterpret_cast<const std::byte*>(w));
    const __m256 w0 = load_column(w), w1 = load_column(w + 8);
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const __m256 xk = _mm256_broadcast_ss(x + t * cols);
      acc[t][0] = _mm256_fmadd_ps(w0, xk, acc[t][0]);
      acc[t][1] = _mm256_fmadd_ps(w1, xk, acc[t][1]);
    }
  }
  store(tile, acc);
}

// A bf16 is the upper half of a float: of a pair, the odd one needs its neighbour masked away, the
// even one a shift.
__m256 part_of(__m256i pairs, int odd) {
  return _mm256_castsi256_ps(
      odd ? _mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000)))
          : _mm256_slli_epi32(pairs, 16));
}

template <int T>
void bf16_tile(const Tile& tile) {
  const Product& p = tile.p;
  const int64_t cols = (p.cols + 31) / 32 * 32;
  const uint16_t* x = p.x.bf16 + tile.token * cols;
  __m256 acc[T][2];
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) acc[t][0] = acc[t][1] = _mm256_setzero_ps();
  for (int64_t step = 0; step < cols; step += 32) {
    const std::byte* panel = tile.panel + step * 32;
    if (tile.ahead) prefetch<512>(panel), prefetch<512>(panel + 512);
    // The two chains one after the other: both at once would not fit in 16 registers.
    __m256 chain[2][T][2];
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      alignas(32) float x_part[T][16];  // the step's activations as floats, to be broadcast
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        for (int half = 0; half < 2; ++half) {
          const __m256i pairs = load_vector(x + t * cols + step + 16 * half);
          _mm256_store_ps(x_part[t] + 8 * half, part_of(pairs, odd));
        }
      }
      __m256(*c)[2] = chain[odd];
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) c[t][0] = c[t][1] = _mm256_setzero_ps();
      for (int i = 0; i < 16; ++i) {
        const __m256 w0 = part_of(load_vector(panel + i * 64), odd);
        const __m256 w1 = part_of(load_vector(panel + i * 64 + 32), odd);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
          const __m256 xk = _mm256_broadcast_ss(&x_part[t][i]);
          c[t][0] = _mm256_fmadd_ps(w0, xk, c[t][0]);
          c[t][1] = _mm256_fmadd_ps(w1, xk, c[t][1]);
        }
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half)
        acc[t][half] =
            _mm256_add_ps(acc[t][half], _mm256_add_ps(chain[0][t][half], chain[1][t][half]));
    }
  }
  store(tile, acc);
}

// ---- Products ---------------------------------------------------------------------------------

// Kernels of one type: run<T>(tile) for every tile width.
template <typename Reader>
struct Quantised {
  template <int T>
  static void run(const Tile& tile) {
    quantised_tile<Reader, T>(tile);
  }
};
template <typename Weight>
struct Float {
  template <int T>
  static void run(const Tile& tile) {
    float_tile<Weight, T>(tile);
  }
};
struct BFloat {
  template <int T>
  static void run(const Tile& tile) {
    bf16_tile<T>(tile);
  }
};

template <typename Kernel>
void over_panels(const Product& p, size_t panel_size) {
  for (int64_t panel = p.panel_begin; panel < p.panel_end; ++panel) {
    const int64_t row = panel * kPanelRows, rows = p.rows - row;
    for (int t = 0; t < p.m; t += kTile) {
      const Tile tile{.p = p,
                      .panel = p.panels + static_cast<size_t>(panel) * panel_size,
                      .token = t,
                      .ahead = t == 0 && p.m > kFewTokens,
                      .rows = static_cast<int>(rows < kPanelRows ? rows : kPanelRows),
                      .y = p.y + t * p.y_stride + row};
      switch (p.m - t) {
        case 1: Kernel::template run<1>(tile); break;
        case 2: Kernel::template run<2>(tile); break;
        case 3: Kernel::template run<3>(tile); break;
        default: Kernel::template run<4>(tile); break;
      }
    }
  }
}

template <typename Reader>
void quantised(const Product& p) {
  over_panels<Quantised<Reader>>(p, static_cast<size_t>(p.cols / 32) * Reader::kBytes);
}

void f32(const Product& p) {
  over_panels<Float<float>>(p, static_cast<size_t>(p.cols) * 64);
}
void f16(const Product& p) {
  over_panels<Float<uint16_t>>(p, static_cast<size_t>(p.cols) * 32);
}

// The compiler does not know that the mode of the next function matters to the arithmetic in this
// one; a call that it cannot look into keeps the two apart.
[[gnu::noinline]] void bf16_flushed(const Product& p) {
  over_panels<BFloat>(p, static_cast<size_t>((p.cols + 31) / 32) * 1024);
}

void bf16(const Product& p) {
  const unsigned mode = _mm_getcsr();
  _mm_setcsr(mode | 0x8040u);  // FTZ | DAZ, as the contract wants it for BF16
  bf16_flushed(p);
  _mm_setcsr(mode);
}

}  // namespace

// In the order of DType.
#ifdef __AVXVNNI__
const ProductFunction kProductsAvxVnni[kDTypeCount] = {
#else
const ProductFunction kProductsAvx2[kDTypeCount] = {
#endif
    f32,
    f16,
    bf16,
    quantised<ReadQ8_0>,
    quantised<ReadQ4_0>,
    quantised<ReadQ4_1>,
    quantised<ReadQ5_0>,
    quantised<ReadQ5_1>,
    quantised<ReadQ4_K>,
    quantised<ReadQ5_K>,
    quantised<ReadQ6_K>,
};

}  // namespace chimera::cpu
