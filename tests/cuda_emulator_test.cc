// The emulator: what it runs, and what it refuses.
#include <functional>

#include "cuda/numeric.cuh"
#include "cuda/runtime.cuh"
#include "tests/cuda_support.h"

namespace chimera::cuda::test {
namespace {

struct Params {
  float* out = nullptr;
  int n = 0;
  const void* source = nullptr;
};

// Runs a kernel and returns the message it dies with, or "".
std::string refusal(void (*kernel)(Params), unsigned threads, size_t shared = 0,
                    const Params& p = {}, Grid grid = {}) {
  try {
    launch("test", kernel, nullptr, grid, static_cast<int>(threads), shared, p);
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}
#define EXPECT_REFUSED(message, ...) \
  EXPECT_NE((message).find(__VA_ARGS__), std::string::npos) << "'" << (message) << "'"

// A block's sum: shuffles in the warps, then shared memory.
void sum_kernel(Params p) {
  auto* partial = reinterpret_cast<float*>(shared_memory());
  float x = static_cast<float>(thread_index() + block_x());
  for (int width = 16; width > 0; width /= 2) x += shuffle_xor(x, width);
  if (lane_index() == 0) partial[warp_index()] = x;
  sync_threads();
  if (thread_index() != 0) return;
  float sum = 0;
  for (int i = 0; i < block_threads() / kLanes; ++i) sum += partial[i];
  p.out[block_x()] = sum;
}

TEST(CudaEmulator, RunsBlocksInAnyOrderOfThreads) {
  for (const auto order : {emulator::Order::kAscending, emulator::Order::kDescending}) {
    emulator::set_order(order);
    std::vector<float> out(3);
    EXPECT_EQ(refusal(sum_kernel, 128, 64, {out.data(), 0, nullptr}, {3}), "");
    for (int b = 0; b < 3; ++b)
      EXPECT_EQ(out[static_cast<size_t>(b)], 127.0f * 64 + 128.0f * static_cast<float>(b));
  }
  emulator::set_order(emulator::Order::kAscending);
}

TEST(CudaEmulator, RefusesLaunchesOverTheLimits) {
  const auto nothing = [](Params) {};
  EXPECT_REFUSED(refusal(nothing, 1025), "threads a block from 1 to 1024, found 1025");
  EXPECT_REFUSED(refusal(nothing, 0), "threads a block");
  EXPECT_REFUSED(refusal(nothing, 32, 100 * 1024), "bytes of shared memory");
  EXPECT_REFUSED(refusal(nothing, 32, 0, {}, {1, 65536}), "grid.y");
  EXPECT_REFUSED(refusal(nothing, 32, 0, {}, {0}), "grid.x");
}

// Each thread takes what its number has in the next block's shared memory.
void neighbour_kernel(Params p) {
  auto* mine = reinterpret_cast<float*>(shared_memory());
  for (int i = 0; i < 4; ++i)
    mine[4 * thread_index() + i] = static_cast<float>(1000 * block_y() + 4 * thread_index() + i);
  sync_cluster();
  float next[4];
  load_cluster_16(mine + 4 * thread_index(), (block_y() + 1) % 3, next);
  p.out[block_y() * 64 + thread_index()] = next[2];
  sync_cluster();
}

TEST(CudaEmulator, BlocksOfAClusterMeet) {
  for (const auto order : {emulator::Order::kAscending, emulator::Order::kDescending}) {
    emulator::set_order(order);
    std::vector<float> out(6 * 64);
    EXPECT_EQ(refusal(neighbour_kernel, 64, 1024, {out.data(), 0, nullptr}, {1, 6, 1, 3}), "");
    for (int b = 0; b < 6; ++b)
      for (int t = 0; t < 64; ++t)
        ASSERT_EQ(out[static_cast<size_t>(b * 64 + t)],
                  static_cast<float>(1000 * (b / 3 * 3 + (b % 3 + 1) % 3) + 4 * t + 2))
            << b << " " << t;
  }
  emulator::set_order(emulator::Order::kAscending);
  const auto nothing = [](Params) {};
  EXPECT_REFUSED(refusal(nothing, 32, 0, {}, {1, 4, 1, 3}), "whole clusters");
  EXPECT_REFUSED(refusal(nothing, 32, 0, {}, {1, 9, 1, 9}), "blocks of a cluster");
  EXPECT_REFUSED(refusal(
                     [](Params) {
                       if (block_y() == 1) sync_cluster();
                     },
                     32, 0, {}, {1, 2, 1, 2}),
                 "some that have returned");
  EXPECT_REFUSED(refusal(
                     [](Params) {
                       float to[4];
                       load_cluster_16(reinterpret_cast<float*>(shared_memory()), 2, to);
                     },
                     32, 64, {}, {1, 2, 1, 2}),
                 "a block of the cluster");
}

TEST(CudaEmulator, ABlockStaysWhileItIsRead) {
  const auto leaves = [](Params) {
    auto* mine = reinterpret_cast<float*>(shared_memory());
    sync_cluster();
    float to[4];
    if (block_y() == 1) load_cluster_16(mine, 0, to);
  };
  EXPECT_REFUSED(refusal(leaves, 32, 64, {}, {1, 2, 1, 2}), "has ended");
}

TEST(CudaEmulator, RefusesDivergentBarriers) {
  // Some threads return before the barrier: first those that would come later, then earlier ones.
  EXPECT_REFUSED(refusal(
                     [](Params) {
                       if (thread_index() < 40) sync_threads();
                     },
                     64),
                 "returns without it");
  EXPECT_REFUSED(refusal(
                     [](Params) {
                       if (thread_index() >= 40) sync_threads();
                     },
                     64),
                 "some that have returned");
  const auto two_places = [](Params) {  // not in a macro, where all is one line
    if (thread_index() < 32)
      sync_threads();
    else
      sync_threads();
  };
  EXPECT_REFUSED(refusal(two_places, 64), "one at another barrier");
  // One warp waits for its own, the other for the block: nobody can go on.
  EXPECT_REFUSED(refusal(
                     [](Params) {
                       if (thread_index() == 3)
                         sync_warp();
                       else
                         sync_threads();
                     },
                     32),
                 "all waiting");
}

TEST(CudaEmulator, RefusesAbsentLanes) {
  EXPECT_REFUSED(refusal([](Params) { shuffle_xor(1.0f, 1); }, 40), "expected 32 lanes, found 8");
  EXPECT_REFUSED(refusal(
                     [](Params) {
                       if (lane_index() != 5) shuffle_xor(1.0f, 1);
                     },
                     32),
                 "returns without it");
  EXPECT_REFUSED(refusal(
                     [](Params) {
                       float d[4] = {};
                       const uint32_t a[4] = {}, b[2] = {};
                       if (lane_index() > 0) mma_f16(d, a, b);
                     },
                     32),
                 "some that have returned");
  EXPECT_REFUSED(refusal(
                     [](Params) {
                       float d[4] = {};
                       const uint32_t a[4] = {}, b[2] = {};
                       if (lane_index() > 7)
                         mma_f16(d, a, b);
                       else
                         mma_bf16(d, a, b);
                     },
                     32),
                 "where other lanes wait");
}

TEST(CudaEmulator, RefusesBadCopies) {
  const Buffer<std::byte> source(64);
  EXPECT_REFUSED(refusal([](Params p) { copy_async_16(shared_memory() + 8, p.source); }, 1, 64,
                         {nullptr, 0, source.get()}),
                 "aligned to 16");
  EXPECT_REFUSED(refusal(
                     [](Params p) {
                       copy_async_16(shared_memory(), static_cast<const std::byte*>(p.source) + 4);
                     },
                     1, 64, {nullptr, 0, source.get()}),
                 "aligned to 16");
  EXPECT_REFUSED(refusal([](Params p) { copy_async_16(shared_memory() + 64, p.source); }, 1, 64,
                         {nullptr, 0, source.get()}),
                 "shared memory");
  EXPECT_REFUSED(refusal([](Params) { shared_memory()[64] = std::byte{1}; }, 1, 64),
                 "a write at byte 64");
  EXPECT_REFUSED(refusal([](Params) { load_16(shared_memory() + 8); }, 1, 64), "aligned");
  const std::string where = refusal(
      [](Params p) {
        if (thread_index() == 2 && block_x() == 1) copy_async_16(shared_memory() + 8, p.source);
      },
      3, 64, {nullptr, 0, source.get()}, {2});
  EXPECT_REFUSED(where, "kernel test, block (1, 0, 0), thread 2, cuda_emulator_test.cc:");
}

// A copy lands when its thread waits for it and not before; memory that nobody wrote is NaN.
TEST(CudaEmulator, CopiesLandLate) {
  Buffer<float> source(8), out(3);
  std::fill(source.begin(), source.end(), 7.0f);
  const auto kernel = [](Params p) {
    auto* shared = reinterpret_cast<float*>(shared_memory());
    copy_async_16(shared, p.source);
    copy_async_commit();
    copy_async_16(shared + 4, static_cast<const float*>(p.source) + 4);
    copy_async_commit();
    p.out[0] = shared[0];
    copy_async_wait<1>();
    p.out[1] = shared[0];
    p.out[2] = shared[4];
    copy_async_wait<0>();
    p.out[2] = shared[4] == 7.0f && is_nan(p.out[2]) ? 1.0f : 0.0f;
  };
  EXPECT_EQ(refusal(kernel, 1, 32, {out.get(), 0, source.get()}), "");
  EXPECT_TRUE(std::isnan(out[0]));
  EXPECT_EQ(out[1], 7.0f);
  EXPECT_EQ(out[2], 1.0f);
}

// After a kernel was refused in the middle, the next one finds everything in order.
TEST(CudaEmulator, RecoversFromARefusal) {
  std::vector<float> out(1);
  for (int i = 0; i < 3; ++i) {
    EXPECT_REFUSED(refusal(
                       [](Params) {
                         if (thread_index() == 3)
                           sync_warp();
                         else
                           sync_threads();
                       },
                       32),
                   "all waiting");
    EXPECT_REFUSED(refusal(
                       [](Params) {
                         if (thread_index() < 40) sync_threads();
                       },
                       64),
                   "returns without it");
    EXPECT_EQ(refusal(sum_kernel, 64, 64, {out.data(), 0, nullptr}), "");
    EXPECT_EQ(out[0], 63.0f * 32);
  }
}

TEST(CudaEmulator, MmaIsAProductOfMatrices) {
  std::mt19937 random(1);
  static float a[16][16], b[16][8], c[16][8];
  for (auto& row : a)
    for (float& v : row) v = static_cast<float>(static_cast<int>(random() % 9) - 4);
  for (auto& row : b)
    for (float& v : row) v = static_cast<float>(static_cast<int>(random() % 9) - 4);
  const auto kernel = [](Params) {
    // PTX ISA, "Matrix fragments for mma.m16n8k16", spelled out apart from tape.cuh.
    const int g = lane_index() >> 2, t = lane_index() & 3;
    const auto two = [](float x, float y) { return pack(float_to_f16(x), float_to_f16(y)); };
    const uint32_t fa[4] = {
        two(a[g][t * 2], a[g][t * 2 + 1]), two(a[g + 8][t * 2], a[g + 8][t * 2 + 1]),
        two(a[g][t * 2 + 8], a[g][t * 2 + 9]), two(a[g + 8][t * 2 + 8], a[g + 8][t * 2 + 9])};
    const uint32_t fb[2] = {two(b[t * 2][g], b[t * 2 + 1][g]),
                            two(b[t * 2 + 8][g], b[t * 2 + 9][g])};
    float d[4] = {1, 1, 1, 1};
    mma_f16(d, fa, fb);
    c[g][t * 2] = d[0], c[g][t * 2 + 1] = d[1], c[g + 8][t * 2] = d[2], c[g + 8][t * 2 + 1] = d[3];
  };
  ASSERT_EQ(refusal(kernel, 32), "");
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) {
      float sum = 1;
      for (int k = 0; k < 16; ++k) sum += a[i][k] * b[k][j];
      EXPECT_EQ(c[i][j], sum);
    }
}

TEST(CudaEmulator, F16ArithmeticRoundsOnce) {
  std::mt19937 random(2);
  for (int i = 0; i < 20000; ++i) {
    const auto a = static_cast<uint16_t>(random()), b = static_cast<uint16_t>(random()),
               c = static_cast<uint16_t>(random());
    const long double exact =
        static_cast<long double>(f16_to_f32(a)) * f16_to_f32(b) + f16_to_f32(c);
    if (!std::isfinite(static_cast<double>(exact)) || std::fabs(exact) > 65000) continue;
    const float got = f16_to_f32(static_cast<uint16_t>(multiply_add_f16x2(a, b, c)));
    // No f16 is nearer.
    const uint16_t h = f32_to_f16(got);
    for (const int step : {-1, 1}) {
      const float other = f16_to_f32(static_cast<uint16_t>(h + step));
      if (!std::isfinite(other)) continue;
      EXPECT_LE(std::fabs(got - exact), std::fabs(other - exact)) << a << " " << b << " " << c;
    }
  }
}

}  // namespace
}  // namespace chimera::cuda::test
