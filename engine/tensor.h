// A view of a weight matrix where the file has it: no ownership, no copy.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <string>

#include "engine/dtype.h"

namespace chimera {

// Elements of an attention head at most: the kernels hold one on the stack.
inline constexpr int kMaxHeadDim = 1024;

struct TensorView {
  std::string name;  // for messages and `info`
  DType type = DType::kF32;
  int64_t rows = 0;                 // outputs; a vector has one row
  int64_t cols = 0;                 // inputs, contiguous
  const std::byte* data = nullptr;  // rows * row_bytes(type, cols) bytes, any alignment

  // The engine rotates pairs (i, i + head_dim/2) of a head (RoPE). Files that rotate pairs
  // (2i, 2i+1) store the rows of q and k in another order; the loader says so here, and row() hands
  // them out in the engine's order. 0: rows are in the engine's order already.
  int interleaved_head_dim = 0;

  // The memory stays as it is for as long as anything made from the view is used: a backend may
  // read the weights where they are instead of making its own copy.
  bool lasting = false;

  bool empty() const { return data == nullptr; }
  size_t bytes() const { return static_cast<size_t>(rows) * row_bytes(type, cols); }
  // Rows [first, last) as they lie in memory; there are no more than `rows`.
  std::span<const std::byte> memory(int64_t first, int64_t last) const {
    const size_t row = row_bytes(type, cols);
    return {data + static_cast<size_t>(std::min(first, rows)) * row,
            data + static_cast<size_t>(std::min(last, rows)) * row};
  }

  // Row r in the engine's order.
  const std::byte* row(int64_t r) const {
    if (interleaved_head_dim != 0) {
      const int64_t d = interleaved_head_dim, half = d / 2, i = r % d;
      r = r - i + (i < half ? 2 * i : 2 * (i - half) + 1);
    }
    return data + static_cast<size_t>(r) * row_bytes(type, cols);
  }
};

}  // namespace chimera
