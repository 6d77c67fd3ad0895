// The kernels' benchmark, under the emulator: that it launches what it says, within its memory.
#include "cuda/bench_kernels.cuh"
#include "tests/cuda_support.h"

namespace chimera::cuda::test {
namespace {

bool other_product(Stream, const void*, const void*, float*, int64_t, int64_t, int) {
  return true;
}

TEST(CudaBench, RunsEveryKernel) {
  KernelBench bench(/*cold_bytes=*/0, /*repeats=*/1);
  for (const DType type : kAllTypes)
    EXPECT_EQ(bench.product(type, 40, 256, {1, 9}).size(), 2u) << dtype_info(type).name;
  const auto products = bench.product(DType::kBF16, 144, 512, {2}, other_product);
  ASSERT_EQ(products.size(), 2u);
  EXPECT_EQ(products[0].kernel, "product 144 x 512");
  EXPECT_EQ(products[0].bytes, 144 * 512 * 2);
  EXPECT_EQ(products[1].kernel, "cuBLAS product 144 x 512");
  const auto others = bench.others(kTinyShape, 250, {1, 11});
  EXPECT_EQ(others.size(), 2u * 8);
  for (const Timing& t : others) EXPECT_TRUE(t.seconds >= 0 && t.bytes >= 0) << t.kernel;
}

}  // namespace
}  // namespace chimera::cuda::test
