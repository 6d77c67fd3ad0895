// The 16 virtual lanes of the arithmetic contract as two AVX2 registers. Included by files of that
// instruction set only; everything has internal linkage (see product_avx512.cc).
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace chimera::cpu {
namespace {

// What the registers hold at once (lanes_kernels.h): sums of kScoreTile queries x blocks of keys,
// of at most kScoreQueries queries; of kQueryTile queries x kHeadTile 16-wide pieces of a head.
constexpr int kScoreTile = 4, kScoreQueries = 4, kQueryTile = 2, kHeadTile = 2;

struct Lanes {
  __m256 lo, hi;
};

inline Lanes broadcast(float x) {
  return {_mm256_set1_ps(x), _mm256_set1_ps(x)};
}
inline Lanes load(const float* p) {
  return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
inline void store(float* p, Lanes a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline Lanes load_first(const float* p, int64_t n) {  // rest 0; n < 16
  float padded[16] = {};
  std::memcpy(padded, p, static_cast<size_t>(n) * 4);
  return load(padded);
}
inline void store_first(float* p, Lanes a, int64_t n) {
  float padded[16];
  store(padded, a);
  std::memcpy(p, padded, static_cast<size_t>(n) * 4);
}
inline Lanes load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline void store_f16(uint16_t* p, Lanes a) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.lo, kNearest));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(a.hi, kNearest));
}

inline Lanes operator+(Lanes a, Lanes b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
inline Lanes operator-(Lanes a, Lanes b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
inline Lanes operator*(Lanes a, Lanes b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
inline Lanes operator/(Lanes a, Lanes b) {
  return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline Lanes negate(Lanes a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_xor_ps(a.lo, sign), _mm256_xor_ps(a.hi, sign)};
}
inline float square_root(float x) {
  return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x)));
}
// max(a, b); b where either is NaN.
inline Lanes max(Lanes a, Lanes b) {
  return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
// a where x < y (false for NaN), b elsewhere.
inline Lanes where_less(Lanes x, Lanes y, Lanes a, Lanes b) {
  return {_mm256_blendv_ps(b.lo, a.lo, _mm256_cmp_ps(x.lo, y.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(b.hi, a.hi, _mm256_cmp_ps(x.hi, y.hi, _CMP_LT_OQ))};
}
// a where x is NaN, b elsewhere.
inline Lanes where_nan(Lanes x, Lanes a, Lanes b) {
  return {_mm256_blendv_ps(b.lo, a.lo, _mm256_cmp_ps(x.lo, x.lo, _CMP_UNORD_Q)),
          _mm256_blendv_ps(b.hi, a.hi, _mm256_cmp_ps(x.hi, x.hi, _CMP_UNORD_Q))};
}
// 2^n for integral n in [-126, 127].
inline Lanes power_of_two(Lanes n) {
  const __m256i bias = _mm256_set1_epi32(127);
  return {
      _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.lo), bias), 23)),
      _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.hi), bias), 23))};
}
inline Lanes floor(Lanes a) {
  return {_mm256_floor_ps(a.lo), _mm256_floor_ps(a.hi)};
}
// The contract's fold of 16 lanes: j and j+8, j and j+4, j and j+2, j and j+1.
inline float fold(Lanes a) {
  const __m256 s8 = _mm256_add_ps(a.lo, a.hi);
  const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_add_ss(s2, _mm_movehdup_ps(s2)));
}
inline float fold_max(Lanes a) {
  const __m256 s8 = _mm256_max_ps(a.lo, a.hi);
  const __m128 s4 = _mm_max_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  const __m128 s2 = _mm_max_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_max_ss(s2, _mm_movehdup_ps(s2)));
}

