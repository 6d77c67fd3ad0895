// The scalar reference: every row kernel as plain loops. It says what the contract (kernels.h)
// means, runs on any machine, and is what the tests hold the faster kernels against.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "engine/cpu/exp.h"
#include "engine/cpu/kernels.h"
#include "engine/cpu/log.h"
#include "engine/philox.h"

namespace chimera::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

float exp(float x) {
  if (std::isnan(x)) return x;
  if (x < kExpLow) return 0.0f;
  if (x > kExpHigh) return kInfinity;
  const float n = (x * kExpLog2e + kExpRound) - kExpRound;
  float r = std::fma(n, -kExpLn2High, x);
  r = std::fma(n, -kExpLn2Low, r);
  float p = kExpTaylor[7];
  for (int i = 6; i >= 0; --i) p = std::fma(p, r, kExpTaylor[i]);
  return p * std::bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
}

// The sum of 16 virtual lanes.
float fold(const float (&lane)[16]) {
  float s[16];
  std::memcpy(s, lane, sizeof s);
  for (int width = 8; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) s[j] = s[j] + s[j + width];
  return s[0];
}

void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* y) {
  float lane[16] = {};
  for (int64_t i = 0; i < n; ++i) lane[i % 16] = std::fma(x[i], x[i], lane[i % 16]);
  const float r = 1.0f / std::sqrt(fold(lane) / static_cast<float>(n) + eps);
  for (int64_t i = 0; i < n; ++i) y[i] = (x[i] * r) * weight[i];
}

void swiglu(const float* gate_up, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i) {
    const float gate = gate_up[i], up = gate_up[n + i];
    y[i] = (gate / (1.0f + exp(-gate))) * up;
  }
}

void silu(const float* x, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = x[i] / (1.0f + exp(-x[i]));
}

void quantize_q8(const float* x, int64_t n, int8_t* q, float* scale, int32_t* sum) {
  for (int64_t b = 0; b < n / 32; ++b, x += 32, q += 32) {
    float largest = 0.0f;
    bool finite = true;
    for (int i = 0; i < 32; ++i) {
      finite = finite && std::isfinite(x[i]);
      largest = std::max(largest, std::fabs(x[i]));
    }
    sum[b] = 0;
    scale[b] = !finite               ? std::numeric_limits<float>::quiet_NaN()
               : largest < 0x1p-100f ? 0.0f
                                     : largest / 127.0f;
    const float inverse = 127.0f / largest;
    for (int i = 0; i < 32; ++i) {
      q[i] = scale[b] > 0 ? static_cast<int8_t>(std::nearbyint(x[i] * inverse)) : int8_t{0};
      sum[b] += q[i];
    }
  }
}

void round_bf16(const float* x, int64_t n, uint16_t* y) {
  for (int64_t i = 0; i < (n + 31) / 32 * 32; ++i) y[i] = i < n ? f32_to_bf16(x[i]) : uint16_t{0};
}

void round_f16(const float* x, int64_t n, uint16_t* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = f32_to_f16(x[i]);
}

void rotate(float* x, const float* cos, const float* sin, int head_dim, float scale) {
  const int half = head_dim / 2;
  for (int i = 0; i < half; ++i) {
    const float a = x[i], b = x[half + i];
    x[i] = std::fma(a, cos[i], -(b * sin[i])) * scale;
    x[half + i] = std::fma(b, cos[i], a * sin[i]) * scale;
  }
}

void attention(const AttentionChunk& c) {
  const auto element = [&c](const void* base, size_t i) {
    return c.type == DType::kF16 ? f16_to_f32(static_cast<const uint16_t*>(base)[i])
                                 : static_cast<const float*>(base)[i];
  };
  for (int n = 0; n < c.n_queries; ++n) {
    const AttentionChunk::Query& query = c.query[n];
    const int end = std::min(query.length, c.begin + kChunk);
    const auto slot_of = [&](int p) { return p < query.direct ? p : query.path[p - c.committed]; };

    float e[kChunk];
    float largest = -kInfinity;
    for (int p = c.begin; p < end; ++p) {
      const auto slot = static_cast<size_t>(slot_of(p)), dim = static_cast<size_t>(c.head_dim);
      float score = 0.0f;
      for (size_t d = 0; d < dim; ++d) {
        const size_t in_chunk = slot % kChunk;
        const float key =
            element(c.k, slot / kChunk * static_cast<size_t>(c.k_stride) +
                             (in_chunk / kKeyBlock * dim + d) * kKeyBlock + in_chunk % kKeyBlock);
        score = std::fma(query.q[d], key, score);
      }
      e[p - c.begin] = score;
      largest = score > largest ? score : largest;
    }
    float lane[16] = {};
    for (int i = 0; i < end - c.begin; ++i) {
      e[i] = exp(e[i] - largest);
      lane[i % 16] = lane[i % 16] + e[i];
    }
    query.partial[0] = largest;
    query.partial[1] = fold(lane);
    for (int d = 0; d < c.padded_dim; ++d) {
      float o = 0.0f;
      for (int p = c.begin; p < end; ++p) {
        const auto slot = static_cast<size_t>(slot_of(p));
        const size_t at = slot / kChunk * static_cast<size_t>(c.v_stride) +
                          slot % kChunk * static_cast<size_t>(c.padded_dim) +
                          static_cast<size_t>(d);
        o = std::fma(e[p - c.begin], element(c.v, at), o);
      }
      query.partial[2 + d] = o;
    }
  }
}

