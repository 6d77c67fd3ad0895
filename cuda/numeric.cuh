// exp, log, Gumbel noise and the sum of 16 virtual lanes, as the CPU's contract defines them
// (engine/cpu/kernels.h, exp.h, log.h).
#pragma once

#include "cuda/device.cuh"
#include "engine/cpu/exp.h"
#include "engine/cpu/log.h"

namespace chimera::cuda {
inline namespace CHIMERA_CUDA_BODY {

BOTH float exp_contract(float x) {
  if (is_nan(x)) return x;
  if (x < cpu::kExpLow) return 0.0f;
  if (x > cpu::kExpHigh) return infinity();
  const float n = (x * cpu::kExpLog2e + cpu::kExpRound) - cpu::kExpRound;
  float r = fma(n, -cpu::kExpLn2High, x);
  r = fma(n, -cpu::kExpLn2Low, r);
  constexpr float c0 = cpu::kExpTaylor[0], c1 = cpu::kExpTaylor[1], c2 = cpu::kExpTaylor[2],
                  c3 = cpu::kExpTaylor[3], c4 = cpu::kExpTaylor[4], c5 = cpu::kExpTaylor[5],
                  c6 = cpu::kExpTaylor[6], c7 = cpu::kExpTaylor[7];
  float p = fma(c7, r, c6);
  p = fma(p, r, c5);
  p = fma(p, r, c4);
  p = fma(p, r, c3);
  p = fma(p, r, c2);
  p = fma(p, r, c1);
  p = fma(p, r, c0);
  return p * float_of(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}

BOTH float log_contract(float x) {
  const auto i = static_cast<int32_t>(bits_of(x)) - cpu::kLogSqrtHalfBits;
  const auto n = static_cast<float>(i >> 23);
  const float f = float_of(static_cast<uint32_t>((i & 0x7fffff) + cpu::kLogSqrtHalfBits)) - 1.0f;
  const float s = divide(f, f + 2.0f), z = s * s;
  constexpr float c0 = cpu::kLogArtanh[0], c1 = cpu::kLogArtanh[1], c2 = cpu::kLogArtanh[2],
                  c3 = cpu::kLogArtanh[3], c4 = cpu::kLogArtanh[4];
  float p = fma(c4, z, c3);
  p = fma(p, z, c2);
  p = fma(p, z, c1);
  p = fma(p, z, c0);
  return fma(n, cpu::kLogLn2, s * p);
}

BOTH float gumbel(uint32_t word) {
  const float w = static_cast<float>(static_cast<int32_t>(word >> 1 | 1)) * cpu::kGumbelUnit;
  const float t = most(1.0f - w, cpu::kGumbelLeast);
  return -log_contract(-(log_contract(t) + ((1.0f - t) - w)));
}

BOTH float silu(float x) { return divide(x, 1.0f + exp_contract(-x)); }

// Virtual lane i is held by lane i of a warp, lanes 16 to 31 hold anything; the sum is lane 0's.
DEVICE float fold_16(float x) {
  for (int width = 8; width > 0; width /= 2) x = x + shuffle_xor(x, width);
  return x;
}

// f16, numbers beyond its range to the largest; NaN stays.
BOTH uint16_t saturate_f16(float x) {
  return float_to_f16(x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x);
}

}  // namespace CHIMERA_CUDA_BODY
}  // namespace chimera::cuda
