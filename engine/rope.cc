#include "engine/rope.h"

#include <cmath>

namespace chimera {
namespace {

constexpr double kLn2High = 0x1.62e42fefa3800p-1, kLn2Low = 0x1.ef35793c76730p-45;
constexpr double kHalfPiHigh = 0x1.921fb54400000p+0, kHalfPiLow = 0x1.0b4611a626331p-34;

// ln x for normal x > 0: x = m 2^e with m near 1, ln m = 2 artanh((m - 1) / (m + 1)).
double logarithm(double x) {
  int e;
  double m = std::frexp(x, &e);
  if (m < 0.70710678118654752) {
    m *= 2;
    --e;
  }
  const double t = (m - 1) / (m + 1), t2 = t * t;
  double sum = 0;
  for (int k = 27; k >= 1; k -= 2) sum = sum * t2 + 1.0 / k;
  return 2 * t * sum + e * kLn2Low + e * kLn2High;
}

double exponential(double x) {
  const double n = std::floor(x / (kLn2High + kLn2Low) + 0.5);
  const double r = (x - n * kLn2High) - n * kLn2Low;
  double sum = 1;
  for (int k = 20; k >= 1; --k) sum = 1 + sum * r / k;
  return std::ldexp(sum, static_cast<int>(n));
}

// kHalfPiHigh has 33 bits: n * kHalfPiHigh is exact for angles below 2^20, a million positions.
void sine_cosine(double x, double* sine, double* cosine) {
  const double n = std::floor(x / (kHalfPiHigh + kHalfPiLow) + 0.5);
  const double r = (x - n * kHalfPiHigh) - n * kHalfPiLow, r2 = r * r;
  double s = 1, c = 1;
  for (int k = 18; k >= 2; k -= 2) {
    c = 1 - c * r2 / (k * (k - 1));
    s = 1 - s * r2 / (k * (k + 1));
  }
  s *= r;
  switch (static_cast<int64_t>(n) & 3) {
    case 0: *sine = s, *cosine = c; break;
    case 1: *sine = c, *cosine = -s; break;
    case 2: *sine = -s, *cosine = -c; break;
    default: *sine = -c, *cosine = s; break;
  }
}

}  // namespace

void fill_rope_table(const LlamaConfig& config, int64_t positions, float* cos, float* sin) {
  const int half = config.head_dim / 2;
  for (int i = 0; i < half; ++i) {
    double frequency = exponential(-2.0 * i / config.head_dim * logarithm(config.rope_base));
    if (!config.rope_divisors.empty())
      frequency /= static_cast<double>(config.rope_divisors[static_cast<size_t>(i)]);
    for (int64_t p = 0; p < positions; ++p) {
      double s, c;
      sine_cosine(static_cast<double>(p) * frequency, &s, &c);
      cos[p * half + i] = static_cast<float>(c);
      sin[p * half + i] = static_cast<float>(s);
    }
  }
}

}  // namespace chimera
