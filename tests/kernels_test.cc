// Every row kernel of every instruction set against the scalar reference, bit for bit, and the
// reference against double precision.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "engine/philox.h"
#include "tests/support.h"

namespace chimera::cpu {
namespace {

std::vector<const Kernels*> fast_kernels() {
  std::vector<const Kernels*> tables;
  for (const Kernels* k :
       {&kAvx2Kernels, &kAvxVnniKernels, &kAvx512Kernels, &kAmxKernels, &kNeonKernels})
    if (machine_has(k->isa)) tables.push_back(k);
  return tables;
}

std::vector<float> random_floats(std::mt19937& random, size_t n, float scale = 1.0f) {
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> x(n);
  for (float& v : x) v = normal(random);
  return x;
}

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

const int64_t kSizes[] = {1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 64, 100, 172, 576};

TEST(RowKernels, RmsNorm) {
  std::mt19937 random(1);
  for (const int64_t n : kSizes) {
    const auto x = random_floats(random, static_cast<size_t>(n)),
               w = random_floats(random, static_cast<size_t>(n));
    std::vector<float> expected(x.size());
    kScalarKernels.rms_norm(x.data(), w.data(), 1e-5f, n, expected.data());
    double sum = 0;
    for (const float v : x) sum += static_cast<double>(v) * static_cast<double>(v);
    for (size_t i = 0; i < x.size(); ++i) {
      const double exact = static_cast<double>(x[i]) /
                           std::sqrt(sum / static_cast<double>(n) + 1e-5) *
                           static_cast<double>(w[i]);
      EXPECT_NEAR(expected[i], exact, 1e-5 * (1 + std::fabs(exact)));
    }
    for (const Kernels* k : fast_kernels()) {
      std::vector<float> y(x.size());
      k->rms_norm(x.data(), w.data(), 1e-5f, n, y.data());
      EXPECT_TRUE(same_bits(y, expected)) << k->name << " " << n;
    }
  }
}

TEST(RowKernels, SwiGlu) {
  std::mt19937 random(2);
  for (const int64_t n : kSizes) {
    auto x = random_floats(random, static_cast<size_t>(2 * n), 5.0f);
    x[0] = n % 2 ? 200.0f : -200.0f;  // exp overflows, underflows
    std::vector<float> expected(static_cast<size_t>(n));
    kScalarKernels.swiglu(x.data(), n, expected.data());
    for (size_t i = 0; i < expected.size(); ++i) {
      const double g = static_cast<double>(x[i]),
                   u = static_cast<double>(x[i + static_cast<size_t>(n)]);
      EXPECT_NEAR(expected[i], g / (1 + std::exp(-g)) * u, 2e-6 * (1 + std::fabs(g * u)));
    }
    for (const Kernels* k : fast_kernels()) {
      std::vector<float> y(expected.size());
      k->swiglu(x.data(), n, y.data());
      EXPECT_TRUE(same_bits(y, expected)) << k->name << " " << n;
    }
  }
}

TEST(RowKernels, QuantizeQ8) {
  std::mt19937 random(3);
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN(),
                  kInf = std::numeric_limits<float>::infinity();
  for (int kind = 0; kind < 40; ++kind) {
    auto x = random_floats(random, 64, kind % 5 == 0 ? 1e-20f : 3.0f);
    if (kind == 1) std::fill(x.begin(), x.end(), 0.0f);
    if (kind == 2) x[5] = kNan;
    if (kind == 3) x[40] = -kInf;
    if (kind == 4) std::fill(x.begin(), x.begin() + 32, 1e-40f);  // denormal: counts as zero
    for (size_t i = 0; i < 64 && kind == 6; ++i) x[i] = static_cast<float>(i) - 31.5f;  // ties
    if (kind == 7) std::fill(x.begin(), x.end(), std::numeric_limits<float>::max());
    std::vector<int8_t> q(64), expected_q(64);
    std::vector<float> scale(2), expected_scale(2);
    std::vector<int32_t> sum(2), expected_sum(2);
    kScalarKernels.quantize_q8(x.data(), 64, expected_q.data(), expected_scale.data(),
                               expected_sum.data());
    for (size_t i = 0; i < 64 && kind > 7; ++i)
      EXPECT_NEAR(expected_q[i] * expected_scale[i / 32], x[i], 0.51f * expected_scale[i / 32]);
    if (kind == 2) {
      EXPECT_TRUE(std::isnan(expected_scale[0]));
    }
    if (kind == 4) {
      EXPECT_EQ(expected_scale[0], 0.0f);
    }
    for (const Kernels* k : fast_kernels()) {
      k->quantize_q8(x.data(), 64, q.data(), scale.data(), sum.data());
      EXPECT_TRUE(same_bits(q, expected_q) && same_bits(scale, expected_scale) &&
                  same_bits(sum, expected_sum))
          << k->name << " " << kind;
    }
  }
}

TEST(RowKernels, RoundingToHalves) {
  // Every exponent, ties, denormals, infinities; NaN stays NaN.
  std::mt19937 random(4);
  std::vector<float> x;
  for (uint32_t high = 0; high < 0x10000; high += 3)
    for (const uint32_t low : {0u, 1u, 0x1000u, 0x7fffu, 0x8000u, 0x8001u}) {
      const uint32_t bits = high << 16 | low;
      float f;
      std::memcpy(&f, &bits, 4);
      x.push_back(f);
    }
  while (x.size() % 32 != 5) x.push_back(1.0f);  // a ragged end
  const auto n = static_cast<int64_t>(x.size());
  const size_t padded = (x.size() + 31) / 32 * 32;
  std::vector<uint16_t> f16(x.size()), bf16(padded), expected_f16(x.size()), expected_bf16(padded);
  kScalarKernels.round_f16(x.data(), n, expected_f16.data());
  kScalarKernels.round_bf16(x.data(), n, expected_bf16.data());
  for (const Kernels* k : fast_kernels()) {
    k->round_f16(x.data(), n, f16.data());
    k->round_bf16(x.data(), n, bf16.data());
    EXPECT_TRUE(same_bits(f16, expected_f16)) << k->name;
    EXPECT_TRUE(same_bits(bf16, expected_bf16)) << k->name;
  }
  // Round trip of every half.
  for (uint32_t h = 0; h < 0x10000; ++h) {
    const auto half = static_cast<uint16_t>(h);
    if (!std::isnan(f16_to_f32(half))) {
      ASSERT_EQ(f32_to_f16(f16_to_f32(half)), half);
    }
    if (!std::isnan(bf16_to_f32(half))) {
      ASSERT_EQ(f32_to_bf16(bf16_to_f32(half)), half);
    }
  }
  EXPECT_EQ(f16_to_f32(0x3c00), 1.0f);
  EXPECT_EQ(f16_to_f32(0x0001), 0x1p-24f);
  EXPECT_EQ(f16_to_f32(0x7bff), 65504.0f);
}

TEST(RowKernels, Rotate) {
  std::mt19937 random(5);
  for (const int dim : {2, 8, 16, 32, 64, 80, 128}) {
    const auto x = random_floats(random, static_cast<size_t>(dim)),
               angle = random_floats(random, static_cast<size_t>(dim / 2));
    std::vector<float> cos, sin;
    for (const float a : angle) cos.push_back(std::cos(a)), sin.push_back(std::sin(a));
    auto expected = x;
    kScalarKernels.rotate(expected.data(), cos.data(), sin.data(), dim, 0.125f);
    for (const Kernels* k : fast_kernels()) {
      auto y = x;
      k->rotate(y.data(), cos.data(), sin.data(), dim, 0.125f);
      EXPECT_TRUE(same_bits(y, expected)) << k->name << " " << dim;
    }
  }
}

TEST(RowKernels, ExpAndArgmax) {
  std::mt19937 random(6);
  std::vector<float> x = random_floats(random, 5000, 40.0f);
  x[17] = std::numeric_limits<float>::quiet_NaN();
  x[18] = -std::numeric_limits<float>::infinity();
  for (const int64_t n :
       {int64_t{1}, int64_t{15}, int64_t{16}, int64_t{40}, int64_t{4999}, int64_t{5000}}) {
    const int32_t best = kScalarKernels.sampling.argmax(x.data(), n);
    std::vector<float> expected(static_cast<size_t>(n)), y(static_cast<size_t>(n));
    kScalarKernels.sampling.exp_scaled(x.data(), n, x[static_cast<size_t>(best)], 0.7f,
                                       expected.data());
    for (size_t i = 0; i < expected.size(); ++i) {
      const double exact =
          std::exp((static_cast<double>(x[i]) - static_cast<double>(x[static_cast<size_t>(best)])) /
                   static_cast<double>(0.7f));
      EXPECT_NEAR(expected[i], std::isnan(x[i]) ? 0.0 : exact,
                  4e-5 * (std::isnan(exact) ? 1 : exact) + 0x1p-34);
    }
    for (const Kernels* k : fast_kernels()) {
      EXPECT_EQ(k->sampling.argmax(x.data(), n), best) << k->name;
      k->sampling.exp_scaled(x.data(), n, x[static_cast<size_t>(best)], 0.7f, y.data());
      EXPECT_TRUE(same_bits(y, expected)) << k->name << " " << n;
    }
  }
  // Ties: the lowest index.
  std::vector<float> ties(100, 1.0f);
  ties[40] = ties[77] = 2.0f;
  for (const Kernels* k : fast_kernels()) EXPECT_EQ(k->sampling.argmax(ties.data(), 100), 40);
  EXPECT_EQ(kScalarKernels.sampling.argmax(ties.data(), 100), 40);
  std::vector<float> none(100, -std::numeric_limits<float>::infinity());  // nothing is larger
  for (const size_t at : {size_t{0}, size_t{17}, size_t{99}}) none[at] = std::nanf("");
  for (const Kernels* k : fast_kernels())
    EXPECT_EQ(k->sampling.argmax(none.data(), 100), 0) << k->name;
  EXPECT_EQ(kScalarKernels.sampling.argmax(none.data(), 100), 0);
}

TEST(RowKernels, TopKIsWhatSortingGives) {
  std::mt19937 random(9);
  std::vector<const Kernels*> tables = fast_kernels();
  tables.push_back(&kScalarKernels);
  for (const int n : {1, 3, 16, 63, 64, 65, 100, 130, 5000})
    for (const int k : {1, 2, 8, 32}) {
      std::vector<float> x(static_cast<size_t>(n));
      for (float& v : x) v = static_cast<float>(static_cast<int>(random() % 400) - 200);  // ties
      std::vector<int32_t> order(x.size());
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
        return x[static_cast<size_t>(a)] > x[static_cast<size_t>(b)];
      });
      order.resize(std::min(order.size(), static_cast<size_t>(k)));
      for (const Kernels* kernels : tables) {
        std::vector<int32_t> found(static_cast<size_t>(k), -1);
        found.resize(static_cast<size_t>(kernels->sampling.top_k(x.data(), n, k, found.data())));
        EXPECT_EQ(found, order) << kernels->name << " " << n << " " << k;
      }
    }
}

