// exp in f32, the one definition that the contract names; the lane versions repeat it step by step.
//
//   x < -87       0                    (so no denormal is ever produced)
//   x > 88        infinity
//   NaN           NaN
//   otherwise     n = round(x / ln 2), by adding and subtracting 1.5 * 2^23
//                 r = fma(n, -ln2_low, fma(n, -ln2_high, x)), |r| <= 0.35
//                 exp(r) by its Taylor polynomial of degree 7 (error 5e-9), Horner with fma
//                 times 2^n, built from its exponent bits
#pragma once

namespace chimera::cpu {

static constexpr float kExpLow = -87.0f, kExpHigh = 88.0f;
static constexpr float kExpRound = 12582912.0f;  // 1.5 * 2^23
static constexpr float kExpLog2e = 0x1.715476p+0f;
static constexpr float kExpLn2High = 0x1.62e4p-1f;        // 15 bits: n * high is exact
static constexpr float kExpLn2Low = 0x1.7f7d1cf8p-20f;    // ln 2 - high
static constexpr float kExpTaylor[8] = {1.0f,       1.0f,        1.0f / 2,   1.0f / 6,
                                        1.0f / 24,  1.0f / 120,  1.0f / 720, 1.0f / 5040};

}  // namespace chimera::cpu
