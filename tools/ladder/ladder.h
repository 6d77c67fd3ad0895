// The ladder: from a plain loop to the engine's kernel, one idea a rung. Start here, then read
// product_avx2.cc or attention_avx2.cc from top to bottom.
//
// Every rung computes the bits of the first one, and is held to it before it is timed.
#pragma once

#include <span>

#include "engine/cpu/kernels.h"

namespace chimera::ladder {

// ---- The product: y = W x for a Q4_1 matrix and m tokens ----------------------------------------

struct ProductCase {
  TensorView file;          // the matrix as the file has it
  const std::byte* panels;  // and repacked: engine/cpu/panels.h
  cpu::ProductInput x;      // (m, cols), in blocks of int8
  int m;
  float* y;  // (m, rows)
};
struct ProductRung {
  const char* name;
  const char* idea;
  cpu::Isa isa;  // that it needs
  void (*run)(const ProductCase&);
};
extern const std::span<const ProductRung> kProductRungs;

// ---- Attention over a tree ----------------------------------------------------------------------

// One chunk of one KV head: all its queries (nodes x query heads), kMaxQueries a tile.
using AttentionTiles = std::span<const cpu::AttentionChunk>;
struct AttentionRung {
  const char* name;
  const char* idea;
  cpu::Isa isa;
  void (*run)(AttentionTiles);
};
extern const std::span<const AttentionRung> kAttentionRungs;

}  // namespace chimera::ladder
