// The 16 virtual lanes of the arithmetic contract as one AVX-512 register. Included by files of
// that instruction set only; everything has internal linkage (see product_avx512.cc).
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace chimera::cpu {
namespace {

// What the registers hold at once (lanes_kernels.h): sums of kScoreTile queries x blocks of keys,
// of at most kScoreQueries queries; of kQueryTile queries x kHeadTile 16-wide pieces of a head.
constexpr int kScoreTile = 16, kScoreQueries = 8, kQueryTile = 4, kHeadTile = 4;

struct Lanes {
  __m512 v;
};

inline Lanes broadcast(float x) {
  return {_mm512_set1_ps(x)};
}
inline Lanes load(const float* p) {
  return {_mm512_loadu_ps(p)};
}
inline void store(float* p, Lanes a) {
  _mm512_storeu_ps(p, a.v);
}
inline __mmask16 first(int64_t n) {
  return static_cast<__mmask16>((1u << n) - 1u);
}
inline Lanes load_first(const float* p, int64_t n) {
  return {_mm512_maskz_loadu_ps(first(n), p)};
}  // rest 0; n < 16
inline void store_first(float* p, Lanes a, int64_t n) {
  _mm512_mask_storeu_ps(p, first(n), a.v);
}
inline Lanes load_f16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline void store_f16(uint16_t* p, Lanes a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

inline Lanes operator+(Lanes a, Lanes b) {
  return {_mm512_add_ps(a.v, b.v)};
}
inline Lanes operator-(Lanes a, Lanes b) {
  return {_mm512_sub_ps(a.v, b.v)};
}
inline Lanes operator*(Lanes a, Lanes b) {
  return {_mm512_mul_ps(a.v, b.v)};
}
inline Lanes operator/(Lanes a, Lanes b) {
  return {_mm512_div_ps(a.v, b.v)};
}
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
inline Lanes negate(Lanes a) {
  return {_mm512_castsi512_ps(
      _mm512_xor_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(INT32_MIN)))};
}
inline float square_root(float x) {
  return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x)));
}
// max(a, b); b where either is NaN.
inline Lanes max(Lanes a, Lanes b) {
  return {_mm512_max_ps(a.v, b.v)};
}
// a where x < y (false for NaN), b elsewhere.
inline Lanes where_less(Lanes x, Lanes y, Lanes a, Lanes b) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, y.v, _CMP_LT_OQ), b.v, a.v)};
}
// a where x is NaN, b elsewhere.
inline Lanes where_nan(Lanes x, Lanes a, Lanes b) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q), b.v, a.v)};
}
// 2^n for integral n in [-126, 127].
inline Lanes power_of_two(Lanes n) {
  const __m512i i = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(i, 23))};
}
inline Lanes floor(Lanes a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
}
// The contract's fold of 16 lanes: j and j+8, j and j+4, j and j+2, j and j+1.
inline float fold(Lanes a) {
  const __m256 s8 = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_add_ss(s2, _mm_movehdup_ps(s2)));
}
inline float fold_max(Lanes a) {
  return _mm512_reduce_max_ps(a.v);
}

// 16 of the 32 numbers of a block, as integers.
struct IntLanes {
  __m512i v;
};
inline IntLanes magnitude_bits(Lanes a) {
  return {_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff))};
}
inline IntLanes max(IntLanes a, IntLanes b) {
  return {_mm512_max_epi32(a.v, b.v)};
}
inline int32_t fold_max(IntLanes a) {
  return _mm512_reduce_max_epi32(a.v);
}
inline IntLanes round_to_int(Lanes a) {
  return {_mm512_cvtps_epi32(a.v)};
}  // nearest, ties to even
inline IntLanes operator+(IntLanes a, IntLanes b) {
  return {_mm512_add_epi32(a.v, b.v)};
}
inline IntLanes broadcast(int32_t x) {
  return {_mm512_set1_epi32(x)};
}
inline IntLanes load(const int32_t* p) {
  return {_mm512_loadu_si512(p)};
}
inline IntLanes operator-(IntLanes a, IntLanes b) {
  return {_mm512_sub_epi32(a.v, b.v)};
}
inline IntLanes operator&(IntLanes a, IntLanes b) {
  return {_mm512_and_si512(a.v, b.v)};
}
inline IntLanes operator|(IntLanes a, IntLanes b) {
  return {_mm512_or_si512(a.v, b.v)};
}
inline IntLanes operator^(IntLanes a, IntLanes b) {
  return {_mm512_xor_si512(a.v, b.v)};
}
template <int kBits>
inline IntLanes shift_left(IntLanes a) {
  return {_mm512_slli_epi32(a.v, kBits)};
}
template <int kBits>
inline IntLanes shift_right(IntLanes a) {  // zeros come in
  return {_mm512_srli_epi32(a.v, kBits)};
}
template <int kBits>
inline IntLanes shift_right_signed(IntLanes a) {
  return {_mm512_srai_epi32(a.v, kBits)};
}
// a where x == y, b elsewhere.
inline IntLanes where_equal(IntLanes x, IntLanes y, IntLanes a, IntLanes b) {
  return {_mm512_mask_blend_epi32(_mm512_cmpeq_epi32_mask(x.v, y.v), b.v, a.v)};
}
inline Lanes to_float(IntLanes a) {  // signed
  return {_mm512_cvtepi32_ps(a.v)};
}
inline IntLanes bits_of(Lanes a) {
  return {_mm512_castps_si512(a.v)};
}
inline Lanes from_bits(IntLanes a) {
  return {_mm512_castsi512_ps(a.v)};
}
// The 64 bits of a * b, unsigned, as two halves. The instruction takes every other lane.
inline IntLanes multiply_wide(IntLanes a, uint32_t b, IntLanes* high) {
  const __m512i factor = _mm512_set1_epi32(static_cast<int32_t>(b));
  const __m512i even = _mm512_mul_epu32(a.v, factor),
                odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), factor);
  high->v = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
  return {_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32))};
}
inline int32_t fold_sum(IntLanes a) {
  return _mm512_reduce_add_epi32(a.v);
}
inline void store_int8(int8_t* p, IntLanes a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
// f32 to bf16, nearest even, NaN made quiet.
inline void store_bf16(uint16_t* p, Lanes a) {
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(nan, rounded, quiet)));
}
// Bit i: x[i] == y.
inline uint32_t equal_mask(Lanes x, float y) {
  return _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(y), _CMP_EQ_OQ);
}
// Bit i: x[i] > y.
inline uint32_t greater_mask(Lanes x, float y) {
  return _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(y), _CMP_GT_OQ);
}

}  // namespace
}  // namespace chimera::cpu