void combine(const float* partials, int n, int64_t stride, int head_dim, int /*padded_dim*/,
             float* out) {
  float m = partials[0], l = partials[1];
  for (int d = 0; d < head_dim; ++d) out[d] = partials[2 + d];
  for (int c = 1; c < n; ++c) {
    const float* p = partials + c * stride;
    const float larger = p[0] > m ? p[0] : m;
    const float a = exp(m - larger), b = exp(p[0] - larger);
    l = std::fma(l, a, p[1] * b);
    for (int d = 0; d < head_dim; ++d) out[d] = std::fma(out[d], a, p[2 + d] * b);
    m = larger;
  }
  for (int d = 0; d < head_dim; ++d) out[d] = out[d] / l;
}

int32_t argmax(const float* x, int64_t n) {
  float largest = -kInfinity;
  int32_t best = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (x[i] > largest) {
      largest = x[i];
      best = static_cast<int32_t>(i);
    }
  }
  return best;
}

int top_k(const float* x, int64_t n, int k, int32_t* index) {
  int found = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (found == k && !(x[i] > x[index[k - 1]])) continue;
    int at = found < k ? found++ : k - 1;
    for (; at > 0 && x[index[at - 1]] < x[i]; --at) index[at] = index[at - 1];
    index[at] = static_cast<int32_t>(i);
  }
  return found;
}

float sum_of_exp(const float* x, int64_t n, float shift, float scale) {
  float lane[16] = {};
  for (int64_t i = 0; i < n; ++i) lane[i % 16] += exp((x[i] - shift) * scale);
  return fold(lane);
}

void exp_scaled(const float* x, int64_t n, float largest, float divisor, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    const float e = std::floor(exp(x[i] / divisor - largest / divisor) * 0x1p34f) * 0x1p-34f;
    out[i] = std::isnan(x[i]) ? 0.0f : e;
  }
}

float log(float x) {
  const int32_t i = std::bit_cast<int32_t>(x) - kLogSqrtHalfBits;
  const auto n = static_cast<float>(i >> 23);
  const float f = std::bit_cast<float>((i & 0x7fffff) + kLogSqrtHalfBits) - 1.0f;
  const float s = f / (f + 2.0f), z = s * s;
  float p = kLogArtanh[4];
  for (int k = 3; k >= 0; --k) p = std::fma(p, z, kLogArtanh[k]);
  return std::fma(n, kLogLn2, s * p);
}

void gumbel(const int32_t* ids, int64_t first, int64_t n, uint64_t seed, int64_t position,
            float* out) {
  for (int64_t i = 0; i < n; ++i) {
    const auto id =
        static_cast<uint32_t>(ids != nullptr ? ids[i] : static_cast<int32_t>(first + i));
    const uint32_t word = token_bits(seed, static_cast<uint64_t>(position), id);
    const float w = static_cast<float>(word >> 1 | 1) * kGumbelUnit;
    const float t = std::max(1.0f - w, kGumbelLeast);
    out[i] = -log(-(log(t) + ((1.0f - t) - w)));
  }
}

}  // namespace

const Kernels kScalarKernels = {Isa::kScalar,
                                "scalar",
                                nullptr,
                                rms_norm,
                                swiglu,
                                silu,
                                quantize_q8,
                                round_bf16,
                                round_f16,
                                rotate,
                                attention,
                                combine,
                                {argmax, exp_scaled, gumbel, top_k, sum_of_exp}};

}  // namespace chimera::cpu
