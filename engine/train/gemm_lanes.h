// The tile kernel over 16 lanes; a lanes_*.h and kTileRows, kTileLanes must come first. Internal
// linkage, as everything that is compiled for one instruction set.
#pragma once

#include <cstdint>

namespace chimera::training {
namespace {

void tile(int64_t k, const float* a, const float* b, float* c, int64_t ldc, bool accumulate) {
  using namespace cpu;
  Lanes sum[kTileRows][kTileLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kTileLanes; ++j) sum[i][j] = broadcast(0.0f);
  }
  for (int64_t p = 0; p < k; ++p, a += kTileRows, b += 16 * kTileLanes) {
    Lanes columns[kTileLanes];
#pragma GCC unroll 2
    for (int j = 0; j < kTileLanes; ++j) columns[j] = load(b + 16 * j);
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
      const Lanes row = broadcast(a[i]);
#pragma GCC unroll 2
      for (int j = 0; j < kTileLanes; ++j) sum[i][j] = fma(row, columns[j], sum[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kTileLanes; ++j) {
      float* to = c + i * ldc + 16 * j;
      store(to, accumulate ? load(to) + sum[i][j] : sum[i][j]);
    }
  }
}

}  // namespace
}  // namespace chimera::training
