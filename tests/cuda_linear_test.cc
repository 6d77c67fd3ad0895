// Products on the tensor cores against the contract as plain loops.
#include <memory>

#include "tests/cuda_support.h"

namespace chimera::cuda::test {
namespace {

struct Case {
  int64_t rows, cols;
  int tokens;
};

// Runs one op as the backend does: input, then the product of matrices of one type, stacked.
std::vector<float> run_stacked(const std::vector<TensorView>& stacked, const std::vector<float>& x,
                               int tokens, Linear::Input input, const std::vector<float>& norm,
                               const std::vector<float>* residual,
                               const std::vector<int>& logits_rows) {
  const TensorView& w = stacked.front();
  int64_t n_rows = 0, n_partials = 0, n_counters = 0;
  std::vector<std::unique_ptr<Buffer<std::byte>>> tapes;
  Buffer<Step> step(1);
  step[0].n_rows = tokens;
  step[0].n_logits = static_cast<int>(logits_rows.size());
  for (size_t i = 0; i < logits_rows.size(); ++i) step[0].logits_row[i] = logits_rows[i];
  const int live = logits_rows.empty() ? tokens : static_cast<int>(logits_rows.size());
  const Rows rows = logits_rows.empty() ? Rows::kAll : Rows::kLogits;
  const Buffer<float> in(x), weight(norm);
  Buffer<std::byte> fragments(static_cast<size_t>(fragment_bytes(live, w.cols)));
  Buffer<float> plain(static_cast<size_t>(live * w.cols));
  std::fill(fragments.begin(), fragments.end(), std::byte{0xff});  // NaN where nothing is written
  const bool f32 = w.type == DType::kF32, bf16 = w.type == DType::kBF16;
  prepare_input(
      nullptr,
      {step.get(), rows, input, in.get(), weight.get(), 1e-5f, w.cols, f32 ? plain.get() : nullptr,
       f32 || bf16 ? nullptr : fragments.get(), bf16 ? fragments.get() : nullptr},
      live + 1);
  for (const TensorView& m : stacked) {
    tapes.push_back(std::make_unique<Buffer<std::byte>>(
        static_cast<size_t>(tape_bytes(m.type, m.rows, m.cols))));
    pack_tape(m, tapes.back()->get());
    n_rows += m.rows;
    n_counters += counter_words(m.rows, live + 1);
  }
  for (const TensorView& m : stacked)
    n_partials += partial_floats(m.type, m.rows, n_rows, m.cols, live);
  Buffer<float> y(static_cast<size_t>(live * n_rows));
  std::fill(y.begin(), y.end(), std::nanf(""));
  if (residual != nullptr) std::copy(residual->begin(), residual->end(), y.begin());
  Buffer<float> partials(static_cast<size_t>(n_partials));
  Buffer<uint32_t> counters(static_cast<size_t>(n_counters));
  LinearParams p{step.get(),
                 rows,
                 f32 ? reinterpret_cast<std::byte*>(plain.get()) : fragments.get(),
                 n_rows,
                 w.cols,
                 n_rows,
                 residual != nullptr,
                 partials.get(),
                 live,
                 counters.get(),
                 {},
                 0};
  float* to = y.get();
  for (size_t i = 0; i < stacked.size(); to += stacked[i++].rows)
    p.segments[p.n_segments++] = {tapes[i]->get(), stacked[i].rows, to};
  linear(nullptr, w.type, p, live + 1);
  finish();
  for (const uint32_t c : counters) EXPECT_EQ(c, 0u);
  return {y.begin(), y.end()};
}

std::vector<float> run(const TensorView& w, const std::vector<float>& x, int tokens,
                       Linear::Input input = Linear::Input::kPlain,
                       const std::vector<float>& norm = {},
                       const std::vector<float>* residual = nullptr,
                       const std::vector<int>& logits_rows = {}) {
  return run_stacked({w}, x, tokens, input, norm, residual, logits_rows);
}

int64_t whole_blocks(DType type, int64_t cols) {
  const int64_t block = dtype_info(type).block_weights;
  return (cols + block - 1) / block * block;
}

TEST(CudaTape, HoldsEveryWeight) {
  std::mt19937 random(1);
  for (const DType type : kAllTypes)
    for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{1, 32}, {17, 96}, {40, 512}}) {
      const RandomMatrix m = random_matrix(random, type, rows, whole_blocks(type, cols), false);
      Buffer<std::byte> tape(static_cast<size_t>(tape_bytes(type, rows, m.view.cols)));
      pack_tape(m.view, tape.get());
      std::vector<float> row(static_cast<size_t>(m.view.cols));
      for (int64_t r = 0; r < rows; ++r) {
        dequantize_row(type, m.view.row(r), m.view.cols, row.data());
        for (int64_t k = 0; k < m.view.cols; ++k)
          ASSERT_EQ(tape_weight(type, tape.get(), m.view.cols, r, k), row[static_cast<size_t>(k)])
              << dtype_info(type).name << " (" << r << ", " << k << ")";
      }
    }
}