TEST(RowKernels, SumOfExponentials) {
  std::mt19937 random(10);
  for (const int n : {1, 4, 16, 17, 2311}) {
    std::vector<float> x = random_floats(random, static_cast<size_t>(n), 5.0f);
    if (n > 1) x[0] = -1000;
    const float largest = *std::max_element(x.begin(), x.end());
    for (const float scale : {1.0f, 0.7f}) {
      double exact = 0;
      for (const float v : x) exact += std::exp(double{scale} * (double{v} - double{largest}));
      const float sum = kScalarKernels.sampling.sum_of_exp(x.data(), n, largest, scale);
      EXPECT_NEAR(sum, exact, 1e-5 * exact) << n;
      for (const Kernels* k : fast_kernels())
        EXPECT_EQ(k->sampling.sum_of_exp(x.data(), n, largest, scale), sum) << k->name << " " << n;
    }
  }
}

TEST(RowKernels, Gumbel) {
  std::mt19937 random(8);
  std::vector<int32_t> ids(3000);
  for (int32_t& id : ids) id = static_cast<int32_t>(random() % 200000);
  const uint64_t seed = 0x123456789abcdef0u;
  const int64_t position = int64_t{5} << 32 | 77;
  for (const int64_t n : {int64_t{1}, int64_t{15}, int64_t{16}, int64_t{63}, int64_t{3000}})
    for (const int64_t first : {int64_t{0}, int64_t{128}, int64_t{-1}}) {  // -1: listed
      const int32_t* tokens = first < 0 ? ids.data() : nullptr;
      std::vector<float> expected(static_cast<size_t>(n) + 1, -7.0f), y = expected;
      kScalarKernels.sampling.gumbel(tokens, first, n, seed, position, expected.data());
      EXPECT_EQ(expected.back(), -7.0f);
      for (int64_t i = 0; i < n; ++i) {
        const auto id = static_cast<uint32_t>(tokens != nullptr ? tokens[i] : first + i);
        const uint32_t bits = token_bits(seed, static_cast<uint64_t>(position), id) >> 1 | 1;
        // Of the uniform number as f32 has it: what it loses near 1 is the contract's.
        const double w =
            std::min(static_cast<double>(static_cast<float>(bits)) * 0x1p-31, 1 - 0x1p-25);
        const double exact = -std::log(-std::log1p(-w));
        EXPECT_NEAR(static_cast<double>(expected[static_cast<size_t>(i)]), exact,
                    2e-6 * std::max(1.0, std::abs(exact)));
      }
      for (const Kernels* k : fast_kernels()) {
        k->sampling.gumbel(tokens, first, n, seed, position, y.data());
        EXPECT_TRUE(same_bits(y, expected)) << k->name << " " << n;
      }
    }
}

