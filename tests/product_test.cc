// Every product of every instruction set that this machine has, bit for bit against
// product_reference, which in turn is compared with a plain product in double precision.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "engine/cpu/kernels.h"
#include "engine/cpu/panels.h"

namespace chimera::cpu {
namespace {

constexpr DType kTypes[] = {DType::kF32,  DType::kF16,  DType::kBF16, DType::kQ8_0,
                            DType::kQ4_0, DType::kQ4_1, DType::kQ5_0, DType::kQ5_1,
                            DType::kQ4_K, DType::kQ5_K, DType::kQ6_K};

struct InstructionSet {
  const char* name;
  Isa isa;
  const ProductFunction* products;
};
// Shown by a test that fails.
void PrintTo(const InstructionSet& set, std::ostream* out) {
  *out << set.name;
}

constexpr InstructionSet kInstructionSets[] = {
#if defined(__x86_64__)
    {"avx2", Isa::kAvx2, kProductsAvx2},
    {"avxvnni", Isa::kAvxVnni, kProductsAvxVnni},
    {"avx512", Isa::kAvx512, kProductsAvx512},
    {"amx", Isa::kAmx, kProductsAmx},
#elif defined(__aarch64__)
    {"neon", Isa::kNeon, kProductsNeon},
#endif
};

// ---- Weights ----------------------------------------------------------------------------------

enum class Values { kOrdinary, kExtreme };

uint16_t random_half(std::mt19937& rng, Values values) {
  if (values == Values::kOrdinary)
    return f32_to_f16(std::uniform_real_distribution<float>(-0.02f, 0.02f)(rng));
  switch (rng() % 6) {
    case 0: return 0;
    case 1: return static_cast<uint16_t>(rng() % 0x400 | (rng() & 0x8000));  // denormal
    case 2: return 0x8000;
    case 3: return static_cast<uint16_t>(0x7bff | (rng() & 0x8000));  // the largest
    default: return static_cast<uint16_t>(rng() % 0x7c00 | (rng() & 0x8000));
  }
}

struct Weights {
  std::vector<std::byte> bytes;
  TensorView view;
};

// Random bytes are valid quants of every type; only the f16 scales are put in their place.
Weights random_weights(DType type, int64_t rows, int64_t cols, Values values, uint32_t seed) {
  std::mt19937 rng(seed);
  const DTypeInfo& info = dtype_info(type);
  Weights w;
  w.bytes.resize(static_cast<size_t>(rows) * row_bytes(type, cols));
  for (auto& b : w.bytes) b = static_cast<std::byte>(rng());
  const auto put = [](std::byte* at, auto value) { std::memcpy(at, &value, sizeof value); };
  std::normal_distribution<float> normal;
  for (std::byte* b = w.bytes.data(); b < w.bytes.data() + w.bytes.size(); b += info.block_bytes) {
    switch (type) {
      case DType::kF32: {
        float f = 0.05f * normal(rng);
        if (values == Values::kExtreme && rng() % 4 == 0) f *= rng() % 2 ? 0x1p-130f : 0x1p40f;
        put(b, f);
        break;
      }
      case DType::kF16: put(b, random_half(rng, values)); break;
      case DType::kBF16: {
        float f = 0.05f * normal(rng);
        // Rows of every size, the smallest with sums about where denormals begin.
        const float sizes[] = {1.0f, 0x1p-60f, 0x1p-119f, 0x1p-122f};
        const size_t row = static_cast<size_t>(b - w.bytes.data()) / row_bytes(type, cols);
        if (values == Values::kExtreme) f *= sizes[row % 4];
        put(b, f32_to_bf16(f));
        break;
      }
      case DType::kQ6_K: put(b + 208, random_half(rng, values)); break;
      case DType::kQ4_1:
      case DType::kQ5_1:
      case DType::kQ4_K:
      case DType::kQ5_K: put(b + 2, random_half(rng, values)); [[fallthrough]];
      default: put(b, random_half(rng, values)); break;
    }
    if (values == Values::kExtreme && activation_for(type) == Activation::kQ8 && rng() % 4 == 0) {
      // The largest quants throughout, or all bits clear: where sums of 16 bits would saturate.
      const int scales = type == DType::kQ4_1 || type == DType::kQ5_1 ? 4 : 2;
      const std::byte fill = type == DType::kQ8_0 ? (rng() % 2 ? std::byte{0x80} : std::byte{0x7f})
                                                  : (rng() % 2 ? std::byte{0xff} : std::byte{0});
      if (info.block_weights == 32) std::fill(b + scales, b + info.block_bytes, fill);
      if (type == DType::kQ4_K || type == DType::kQ5_K)
        std::fill(b + 16, b + info.block_bytes, fill);
      if (type == DType::kQ6_K) std::fill(b, b + 192, fill);
    }
  }
  w.view = {"w", type, rows, cols, w.bytes.data(), 0};
  return w;
}

std::vector<std::byte> pack(const TensorView& w) {
  const int64_t panels = (w.rows + kPanelRows - 1) / kPanelRows;
  const size_t size = panel_bytes(w.type, w.cols);
  std::vector<std::byte> out(static_cast<size_t>(panels) * size, std::byte{0xcc});
  for (int64_t p = 0; p < panels; ++p) pack_panel(w, p, out.data() + static_cast<size_t>(p) * size);
  return out;
}

// ---- Activations, by the contract --------------------------------------------------------------

struct Inputs {
  std::vector<float> f32, scale;
  std::vector<uint16_t> bf16;
  std::vector<int8_t> q8;
  std::vector<int32_t> sum;

