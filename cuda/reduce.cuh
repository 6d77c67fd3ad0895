// One value for all threads of a block, folded in a fixed order: within each warp by halves, then
// the warps' in turn.
#pragma once

#include "cuda/device.cuh"

namespace chimera::cuda {
inline namespace CHIMERA_CUDA_BODY {

DEVICE uint64_t shuffle_xor(uint64_t x, int mask) {
  const uint32_t high = shuffle_xor(static_cast<uint32_t>(x >> 32), mask),
                 low = shuffle_xor(static_cast<uint32_t>(x), mask);
  return static_cast<uint64_t>(high) << 32 | low;
}

// Of a block of kThreads. scratch: (kThreads / kLanes), free again afterwards.
template <int kThreads, typename T, typename F>
DEVICE T block_fold(T* scratch, T x, const F& f) {
  for (int width = kLanes / 2; width > 0; width /= 2) x = f(x, shuffle_xor(x, width));
  if (lane_index() == 0) scratch[warp_index()] = x;
  sync_threads();
  x = scratch[0];
  for (int i = 1; i < kThreads / kLanes; ++i) x = f(x, scratch[i]);
  sync_threads();
  return x;
}
template <int kThreads, typename T>
DEVICE T block_sum(T* scratch, T x) {
  return block_fold<kThreads>(scratch, x, [](T a, T b) { return a + b; });
}
template <int kThreads, typename T>
DEVICE T block_max(T* scratch, T x) {
  return block_fold<kThreads>(scratch, x, [](T a, T b) { return most(a, b); });
}

}  // namespace CHIMERA_CUDA_BODY
}  // namespace chimera::cuda
