// The 16 virtual lanes of the arithmetic contract as four NEON registers. Included by files of that
// instruction set only; everything has internal linkage (see product_avx512.cc).
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace chimera::cpu {
namespace {

// What the registers hold at once (lanes_kernels.h): sums of kScoreTile queries x blocks of keys,
// of at most kScoreQueries queries; of kQueryTile queries x kHeadTile 16-wide pieces of a head.
// (32 registers of 4 lanes are as much as the 16 of 8 that AVX2 has.)
constexpr int kScoreTile = 4, kScoreQueries = 4, kQueryTile = 2, kHeadTile = 2;

struct Lanes {
  float32x4_t v[4];
};
struct IntLanes {
  int32x4_t v[4];
};

// f(0) .. f(3), the parts.
template <typename F>
[[gnu::always_inline]] inline Lanes parts(const F& f) {
  return {{f(0), f(1), f(2), f(3)}};
}
template <typename F>
[[gnu::always_inline]] inline IntLanes int_parts(const F& f) {
  return {{f(0), f(1), f(2), f(3)}};
}

inline Lanes broadcast(float x) {
  return parts([&](int) { return vdupq_n_f32(x); });
}
inline Lanes load(const float* p) {
  return parts([&](int i) { return vld1q_f32(p + 4 * i); });
}
inline void store(float* p, Lanes a) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.v[i]);
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
  return parts([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
}
inline void store_f16(uint16_t* p, Lanes a) {
  for (int i = 0; i < 4; ++i) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(a.v[i])));
}