// A cache with committed positions, a tail of tree nodes, and queries with random paths.
struct AttentionCase {
  std::vector<uint16_t> k16, v16;
  std::vector<float> k32, v32, q, partials;
  std::vector<std::vector<int32_t>> paths;
  AttentionChunk chunk{};

  AttentionCase(std::mt19937& random, DType type, int head_dim, int committed, int tail,
                int queries, int chunk_index) {
    const int padded = (head_dim + 15) / 16 * 16, chunks = (committed + tail - 1) / kChunk + 1;
    // Chunks do not follow each other directly.
    const int k_stride = kChunk * head_dim + 16, v_stride = kChunk * padded + 48;
    const auto k = random_floats(random, static_cast<size_t>(chunks * k_stride)),
               v = random_floats(random, static_cast<size_t>(chunks * v_stride));
    k32 = k, v32 = v;
    for (const float x : k) k16.push_back(f32_to_f16(x));
    for (const float x : v) v16.push_back(f32_to_f16(x));
    q = random_floats(random, static_cast<size_t>(queries * head_dim), 0.5f);
    partials.assign(static_cast<size_t>(queries * partial_size(padded)), 0.0f);
    chunk = {type,
             type == DType::kF16 ? static_cast<const void*>(k16.data()) : k32.data(),
             type == DType::kF16 ? static_cast<const void*>(v16.data()) : v32.data(),
             k_stride,
             v_stride,
             head_dim,
             padded,
             chunk_index * kChunk,
             committed,
             queries,
             {}};
    paths.resize(static_cast<size_t>(queries));
    for (int i = 0; i < queries; ++i) {
      // A path of ascending slots in the tail; the first queries have one without gaps.
      auto& path = paths[static_cast<size_t>(i)];
      for (int slot = committed; slot < committed + tail; ++slot)
        if (i < queries / 3 || random() % 2) path.push_back(slot);
      if (path.empty()) path.push_back(committed);
      const int length = committed + static_cast<int>(path.size());
      int direct = committed;
      while (direct < length && path[static_cast<size_t>(direct - committed)] == direct) ++direct;
      chunk.query[i] = {q.data() + i * head_dim, path.data(), direct, length,
                        partials.data() + i * partial_size(padded)};
    }
  }
};

