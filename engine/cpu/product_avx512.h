// How AVX-512 code reads panels: shared by product_avx512.cc and product_amx.cc.
//
// An unnamed namespace in a header is meant here: each of the two files gets its own copy, and none
// has linkage (see product_avx512.cc).
#pragma once

// g++ 12 takes the "any value will do" operands inside its own intrinsics for mistakes.
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "engine/cpu/panels.h"

namespace chimera::cpu {
namespace {

// A reader stands on one block of 32 columns. group(g) is the vector [16 rows][4 k] of column group
// g = 0..7, unsigned bytes that are kOffset too large; scale(s), s < kScales, are the 16 rows'
// scales (of half s of the block where there are two); min() their minima if kHasMin.

__m512 load_halves(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

__m512i load_bytes(const uint8_t* p) {  // 16 bytes, zero extended
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

__m512i nibbles(const uint8_t (*quants)[64], int group) {
  const __m512i v = _mm512_loadu_si512(quants[group % 4]);
  return _mm512_and_si512(group < 4 ? v : _mm512_srli_epi16(v, 4), _mm512_set1_epi8(15));
}

// Adds bit `group` of every byte of `high` as the fifth bit. Bytes shift as parts of wider lanes,
// and the mask drops what has crossed from a neighbour.
__m512i with_fifth_bit(__m512i low, const uint8_t* high, int group) {
  const __m512i v = _mm512_loadu_si512(high);
  const __m512i bit = group < 4 ? _mm512_slli_epi16(v, 4 - group) : _mm512_srli_epi16(v, group - 4);
  return _mm512_or_si512(low, _mm512_and_si512(bit, _mm512_set1_epi8(16)));
}

struct ReadQ8_0 {
  static constexpr int kBytes = sizeof(PanelQ8_0), kOffset = 128, kScales = 1;
  static constexpr bool kHasMin = false;
  const PanelQ8_0* p;
  ReadQ8_0(const std::byte* panel, int64_t block)
      : p(reinterpret_cast<const PanelQ8_0*>(panel) + block) {}
  __m512 scale(int) const { return load_halves(p->scale); }
  __m512 min() const { return _mm512_setzero_ps(); }
  __m512i group(int g) const { return _mm512_loadu_si512(p->quants[g]); }
};

struct ReadQ4_0 {
  static constexpr int kBytes = sizeof(PanelQ4_0), kOffset = 8, kScales = 1;
  static constexpr bool kHasMin = false;
  const PanelQ4_0* p;
  ReadQ4_0(const std::byte* panel, int64_t block)
      : p(reinterpret_cast<const PanelQ4_0*>(panel) + block) {}
  __m512 scale(int) const { return load_halves(p->scale); }
  __m512 min() const { return _mm512_setzero_ps(); }
  __m512i group(int g) const { return nibbles(p->quants, g); }
};

struct ReadQ4_1 {
  static constexpr int kBytes = sizeof(PanelQ4_1), kOffset = 0, kScales = 1;
  static constexpr bool kHasMin = true;
  const PanelQ4_1* p;
  ReadQ4_1(const std::byte* panel, int64_t block)
      : p(reinterpret_cast<const PanelQ4_1*>(panel) + block) {}
  __m512 scale(int) const { return load_halves(p->scale); }
  __m512 min() const { return load_halves(p->min); }
  __m512i group(int g) const { return nibbles(p->quants, g); }
};

struct ReadQ5_0 {
  static constexpr int kBytes = sizeof(PanelQ5_0), kOffset = 16, kScales = 1;
  static constexpr bool kHasMin = false;
  const PanelQ5_0* p;
  ReadQ5_0(const std::byte* panel, int64_t block)
      : p(reinterpret_cast<const PanelQ5_0*>(panel) + block) {}
  __m512 scale(int) const { return load_halves(p->scale); }
  __m512 min() const { return _mm512_setzero_ps(); }
  __m512i group(int g) const { return with_fifth_bit(nibbles(p->quants, g), p->high, g); }
};

struct ReadQ5_1 {
  static constexpr int kBytes = sizeof(PanelQ5_1), kOffset = 0, kScales = 1;
  static constexpr bool kHasMin = true;
  const PanelQ5_1* p;
  ReadQ5_1(const std::byte* panel, int64_t block)
      : p(reinterpret_cast<const PanelQ5_1*>(panel) + block) {}
  __m512 scale(int) const { return load_halves(p->scale); }
  __m512 min() const { return load_halves(p->min); }
  __m512i group(int g) const { return with_fifth_bit(nibbles(p->quants, g), p->high, g); }
};

// Scale and minimum of Q4_K and Q5_K: 6-bit numbers times d and -dmin, one rounding each.
template <typename Panel>
__m512 k_scale(const Panel& p, int block) {
  const __m512i number = load_bytes(p.six_bits[block / 2][block % 2 * 2]);
  return _mm512_mul_ps(load_halves(p.d),
                       _mm512_cvtepi32_ps(_mm512_and_si512(number, _mm512_set1_epi32(63))));
}

template <typename Panel>
__m512 k_min(const Panel& p, int block) {
  const auto& bytes = p.six_bits[block / 2];
  __m512i number;
  if (block % 2 == 0) {
    number = _mm512_and_si512(load_bytes(bytes[1]), _mm512_set1_epi32(63));
  } else {  // the upper two bits of three bytes
    const __m512i b0 = _mm512_srli_epi32(load_bytes(bytes[0]), 6);
    const __m512i b1 = _mm512_srli_epi32(load_bytes(bytes[1]), 6);
    const __m512i b2 = _mm512_srli_epi32(load_bytes(bytes[2]), 6);
    number =
        _mm512_or_si512(b0, _mm512_or_si512(_mm512_slli_epi32(b1, 2), _mm512_slli_epi32(b2, 4)));
  }
  return _mm512_mul_ps(load_halves(p.minus_dmin), _mm512_cvtepi32_ps(number));
}

struct ReadQ4_K {
  static constexpr int kBytes = sizeof(PanelQ4_K) / 8, kOffset = 0, kScales = 1;
  static constexpr bool kHasMin = true;
  const PanelQ4_K* p;
  int block;
  ReadQ4_K(const std::byte* panel, int64_t b)
      : p(reinterpret_cast<const PanelQ4_K*>(panel) + b / 8), block(static_cast<int>(b % 8)) {}
  __m512 scale(int) const { return k_scale(*p, block); }
  __m512 min() const { return k_min(*p, block); }
  __m512i group(int g) const { return nibbles(p->quants[block], g); }
};

struct ReadQ5_K {
  static constexpr int kBytes = sizeof(PanelQ5_K) / 8, kOffset = 0, kScales = 1;
  static constexpr bool kHasMin = true;
  const PanelQ5_K* p;
  int block;
  ReadQ5_K(const std::byte* panel, int64_t b)
      : p(reinterpret_cast<const PanelQ5_K*>(panel) + b / 8), block(static_cast<int>(b % 8)) {}
  __m512 scale(int) const { return k_scale(*p, block); }
  __m512 min() const { return k_min(*p, block); }
  __m512i group(int g) const {
    return with_fifth_bit(nibbles(p->quants[block], g), p->high[block], g);
  }
};

struct ReadQ6_K {
  static constexpr int kBytes = sizeof(PanelQ6_K) / 8, kOffset = 32, kScales = 2;
  static constexpr bool kHasMin = false;
  const PanelQ6_K* p;
  int block;
  ReadQ6_K(const std::byte* panel, int64_t b)
      : p(reinterpret_cast<const PanelQ6_K*>(panel) + b / 8), block(static_cast<int>(b % 8)) {}
  __m512 scale(int s) const {
    const auto* bytes = reinterpret_cast<const __m128i*>(p->scale[block][s]);
    return _mm512_mul_ps(load_halves(p->d),
                         _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes))));
  }
  __m512 min() const { return _mm512_setzero_ps(); }
  __m512i group(int g) const {  // bits 2 (g % 4) and up of `high` become bits 4 and 5
    const __m512i v = _mm512_loadu_si512(p->high[block][g / 4]);
    const int to = 4 - 2 * (g % 4);
    const __m512i bits = to > 0 ? _mm512_slli_epi16(v, to) : _mm512_srli_epi16(v, -to);
    return _mm512_or_si512(nibbles(p->quants[block], g),
                           _mm512_and_si512(bits, _mm512_set1_epi8(0x30)));
  }
};

}  // namespace
}  // namespace chimera::cpu