TEST(CudaLinear, EveryTypeAtOddSizes) {
  std::mt19937 random(2);
  for (const bool integers : {true, false})
    for (const DType type : kAllTypes)
      for (const Case& c : {Case{1, 32, 1},
                            {16, 64, 3},
                            {33, 288, 8},
                            {130, 544, 9},
                            {200, 96, 33},
                            {257, 800, 2}}) {
        const RandomMatrix m =
            random_matrix(random, type, c.rows, whole_blocks(type, c.cols), integers);
        const std::vector<float> x =
            random_input(random, static_cast<size_t>(c.tokens * m.view.cols), integers);
        const std::vector<float> y = run(m.view, x, c.tokens),
                                 expected = product_oracle(m.view, x, c.tokens);
        ASSERT_TRUE(same_sums(y.data(), expected.data(), y.size(), integers || type == DType::kF32))
            << dtype_info(type).name << " " << c.rows << " x " << m.view.cols << ", " << c.tokens
            << " tokens";
      }
}

TEST(CudaLinear, AnyNumberOfColumns) {
  std::mt19937 random(3);
  for (const DType type : {DType::kF32, DType::kF16, DType::kBF16})
    for (const int64_t cols : {1, 7, 31, 33, 172}) {
      const RandomMatrix m = random_matrix(random, type, 19, cols, false);
      const std::vector<float> x = random_input(random, static_cast<size_t>(5 * cols), false);
      const std::vector<float> y = run(m.view, x, 5), expected = product_oracle(m.view, x, 5);
      ASSERT_TRUE(same_sums(y.data(), expected.data(), y.size(), type == DType::kF32))
          << dtype_info(type).name << " " << cols;
    }
}

// The signature: a token alone has the bits that it has among 64.
TEST(CudaLinear, WidthIndependent) {
  std::mt19937 random(4);
  for (const DType type : kAllTypes) {
    const RandomMatrix m = random_matrix(random, type, 70, 1280, false);
    const std::vector<float> x = random_input(random, static_cast<size_t>(64 * 1280), false);
    const std::vector<float> all = run(m.view, x, 64);
    // Threads in the other order: what a race would change.
    set_descending(true);
    const std::vector<float> other_way = run(m.view, x, 64);
    set_descending(false);
    ASSERT_TRUE(same_bits(other_way.data(), all.data(), all.size())) << dtype_info(type).name;
    for (const auto& [first, count] : {std::pair{0, 1}, {63, 1}, {17, 2}, {9, 8}, {3, 31}}) {
      const std::vector<float> some =
          run(m.view, {x.begin() + first * 1280, x.begin() + (first + count) * 1280}, count);
      ASSERT_TRUE(same_bits(some.data(), all.data() + first * 70, some.size()))
          << dtype_info(type).name << " " << first;
    }
  }
}

// How high a block is depends on the device, and bits do not: 4 to 8 row tiles, for these.
TEST(CudaLinear, BlockHeights) {
  std::mt19937 random(9);
  for (const DType type : {DType::kBF16, DType::kQ4_0, DType::kQ6_K})
    for (const int64_t cols : {256, 1280})  // one run, a cluster of them
      for (const auto& [rows, blocks] :
           {std::pair<int64_t, int>{70, 1}, {257, 1}, {257, 4}, {210, 2}, {250, 2}}) {
        const RandomMatrix m = random_matrix(random, type, rows, cols, false);
        const std::vector<float> x = random_input(random, static_cast<size_t>(64 * cols), false);
        for (const int tokens : {1, 11, 64}) {
          const std::vector<float> some{x.begin(), x.begin() + tokens * cols};
          const std::vector<float> one = run(m.view, some, tokens);
          set_resident_blocks(blocks * static_cast<int>(n_splits(rows, cols)));
          const std::vector<float> other = run(m.view, some, tokens);
          set_resident_blocks(264);
          ASSERT_TRUE(same_bits(one.data(), other.data(), one.size()))
              << dtype_info(type).name << " " << rows << " x " << cols << ", " << tokens;
        }
      }
}

// Runs of a split are added in a cluster's shared memory, or in the device's: where there are no
// clusters, and where there are more runs than the largest has.
TEST(CudaLinear, RunsAreAddedAlike) {
  std::mt19937 random(8);
  ASSERT_GT(n_splits(70, 4352), kLargestCluster);
  for (const int64_t cols : {1280, 4352})
    for (const DType type : {DType::kBF16, DType::kQ6_K}) {
      const RandomMatrix m = random_matrix(random, type, 70, cols, false);
      const std::vector<float> x = random_input(random, static_cast<size_t>(35 * cols), false),
                               expected = product_oracle(m.view, x, 35);
      for (const int tokens : {3, 35})
        for (const bool accumulates : {false, true}) {
          const size_t n = static_cast<size_t>(tokens) * 70;
          const std::vector<float> residual = random_input(random, n, false),
                                   *before = accumulates ? &residual : nullptr;
          const auto one = run(m.view, x, tokens, Linear::Input::kPlain, {}, before);
          set_clusters(false);
          const auto other = run(m.view, x, tokens, Linear::Input::kPlain, {}, before);
          set_clusters(true);
          ASSERT_TRUE(same_bits(one.data(), other.data(), n)) << cols << " " << tokens;
          set_resident_blocks(1);  // as on a slice of a GPU that has no room for a cluster
          const auto small = run(m.view, x, tokens, Linear::Input::kPlain, {}, before);
          set_resident_blocks(264);
          ASSERT_TRUE(same_bits(one.data(), small.data(), n)) << cols << " " << tokens;
          ASSERT_TRUE(before != nullptr || same_sums(one.data(), expected.data(), n, false))
              << cols << " " << tokens;
        }
    }
}

