// What the tests of the CUDA kernels share: random weights of every type, and the contract
// (cuda/contract.cuh) as plain loops.
//
// The same test files are compiled twice: by g++ into chimera_tests, where the kernels run under
// the emulator, on every machine; by nvcc into gpu_tests, where they run on the GPU. The contract
// leaves one thing to the hardware, the order of mma's sum: where it may show, the GPU's results
// are compared with the oracle's within a tolerance, and everywhere else bit for bit.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cuda/linear.cuh"
#include "engine/cpu/kernels.h"
#include "engine/error.h"

namespace chimera::cuda {
inline namespace CHIMERA_CUDA_BODY {
namespace test {

#if defined(__CUDACC__)
inline constexpr bool kOnDevice = true;
inline void set_descending(bool /*descending*/) {}
inline void set_clusters(bool /*has_any*/) {}
inline void set_resident_blocks(int /*n*/) {}
#else
inline constexpr bool kOnDevice = false;
// The order in which the emulator runs threads: what a race would show in.
inline void set_descending(bool descending) {
  emulator::set_order(descending ? emulator::Order::kDescending : emulator::Order::kAscending);
}
// As on sm_90, or as before.
inline void set_clusters(bool has_any) {
  emulator::set_largest_cluster(has_any ? emulator::kMaxCluster : 1);
}
// Launches are cut for a device of this size.
inline void set_resident_blocks(int n) {
  emulator::set_resident_blocks(n);
}
#endif

// What was launched is done; the host may read the results.
inline void finish() {
  synchronize(nullptr);
}

inline const DType kAllTypes[] = {DType::kF32,  DType::kF16,  DType::kBF16, DType::kQ8_0,
                                  DType::kQ4_0, DType::kQ4_1, DType::kQ5_0, DType::kQ5_1,
                                  DType::kQ4_K, DType::kQ5_K, DType::kQ6_K};

// 256-aligned, like the device's memory.
template <typename T>
class Buffer {
 public:
  explicit Buffer(size_t n)
      : n_(n), p_(static_cast<T*>(allocate_managed(std::max<size_t>(n, 1) * sizeof(T)))) {}
  explicit Buffer(const std::vector<T>& v) : Buffer(v.size()) { std::copy(v.begin(), v.end(), p_); }
  ~Buffer() { free_device(p_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return p_; }
  T& operator[](size_t i) const { return p_[i]; }
  size_t size() const { return n_; }
  T* begin() const { return p_; }
  T* end() const { return p_ + n_; }

 private:
  size_t n_;
  T* p_;
};

// A matrix of random bytes whose scales are sane. integers: every weight is a small integer.
struct RandomMatrix {
  std::vector<std::byte> bytes;
  TensorView view;
};
inline RandomMatrix random_matrix(std::mt19937& random, DType type, int64_t rows, int64_t cols,
                                  bool integers) {
  const DTypeInfo& info = dtype_info(type);
  RandomMatrix m;
  m.bytes.resize(static_cast<size_t>(rows) * row_bytes(type, cols));
  std::normal_distribution<float> normal;
  const auto put16 = [](std::byte* p, uint16_t h) { std::memcpy(p, &h, 2); };
  const auto small = [&] { return static_cast<float>(static_cast<int>(random() % 9) - 4); };
  const auto scale = [&] {
    return f32_to_f16(integers ? 1.0f : 0.01f * (1.0f + std::fabs(normal(random))));
  };
  for (size_t at = 0; at < m.bytes.size(); at += static_cast<size_t>(info.block_bytes)) {
    std::byte* b = m.bytes.data() + at;
    for (int i = 0; i < info.block_bytes; ++i) b[i] = static_cast<std::byte>(random());
    switch (type) {
      case DType::kF32: {
        const float f = integers ? small() : normal(random);
        std::memcpy(b, &f, 4);
        break;
      }
      case DType::kF16: put16(b, f32_to_f16(integers ? small() : normal(random))); break;
      case DType::kBF16: put16(b, f32_to_bf16(integers ? small() : normal(random))); break;
      case DType::kQ4_1:
      case DType::kQ5_1:
        put16(b + 2, f32_to_f16(integers ? small() : normal(random)));
        [[fallthrough]];
      case DType::kQ8_0:
      case DType::kQ4_0:
      case DType::kQ5_0: put16(b, scale()); break;
      case DType::kQ4_K:
      case DType::kQ5_K:
        put16(b, scale());
        put16(b + 2, scale());
        break;
      case DType::kQ6_K:
        put16(b + 208, scale());
        for (int i = 192; integers && i < 208; ++i) b[i] &= std::byte{15};  // exact in f16
        break;
    }
  }
  m.view = {"random", type, rows, cols, m.bytes.data(), 0};
  return m;
}

inline std::vector<float> random_input(std::mt19937& random, size_t n, bool integers,
                                       float scale = 1.0f) {
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> x(n);
  for (float& v : x)
    v = integers ? static_cast<float>(static_cast<int>(random() % 5) - 2) : normal(random);
  return x;
}

// The weights that a product sees, from the file's blocks alone.
inline std::vector<float> product_weights(const TensorView& w) {
  std::vector<float> out(static_cast<size_t>(w.rows * w.cols));
  for (int64_t row = 0; row < w.rows; ++row) {
    float* to = out.data() + row * w.cols;
    if (activation_for(w.type) != Activation::kQ8) {
      dequantize_row(w.type, w.row(row), w.cols, to);
      continue;
    }
    const bool k_quant = dtype_info(w.type).block_weights == 256;
    CanonicalBlock block;
    for (int64_t b = 0; b < w.cols / 32; ++b) {
      read_block(w.type, w.row(row), b, &block);
      for (int i = 0; i < 32; ++i) {
        double scale = block.scale[i / 16], min = block.has_min ? block.min : 0.0f;
        if (k_quant) {
          scale = f16_to_f32(f32_to_f16(block.scale[i / 16]));
          min = f16_to_f32(f32_to_f16(static_cast<float>(min)));
        }
        to[b * 32 + i] = f16_to_f32(round_once_f16(scale * block.q[i] + min));
      }
    }
  }
  return out;
}

// One product, by the contract. x: (tokens, cols) as it comes in.
inline std::vector<float> product_oracle(const TensorView& w, const std::vector<float>& x,
                                         int64_t tokens) {
  const std::vector<float> weights = product_weights(w);
  const int64_t n = w.rows, k = w.cols;
  std::vector<float> y(static_cast<size_t>(tokens * n));
  for (int64_t t = 0; t < tokens; ++t) {
    std::vector<float> a(x.begin() + t * k, x.begin() + (t + 1) * k);
    if (w.type == DType::kBF16)
      for (float& v : a) v = bf16_to_f32(f32_to_bf16(v));
    else if (w.type != DType::kF32)
      for (float& v : a) v = f16_to_f32(f32_to_f16(std::clamp(v, -65504.0f, 65504.0f)));
    for (int64_t row = 0; row < n; ++row) {
      const float* b = weights.data() + row * k;
      float total = 0;
      if (w.type == DType::kF32) {
        for (int64_t i = 0; i < k; ++i) total = std::fma(b[i], a[static_cast<size_t>(i)], total);
      } else {
        const int64_t run = split_units(n, k) * kSplitUnit;
        for (int64_t begin = 0; begin < k; begin += run) {
          float sum = 0;
          for (int64_t i = begin; i < std::min(k, begin + run); i += 16) {
            float wa[16] = {}, xa[16] = {};
            for (int64_t j = 0; j < 16 && i + j < k; ++j) {
              wa[j] = b[i + j];
              xa[j] = a[static_cast<size_t>(i + j)];
            }
            sum = mma_element(sum, wa, xa);
          }
          total = begin == 0 ? sum : total + sum;
        }
      }
      y[static_cast<size_t>(t * n + row)] = total;
    }
  }
  return y;
}

inline ::testing::AssertionResult same_bits(const float* a, const float* b, size_t n) {
  for (size_t i = 0; i < n; ++i)
    if (std::memcmp(a + i, b + i, 4) != 0)
      return ::testing::AssertionFailure()
             << "at " << i << " of " << n << ": " << a[i] << " and " << b[i];
  return ::testing::AssertionSuccess();
}

// Results of mma: the oracle's bits under the emulator. On the device the order of its sums is its
// own: exact sums (small integers) still have one result, others come near.
inline ::testing::AssertionResult same_sums(const float* a, const float* expected, size_t n,
                                            bool exact) {
  if (exact || !kOnDevice) return same_bits(a, expected, n);
  float largest = 0;
  for (size_t i = 0; i < n; ++i) largest = std::max(largest, std::fabs(expected[i]));
  for (size_t i = 0; i < n; ++i)
    if (!(std::fabs(a[i] - expected[i]) <= 2e-3f * largest))
      return ::testing::AssertionFailure()
             << "at " << i << " of " << n << ": " << a[i] << " is far from " << expected[i];
  return ::testing::AssertionSuccess();
}

}  // namespace test
}  // namespace CHIMERA_CUDA_BODY
}  // namespace chimera::cuda
