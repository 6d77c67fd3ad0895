// The fused tree attention: every row of a step against its committed positions and its ancestors.
//
// # The idea
// As in the products, keys and values are the tensor core's wide operand (16 positions, or 16
// coordinates) and queries its 8 columns: one query and 32 run the same instructions, and a column
// depends on nothing but itself. A query is a (row, query head) pair; those that share a KV head
// share its keys. A block has one chunk of 256 positions of one KV head and up to 32 queries (8,
// with less code and memory, where there are no more):
//
//   1. S^T = K Q^T by tiles of 16 positions, a warp each; scores go to shared memory
//   2. max, exp, sum for each query, a warp each                       (the CPU's definition)
//   3. O^T = V^T E^T by tiles of 16 coordinates, a warp each, positions ascending
//
// and combine_kernel adds a query's chunks in ascending order.
//
// # Ancestors
// A chunk is cut by *logical* position. Up to the sequence's committed length that is also the
// slot, for every row alike, so whole tiles below it are read once for all queries. Behind it
// siblings stand side by side; masking them would leave a row's ancestors at other places in the
// tile than they had alone, in other lanes, other sums. So a tile that touches the path is
// *gathered* for each row: the lanes load the row's own ancestors in logical order, the same mma
// runs, and only the row's own columns are kept. With a tree of depth 8 that is one tile or two for
// each row.
//
//   positions  0 ........ 15 16 ....... 31 | 32 33 34   committed = 32; row c has ancestors a, b
//   tiles      [  shared   ] [  shared   ]   [a  b  c  0 ... 0]   gathered for c
//                                            [a  d  0 ... 0]      gathered for d
//
// (A chain of prompt rows has its ancestors in the slots of their positions: `direct` says how far
// that goes for each row, and its tiles are shared as well.)
//
// Gathered from where: the slots behind the shared tiles are laid out in shared memory first, a
// slot in a row, and load_matrices() takes its fragment from any 16 of them: which, for each row
// and tile, stands in a table. A row's products go into its own columns alone, so no row waits for
// another. (LLaMA-2-7B's 32 layers, 64 nodes after 512 tokens, on an H200: 2.37 ms with fragments
// straight from the cache, 32 loads of 2 or 4 bytes each; 1.34 from shared memory, slots looked up
// by each warp for each row, one row after the other; 0.79 so.)
//
// Nothing here is done often enough to be bound by anything but latency. So loads are begun as
// early as can be: what needs the Step alone, and the keys of a warp's first tile, before the
// kernel's turn; values before the softmax. And a block waits for every instruction that it runs
// for the first time: loops are unrolled no further than loads ask for.
//
// Shared memory at head_dim 128: 90 KiB; 127 registers of 256 threads: two blocks on an H100.
//
// attention_f32_kernel is the plain form for an F32 cache: a block for each query and chunk, FMA
// chains.
#pragma once

#include "cuda/contract.cuh"
#include "cuda/kv.cuh"
#include "cuda/linear.cuh"
#include "cuda/numeric.cuh"
#include "cuda/runtime.cuh"
#include "engine/step.h"

