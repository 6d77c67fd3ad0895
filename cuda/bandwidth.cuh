// Reads memory and does nothing else: the speed that a product over few tokens can at best have.
#pragma once

#include "cuda/runtime.cuh"

namespace chimera::cuda {
inline namespace CHIMERA_CUDA_BODY {

// 1536 threads a multiprocessor or more with four loads of 16 bytes each: 96 KiB in flight, some
// five times what 3.35 TB/s x 0.8 us ask of each of 132. The grid is as many blocks as live at
// once: one more, and its share of the memory would be read when the others are done.
inline constexpr int kReadThreads = 512, kReadLoads = 4;

struct ReadParams {
  const std::byte* data;
  int64_t units;  // of 16 bytes
  uint32_t* sum;  // one for each block: keeps the loads from being optimised away
};
KERNEL(kReadThreads, 3) void read_kernel(ReadParams p) {
  wait_for_previous();
  const int64_t stride = static_cast<int64_t>(grid_x()) * kReadThreads;
  uint32_t sum = 0;
  for (int64_t first = static_cast<int64_t>(block_x()) * kReadThreads + thread_index();
       first < p.units; first += kReadLoads * stride) {
    Words4 loaded[kReadLoads];
    UNROLLED_FOR (int i = 0; i < kReadLoads; ++i) {
      const int64_t unit = least(first + i * stride, p.units - 1);
      loaded[i] = load_16(p.data + unit * 16);
    }
    UNROLLED_FOR (int i = 0; i < kReadLoads; ++i)
      UNROLLED_FOR (int w = 0; w < 4; ++w) sum ^= loaded[i].word[w];
  }
  for (int width = 16; width > 0; width /= 2) sum ^= shuffle_xor(sum, width);
  if (sum != 0 && lane_index() == 0) p.sum[block_x()] = sum;
}
inline void read(Stream stream, const ReadParams& p, int blocks) {
  launch("read", read_kernel, stream, {blocks}, kReadThreads, 0, p);
}

}  // namespace CHIMERA_CUDA_BODY
}  // namespace chimera::cuda