inline Lanes operator+(Lanes a, Lanes b) {
  return parts([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
}
inline Lanes operator-(Lanes a, Lanes b) {
  return parts([&](int i) { return vsubq_f32(a.v[i], b.v[i]); });
}
inline Lanes operator*(Lanes a, Lanes b) {
  return parts([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
}
inline Lanes operator/(Lanes a, Lanes b) {
  return parts([&](int i) { return vdivq_f32(a.v[i], b.v[i]); });
}
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
  return parts([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
}
inline Lanes negate(Lanes a) {
  return parts([&](int i) { return vnegq_f32(a.v[i]); });
}
inline float square_root(float x) {
  return vget_lane_f32(vsqrt_f32(vdup_n_f32(x)), 0);
}
// max(a, b); b where either is NaN. (FMAX would give the NaN.)
inline float32x4_t max(float32x4_t a, float32x4_t b) {
  return vbslq_f32(vcgtq_f32(a, b), a, b);
}
inline Lanes max(Lanes a, Lanes b) {
  return parts([&](int i) { return max(a.v[i], b.v[i]); });
}
// a where x < y (false for NaN), b elsewhere.
inline Lanes where_less(Lanes x, Lanes y, Lanes a, Lanes b) {
  return parts([&](int i) { return vbslq_f32(vcltq_f32(x.v[i], y.v[i]), a.v[i], b.v[i]); });
}
// a where x is NaN, b elsewhere.
inline Lanes where_nan(Lanes x, Lanes a, Lanes b) {
  return parts([&](int i) { return vbslq_f32(vceqq_f32(x.v[i], x.v[i]), b.v[i], a.v[i]); });
}
// 2^n for integral n in [-126, 127].
inline Lanes power_of_two(Lanes n) {
  return parts([&](int i) {
    const int32x4_t biased = vaddq_s32(vcvtq_s32_f32(n.v[i]), vdupq_n_s32(127));
    return vreinterpretq_f32_s32(vshlq_n_s32(biased, 23));
  });
}
inline Lanes floor(Lanes a) {
  return parts([&](int i) { return vrndmq_f32(a.v[i]); });
}
// The contract's fold of 16 lanes: j and j+8, j and j+4, j and j+2, j and j+1.
inline float fold(Lanes a) {
  const float32x4_t s4 = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
  const float32x2_t s2 = vadd_f32(vget_low_f32(s4), vget_high_f32(s4));
  return vget_lane_f32(s2, 0) + vget_lane_f32(s2, 1);
}
inline float fold_max(Lanes a) {
  const float32x4_t s4 = max(max(a.v[0], a.v[2]), max(a.v[1], a.v[3]));
  const float32x4_t s2 = max(s4, vextq_f32(s4, s4, 2)), s1 = max(s2, vextq_f32(s2, s2, 1));
  return vgetq_lane_f32(s1, 0);
}

inline IntLanes magnitude_bits(Lanes a) {
  return int_parts([&](int i) { return vreinterpretq_s32_f32(vabsq_f32(a.v[i])); });
}
inline IntLanes max(IntLanes a, IntLanes b) {
  return int_parts([&](int i) { return vmaxq_s32(a.v[i], b.v[i]); });
}
inline int32_t fold_max(IntLanes a) {
  return vmaxvq_s32(vmaxq_s32(vmaxq_s32(a.v[0], a.v[1]), vmaxq_s32(a.v[2], a.v[3])));
}
inline IntLanes round_to_int(Lanes a) {  // nearest, ties to even
  return int_parts([&](int i) { return vcvtnq_s32_f32(a.v[i]); });
}
inline IntLanes broadcast(int32_t x) {
  return int_parts([&](int) { return vdupq_n_s32(x); });
}
inline IntLanes load(const int32_t* p) {
  return int_parts([&](int i) { return vld1q_s32(p + 4 * i); });
}
inline IntLanes operator+(IntLanes a, IntLanes b) {
  return int_parts([&](int i) { return vaddq_s32(a.v[i], b.v[i]); });
}
inline IntLanes operator-(IntLanes a, IntLanes b) {
  return int_parts([&](int i) { return vsubq_s32(a.v[i], b.v[i]); });
}
inline IntLanes operator&(IntLanes a, IntLanes b) {
  return int_parts([&](int i) { return vandq_s32(a.v[i], b.v[i]); });
}
inline IntLanes operator|(IntLanes a, IntLanes b) {
  return int_parts([&](int i) { return vorrq_s32(a.v[i], b.v[i]); });
}
inline IntLanes operator^(IntLanes a, IntLanes b) {
  return int_parts([&](int i) { return veorq_s32(a.v[i], b.v[i]); });
}
template <int kBits>
inline IntLanes shift_left(IntLanes a) {
  return int_parts([&](int i) { return vshlq_n_s32(a.v[i], kBits); });
}
template <int kBits>
inline IntLanes shift_right(IntLanes a) {  // zeros come in
  return int_parts([&](int i) {
    return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a.v[i]), kBits));
  });
}
template <int kBits>
inline IntLanes shift_right_signed(IntLanes a) {
  return int_parts([&](int i) { return vshrq_n_s32(a.v[i], kBits); });
}
// a where x == y, b elsewhere.
inline IntLanes where_equal(IntLanes x, IntLanes y, IntLanes a, IntLanes b) {
  return int_parts([&](int i) { return vbslq_s32(vceqq_s32(x.v[i], y.v[i]), a.v[i], b.v[i]); });
}
inline Lanes to_float(IntLanes a) {  // signed
  return parts([&](int i) { return vcvtq_f32_s32(a.v[i]); });
}
inline IntLanes bits_of(Lanes a) {
  return int_parts([&](int i) { return vreinterpretq_s32_f32(a.v[i]); });
}
inline Lanes from_bits(IntLanes a) {
  return parts([&](int i) { return vreinterpretq_f32_s32(a.v[i]); });
}
// The 64 bits of a * b, unsigned, as two halves.
inline IntLanes multiply_wide(IntLanes a, uint32_t b, IntLanes* high) {
  const uint32x4_t factor = vdupq_n_u32(b);
  IntLanes low;
  for (int i = 0; i < 4; ++i) {
    const uint32x4_t x = vreinterpretq_u32_s32(a.v[i]);
    const auto p01 = vreinterpretq_s32_u64(vmull_u32(vget_low_u32(x), vget_low_u32(factor)));
    const auto p23 = vreinterpretq_s32_u64(vmull_high_u32(x, factor));
    low.v[i] = vuzp1q_s32(p01, p23);
    high->v[i] = vuzp2q_s32(p01, p23);
  }
  return low;
}
inline int32_t fold_sum(IntLanes a) {
  return vaddvq_s32(vaddq_s32(vaddq_s32(a.v[0], a.v[1]), vaddq_s32(a.v[2], a.v[3])));
}
inline void store_int8(int8_t* p, IntLanes a) {  // values fit: dropping the upper bits is exact
  const int16x8_t lo = vcombine_s16(vmovn_s32(a.v[0]), vmovn_s32(a.v[1]));
  const int16x8_t hi = vcombine_s16(vmovn_s32(a.v[2]), vmovn_s32(a.v[3]));
  vst1q_s8(p, vcombine_s8(vmovn_s16(lo), vmovn_s16(hi)));
}
inline void store_bf16(uint16_t* p, Lanes a) {  // nearest even, NaN made quiet
  for (int i = 0; i < 4; ++i) {
    const uint32x4_t u = vreinterpretq_u32_f32(a.v[i]), upper = vshrq_n_u32(u, 16);
    const uint32x4_t odd = vandq_u32(upper, vdupq_n_u32(1));
    const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(vaddq_u32(u, vdupq_n_u32(0x7fff)), odd), 16);
    const uint32x4_t quiet = vorrq_u32(upper, vdupq_n_u32(0x40));
    vst1_u16(p + 4 * i, vmovn_u32(vbslq_u32(vceqq_f32(a.v[i], a.v[i]), rounded, quiet)));
  }
}
// Bit i of the result: whether lane i of the parts' masks is set.
template <typename F>
[[gnu::always_inline]] inline uint32_t mask_of(const F& f) {
  constexpr uint32_t kBits[4] = {1, 2, 4, 8};
  const uint32x4_t bits = vld1q_u32(kBits);
  uint32_t mask = 0;
  for (int i = 0; i < 4; ++i) mask |= vaddvq_u32(vandq_u32(f(i), bits)) << 4 * i;
  return mask;
}
inline uint32_t equal_mask(Lanes x, float y) {
  return mask_of([&](int i) { return vceqq_f32(x.v[i], vdupq_n_f32(y)); });
}
inline uint32_t greater_mask(Lanes x, float y) {
  return mask_of([&](int i) { return vcgtq_f32(x.v[i], vdupq_n_f32(y)); });
}

}  // namespace
}  // namespace chimera::cpu
