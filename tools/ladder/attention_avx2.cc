// The rungs of attention over a tree: every node sees the committed positions and its own
// ancestors, which stand among their siblings behind them. The definition is AttentionChunk's
// (engine/cpu/kernels.h): scores, their maximum, exp, a sum in 16 lanes, weighted values.
//
// Keys stand transposed in blocks of 16 positions, so that a vector holds the same element of 16
// keys.
#pragma GCC diagnostic ignored "-Wunused-function"  // most of the row kernels
#include "engine/cpu/lanes_avx2.h"
// The lanes come first: exp and the folds of a row are the engine's.
#include "engine/cpu/lanes_kernels.h"
#include "tools/ladder/ladder.h"

namespace chimera::ladder {
namespace {

using namespace cpu;  // NOLINT: the lanes have internal linkage and no other home
using Query = AttentionChunk::Query;

// ---- 1: as it is written, a query at a time -----------------------------------------------------

void one_by_one(AttentionTiles tiles, void (*attention)(const AttentionChunk&)) {
  for (const AttentionChunk& tile : tiles)
    for (int q = 0; q < tile.n_queries; ++q) {
      AttentionChunk one = tile;
      one.n_queries = 1;
      one.query[0] = tile.query[q];
      attention(one);
    }
}

void plain_loop(AttentionTiles tiles) {
  one_by_one(tiles, kScalarKernels.attention);
}

// ---- 2 and 3: vectors ---------------------------------------------------------------------------

int end_of(const AttentionChunk& c, const Query& query) {
  return query.length < c.begin + kChunk ? query.length : c.begin + kChunk;
}
int slot_of(const AttentionChunk& c, const Query& query, int p) {
  return p < query.direct ? p : query.path[p - c.committed];
}
const uint16_t* key_of(const AttentionChunk& c, int slot) {
  return static_cast<const uint16_t*>(c.k) + slot / kKeyBlock * kKeyBlock * c.head_dim +
         slot % kKeyBlock;
}

// Scores of positions that stand in their own slots, 16 at a time; the others, on a tree's paths,
// one at a time. All queries of the chunk use a key while it is at hand.
void scores(const AttentionChunk& c, float (*e)[kChunk + 32]) {
  int direct = c.begin;
  for (int q = 0; q < c.n_queries; ++q) {
    const int d =
        c.query[q].direct < end_of(c, c.query[q]) ? c.query[q].direct : end_of(c, c.query[q]);
    direct = d > direct ? d : direct;
  }
  for (int p = c.begin; p < direct; p += kKeyBlock) {
    Lanes s[kMaxQueries];
    for (int q = 0; q < c.n_queries; ++q) s[q] = broadcast(0.0f);
    for (int d = 0; d < c.head_dim; ++d) {
      const Lanes key = load_f16(key_of(c, p) + d * kKeyBlock);
      for (int q = 0; q < c.n_queries; ++q) s[q] = fma(broadcast(c.query[q].q[d]), key, s[q]);
    }
    for (int q = 0; q < c.n_queries; ++q) store(e[q] + p - c.begin, s[q]);
  }
  for (int q = 0; q < c.n_queries; ++q) {
    const Query& query = c.query[q];
    for (int p = query.direct > c.begin ? query.direct : c.begin; p < end_of(c, query); ++p) {
      const uint16_t* key = key_of(c, slot_of(c, query, p));
      float s = 0;
      for (int d = 0; d < c.head_dim; ++d)
        s = __builtin_fmaf(query.q[d], _cvtsh_ss(key[d * kKeyBlock]), s);
      e[q][p - c.begin] = s;
    }
  }
}

// Scores become weights; writes the maximum and the sum.
void softmax(const AttentionChunk& c, const Query& query, float* e) {
  const int n = end_of(c, query) - c.begin, padded = (n + 15) / 16 * 16;
  for (int i = n; i < padded; ++i) e[i] = -kInfinity;
  Lanes largest = broadcast(-kInfinity), sum = broadcast(0.0f);
  for (int i = 0; i < padded; i += 16) largest = max(load(e + i), largest);
  query.partial[0] = fold_max(largest);
  for (int i = 0; i < padded; i += 16) {
    const Lanes weight = exp(load(e + i) - broadcast(query.partial[0]));
    store(e + i, weight);
    sum = sum + weight;
  }
  query.partial[1] = fold(sum);
}

void values(const AttentionChunk& c, const Query& query, const float* e) {
  float* o = query.partial + 2;
  for (int d = 0; d < c.padded_dim; d += 16) {
    Lanes sum = broadcast(0.0f);
    for (int p = c.begin; p < end_of(c, query); ++p) {
      const auto* v = static_cast<const uint16_t*>(c.v) + slot_of(c, query, p) * c.padded_dim;
      sum = fma(broadcast(e[p - c.begin]), load_f16(v + d), sum);
    }
    store(o + d, sum);
  }
}

void vectors(const AttentionChunk& c) {
  float e[kMaxQueries][kChunk + 32];
  scores(c, e);
  for (int q = 0; q < c.n_queries; ++q) {
    softmax(c, c.query[q], e[q]);
    values(c, c.query[q], e[q]);
  }
}

// ---- 4 and up: the engine's ---------------------------------------------------------------------

void engine(AttentionTiles tiles, const Kernels& kernels) {
  for (const AttentionChunk& tile : tiles) kernels.attention(tile);
}

constexpr AttentionRung kRungs[] = {
    {"plain loop", "the definition, a number at a time, a query at a time", Isa::kScalar,
     plain_loop},
    {"lanes are keys", "16 scores at once without a sum across lanes, wherever the keys stand",
     Isa::kAvx2, [](AttentionTiles tiles) { one_by_one(tiles, vectors); }},
    {"a tile of queries", "8 nodes and heads in one pass: a key is loaded and widened once for all",
     Isa::kAvx2,
     [](AttentionTiles tiles) {
       for (const AttentionChunk& tile : tiles) vectors(tile);
     }},
    {"the engine, AVX2",
     "sums in registers, values shared too, siblings scored 16 at a time and picked by path",
     Isa::kAvx2, [](AttentionTiles tiles) { engine(tiles, kAvx2Kernels); }},
    {"the engine, AVX-512", "twice the lanes and the registers: two blocks of keys at once",
     Isa::kAvx512, [](AttentionTiles tiles) { engine(tiles, kAvx512Kernels); }},
};

}  // namespace

const std::span<const AttentionRung> kAttentionRungs = kRungs;

}  // namespace chimera::ladder