// Stacked matrices share a launch and a split of K. Sums of integers, so that they are the same in
// any split. With 35 tokens a K-quant's are two groups.
TEST(CudaLinear, StackedAsAlone) {
  std::mt19937 random(7);
  constexpr int64_t kCols = 1280;
  for (const DType type : {DType::kQ8_0, DType::kF32, DType::kQ4_K}) {
    const bool groups = type == DType::kQ4_K;
    const int tokens = groups ? 35 : 1;
    const int64_t sizes[] = {groups ? 257 : 8448, 40, 130};
    ASSERT_EQ(n_splits(sizes[0] + 170, kCols), groups ? 3 : 2);
    const std::vector<float> x = random_input(random, static_cast<size_t>(tokens * kCols), true);
    std::vector<RandomMatrix> matrices;
    std::vector<TensorView> views;
    std::vector<std::vector<float>> alone;
    for (const int64_t rows : sizes) {
      matrices.push_back(random_matrix(random, type, rows, kCols, true));
      views.push_back(matrices.back().view);
      views.back().data = matrices.back().bytes.data();
      alone.push_back(run(views.back(), x, tokens));
    }
    const std::vector<float> stacked =
        run_stacked(views, x, tokens, Linear::Input::kPlain, {}, nullptr, {});
    const float* y = stacked.data();
    for (int t = 0; t < tokens; ++t)
      for (size_t i = 0; i < alone.size(); y += sizes[i++])
        ASSERT_TRUE(same_bits(y, alone[i].data() + t * sizes[i], static_cast<size_t>(sizes[i])))
            << dtype_info(type).name << " token " << t << " matrix " << i;
  }
}

TEST(CudaLinear, InputsAndEpilogue) {
  std::mt19937 random(5);
  constexpr int64_t kRows = 40, kCols = 352;
  for (const DType type : {DType::kF32, DType::kBF16, DType::kQ5_1}) {
    const bool exact = type == DType::kF32;
    const RandomMatrix m = random_matrix(random, type, kRows, kCols, false);
    const std::vector<float> x = random_input(random, 7 * 2 * kCols, false),
                             norm = random_input(random, kCols, false);
    const std::vector<float> residual = random_input(random, 7 * kRows, false);
    std::vector<float> normed(7 * kCols), gated(7 * kCols);
    for (size_t t = 0; t < 7; ++t) {
      cpu::kScalarKernels.rms_norm(x.data() + t * kCols, norm.data(), 1e-5f, kCols,
                                   normed.data() + t * kCols);
      cpu::kScalarKernels.swiglu(x.data() + t * 2 * kCols, kCols, gated.data() + t * kCols);
    }
    auto y = run(m.view, x, 7, Linear::Input::kRmsNorm, norm),
         expected = product_oracle(m.view, normed, 7);
    ASSERT_TRUE(same_sums(y.data(), expected.data(), y.size(), exact)) << "norm";
    y = run(m.view, x, 7, Linear::Input::kSwiGlu);
    expected = product_oracle(m.view, gated, 7);
    ASSERT_TRUE(same_sums(y.data(), expected.data(), y.size(), exact)) << "SwiGLU";
    expected = y;
    y = run(m.view, x, 7, Linear::Input::kSwiGlu, {}, &residual);
    for (size_t i = 0; i < y.size(); ++i) expected[i] = residual[i] + expected[i];
    ASSERT_TRUE(same_bits(y.data(), expected.data(), y.size())) << "accumulate";
    const std::vector<float> rows = run(m.view, x, 7, Linear::Input::kPlain, {}, nullptr, {6, 2});
    const std::vector<float> all = run(m.view, x, 7);
    ASSERT_TRUE(same_bits(rows.data(), all.data() + 6 * kRows, kRows));
    ASSERT_TRUE(same_bits(rows.data() + kRows, all.data() + 2 * kRows, kRows));
  }
}

TEST(CudaLinear, ActivationsBeyondF16Saturate) {
  std::mt19937 random(6);
  const RandomMatrix m = random_matrix(random, DType::kQ8_0, 16, 32, true);
  std::vector<float> x(32, 0.0f);
  x[3] = 1e6f;
  const auto y = run(m.view, x, 1), expected = product_oracle(m.view, x, 1);
  EXPECT_TRUE(same_bits(y.data(), expected.data(), y.size()));
  EXPECT_TRUE(std::isfinite(y[0]));
}

}  // namespace
}  // namespace chimera::cuda::test
