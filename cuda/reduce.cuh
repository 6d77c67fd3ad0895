// One value for all threads of a block, folded in a fixed order: within each warp by halves, then
// the warps' in turn. And what makes "the largest, of equal ones the first" a plain maximum.
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

// A number and its index as one integer: the larger number is the larger integer, of equal numbers
// the one with the lower index; NaN is the least. Never 0.
DEVICE uint64_t order_key(float x, uint32_t index) {
  const uint32_t u = bits_of(x + 0.0f);  // -0 is 0
  const uint32_t order = is_nan(x) ? 0u : (u & 0x80000000u) != 0 ? ~u : u | 0x80000000u;
  return static_cast<uint64_t>(order) << 32 | (0xffffffffu - index);
}
DEVICE int32_t key_index(uint64_t key) {
  return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(key));
}

// The kMost largest of value(0 .. n - 1), largest first, as keys; 0 where there are fewer. Each
// thread keeps the best of its own share in registers; then kMost times the block's best is taken
// from the thread that has it.
template <int kThreads, int kMost, typename Value>
DEVICE void block_top(uint64_t* scratch, int n, const Value& value, uint64_t (&top)[kMost]) {
  uint64_t own[kMost] = {};
  constexpr int kTogether = 8;  // numbers on their way at once
  for (int first = thread_index(); first < n; first += kTogether * kThreads) {
    float x[kTogether];
    UNROLLED_FOR (int i = 0; i < kTogether; ++i)
      if (first + i * kThreads < n) x[i] = value(first + i * kThreads);
    const auto key_of = [&](int i) {
      const int at = first + i * kThreads;
      return at < n ? order_key(x[i], static_cast<uint32_t>(at)) : 0;
    };
    uint32_t larger = 0;  // a bit for each number that was, before any of them
    UNROLLED_FOR (int i = 0; i < kTogether; ++i)
      larger |= key_of(i) > own[kMost - 1] ? 1u << i : 0u;
    while (larger != 0) {  // as a rule there is none: the code that puts one in its place is long
      uint64_t key = 0;
      UNROLLED_FOR (int i = 0; i < kTogether; ++i)
        if ((larger & (0u - larger)) == 1u << i) key = key_of(i);
      larger &= larger - 1;
      UNROLLED_FOR (int j = 0; j < kMost; ++j) {  // the smaller one moves on
        const uint64_t greater = most(own[j], key);
        key = least(own[j], key);
        own[j] = greater;
      }
    }
  }
  UNROLLED_FOR (int r = 0; r < kMost; ++r) {
    top[r] = block_max<kThreads>(scratch, own[0]);
    if (own[0] == top[r]) {
      UNROLLED_FOR (int j = 0; j + 1 < kMost; ++j) own[j] = own[j + 1];
      own[kMost - 1] = 0;
    }
  }
}

}  // namespace CHIMERA_CUDA_BODY
}  // namespace chimera::cuda
