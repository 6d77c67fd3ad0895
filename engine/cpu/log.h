// The natural logarithm in f32 and Gumbel noise made with it, the one definition that the contract
// names; the lane versions and the GPU repeat it step by step.
//
// log(x), x > 0 and not denormal:
//   x = m 2^n with m in [sqrt(1/2), sqrt(2)), taken from its bits
//   f = m - 1 (exact), s = f / (f + 2), z = s * s
//   log(m) = 2 artanh(s) = s (2 + z (2/3 + z (2/5 + z (2/7 + z 2/9)))), error 2e-9 of it; by fma
//   log(x) = fma(n, ln 2, log(m))
//
// gumbel(word), of 32 random bits:
//   w = float(word >> 1 | 1) * 2^-31                      uniform in (0, 1], fine near 0
//   t = max(1 - w, 2^-25), lost = (1 - t) - w             what rounding took from t, exactly
//   E = -(log(t) + lost)                                  exponential: -log(1 - w), exact near 0
//   G = -log(E)
// A large G comes of a w near 0, and that is where tokens win: there E = w, with 24 bits of its
// own.
#pragma once

#include <cstdint>

namespace chimera::cpu {

static constexpr int32_t kLogSqrtHalfBits = 0x3f3504f3;
static constexpr float kLogLn2 = 0x1.62e43p-1f;
static constexpr float kLogArtanh[5] = {2.0f, 2.0f / 3, 2.0f / 5, 2.0f / 7, 2.0f / 9};
static constexpr float kGumbelUnit = 0x1p-31f, kGumbelLeast = 0x1p-25f;

}  // namespace chimera::cpu
