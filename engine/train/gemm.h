// Matrix products of the trainer: C = A B, C += A B, with A and B read by rows or by
// columns.
//
// The usual blocked form: A and B are copied into panels as tall (wide) as the tile that stays in
// registers, k is cut into pieces that keep a panel of A in L1 and a block of B in L2. An element
// of C is one sum over k in an order that depends on k alone: the same bits for any number of
// threads.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/cpu/thread_pool.h"
#include "engine/train/ops.h"

namespace chimera::training {

// Element (i, j) is data[i * row_stride + j * col_stride]; one of the strides is 1.
template <typename T>
struct Operand {
  const T* data;
  int64_t row_stride, col_stride;

  Operand offset(int64_t i, int64_t j) const {
    return {data + i * row_stride + j * col_stride, row_stride, col_stride};
  }
};
template <typename T>
Operand<T> by_rows(const T* data, int64_t width) {
  return {data, width, 1};
}
template <typename T>
Operand<T> transposed(const T* data, int64_t width) {
  return {data, 1, width};
}

bool machine_has(Precision precision);  // and the instruction set that the engine runs with

// A tile of C: `rows` x `cols` floats, from a panel of `rows` lines of A and one of `cols` lines of
// B. A panel holds, word after word in k, that word of every line; a word is k_per_word elements.
struct TileKernel {
  int rows, cols, k_per_word;
  // Copies `count` lines (rows of A or columns of B) of length k into panels of `height` lines; the
  // last panel and the last word are filled up with zeros.
  void (*pack)(const float* data, int64_t line_stride, int64_t k_stride, int64_t count, int64_t k,
               int height, float* out);
  // c (rows, cols) with stride ldc; accumulate: added to what is there.
  void (*run)(int64_t words, const float* a, const float* b, float* c, int64_t ldc,
              bool accumulate);
};
extern const TileKernel kTileScalar, kTileAvx2, kTileAvx512, kTileAvx512Bf16;
// Of the instruction set that the engine runs with; kBF16 where machine_has() it.
const TileKernel& select_tile(Precision precision);

// Packs element by element: for tiles of one element a word.
void pack_f32(const float* data, int64_t line_stride, int64_t k_stride, int64_t count, int64_t k,
              int height, float* out);

// Scratch of one thread.
struct GemmScratch {
  std::vector<float> a, b, tile;
};

// C (m, n), stride ldc, on one thread. f64 is a plain loop, for checking gradients.
void gemm(const TileKernel& tile, GemmScratch* scratch, int64_t m, int64_t n, int64_t k,
          Operand<float> a, Operand<float> b, float* c, int64_t ldc, bool accumulate);
void gemm(const TileKernel& tile, GemmScratch* scratch, int64_t m, int64_t n, int64_t k,
          Operand<double> a, Operand<double> b, double* c, int64_t ldc, bool accumulate);

}  // namespace chimera::training