TEST(RowKernels, Attention) {
  std::mt19937 random(7);
  int cases = 0;
  for (const DType type : {DType::kF16, DType::kF32})
    for (const int head_dim : {8, 16, 48, 64, 80, 128})
      for (const int committed : {0, 1, 15, 16, 100, 250, 255, 256, 300, 511})
        for (const int tail : {1, 5, 17, 40})
          for (const int queries : {1, 2, 3, 5, 7, 8}) {
            if ((++cases + head_dim) % 3 != 0 && queries != 8)
              continue;  // a third of the grid will do
            for (int c = 0; c <= committed / kChunk; ++c) {
              AttentionCase one(random, type, head_dim, committed, tail, queries, c);
              kScalarKernels.attention(one.chunk);
              const auto expected = one.partials;
              for (const Kernels* k : fast_kernels()) {
                std::fill(one.partials.begin(), one.partials.end(), 0.0f);
                k->attention(one.chunk);
                ASSERT_TRUE(same_bits(one.partials, expected))
                    << k->name << " head_dim " << head_dim << " committed " << committed << " tail "
                    << tail << " queries " << queries << " chunk " << c;
              }
            }
          }
}

TEST(RowKernels, AttentionIsSoftmaxAttention) {
  std::mt19937 random(8);
  AttentionCase a(random, DType::kF32, 64, 300, 10, 1, 0);
  const int psize = partial_size(64);
  std::vector<float> partials(static_cast<size_t>(2 * psize)), out(64);
  for (int c = 0; c < 2; ++c) {
    a.chunk.begin = c * kChunk;
    a.chunk.query[0].partial = partials.data() + c * psize;
    kScalarKernels.attention(a.chunk);
  }
  kScalarKernels.combine(partials.data(), 2, psize, 64, 64, out.data());
  std::vector<double> score;
  double sum = 0;
  const auto slot = [&](int p) { return p < 300 ? p : a.paths[0][static_cast<size_t>(p - 300)]; };
  for (int p = 0; p < a.chunk.query[0].length; ++p) {
    double s = 0;
    for (int d = 0; d < 64; ++d)
      s += static_cast<double>(a.q[static_cast<size_t>(d)]) *
           static_cast<double>(
               a.k32[static_cast<size_t>(slot(p) / kChunk * a.chunk.k_stride +
                                         (slot(p) % kChunk / 16 * 64 + d) * 16 + slot(p) % 16)]);
    score.push_back(std::exp(s));
    sum += score.back();
  }
  for (int d = 0; d < 64; ++d) {
    double o = 0;
    for (size_t p = 0; p < score.size(); ++p)
      o += score[p] / sum *
           static_cast<double>(
               a.v32[static_cast<size_t>(slot(static_cast<int>(p)) / kChunk * a.chunk.v_stride +
                                         slot(static_cast<int>(p)) % kChunk * 64 + d)]);
    EXPECT_NEAR(out[static_cast<size_t>(d)], o, 1e-5);
  }
}

TEST(RowKernels, Combine) {
  std::mt19937 random(9);
  for (const int head_dim : {8, 16, 64, 80})
    for (const int n : {1, 2, 5}) {
      const int padded = (head_dim + 15) / 16 * 16, psize = partial_size(padded);
      auto partials = random_floats(random, static_cast<size_t>(n * psize), 3.0f);
      for (int c = 0; c < n; ++c)
        partials[static_cast<size_t>(c * psize + 1)] = 1.0f + static_cast<float>(c);
      std::vector<float> expected(static_cast<size_t>(head_dim)),
          out(static_cast<size_t>(head_dim));
      kScalarKernels.combine(partials.data(), n, psize, head_dim, padded, expected.data());
      for (const Kernels* k : fast_kernels()) {
        k->combine(partials.data(), n, psize, head_dim, padded, out.data());
        EXPECT_TRUE(same_bits(out, expected)) << k->name;
      }
    }
}

}  // namespace
}  // namespace chimera::cpu