namespace chimera::cuda {
inline namespace CHIMERA_CUDA_BODY {

struct AttentionParams {
  const Step* step;
  const float* qkv;  // (rows, (n_heads + 2 n_kv_heads) * head_dim); q rotated and scaled
  Heads heads;
  KvLayer kv;
  int max_chunks;
  float* partials;  // (rows, n_heads, max_chunks, 2 + padded_dim): max, sum, o
  float* out;       // (rows, n_heads * head_dim)

  DEVICE const float* query(int row, int head) const {
    return qkv + (static_cast<int64_t>(row) * (heads.n_heads + 2 * heads.n_kv_heads) + head) *
                     heads.head_dim;
  }
  DEVICE float* partial(int row, int head, int chunk) const {
    return partials + ((static_cast<int64_t>(row) * heads.n_heads + head) * max_chunks + chunk) *
                          (2 + kv.padded_dim);
  }
};

// One query's chunk, n <= 256 scores in shared memory, in half a warp, whose lanes are the
// contract's 16 virtual ones: lane i has positions i, i + 16, ... put(j, e) gets e = exp(s - max)
// of position 16 j + lane, for j < tiles; 0 past the last. n <= 0: none. Loops are short: a block
// runs them once for each of its queries, and waits for every instruction that it has not run yet.
inline constexpr int kHalfWarp = 16;
struct MaxSum {
  float max, sum;
};
template <typename F>
DEVICE MaxSum softmax_chunk(const float* s, int n, int tiles, const F& put) {
  const int lane = lane_index() % kHalfWarp;
  float largest = -infinity();
  UNROLL_BY(8)
  for (int i = lane; i < n; i += kHalfWarp) largest = s[i] > largest ? s[i] : largest;
  for (int width = kHalfWarp / 2; width > 0; width /= 2) {
    const float other = shuffle_xor(largest, width);
    largest = other > largest ? other : largest;
  }
  float sum = 0;
  UNROLL_BY(4)
  for (int j = 0; j < tiles; ++j) {
    const int i = lane + j * kHalfWarp;
    const float e = i < n ? exp_contract(s[i] - largest) : 0.0f;
    sum = sum + e;
    put(j, e);
  }
  return {largest, fold_16(sum)};
}

// ---- F32 cache ---------------------------------------------------------------------------------

inline constexpr int kPlainThreads = 128;
KERNEL(kPlainThreads, 1) void attention_f32_kernel(AttentionParams p) {
  wait_for_previous();
  const Step* step = p.step;
  const int chunk = block_x(), head = block_y(), row = step->first_new + block_z(),
            begin = chunk * kChunk;
  if (row >= step->n_rows || step->position[row] < begin) return;
  const int n = least(step->position[row] + 1 - begin, kChunk), dim = p.heads.head_dim;
  const int sequence = step->sequence[row];
  auto* e = reinterpret_cast<float*>(shared_memory());
  auto* slots = reinterpret_cast<int*>(e + kChunk);
  for (int i = thread_index(); i < n; i += block_threads()) slots[i] = begin + i;
  sync_threads();
  if (thread_index() == 0)
    for (int node = row; node >= 0 && step->position[node] >= begin; node = step->parent[node])
      if (step->position[node] - begin < n) slots[step->position[node] - begin] = step->slot[node];
  sync_threads();

  const int64_t base = p.kv.head_offset(sequence, head / (p.heads.n_heads / p.heads.n_kv_heads));
  const float* q = p.query(row, head);
  for (int i = thread_index(); i < n; i += block_threads()) {
    float score = 0;
    for (int d = 0; d < dim; ++d)
      score = fma(q[d], load_kv(p.kv.type, p.kv.k, base + p.kv.k_index(slots[i], d)), score);
    e[i] = score;
  }
  sync_threads();
  float* partial = p.partial(row, head, chunk);
  if (warp_index() == 0) {
    const int lane = lane_index();
    const MaxSum m =
        softmax_chunk(e, lane < kHalfWarp ? n : 0, ceil_div(n, kHalfWarp), [&](int j, float x) {
          if (lane < kHalfWarp && lane + j * kHalfWarp < n) e[lane + j * kHalfWarp] = x;
        });
    if (lane == 0) {
      partial[0] = m.max;
      partial[1] = m.sum;
    }
  }
  sync_threads();
  for (int d = thread_index(); d < dim; d += block_threads()) {
    float o = 0;
    for (int i = 0; i < n; ++i)
      o = fma(e[i], load_kv(p.kv.type, p.kv.v, base + p.kv.v_index(slots[i], d)), o);
    partial[2 + d] = o;
  }
}

// ---- F16 cache ---------------------------------------------------------------------------------

inline constexpr int kAttentionThreads = 256, kAttentionWarps = kAttentionThreads / kLanes;
inline constexpr int kMostQueryTiles = 4;  // of a block, of 8 queries
inline constexpr int kChunkTiles = kChunk / kKvTile;
inline constexpr int kScoreStride =
    kChunk + 4;  // floats; + 4: the 32 lanes of a C fragment hit 32 banks

// Queries [first, first + count) of a sequence's new (row, query head) pairs of one KV head.
struct QueryTile {
  int sequence, first, count;  // count 0: there is no such tile
  // Of the sequence; its rows from first_new on ask.
  int first_row, end_row, first_new, committed;
};
// What it reads of the Step is on its way at once: no load waits for another.
DEVICE QueryTile query_tile(const Step* step, int group, int index, int queries) {
  const int n_sequences = early(step->n_sequences), first_new = early(step->first_new);
  const auto read = [&](int s) {
    const Step::Sequence& of = step->sequences[s];
    const int first_row = early(of.first_row), n_rows = early(of.n_rows);
    return QueryTile{s, 0, 0, first_row, first_row + n_rows, first_new, early(of.committed)};
  };
  QueryTile t = read(0);
  for (int next = 1; next <= n_sequences; ++next) {
    t.first_new = most(t.first_row, first_new);
    const int pairs = most(0, t.end_row - t.first_new) * group, n = ceil_div(pairs, queries);
    if (index < n) {
      t.first = index * queries;
      t.count = least(queries, pairs - t.first);
      return t;
    }
    index -= n;
    if (next < n_sequences) t = read(next);
  }
  return {};
}

struct AttentionShared {
  float* scores;  // (queries, kScoreStride); then e
  uint16_t* v;    // ... and then, in the same place, as k
  uint32_t* e;    // B fragments: (position tile, query tile, lane, 2)
  uint32_t* q;    // B fragments: (query tile, dim tile, lane, 2)
  uint16_t* k;    // (tail_slots + 1, padded_dim + 8): what is gathered, a slot in a row; zeros
  int* row;       // (queries) row of the tile and head of the group that a query is
  int* head;
  int* length;         // (rows of the tile) positions that a row sees
  int* direct;         // (rows of the tile) positions below stand in the slot of the same number
  uint32_t* gathered;  // (kChunkTiles) by position tile behind the whole ones: a bit for each row
                       // of the tile for which it is gathered
  int16_t* parent;     // (rows of the step) in shared memory, where a walk takes no time
  uint8_t* slot;       // ... - committed
  uint8_t* path;       // (rows of the tile, kMaxRows): slot of the ancestor at depth i, - committed
  uint8_t* at;  // (rows of the tile, tail_slots): by position of the tail, the row of k and v
};
// Slots of K and V that are laid out in shared memory to be gathered from there: those of a tree of
// 64 nodes and of the tile that it begins in, or fewer where sm_89's 99 KiB have no room.
BOTH constexpr int tail_slots(int padded_dim) {
  return padded_dim <= 128 ? 80 : padded_dim <= 256 ? 32 : 0;
}
// f16 of a slot: 16 bytes more than needed put 8 neighbours into all 32 banks.
BOTH constexpr int tail_stride(int padded_dim) { return padded_dim + 8; }
BOTH constexpr int tail_bytes(int padded_dim) {
  return (tail_slots(padded_dim) + 1) * tail_stride(padded_dim) * 2;
}
BOTH constexpr int score_bytes(int queries, int padded_dim) {
  return most(queries * kScoreStride * 4, tail_bytes(padded_dim));
}
BOTH constexpr size_t attention_shared_bytes(int query_tiles, int padded_dim) {
  const int queries = 8 * query_tiles;
  return static_cast<size_t>(
      score_bytes(queries, padded_dim) + kChunkTiles * query_tiles * kLanes * 8 +
      query_tiles * padded_dim / kKvTile * kLanes * 8 + tail_bytes(padded_dim) + queries * 16 +
      kChunkTiles * 4 + Step::kMaxRows * 3 + queries * (Step::kMaxRows + tail_slots(padded_dim)));
}
static_assert(attention_shared_bytes(kMostQueryTiles, 256) <= 99 * 1024);
DEVICE AttentionShared carve_attention(int query_tiles, int padded_dim) {
  const int queries = 8 * query_tiles;
  AttentionShared s;
  s.scores = reinterpret_cast<float*>(shared_memory());
  s.v = reinterpret_cast<uint16_t*>(s.scores);
  s.e = reinterpret_cast<uint32_t*>(shared_memory() + score_bytes(queries, padded_dim));
  s.q = s.e + kChunkTiles * query_tiles * kLanes * 2;
  s.k = reinterpret_cast<uint16_t*>(s.q + query_tiles * (padded_dim / kKvTile) * kLanes * 2);
  s.row = reinterpret_cast<int*>(s.k + tail_bytes(padded_dim) / 2);
  s.head = s.row + queries;
  s.length = s.head + queries;
  s.direct = s.length + queries;
  s.gathered = reinterpret_cast<uint32_t*>(s.direct + queries);
  s.parent = reinterpret_cast<int16_t*>(s.gathered + kChunkTiles);
  s.slot = reinterpret_cast<uint8_t*>(s.parent + Step::kMaxRows);
  s.path = s.slot + Step::kMaxRows;
  s.at = s.path + queries * Step::kMaxRows;
  return s;
}

// What a block has to do: its queries, the positions of its chunk in tiles, and the steps of the
// work, in the order of attention_kernel().
//
//   tiles of the chunk   0 ........... whole ........... shared ........... tiles
//   all rows             read once     |                 |                  |
//   direct rows                        read once         |                  |
//   other rows                         gathered          gathered           |
template <int kQueryTiles>
class AttentionBlock {
 public:
  static constexpr int kQueries = 8 * kQueryTiles;
  static constexpr int kEarlyDims = 8;             // of 16 coordinates
  static constexpr int kValues = kChunkTiles / 2;  // tiles of values that are loaded at once

  DEVICE explicit AttentionBlock(const AttentionParams& params)
      : p(params),
        step(p.step),
        begin(block_x() * kChunk),
        kv_head(block_y()),
        group(p.heads.n_heads / p.heads.n_kv_heads),
        dim_tiles(p.kv.padded_dim / kKvTile),
        s(carve_attention(kQueryTiles, p.kv.padded_dim)),
        g(lane_index() / 4),
        t(lane_index() % 4) {}

  // Finds the queries and where each row's ancestors are; false: there is nothing to do. Of what
  // the Step says of a row each thread asks for one at once, while the tile is looked up.
  DEVICE bool find_queries() {
    static_assert(kAttentionThreads >= Step::kMaxRows);
    const int own = least(thread_index(), Step::kMaxRows - 1);
    const int own_parent = early(step->parent[own]), own_slot = early(step->slot[own]),
              own_position = early(step->position[own]);
    queries = query_tile(step, group, block_z(), kQueries);
    committed = queries.committed;
    if (queries.count == 0 || begin >= committed + queries.end_row - queries.first_row)
      return false;
    skipped = queries.first / group;
    n_rows = (queries.first + queries.count - 1) / group - skipped + 1;
    first_row = queries.first_new + skipped;
    query_tiles = ceil_div(queries.count, 8);
    if (thread_index() < queries.count) {
      const int pair = queries.first + thread_index();
      s.row[thread_index()] = pair / group - skipped;
      s.head[thread_index()] = kv_head * group + pair % group;
    }
    if (own >= queries.first_row && own < first_row + n_rows) {
      s.parent[own] = static_cast<int16_t>(own_parent);
      s.slot[own] = static_cast<uint8_t>(own_slot - committed);
      if (own >= first_row) s.length[own - first_row] = own_position + 1;
    }
    sync_threads();
    if (thread_index() < n_rows) {
      uint8_t* path = s.path + thread_index() * Step::kMaxRows;
      const int position = s.length[thread_index()] - 1;
      int depth = position - committed;
      for (int node = first_row + thread_index(); node >= 0; node = s.parent[node])
        path[depth--] = s.slot[node];
      int direct = committed;
      while (direct <= position && path[direct - committed] == direct - committed) ++direct;
      s.direct[thread_index()] = direct;
    }
    sync_threads();
    return true;
  }

  // Finds the tiles; false: no row sees this chunk.
  DEVICE bool find_tiles() {
    int longest = 0, least_direct = committed + Step::kMaxRows, most_direct = 0;
    for (int r = 0; r < n_rows; ++r) {
      longest = most(longest, s.length[r]);
      least_direct = least(least_direct, s.direct[r]);
      most_direct = most(most_direct, s.direct[r]);
    }
    if (longest <= begin) return false;
    tiles = least(kChunkTiles, ceil_div(longest - begin, kKvTile));
    shared = most(0, least(tiles, (most_direct - begin) / kKvTile));
    whole = most(0, least(tiles, (least_direct - begin) / kKvTile));

    const int64_t base = p.kv.head_offset(queries.sequence, kv_head);
    k_cache = static_cast<const uint16_t*>(p.kv.k) + base;
    v_cache = static_cast<const uint16_t*>(p.kv.v) + base;
    UNROLLED_FOR (int j = 0; j < kQueryTiles; ++j)
      UNROLLED_FOR (int i = 0; i < 2; ++i) {
        const int query = j * 8 + 2 * t + i;
        row_of[j][i] = query < queries.count ? s.row[query] : -1;
        direct_of[j][i] = query < queries.count ? s.direct[row_of[j][i]] : -1;
      }
    tail_from = begin + whole * kKvTile;
    n_tail = committed + s.slot[first_row + n_rows - 1] + 1 - tail_from;
    zeros = tail_slots(p.kv.padded_dim);
    stride = tail_stride(p.kv.padded_dim);
    staged = whole < tiles && n_tail <= zeros;
    return true;
  }

  // For each row, where in the tail its ancestors stand, and the tiles that it gathers.
  DEVICE void make_tables() {
    if (!staged) return;
    const int span = (tiles - whole) * kKvTile;
    for (int row = warp_index(); row < n_rows; row += kAttentionWarps)
      for (int i = lane_index(); i < span; i += kLanes)
        s.at[row * zeros + i] = static_cast<uint8_t>(
            tail_from + i < s.length[row] ? slot_of(row, tail_from + i) - tail_from : zeros);
    for (int tile = whole + warp_index(); tile < tiles; tile += kAttentionWarps) {
      uint32_t rows =
          lane_index() < n_rows && is_gathered(tile, lane_index()) ? 1u << lane_index() : 0u;
      for (int width = kLanes / 2; width > 0; width /= 2) rows |= shuffle_xor(rows, width);
      if (lane_index() == 0) s.gathered[tile - whole] = rows;
    }
  }

  // Keys and values of the chunk, tile by tile, are on their way to L2, those that are there
  // already, while the rows before this kernel's turn are made. The keys of a warp's first tile
  // come all the way, if nothing in it can be new.
  DEVICE void ask_ahead(uint32_t (&keys)[kEarlyDims][4]) const {
    const int wanted = staged ? most(tiles, whole + ceil_div(n_tail, kKvTile)) : tiles;
    for (int i = 128 * thread_index(); i < wanted * dim_tiles * 512; i += 128 * kAttentionThreads) {
      prefetch_l2(reinterpret_cast<const std::byte*>(k_cache + p.kv.tile(begin / kKvTile, 0)) + i);
      prefetch_l2(reinterpret_cast<const std::byte*>(v_cache + p.kv.tile(begin / kKvTile, 0)) + i);
    }
    if (is_early(warp_index()))
      UNROLLED_FOR (int dim_tile = 0; dim_tile < kEarlyDims; ++dim_tile)
        if (dim_tile < dim_tiles) {
          const Words4 w = early_16(k_cache + p.kv.tile(begin / kKvTile + warp_index(), dim_tile) +
                                    lane_index() * 8);
          UNROLLED_FOR (int r = 0; r < 4; ++r) keys[dim_tile][r] = w.word[r];
        }
  }

  // Queries, rounded, as B fragments: k = coordinate, column = query. Loads of all of a warp's go
  // ahead of what is done with them; a lane has 4 coordinates.
  DEVICE void place_queries() const {
    constexpr int kEach = kQueries / kAttentionWarps, kCoordinates = 4;
    const int dim = p.heads.head_dim;
    UNROLL_BY(1)
    for (int d = kCoordinates * lane_index(); d < p.kv.padded_dim; d += kCoordinates * kLanes) {
      float q[kEach][kCoordinates];
      UNROLLED_FOR (int i = 0; i < kEach; ++i) {
        const int query = warp_index() + i * kAttentionWarps;
        const bool live = query < queries.count;
        const float* from =
            p.query(first_row + (live ? s.row[query] : 0), live ? s.head[query] : 0);
        UNROLLED_FOR (int c = 0; c < kCoordinates; ++c)
          q[i][c] = live && d + c < dim ? from[d + c] : 0.0f;
      }
      UNROLLED_FOR (int i = 0; i < kEach; ++i) {
        const int query = warp_index() + i * kAttentionWarps;
        if (query >= query_tiles * 8) break;
        UNROLLED_FOR (int c = 0; c < kCoordinates; c += 2) {
          const Place16 at = place_b(d % 16 + c, query % 8);
          s.q[((query / 8 * dim_tiles + d / 16) * kLanes + at.lane) * 2 + at.reg] =
              pack(saturate_f16(q[i][c]), saturate_f16(q[i][c + 1]));
        }
      }
    }
  }

  // Lays out the tail of the keys, or of the values, a slot in a row, so that a fragment of any 16
  // slots is one load_matrices(). (From the cache itself it is 32 loads of 2 or 4 bytes, a sector
  // each: only for trees that are larger than the tail.) Values take the scores' place, and are
  // there for all threads when this returns.
  DEVICE void stage_keys() const {
    if (!staged) return;
    stage(k_cache, s.k, [this](uint16_t* to, int r, uint32_t two) {
      *reinterpret_cast<uint32_t*>(to + (g + 8 * (r % 2)) * stride + 2 * t + 8 * (r / 2)) = two;
    });
  }
  DEVICE void stage_values() const {
    if (!staged) return;
    stage(v_cache, s.v, [this](uint16_t* to, int r, uint32_t two) {
      to += (2 * t + 8 * (r / 2)) * stride + g + 8 * (r % 2);
      to[0] = static_cast<uint16_t>(two);
      to[stride] = static_cast<uint16_t>(two >> 16);
    });
    sync_threads();
  }

  // Scores of the tiles that stand in their own slots, for the rows for which they do.
  DEVICE void score_shared(uint32_t (&keys)[kEarlyDims][4]) const {
    UNROLL_BY(1)
    for (int tile = warp_index(); tile < shared; tile += kAttentionWarps) {
      const int end = begin + (tile + 1) * kKvTile;
      float c[kQueryTiles][4] = {};
      const auto multiply = [&](int dim_tile, const uint32_t(&a)[4]) {
        UNROLLED_FOR (int j = 0; j < kQueryTiles; ++j) {
          if (j >= query_tiles) break;
          uint32_t b[2];
          query_fragment(j, dim_tile, b);
          mma_f16(c[j], a, b);
        }
      };
      if (tile != warp_index() || !is_early(tile))
        UNROLLED_FOR (int dim_tile = 0; dim_tile < kEarlyDims; ++dim_tile)
          if (dim_tile < dim_tiles)
            load_tile(k_cache, begin / kKvTile + tile, dim_tile, keys[dim_tile]);
      UNROLLED_FOR (int dim_tile = 0; dim_tile < kEarlyDims; ++dim_tile)
        if (dim_tile < dim_tiles) multiply(dim_tile, keys[dim_tile]);
      for (int dim_tile = kEarlyDims; dim_tile < dim_tiles; ++dim_tile) {
        uint32_t a[4];
        load_tile(k_cache, begin / kKvTile + tile, dim_tile, a);
        multiply(dim_tile, a);
      }
      UNROLLED_FOR (int j = 0; j < kQueryTiles; ++j)
        store_scores(c[j], tile, j, [&](int /*row*/, int direct) { return end <= direct; });
    }
  }

  // Scores of the gathered tiles. They are few, but there is one of each for every row: the pairs
  // of tile and row are dealt to all warps.
  DEVICE void score_gathered() const {
    const int pairs = (tiles - whole) * n_rows;
    if (!staged) {
      for (int pair = warp_index(); pair < pairs; pair += kAttentionWarps)
        score_from_cache(whole + pair / n_rows, pair % n_rows);
      return;
    }
    constexpr int kTogether = 2;  // chains of products that need not wait for each other
    for (int first = warp_index(); first < pairs; first += kTogether * kAttentionWarps) {
      const uint16_t* k[kTogether];
      int tile[kTogether], row[kTogether];
      bool wanted[kTogether];
      UNROLLED_FOR (int i = 0; i < kTogether; ++i) {
        const int pair = first + i * kAttentionWarps;
        tile[i] = whole + pair / n_rows, row[i] = pair % n_rows;
        wanted[i] = pair < pairs && is_staged(tile[i], row[i]);
        k[i] = s.k + lane_index() / 16 * 8 +
               (wanted[i] ? staged_row(row[i], tile[i], lane_index() % 16) : zeros * stride);
      }
      UNROLLED_FOR (int j = 0; j < kQueryTiles; ++j) {
        bool has_any = false;
        UNROLLED_FOR (int i = 0; i < kTogether; ++i)
          has_any = has_any || (wanted[i] && has(j, row[i]));
        if (!has_any) continue;
        float c[kTogether][4] = {};
        UNROLL_BY(4)
        for (int dim_tile = 0; dim_tile < dim_tiles; ++dim_tile) {
          uint32_t b[2];
          query_fragment(j, dim_tile, b);
          UNROLLED_FOR (int i = 0; i < kTogether; ++i) {
            uint32_t a[4];
            load_matrices<false>(k[i] + dim_tile * kKvTile, a);
            mma_f16(c[i], a, b);
          }
        }
        UNROLLED_FOR (int i = 0; i < kTogether; ++i)
          if (wanted[i] && has(j, row[i])) store_row(c[i], tile[i], j, row[i]);
      }
    }
  }

  // Values of kValues whole tiles from `first` on.
  DEVICE void load_values(int dim_tile, int first, uint32_t (&values)[kValues][4]) const {
    UNROLLED_FOR (int i = 0; i < kValues; ++i)
      if (dim_tile < dim_tiles && first + i < whole)
        load_tile(v_cache, begin / kKvTile + first + i, dim_tile, values[i]);
  }

  // Softmax of the chunk, and e as B fragments: k = position, column = query.
  DEVICE void softmax() const {
    for (int pair = warp_index(); 2 * pair < queries.count; pair += kAttentionWarps) {
      const int lane = lane_index() % kHalfWarp, query = 2 * pair + lane_index() / kHalfWarp;
      const int row = query < queries.count ? s.row[query] : -1,
                n = row >= 0 ? least(kChunk, s.length[row] - begin) : 0;
      const Place16 at = place_b(lane, query % 8);
      auto* to = reinterpret_cast<uint16_t*>(s.e) +
                 ((query / 8 * kLanes + at.lane) * 2 + at.reg) * 2 + at.half;
      const MaxSum m = softmax_chunk(
          s.scores + query * kScoreStride, n, tiles,
          [&](int tile, float e) { to[tile * kQueryTiles * kLanes * 4] = float_to_f16(e); });
      if (n > 0 && lane == 0) {
        float* partial = p.partial(first_row + row, s.head[query], block_x());
        partial[0] = m.max;
        partial[1] = m.sum;
      }
    }
  }

  // The output: positions ascending. `values` holds those of the warp's first tiles.
  DEVICE void add_values(uint32_t (&values)[kValues][4]) const {
    for (int dim_tile = warp_index(); dim_tile < dim_tiles; dim_tile += kAttentionWarps) {
      Sums o = {};
      UNROLL_BY(1)
      for (int first = 0; first < kChunkTiles; first += kValues) {
        UNROLLED_FOR (int i = 0; i < kValues; ++i) {
          if (first + i >= whole) break;
          UNROLLED_FOR (int j = 0; j < kQueryTiles; ++j) {
            if (j >= query_tiles) break;
            uint32_t b[2];
            e_fragment(first + i, j, b);
            mma_f16(o[j], values[i], b);
          }
        }
        const bool last = first + kValues == kChunkTiles;
        load_values(last ? dim_tile + kAttentionWarps : dim_tile, last ? 0 : first + kValues,
                    values);
      }
      for (int tile = whole; tile < tiles; ++tile) {
        if (tile < shared) add_shared(o, tile, dim_tile);
        if (staged)
          add_staged(o, tile, dim_tile);
        else
          add_from_cache(o, tile, dim_tile);
      }
      UNROLLED_FOR (int j = 0; j < kQueryTiles; ++j)
        UNROLLED_FOR (int i = 0; i < 2; ++i) {
          const int row = row_of[j][i];
          if (row < 0 || s.length[row] <= begin) continue;
          float* to = p.partial(first_row + row, s.head[j * 8 + 2 * t + i], block_x()) + 2 +
                      dim_tile * kKvTile + g;
          to[0] = o[j][i];
          to[8] = o[j][i + 2];
        }
    }
  }

 private:
  using Sums = float[kQueryTiles][4];  // C fragments

  // ---- Who sees what ----
  DEVICE int slot_of(int row, int position) const {
    return position < committed ? position
                                : committed + s.path[row * Step::kMaxRows + position - committed];
  }
  // Does a row see the tile, and not in slots of the same numbers?
  DEVICE bool is_gathered(int tile, int row) const {
    return begin + (tile + 1) * kKvTile > s.direct[row] && s.length[row] > begin + tile * kKvTile;
  }
  DEVICE bool is_staged(int tile, int row) const {  // the same, from the table
    return (s.gathered[tile - whole] >> row & 1u) != 0;
  }
  // Where in s.k or s.v stands what a row sees at a position of a tile.
  DEVICE int staged_row(int row, int tile, int position) const {
    return s.at[row * zeros + (tile - whole) * kKvTile + position] * stride;
  }
  // Can nothing in the tile be new: is it a shared one below the committed length?
  DEVICE bool is_early(int tile) const {
    return tile < shared && begin + (tile + 1) * kKvTile <= committed;
  }
  // Has a tile of queries any of a row? Those of a row follow each other.
  DEVICE bool has(int query_tile, int row) const {
    const int first = (skipped + row) * group - queries.first;
    return first < 8 * (query_tile + 1) && least(first + group, queries.count) > 8 * query_tile;
  }

  // ---- Fragments ----
  DEVICE void load_tile(const uint16_t* cache, int slot_tile, int dim_tile,
                        uint32_t (&a)[4]) const {
    const Words4 w = load_16(cache + p.kv.tile(slot_tile, dim_tile) + lane_index() * 8);
    UNROLLED_FOR (int r = 0; r < 4; ++r) a[r] = w.word[r];
  }
  DEVICE void query_fragment(int query_tile, int dim_tile, uint32_t (&b)[2]) const {
    const Words2 w =
        load_8(s.q + ((query_tile * dim_tiles + dim_tile) * kLanes + lane_index()) * 2);
    b[0] = w.word[0];
    b[1] = w.word[1];
  }
  DEVICE void e_fragment(int tile, int query_tile, uint32_t (&b)[2]) const {
    const Words2 w = load_8(s.e + ((tile * kQueryTiles + query_tile) * kLanes + lane_index()) * 2);
    b[0] = w.word[0];
    b[1] = w.word[1];
  }
  template <typename Put>
  DEVICE void stage(const uint16_t* cache, uint16_t* to, const Put& put) const {
    for (int i = thread_index(); i < stride; i += kAttentionThreads) to[zeros * stride + i] = 0;
    for (int dim_tile = warp_index(); dim_tile < dim_tiles; dim_tile += kAttentionWarps) {
      UNROLL_BY(5)
      for (int slot = 0; slot < n_tail; slot += kKvTile) {
        uint32_t a[4];
        load_tile(cache, (tail_from + slot) / kKvTile, dim_tile, a);
        UNROLLED_FOR (int r = 0; r < 4; ++r) put(to + slot * stride + dim_tile * kKvTile, r, a[r]);
      }
    }
  }

  // ---- Scores ----
  // Of the queries for which wanted(row, how far it is direct) holds.
  template <typename Wanted>
  DEVICE void store_scores(const float (&c)[4], int tile, int j, const Wanted& wanted) const {
    UNROLLED_FOR (int i = 0; i < 4; ++i)
      if (wanted(row_of[j][i % 2], direct_of[j][i % 2]))
        s.scores[(j * 8 + 2 * t + i % 2) * kScoreStride + tile * kKvTile + g + 8 * (i / 2)] = c[i];
  }
  DEVICE void store_row(const float (&c)[4], int tile, int j, int row) const {
    store_scores(c, tile, j, [&](int r, int /*direct*/) { return r == row; });
  }
  // A gathered tile's scores for a row where the tail is too long for shared memory. Lanes 4 g ..
  // 4 g + 3 load positions g and g + 8 of the tile, as this row sees them.
  DEVICE void score_from_cache(int tile, int row) const {
    if (!is_gathered(tile, row)) return;
    int64_t at[2];
    bool seen[2];
    UNROLLED_FOR (int i = 0; i < 2; ++i) {
      const int position = begin + tile * kKvTile + g + 8 * i;
      seen[i] = position < s.length[row];
      at[i] = seen[i] ? p.kv.k_index(slot_of(row, position), 2 * t) : 0;
    }
    UNROLLED_FOR (int j = 0; j < kQueryTiles; ++j) {
      if (!has(j, row)) continue;
      float c[4] = {};
      for (int dim_tile = 0; dim_tile < dim_tiles; ++dim_tile) {
        uint32_t a[4], b[2];
        // Coordinates 2 t + 8: two registers, four elements, on.
        UNROLLED_FOR (int r = 0; r < 4; ++r)
          a[r] = seen[r % 2] ? *reinterpret_cast<const uint32_t*>(k_cache + at[r % 2] +
                                                                  dim_tile * 256 + r / 2 * 4)
                             : 0u;
        query_fragment(j, dim_tile, b);
        mma_f16(c, a, b);
      }
      store_row(c, tile, j, row);
    }
  }

  // ---- Output ----
  // o of the wanted queries' columns becomes mma(a, e, o); the others stay.
  template <typename Wanted>
  DEVICE void add(Sums& o, int tile, int j, const uint32_t (&a)[4], const Wanted& wanted) const {
    uint32_t b[2];
    e_fragment(tile, j, b);
    float c[4] = {o[j][0], o[j][1], o[j][2], o[j][3]};
    mma_f16(c, a, b);
    UNROLLED_FOR (int i = 0; i < 4; ++i)
      if (wanted(row_of[j][i % 2], direct_of[j][i % 2])) o[j][i] = c[i];
  }
  DEVICE void add_shared(Sums& o, int tile, int dim_tile) const {
    const int end = begin + (tile + 1) * kKvTile;
    uint32_t a[4];
    load_tile(v_cache, begin / kKvTile + tile, dim_tile, a);
    UNROLLED_FOR (int j = 0; j < kQueryTiles; ++j)
      if (j < query_tiles)
        add(o, tile, j, a, [&](int /*row*/, int direct) { return end <= direct; });
  }
  // A row's products go into its own columns alone, so rows need not wait for each other: each
  // begins with the sums as they were.
  DEVICE void add_staged(Sums& o, int tile, int dim_tile) const {
    constexpr int kTogether = 4;
    const int position = lane_index() % 8 + lane_index() / 16 * 8;
    const uint16_t* v = s.v + dim_tile * kKvTile + lane_index() / 8 % 2 * 8;
    UNROLLED_FOR (int j = 0; j < kQueryTiles; ++j) {
      if (j >= query_tiles) break;
      uint32_t b[2];
      e_fragment(tile, j, b);
      const float before[4] = {o[j][0], o[j][1], o[j][2], o[j][3]};
      const int end_row = s.row[least(j * 8 + 7, queries.count - 1)] + 1;
      UNROLL_BY(1)
      for (int first = s.row[j * 8]; first < end_row; first += kTogether) {
        uint32_t a[kTogether][4];
        bool wanted[kTogether];
        UNROLLED_FOR (int i = 0; i < kTogether; ++i) {
          wanted[i] = first + i < end_row && is_staged(tile, first + i);
          load_matrices<true>(
              v + (wanted[i] ? staged_row(first + i, tile, position) : zeros * stride), a[i]);
        }
        UNROLLED_FOR (int i = 0; i < kTogether; ++i) {
          if (!wanted[i]) continue;
          float c[4] = {before[0], before[1], before[2], before[3]};
          mma_f16(c, a[i], b);
          UNROLLED_FOR (int k = 0; k < 4; ++k)
            if (row_of[j][k % 2] == first + i) o[j][k] = c[k];
        }
      }
    }
  }
  DEVICE void add_from_cache(Sums& o, int tile, int dim_tile) const {
    for (int row = 0; row < n_rows; ++row) {
      if (!is_gathered(tile, row)) continue;
      uint32_t a[4];
      const int n = s.length[row];
      // Rows: coordinates g, g + 8; k: positions 2 t, 2 t + 1, + 8.
      UNROLLED_FOR (int r = 0; r < 4; ++r) {
        const int position = begin + tile * kKvTile + 2 * t + 8 * (r / 2),
                  d = dim_tile * kKvTile + g + 8 * (r % 2);
        const auto value = [&](int at) {
          return at < n ? v_cache[p.kv.v_index(slot_of(row, at), d)] : uint16_t{0};
        };
        a[r] = pack(value(position), value(position + 1));
      }
      UNROLLED_FOR (int j = 0; j < kQueryTiles; ++j)
        if (has(j, row)) add(o, tile, j, a, [&](int r, int /*direct*/) { return r == row; });
    }
  }

  const AttentionParams& p;
  const Step* step;
  int begin;  // first position of the chunk
  int kv_head, group, dim_tiles;
  AttentionShared s;
  QueryTile queries{};
  int committed = 0;
  int first_row = 0, n_rows = 0;  // that ask
  int skipped = 0;                // new rows of the sequence before those
  int query_tiles = 0;
  int tiles = 0;   // of the chunk, that anyone sees
  int shared = 0;  // tiles below are direct for some row
  int whole = 0;   // those below for all: none is gathered
  const uint16_t *k_cache = nullptr, *v_cache = nullptr;
  // What is gathered: n_tail slots from tail_from on, which is a position as well. Staged: they
  // stand in shared memory, `stride` elements each, and behind them, at `zeros`, a row of zeros.
  int tail_from = 0, n_tail = 0, zeros = 0, stride = 0;
  bool staged = false;
  // A lane's own: its place in a fragment, and of the two queries of each of its C fragments the
  // row (-1: no query) and how far that is direct.
  int g, t;
  int row_of[kQueryTiles][2] = {}, direct_of[kQueryTiles][2] = {};
};

// Blocks that a multiprocessor's shared memory has room for, and so registers must have.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
inline constexpr int kAttentionBlocks = 1;
#else
inline constexpr int kAttentionBlocks = 2;
#endif
template <int kQueryTiles>
KERNEL(kAttentionThreads, kAttentionBlocks)
void attention_kernel(AttentionParams p) {
  using Block = AttentionBlock<kQueryTiles>;
  Block block(p);
  // Until its turn, only the Step is read, and what rope_append, just before, does not write.
  if (!block.find_queries() || !block.find_tiles()) return leave();
  block.make_tables();
  uint32_t keys[Block::kEarlyDims][4];
  block.ask_ahead(keys);
  wait_for_previous();

  block.place_queries();
  block.stage_keys();
  sync_threads();
  block.score_shared(keys);
  block.score_gathered();
  uint32_t values[Block::kValues][4];  // on their way meanwhile
  block.load_values(warp_index(), 0, values);
  sync_threads();
  block.softmax();
  sync_threads();
  block.stage_values();
  block.add_values(values);
}

// ---- Chunks together ---------------------------------------------------------------------------

// (M, L, O) = the first chunk's, and then, ascending,
//   M' = max(M, max); a = exp(M - M'); b = exp(max - M'); L = fma(L, a, sum * b); O = fma(O, a, o *
//   b)
// Block (row, part): the coordinates of all heads.
KERNEL(kInputThreads, 1) void combine_kernel(AttentionParams p) {
  let_next_begin();  // the input of a product
  const int row = early(p.step->first_new) + block_x(), dim = p.heads.head_dim;
  const int head = (block_y() * kInputThreads + thread_index()) / dim,
            d = (block_y() * kInputThreads + thread_index()) % dim;
  if (row >= early(p.step->n_rows) || head >= p.heads.n_heads) return leave();
  const int chunks = early(p.step->position[row]) / kChunk + 1;
  wait_alone();
  const float* c = p.partial(row, head, 0);
  float m = c[0], l = c[1], o = c[2 + d];
  constexpr int kTogether = 4;  // loads of so many chunks
  for (int first = 1; first < chunks; first += kTogether) {
    float max[kTogether], sum[kTogether], value[kTogether];
    UNROLLED_FOR (int i = 0; i < kTogether; ++i)
      if (first + i < chunks) {
        c = p.partial(row, head, first + i);
        max[i] = c[0];
        sum[i] = c[1];
        value[i] = c[2 + d];
      }
    UNROLLED_FOR (int i = 0; i < kTogether; ++i) {
      if (first + i >= chunks) break;
      const float larger = max[i] > m ? max[i] : m;
      const float a = exp_contract(m - larger), b = exp_contract(max[i] - larger);
      l = fma(l, a, sum[i] * b);
      o = fma(o, a, value[i] * b);
      m = larger;
    }
  }
  p.out[(static_cast<int64_t>(row) * p.heads.n_heads + head) * p.heads.head_dim + d] = divide(o, l);
}

// n_chunks, n_sequences: at least those of the step.
inline void attention(Stream stream, const AttentionParams& p, int max_rows, int n_chunks,
                      int n_sequences) {
  const int group = p.heads.n_heads / p.heads.n_kv_heads;
  if (p.kv.type == DType::kF16) {
    // Sequences share no block: each but the first may add one that is not full.
    const int queries = max_rows * group, tiles = queries <= 8 ? 1 : kMostQueryTiles;
    const Grid grid{n_chunks, p.heads.n_kv_heads,
                    ceil_div(queries, 8 * tiles) + n_sequences - 1};
    launch("attention", tiles == 1 ? attention_kernel<1> : attention_kernel<kMostQueryTiles>,
           stream, grid, kAttentionThreads, attention_shared_bytes(tiles, p.kv.padded_dim), p);
  } else {
    launch("attention f32", attention_f32_kernel, stream, {n_chunks, p.heads.n_heads, max_rows},
           kPlainThreads, kChunk * 8, p);
  }
  launch("combine", combine_kernel, stream,
         {max_rows, ceil_div(p.heads.n_heads * p.heads.head_dim, kInputThreads)}, kInputThreads, 0,
         p);
}

}  // namespace CHIMERA_CUDA_BODY
}  // namespace chimera::cuda