  ProductInput of(DType type) const {
    ProductInput x;
    switch (activation_for(type)) {
      case Activation::kF32: x.f32 = f32.data(); break;
      case Activation::kBF16: x.bf16 = bf16.data(); break;
      case Activation::kQ8: x.q8 = q8.data(), x.scale = scale.data(), x.sum = sum.data(); break;
    }
    return x;
  }
};

void quantise_block(const float* x, int8_t* q, float* scale, int32_t* sum) {
  float max = 0.0f;
  bool finite = true;
  for (int i = 0; i < 32; ++i) {
    finite = finite && std::isfinite(x[i]);
    max = std::max(max, std::fabs(x[i]));
  }
  *sum = 0;
  std::fill(q, q + 32, 0);
  *scale = finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  if (!finite || max < 0x1p-100f) return;
  *scale = max / 127.0f;
  const float inverse = 127.0f / max;
  for (int i = 0; i < 32; ++i) {
    q[i] = static_cast<int8_t>(std::nearbyint(x[i] * inverse));
    *sum += q[i];
  }
}

Inputs random_inputs(int m, int64_t cols, Values values, uint32_t seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  Inputs in;
  in.f32.resize(static_cast<size_t>(m * cols));
  for (auto& f : in.f32) f = normal(rng);
  if (values == Values::kExtreme) {
    for (size_t i = 0; i < in.f32.size(); i += 32) {
      const size_t n = std::min<size_t>(32, in.f32.size() - i);
      float* x = &in.f32[i];
      switch (rng() % 8) {
        case 0: std::fill(x, x + n, 0.0f); break;
        case 1: std::fill(x, x + n, 3.0f); break;  // a = 127 throughout
        case 2: std::fill(x, x + n, -3.0f); break;
        case 3:
          for (size_t j = 0; j < n; ++j) x[j] *= 0x1p-98f;
          break;
        case 4:
          for (size_t j = 0; j < n; ++j) x[j] *= 0x1p-60f;
          break;
        default: break;
      }
    }
  }
  const int64_t padded = (cols + 31) / 32 * 32;
  in.bf16.resize(static_cast<size_t>(m * padded));
  for (int t = 0; t < m; ++t)
    for (int64_t k = 0; k < cols; ++k) in.bf16[t * padded + k] = f32_to_bf16(in.f32[t * cols + k]);
  if (cols % 32 == 0) {
    const size_t blocks = static_cast<size_t>(m * cols / 32);
    in.q8.resize(blocks * 32), in.scale.resize(blocks), in.sum.resize(blocks);
    for (size_t b = 0; b < blocks; ++b)
      quantise_block(&in.f32[b * 32], &in.q8[b * 32], &in.scale[b], &in.sum[b]);
  }
  return in;
}

// ---- Comparison -------------------------------------------------------------------------------

::testing::AssertionResult same_bits(const std::vector<float>& want,
                                     const std::vector<float>& got) {
  for (size_t i = 0; i < want.size(); ++i) {
    if (std::isnan(want[i]) && std::isnan(got[i]))
      continue;  // payloads are not part of the contract
    if (std::memcmp(&want[i], &got[i], 4) != 0)
      return ::testing::AssertionFailure()
             << "y[" << i << "] is " << std::hexfloat << got[i] << ", the reference " << want[i];
  }
  return ::testing::AssertionSuccess();
}

constexpr int kMaxTokens = 100;
constexpr int kTokens[] = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 100};

// Every m of `tokens`, overwriting and accumulating, whole and in ranges of panels.
void compare(const InstructionSet& isa, DType type, int64_t rows, int64_t cols, Values values,
             const std::vector<int>& tokens) {
  SCOPED_TRACE(std::string(isa.name) + " " + dtype_info(type).name + " " + std::to_string(rows) +
               " x " + std::to_string(cols) + (values == Values::kExtreme ? " extreme" : ""));
  const auto seed = static_cast<uint32_t>(rows * 1000 + cols);
  const Weights w = random_weights(type, rows, cols, values, seed);
  const Inputs in = random_inputs(kMaxTokens, cols, values, seed + 1);
  const std::vector<std::byte> panels = pack(w.view);
  const int64_t panel_count = (rows + kPanelRows - 1) / kPanelRows, stride = rows + 3;
  const size_t size = static_cast<size_t>(kMaxTokens * stride);
  std::vector<float> before(size);
  for (size_t i = 0; i < size; ++i) before[i] = static_cast<float>(i % 17) * 0.25f - 2.0f;

  for (const bool accumulate : {false, true}) {
    // A token's outputs do not depend on m, so the reference runs once, for all tokens.
    std::vector<float> all = before;
    product_reference(w.view, 0, rows, in.of(type), kMaxTokens, all.data(), stride, accumulate);
    for (const int m : tokens) {
      SCOPED_TRACE("m = " + std::to_string(m) + (accumulate ? " accumulate" : ""));
      std::vector<float> want = before, got = before;
      std::copy(all.begin(), all.begin() + m * stride, want.begin());
      Product p{panels.data(), rows, cols,       0,      panel_count,
                in.of(type),   m,    got.data(), stride, accumulate};
      isa.products[static_cast<int>(type)](p);
      ASSERT_TRUE(same_bits(want, got));

      // Each panel by itself, in descending order.
      got = before;
      for (int64_t i = panel_count; i-- > 0;) {
        p.panel_begin = i, p.panel_end = i + 1;
        isa.products[static_cast<int>(type)](p);
      }
      ASSERT_TRUE(same_bits(want, got)) << "panel by panel";
    }
  }
}

std::vector<int64_t> columns_for(DType type) {
  if (activation_for(type) != Activation::kQ8) return {1, 7, 32, 33, 100, 576};
  if (dtype_info(type).block_weights == 256) return {256, 512, 768};
  return {32, 64, 96, 288, 576};
}

class ProductTest : public ::testing::TestWithParam<InstructionSet> {
 protected:
  void SetUp() override {
    if (!machine_has(isa().isa)) GTEST_SKIP() << "this machine has no " << isa().name;
  }
  const InstructionSet& isa() const { return GetParam(); }
};
class ProductTestFull : public ProductTest {};

TEST_P(ProductTest, EqualsReference) {
  for (const DType type : kTypes) {
    if (isa().products[static_cast<int>(type)] == nullptr) continue;
    for (const int64_t cols : columns_for(type))
      for (const Values values : {Values::kOrdinary, Values::kExtreme})
        compare(isa(), type, 17, cols, values, {1, 3, 8, 13});
  }
}

TEST_P(ProductTestFull, EqualsReference) {
  for (const DType type : kTypes) {
    if (isa().products[static_cast<int>(type)] == nullptr) continue;
    for (const int64_t rows : {1, 5, 16, 17, 40, 100})
      for (const int64_t cols : columns_for(type))
        for (const Values values : {Values::kOrdinary, Values::kExtreme})
          compare(isa(), type, rows, cols, values, {std::begin(kTokens), std::end(kTokens)});
  }
}

// A block of activations that holds an infinity or NaN makes its own token NaN and no other.
TEST_P(ProductTest, NanStaysWithItsToken) {
  for (const DType type : kTypes) {
    const ProductFunction product = isa().products[static_cast<int>(type)];
    if (product == nullptr) continue;
    SCOPED_TRACE(dtype_info(type).name);
    const int64_t rows = 20, cols = 256;
    const int m = 5;
    const Weights w = random_weights(type, rows, cols, Values::kOrdinary, 1);
    const std::vector<std::byte> panels = pack(w.view);
    Inputs in = random_inputs(m, cols, Values::kOrdinary, 2);
    const auto poison = [&](int token, int64_t k, float value) {
      in.f32[token * cols + k] = value;
      in.bf16[token * cols + k] = f32_to_bf16(value);
      const size_t b = static_cast<size_t>(token * cols + k) / 32;
      quantise_block(&in.f32[b * 32], &in.q8[b * 32], &in.scale[b], &in.sum[b]);
    };
    poison(1, 40, std::numeric_limits<float>::infinity());
    poison(1, 41, -std::numeric_limits<float>::infinity());
    poison(3, 255, std::numeric_limits<float>::quiet_NaN());
    std::vector<float> want(m * rows), got(m * rows);
    product_reference(w.view, 0, rows, in.of(type), m, want.data(), rows, false);
    product({panels.data(), rows, cols, 0, 2, in.of(type), m, got.data(), rows, false});
    EXPECT_TRUE(same_bits(want, got));
    for (int t = 0; t < m; ++t)
      for (int64_t n = 0; n < rows; ++n)
        EXPECT_EQ(std::isfinite(got[t * rows + n]), t != 1 && t != 3) << t << " " << n;
  }
}

// The BF16 product works with denormals flushed, whatever the caller's mode, and leaves that alone.
// w[0] x[0] and w[2] x[2] meet in one chain of fmas.
TEST_P(ProductTest, Bf16FlushesDenormals) {
  struct {
    float w[4], x[4], result;
  } const cases[] = {
      {{0x1p-130f, 0x1p-70f}, {0x1p30f, 0x1p-60f}, 0},           // 2^-100 and 2^-130 unflushed
      {{0x1p-100f, 0, -0x1p-100f}, {0x1p-26f, 0, 0x1p-50f}, 0},  // 2^-126 - 2^-150 has 24 bits,
      {{0x1p-100f, 0, -0x1p-100f}, {0x1p-26f, 0, 0x1p-60f}, 0x1p-126f}};  // 2^-126 - 2^-160 more
  for (const auto& c : cases) {
    SCOPED_TRACE(c.result);
    uint16_t w[4], x[32] = {};
    for (int i = 0; i < 4; ++i) {
      w[i] = f32_to_bf16(c.w[i]);
      x[i] = f32_to_bf16(c.x[i]);
    }
    const TensorView view{"w", DType::kBF16, 1, 4, reinterpret_cast<const std::byte*>(w), 0};
    ProductInput in;
    in.bf16 = x;
    float want = 1.0f, got = 1.0f;
    product_reference(view, 0, 1, in, 1, &want, 1, false);
    EXPECT_EQ(want, c.result);
    const std::vector<std::byte> panels = pack(view);
    isa().products[static_cast<int>(DType::kBF16)](
        {panels.data(), 1, 4, 0, 1, in, 1, &got, 1, false});
    EXPECT_EQ(std::memcmp(&want, &got, 4), 0);
  }
  volatile float tiny = 0x1p-130f;
  EXPECT_NE(tiny * 0.5f, 0.0f);
}

std::string name_of(const ::testing::TestParamInfo<InstructionSet>& test) {
  return test.param.name;
}
INSTANTIATE_TEST_SUITE_P(Isa, ProductTest, ::testing::ValuesIn(kInstructionSets), name_of);
INSTANTIATE_TEST_SUITE_P(Isa, ProductTestFull, ::testing::ValuesIn(kInstructionSets), name_of);

// ---- The reference itself ---------------------------------------------------------------------

// Against a product in double precision of dequantize_row's weights with the activations as they
// are after rounding. What is left is f32 rounding: a few ulps of the sum of magnitudes.
TEST(ProductReference, NearDoublePrecision) {
  for (const DType type : kTypes) {
    SCOPED_TRACE(dtype_info(type).name);
    const int64_t rows = 9, cols = 512;
    const int m = 3;
    const Weights w = random_weights(type, rows, cols, Values::kOrdinary, 5);
    const Inputs in = random_inputs(m, cols, Values::kOrdinary, 6);
    std::vector<float> y(m * rows), row(cols);
    product_reference(w.view, 0, rows, in.of(type), m, y.data(), rows, false);
    for (int64_t n = 0; n < rows; ++n) {
      dequantize_row(type, w.view.row(n), cols, row.data());
      for (int t = 0; t < m; ++t) {
        double sum = 0, magnitude = 0;
        for (int64_t k = 0; k < cols; ++k) {
          const auto at = static_cast<size_t>(t * cols + k);
          double x = in.f32[at];
          if (activation_for(type) == Activation::kBF16) x = bf16_to_f32(in.bf16[at]);
          if (activation_for(type) == Activation::kQ8)
            x = static_cast<double>(in.scale[at / 32]) * in.q8[at];
          sum += x * row[k];
          magnitude += std::fabs(x * row[k]);
        }
        EXPECT_NEAR(y[t * rows + n], sum, 2e-6 * magnitude + 1e-30) << t << " " << n;
      }
    }
  }
}

TEST(ProductReference, TokensAndRowRangesAreIndependent) {
  for (const DType type : kTypes) {
    SCOPED_TRACE(dtype_info(type).name);
    const int64_t rows = 7, cols = 256;
    const int m = 37;
    const Weights w = random_weights(type, rows, cols, Values::kExtreme, 7);
    const Inputs in = random_inputs(m, cols, Values::kExtreme, 8);
    std::vector<float> all(m * rows);
    product_reference(w.view, 0, rows, in.of(type), m, all.data(), rows, false);
    for (int t = 0; t < m; ++t) {
      ProductInput x = in.of(type);
      if (x.f32) x.f32 += t * cols;
      if (x.bf16) x.bf16 += t * cols;
      if (x.q8) x.q8 += t * cols, x.scale += t * cols / 32, x.sum += t * cols / 32;
      std::vector<float> one(rows, 1.0f);
      product_reference(w.view, 3, rows, x, 1, one.data(), rows, false);
      product_reference(w.view, 0, 3, x, 1, one.data(), rows, false);
      ASSERT_EQ(std::memcmp(one.data(), &all[t * rows], rows * 4), 0) << t;
    }
  }
}

// ---- Panels -----------------------------------------------------------------------------------

TEST(Panels, RoundTrip) {
  for (const DType type : kTypes) {
    for (const int64_t cols : columns_for(type)) {
      SCOPED_TRACE(std::string(dtype_info(type).name) + " " + std::to_string(cols));
      const int64_t rows = 21;
      const Weights w = random_weights(type, rows, cols, Values::kExtreme, 9);
      const std::vector<std::byte> panels = pack(w.view);
      std::vector<float> want(cols), got(cols);
      for (int64_t r = 0; r < rows; ++r) {
        dequantize_row(type, w.view.row(r), cols, want.data());
        dequantize_panel_row(type, panels.data(), cols, r, got.data());
        ASSERT_EQ(std::memcmp(want.data(), got.data(), cols * 4), 0) << "row " << r;
      }
      for (int64_t r = rows; r < 32; ++r) {  // the padding
        dequantize_panel_row(type, panels.data(), cols, r, got.data());
        for (const float f : got) ASSERT_EQ(f, 0.0f);
      }
    }
  }
}

TEST(Panels, RowsComeInTheEnginesOrder) {
  Weights w = random_weights(DType::kQ4_1, 32, 64, Values::kOrdinary, 10);
  w.view.interleaved_head_dim = 16;
  const std::vector<std::byte> panels = pack(w.view);
  std::vector<float> want(64), got(64);
  for (int64_t r = 0; r < 32; ++r) {
    const int64_t in_head = r % 16;
    const int64_t file_row = r - in_head + (in_head < 8 ? 2 * in_head : 2 * (in_head - 8) + 1);
    dequantize_row(DType::kQ4_1, w.bytes.data() + file_row * 40, 64, want.data());
    dequantize_panel_row(DType::kQ4_1, panels.data(), 64, r, got.data());
    EXPECT_EQ(want, got) << r;
  }
}

// No panel is larger than the file's bytes, but for BF16's padding.
TEST(Panels, Size) {
  for (const DType type : kTypes)
    EXPECT_EQ(panel_bytes(type, 512), 16 * row_bytes(type, 512)) << dtype_info(type).name;
  EXPECT_EQ(panel_bytes(DType::kBF16, 33), 16u * 64 * 2);
}

}  // namespace
}  // namespace chimera::cpu