// 16 of the 32 numbers of a block, as integers.
struct IntLanes {
  __m256i lo, hi;
};
inline IntLanes magnitude_bits(Lanes a) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  return {_mm256_and_si256(_mm256_castps_si256(a.lo), mask),
          _mm256_and_si256(_mm256_castps_si256(a.hi), mask)};
}
inline IntLanes max(IntLanes a, IntLanes b) {
  return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)};
}
inline int32_t fold_max(IntLanes a) {
  const __m256i s8 = _mm256_max_epi32(a.lo, a.hi);
  const __m128i s4 = _mm_max_epi32(_mm256_castsi256_si128(s8), _mm256_extracti128_si256(s8, 1));
  const __m128i s2 = _mm_max_epi32(s4, _mm_shuffle_epi32(s4, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(s2, _mm_shuffle_epi32(s2, 0xb1)));
}
inline IntLanes round_to_int(Lanes a) {  // nearest, ties to even
  return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)};
}
inline IntLanes operator+(IntLanes a, IntLanes b) {
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
inline IntLanes broadcast(int32_t x) {
  return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)};
}
inline IntLanes load(const int32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
}
inline IntLanes operator-(IntLanes a, IntLanes b) {
  return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)};
}
inline IntLanes operator&(IntLanes a, IntLanes b) {
  return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)};
}
inline IntLanes operator|(IntLanes a, IntLanes b) {
  return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)};
}
inline IntLanes operator^(IntLanes a, IntLanes b) {
  return {_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)};
}
template <int kBits>
inline IntLanes shift_left(IntLanes a) {
  return {_mm256_slli_epi32(a.lo, kBits), _mm256_slli_epi32(a.hi, kBits)};
}
template <int kBits>
inline IntLanes shift_right(IntLanes a) {  // zeros come in
  return {_mm256_srli_epi32(a.lo, kBits), _mm256_srli_epi32(a.hi, kBits)};
}
template <int kBits>
inline IntLanes shift_right_signed(IntLanes a) {
  return {_mm256_srai_epi32(a.lo, kBits), _mm256_srai_epi32(a.hi, kBits)};
}
// a where x == y, b elsewhere.
inline IntLanes where_equal(IntLanes x, IntLanes y, IntLanes a, IntLanes b) {
  return {_mm256_blendv_epi8(b.lo, a.lo, _mm256_cmpeq_epi32(x.lo, y.lo)),
          _mm256_blendv_epi8(b.hi, a.hi, _mm256_cmpeq_epi32(x.hi, y.hi))};
}
inline Lanes to_float(IntLanes a) {  // signed
  return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)};
}
inline IntLanes bits_of(Lanes a) {
  return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)};
}
inline Lanes from_bits(IntLanes a) {
  return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)};
}
// The 64 bits of a * b, unsigned, as two halves. The instruction takes every other lane.
inline __m256i multiply_wide(__m256i a, __m256i b, __m256i* high) {
  const __m256i even = _mm256_mul_epu32(a, b), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), b);
  *high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
}
inline IntLanes multiply_wide(IntLanes a, uint32_t b, IntLanes* high) {
  const __m256i factor = _mm256_set1_epi32(static_cast<int32_t>(b));
  IntLanes low;
  low.lo = multiply_wide(a.lo, factor, &high->lo);
  low.hi = multiply_wide(a.hi, factor, &high->hi);
  return low;
}
inline int32_t fold_sum(IntLanes a) {
  const __m256i s8 = _mm256_add_epi32(a.lo, a.hi);
  const __m128i s4 = _mm_add_epi32(_mm256_castsi256_si128(s8), _mm256_extracti128_si256(s8, 1));
  const __m128i s2 = _mm_add_epi32(s4, _mm_shuffle_epi32(s4, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s2, _mm_shuffle_epi32(s2, 0xb1)));
}
inline void store_int8(int8_t* p, IntLanes a) {  // values fit: the saturating packs change nothing
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xd8);
  const __m128i packed =
      _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
// f32 to bf16, nearest even, NaN made quiet.
inline __m256i bf16_bits(__m256 a) {
  const __m256i u = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
  return _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)));
}
inline void store_bf16(uint16_t* p, Lanes a) {
  const __m256i words = _mm256_packus_epi32(bf16_bits(a.lo), bf16_bits(a.hi));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(words, 0xd8));
}
// Bit i: x[i] == y.
inline uint32_t equal_mask(Lanes x, float y) {
  const __m256 b = _mm256_set1_ps(y);
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x.lo, b, _CMP_EQ_OQ))) |
         static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x.hi, b, _CMP_EQ_OQ))) << 8;
}
inline uint32_t greater_mask(Lanes x, float y) {
  const __m256 b = _mm256_set1_ps(y);
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x.lo, b, _CMP_GT_OQ))) |
         static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x.hi, b, _CMP_GT_OQ))) << 8;
}

}  // namespace
}  // namespace chimera::cpu
