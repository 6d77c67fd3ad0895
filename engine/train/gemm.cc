#include "engine/train/gemm.h"

#include <algorithm>

#include "engine/cpu/kernels.h"

namespace chimera::training {
namespace {

constexpr int64_t kDeepest = 320;  // words of a panel: 14 rows of A then take 18 KB of L1
constexpr int64_t kWidest = 512;   // columns of a block of B: 640 KB, for L2
constexpr int kScalarRows = 4, kScalarCols = 8;

void tile_scalar(int64_t k, const float* a, const float* b, float* c, int64_t ldc,
                 bool accumulate) {
  float sum[kScalarRows][kScalarCols] = {};
  for (int64_t p = 0; p < k; ++p) {
    for (int i = 0; i < kScalarRows; ++i) {
      for (int j = 0; j < kScalarCols; ++j) {
        sum[i][j] += a[p * kScalarRows + i] * b[p * kScalarCols + j];
      }
    }
  }
  for (int i = 0; i < kScalarRows; ++i) {
    for (int j = 0; j < kScalarCols; ++j) {
      c[i * ldc + j] = accumulate ? c[i * ldc + j] + sum[i][j] : sum[i][j];
    }
  }
}

int64_t round_up(int64_t n, int64_t step) {
  return (n + step - 1) / step * step;
}

}  // namespace

void pack_f32(const float* data, int64_t line_stride, int64_t k_stride, int64_t count, int64_t k,
              int height, float* out) {
  for (int64_t first = 0; first < count; first += height, out += k * height) {
    const int64_t lines = std::min<int64_t>(height, count - first);
    const float* source = data + first * line_stride;
    if (lines < height) std::fill(out, out + k * height, 0.0f);
    if (line_stride == 1) {
      for (int64_t p = 0; p < k; ++p) {
        std::copy(source + p * k_stride, source + p * k_stride + lines, out + p * height);
      }
      continue;
    }
    // Four lines at once, so that every cache line of the panel is met while it is at hand.
    int64_t i = 0;
    for (; i + 4 <= lines; i += 4) {
      const float* s0 = source + i * line_stride;
      const float* s1 = s0 + line_stride;
      const float* s2 = s1 + line_stride;
      const float* s3 = s2 + line_stride;
      for (int64_t p = 0; p < k; ++p) {
        float* to = out + p * height + i;
        to[0] = s0[p], to[1] = s1[p], to[2] = s2[p], to[3] = s3[p];
      }
    }
    for (; i < lines; ++i) {
      for (int64_t p = 0; p < k; ++p) out[p * height + i] = source[i * line_stride + p];
    }
  }
}

#if !defined(__x86_64__)
const TileKernel kTileAvx2{}, kTileAvx512{}, kTileAvx512Bf16{};  // in name only: other_machines.cc
#endif
const TileKernel kTileScalar = {kScalarRows, kScalarCols, 1, pack_f32, tile_scalar};

bool machine_has(Precision precision) {
  if (precision == Precision::kF32) return true;
#if defined(__x86_64__)
  const cpu::Isa isa = cpu::select_kernels().isa;
  return (isa == cpu::Isa::kAvx512 || isa == cpu::Isa::kAmx) &&
         __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

const TileKernel& select_tile(Precision precision) {
  if (precision == Precision::kBF16) return kTileAvx512Bf16;
  switch (cpu::select_kernels().isa) {
    case cpu::Isa::kAmx:
    case cpu::Isa::kAvx512: return kTileAvx512;
    case cpu::Isa::kAvxVnni:
    case cpu::Isa::kAvx2: return kTileAvx2;
    case cpu::Isa::kNeon:
    case cpu::Isa::kScalar: break;
  }
  return kTileScalar;
}

void gemm(const TileKernel& tile, GemmScratch* scratch, int64_t m, int64_t n, int64_t k,
          Operand<float> a, Operand<float> b, float* c, int64_t ldc, bool accumulate) {
  if (m == 0 || n == 0) return;
  const int64_t all_words = (k + tile.k_per_word - 1) / tile.k_per_word;
  const int64_t pieces = std::max<int64_t>(1, (all_words + kDeepest - 1) / kDeepest);
  const int64_t most_words = (all_words + pieces - 1) / pieces;
  const int64_t depth = std::max<int64_t>(most_words, 1) * tile.k_per_word;
  scratch->a.resize(static_cast<size_t>(round_up(m, tile.rows) * most_words));
  scratch->b.resize(static_cast<size_t>(round_up(std::min(n, kWidest), tile.cols) * most_words));
  scratch->tile.resize(static_cast<size_t>(tile.rows * tile.cols));
  for (int64_t p = 0; p < std::max<int64_t>(k, 1); p += depth) {
    const int64_t deep = std::min(depth, k - p);
    const int64_t words = (deep + tile.k_per_word - 1) / tile.k_per_word;
    const bool add = accumulate || p > 0;
    tile.pack(a.offset(0, p).data, a.row_stride, a.col_stride, m, deep, tile.rows,
              scratch->a.data());
    for (int64_t j0 = 0; j0 < n; j0 += kWidest) {
      const int64_t width = std::min(kWidest, n - j0);
      tile.pack(b.offset(p, j0).data, b.col_stride, b.row_stride, width, deep, tile.cols,
                scratch->b.data());
      for (int64_t i = 0; i < m; i += tile.rows) {
        const float* pa = scratch->a.data() + i * words;
        for (int64_t j = 0; j < width; j += tile.cols) {
          const float* pb = scratch->b.data() + j * words;
          float* to = c + i * ldc + j0 + j;
          const int64_t rows = std::min<int64_t>(tile.rows, m - i);
          const int64_t cols = std::min<int64_t>(tile.cols, width - j);
          if (rows == tile.rows && cols == tile.cols) {
            tile.run(words, pa, pb, to, ldc, add);
            continue;
          }
          float* edge = scratch->tile.data();
          tile.run(words, pa, pb, edge, tile.cols, false);
          for (int64_t r = 0; r < rows; ++r) {
            for (int64_t q = 0; q < cols; ++q) {
              float& y = to[r * ldc + q];
              y = add ? y + edge[r * tile.cols + q] : edge[r * tile.cols + q];
            }
          }
        }
      }
    }
  }
}

void gemm(const TileKernel&, GemmScratch*, int64_t m, int64_t n, int64_t k, Operand<double> a,
          Operand<double> b, double* c, int64_t ldc, bool accumulate) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (int64_t p = 0; p < k; ++p) sum += *a.offset(i, p).data * *b.offset(p, j).data;
      c[i * ldc + j] = accumulate ? c[i * ldc + j] + sum : sum;
    }
  }
}

}  // namespace chimera::training
