// The rungs of the product. m tokens times a matrix of Q4_1 blocks: 32 weights d * q + m, where q
// has four bits. The arithmetic is the contract's (engine/cpu/kernels.h): an integer dot for each
// block, which is exact in any order, and around it one chain of f32 operations.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "engine/cpu/panels.h"
#include "tools/ladder/ladder.h"

namespace chimera::ladder {
namespace {

using cpu::PanelQ4_1;

// ---- 1: as it is written ------------------------------------------------------------------------

void plain_loop(const ProductCase& c) {
  cpu::product_reference(c.file, 0, c.file.rows, c.x, c.m, c.y, c.file.rows, false);
}

// ---- 2: 32 products in two instructions ---------------------------------------------------------

struct BlockQ4_1 {  // as the file has it
  uint16_t scale, min;
  uint8_t quants[16];  // byte j: weights j and j + 16
};

int dot_of(const BlockQ4_1& block, const int8_t* a) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(block.quants));
  const __m128i mask = _mm_set1_epi8(15);
  const __m256i q =
      _mm256_set_m128i(_mm_and_si128(_mm_srli_epi16(bytes, 4), mask), _mm_and_si128(bytes, mask));
  const __m256i pairs =
      _mm256_maddubs_epi16(q, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)));
  const __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
  return _mm_cvtsi128_si32(s);
}

void vector_dots(const ProductCase& c) {
  const int64_t blocks = c.file.cols / 32;
  for (int64_t n = 0; n < c.file.rows; ++n) {
    const auto* row = reinterpret_cast<const BlockQ4_1*>(c.file.row(n));
    for (int t = 0; t < c.m; ++t) {
      float acc = 0;
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t i = t * blocks + b;
        float u = _cvtsh_ss(row[b].min) * static_cast<float>(c.x.sum[i]);
        u = __builtin_fmaf(_cvtsh_ss(row[b].scale),
                           static_cast<float>(dot_of(row[b], c.x.q8 + 32 * i)), u);
        acc = __builtin_fmaf(c.x.scale[i], u, acc);
      }
      c.y[t * c.file.rows + n] = acc;
    }
  }
}

// ---- 3 to 5: lanes are rows ---------------------------------------------------------------------

// f(t) for t < T, in a loop or written out.
template <int T, bool kWrittenOut, typename F>
[[gnu::always_inline]] inline void each(const F& f) {
  if constexpr (kWrittenOut) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) f(t);
  } else {
    for (int t = 0; t < T; ++t) f(t);
  }
}

__m256 halves(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// 8 rows of a panel (half 0 or 1) times T tokens from token t0 on.
template <int T, bool kWrittenOut>
void tile(const ProductCase& c, int64_t panel, int half, int t0) {
  const int64_t blocks = c.file.cols / 32;
  const auto* block = reinterpret_cast<const PanelQ4_1*>(c.panels) + panel * blocks;
  const __m256i mask = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  __m256 acc[T];
  each<T, kWrittenOut>([&](int t) { acc[t] = _mm256_setzero_ps(); });
  for (int64_t b = 0; b < blocks; ++b, ++block) {
    const __m256 scale = halves(block->scale + 8 * half), min = halves(block->min + 8 * half);
    __m256i dot[T];  // 16 bits are enough for half a block: 16 * 15 * 127 = 30,480
    each<T, kWrittenOut>([&](int t) { dot[t] = _mm256_setzero_si256(); });
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const __m256i bytes =
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block->quants[v] + 32 * half));
      const __m256i low = _mm256_and_si256(bytes, mask);
      const __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask);
      each<T, kWrittenOut>([&](int t) {
        int a[2];  // four columns of group v, and of group v + 4
        const int8_t* x = c.x.q8 + (t0 + t) * c.file.cols + 32 * b + 4 * v;
        std::memcpy(&a[0], x, 4);
        std::memcpy(&a[1], x + 16, 4);
        dot[t] = _mm256_add_epi16(dot[t], _mm256_maddubs_epi16(low, _mm256_set1_epi32(a[0])));
        dot[t] = _mm256_add_epi16(dot[t], _mm256_maddubs_epi16(high, _mm256_set1_epi32(a[1])));
      });
    }
    each<T, kWrittenOut>([&](int t) {
      const int64_t i = (t0 + t) * blocks + b;
      const __m256 sum = _mm256_set1_ps(static_cast<float>(c.x.sum[i]));
      const __m256 u = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(_mm256_madd_epi16(dot[t], ones)),
                                       _mm256_mul_ps(min, sum));
      acc[t] = _mm256_fmadd_ps(_mm256_set1_ps(c.x.scale[i]), u, acc[t]);
    });
  }
  each<T, kWrittenOut>([&](int t) {
    _mm256_storeu_ps(c.y + (t0 + t) * c.file.rows + 16 * panel + 8 * half, acc[t]);
  });
}

template <int T, bool kWrittenOut>
void tiles(const ProductCase& c) {
  for (int64_t panel = 0; panel < c.file.rows / cpu::kPanelRows; ++panel)
    for (int half = 0; half < 2; ++half) {
      int t = 0;
      for (; t + T <= c.m; t += T) tile<T, kWrittenOut>(c, panel, half, t);
      for (; t < c.m; ++t) tile<1, kWrittenOut>(c, panel, half, t);
    }
}

// ---- 6 and up: the engine's ---------------------------------------------------------------------

void engine(const cpu::ProductFunction* products, const ProductCase& c) {
  products[static_cast<int>(DType::kQ4_1)]({c.panels, c.file.rows, c.file.cols, 0,
                                            c.file.rows / cpu::kPanelRows, c.x, c.m, c.y,
                                            c.file.rows, false});
}

constexpr ProductRung kRungs[] = {
    {"plain loop", "the definition, a weight at a time", cpu::Isa::kScalar, plain_loop},
    {"vector dots", "a block's 32 products in two instructions: integers add up in any order",
     cpu::Isa::kAvx2, vector_dots},
    {"lanes are rows", "16 rows repacked side by side, so that no sum runs across lanes",
     cpu::Isa::kAvx2, tiles<1, true>},
    {"tiles of 4 tokens", "weights are unpacked once for 4 tokens", cpu::Isa::kAvx2,
     tiles<4, false>},
    {"sums in registers", "inner loops written out: left as loops, their sums stand in memory",
     cpu::Isa::kAvx2, tiles<4, true>},
    {"the engine, AVX2", "wider tiles; the first of them asks for the weights to come",
     cpu::Isa::kAvx2, [](const ProductCase& c) { engine(cpu::kProductsAvx2, c); }},
    {"the engine, AVX-512", "16 rows a register; VPDPBUSD multiplies and adds four columns at once",
     cpu::Isa::kAvx512, [](const ProductCase& c) { engine(cpu::kProductsAvx512, c); }},
    {"the engine, AMX", "a tile of 16 rows x 16 tokens x 64 columns an instruction", cpu::Isa::kAmx,
     [](const ProductCase& c) { engine(cpu::kProductsAmx, c); }},
};

}  // namespace

const std::span<const ProductRung> kProductRungs = kRungs;

}  // namespace chimera::ladder
