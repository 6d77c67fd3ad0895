// The products of the arithmetic contract (kernels.h) as plain loops: what every fast product must
// equal bit for bit. Slow on purpose, and nothing in it is of one machine.
#include <algorithm>
#include <cmath>

#include "engine/cpu/flushed.h"
#include "engine/cpu/kernels.h"

namespace chimera::cpu {
namespace {

// One row of weights times one row of activations.
float dot_f32(DType type, const std::byte* row, const float* x, int64_t cols) {
  float acc = 0.0f;
  for (int64_t k = 0; k < cols; ++k) {
    float w;
    dequantize_row(type, row + row_bytes(type, k), 1, &w);
    acc = std::fma(w, x[k], acc);
  }
  return acc;
}

float dot_bf16(const std::byte* row, const uint16_t* x, int64_t cols) {
  float acc = 0.0f;
  for (int64_t k = 0; k < cols; k += 32) {
    float w[32] = {};
    dequantize_row(DType::kBF16, row + row_bytes(DType::kBF16, k), std::min<int64_t>(32, cols - k),
                   w);
    float even = 0.0f, odd = 0.0f;
    for (int i = 0; i < 32; i += 2) {
      even = flushed_fma(flushed(w[i]), flushed(bf16_to_f32(x[k + i])), even);
      odd = flushed_fma(flushed(w[i + 1]), flushed(bf16_to_f32(x[k + i + 1])), odd);
    }
    acc = flushed(acc + flushed(even + odd));
  }
  return acc;
}

int dot_integers(const int8_t* q, const int8_t* a, int n) {
  int sum = 0;
  for (int i = 0; i < n; ++i) sum += q[i] * a[i];
  return sum;
}

// acc after one more block: q8, scale and sum are those of the activations.
float add_block(DType type, const CanonicalBlock& w, const int8_t* q8, float scale, int32_t sum,
                float acc) {
  float u = w.has_min ? w.min * static_cast<float>(sum) : 0.0f;
  if (type == DType::kQ6_K) {
    u = std::fma(w.scale[0], static_cast<float>(dot_integers(w.q, q8, 16)), u);
    u = std::fma(w.scale[1], static_cast<float>(dot_integers(w.q + 16, q8 + 16, 16)), u);
  } else {
    u = std::fma(w.scale[0], static_cast<float>(dot_integers(w.q, q8, 32)), u);
  }
  return std::fma(scale, u, acc);
}

}  // namespace

void product_reference(const TensorView& w, int64_t row_begin, int64_t row_end,
                       const ProductInput& x, int m, float* y, int64_t y_stride, bool accumulate) {
  constexpr int kTokens = 16;  // that share the reading of a block
  const int64_t blocks = w.cols / 32, padded = (w.cols + 31) / 32 * 32;
  const Activation form = activation_for(w.type);
  for (int64_t n = row_begin; n < row_end; ++n) {
    const std::byte* row = w.row(n);
    for (int first = 0; first < m; first += kTokens) {
      const int tokens = std::min(kTokens, m - first);
      float acc[kTokens] = {};
      if (form == Activation::kF32) {
        for (int t = 0; t < tokens; ++t)
          acc[t] = dot_f32(w.type, row, x.f32 + (first + t) * w.cols, w.cols);
      } else if (form == Activation::kBF16) {
        for (int t = 0; t < tokens; ++t)
          acc[t] = dot_bf16(row, x.bf16 + (first + t) * padded, w.cols);
      } else {
        for (int64_t b = 0; b < blocks; ++b) {
          CanonicalBlock block;
          read_block(w.type, row, b, &block);
          for (int t = 0; t < tokens; ++t) {
            const int64_t at = (first + t) * blocks + b;
            acc[t] = add_block(w.type, block, x.q8 + at * 32, x.scale[at], x.sum[at], acc[t]);
          }
        }
      }
      for (int t = 0; t < tokens; ++t) {
        float& out = y[(first + t) * y_stride + n];
        if (!accumulate)
          out = acc[t];
        else if (form == Activation::kBF16)
          out = flushed(flushed(out) + acc[t]);
        else
          out += acc[t];
      }
    }
  }
}

}  // namespace chimera::cpu
