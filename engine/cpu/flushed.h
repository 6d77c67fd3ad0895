// In the BF16 product (kernels.h) denormals count as zero, as operands and as results: so it is in
// the AMX instruction whose results it shares. The fast products of x86 have the processor do it,
// by its modes DAZ and FTZ. This says it in plain arithmetic.
#pragma once

#include <cfloat>
#include <cmath>

namespace chimera::cpu {
namespace {

inline float flushed(float x) {
  return std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : x;
}

// a and b are of bf16, none of the three denormal. Whether a result is denormal is asked of its 24
// bits, and just below FLT_MIN a float has fewer. A double does not: so close to FLT_MIN the sum in
// it is either exact or as good as c, which is a float.
inline float flushed_fma(float a, float b, float c) {
  const float y = std::fma(a, b, c);
  if (!(std::fabs(y) <= FLT_MIN)) return y;
  constexpr double kRoundsToNormal = 0x1p-126 - 0x1p-151;
  const double sum =
      std::fma(static_cast<double>(a), static_cast<double>(b), static_cast<double>(c));
  return std::fabs(sum) < kRoundsToNormal ? std::copysign(0.0f, y) : y;
}

}  // namespace
}  // namespace chimera::cpu
