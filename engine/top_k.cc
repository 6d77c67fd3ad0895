#include "engine/top_k.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace chimera {
namespace {

// Four lanes: every x86-64 and ARM machine has them without flags.
using Floats = float __attribute__((vector_size(16)));
using Ints = int32_t __attribute__((vector_size(16)));

Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

}  // namespace

int top_k(const float* x, int64_t n, int k, int32_t* index) {
  constexpr int64_t kPiece = 32;
  int found = 0;
  float least = -INFINITY;
  for (int64_t first = 0; first < n; first += kPiece) {
    const int64_t end = std::min(first + kPiece, n);
    // Nearly all pieces hold nothing that is large enough.
    if (found == k && end == first + kPiece) {
      Ints larger{};
      for (int64_t i = first; i < end; i += 4) larger |= load(x + i) > least;
      if ((larger[0] | larger[1] | larger[2] | larger[3]) == 0) continue;
    }
    for (int64_t i = first; i < end; ++i) {
      if (found == k && !(x[i] > least)) continue;
      int at = found < k ? found++ : k - 1;
      for (; at > 0 && x[index[at - 1]] < x[i]; --at) index[at] = index[at - 1];
      index[at] = static_cast<int32_t>(i);
      if (found == k) least = x[index[k - 1]];
    }
  }
  return found;
}

// 2^t = 2^whole 2^f with f in [-1/2, 1/2]: a polynomial for the fraction, and the whole part added
// to the exponent's bits. Adding 1.5 * 2^23 rounds t to a whole number and leaves it in the
// mantissa's lowest bits.
float sum_of_exp(const float* x, int64_t n, float shift, float scale) {
  constexpr float kRound = 12582912.0f, kLog2E = 1.44269504f, kLeast = -120.0f;
  Floats sums{};
  for (int64_t i = 0; i < n; i += 4) {
    Floats v;
    if (i + 4 <= n) {
      v = load(x + i);
    } else {
      v = Floats{} - INFINITY;
      for (int64_t j = i; j < n; ++j) v[j - i] = x[j];
    }
    Floats t = (v - shift) * (scale * kLog2E);
    t = t > kLeast ? t : Floats{} + kLeast;
    const Floats rounded = t + kRound, f = t - (rounded - kRound);
    const Floats power =
        1.0f + f * (0.69314718f + f * (0.24022651f + f * (0.05550411f + f * 0.00961813f)));
    Ints bits, whole;
    std::memcpy(&bits, &power, sizeof bits);
    std::memcpy(&whole, &rounded, sizeof whole);
    bits += whole << 23;
    Floats e;
    std::memcpy(&e, &bits, sizeof e);
    sums += e;
  }
  return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

}  // namespace chimera
