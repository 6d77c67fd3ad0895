// The fused tree attention: every row of a step against its committed positions and its ancestors.
//
// # The idea
// As in the products, keys and values are the tensor core's wide operand (16 positions, or 16
// coordinates) and queries its 8 columns: one query and 32 run the same instructions, and a column
// depends on nothing but itself. A query is a (row, query head) pair; those that share a KV head
// share its keys. A block has one chunk of 256 positions of one KV head and up to 32 queries:
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
// slot in a row, and load_matrices() takes its fragment from any 16 of them. (Straight
// from the cache it is 32 loads of 2 or 4 bytes for a fragment: attention of 64 nodes took 2.37 ms
// in LLaMA-2-7B's 32 layers on an H200, and 1.88 so.)
//
// Shared memory at head_dim 128: 87 KiB; 123 registers of 256 threads: two blocks on an H100. K and
// V of shared tiles go straight from global memory to registers, 16 bytes a lane: the 8 loads of a
// tile (4 KiB a warp, 32 KiB a block, 64 KiB a multiprocessor) do not depend on each other. What
// needs the Step alone is done, and K and V are asked for, before the kernel's turn.
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

// One query's chunk in one warp: s (n) scores become e = exp(s - max); n <= 256.
struct MaxSum {
  float max, sum;  // sum: lane 0's
};
DEVICE MaxSum softmax_chunk(float* s, int n) {
  constexpr int kEach = kChunk / kLanes;  // a lane's, in registers: its exps do not wait in turn
  float x[kEach], largest = -infinity();
  UNROLLED_FOR (int j = 0; j < kEach; ++j) {
    const int i = lane_index() + j * kLanes;
    x[j] = i < n ? s[i] : -infinity();
  }
  UNROLLED_FOR (int j = 0; j < kEach; ++j) largest = x[j] > largest ? x[j] : largest;
  for (int width = 16; width > 0; width /= 2) {
    const float other = shuffle_xor(largest, width);
    largest = other > largest ? other : largest;
  }
  UNROLLED_FOR (int j = 0; j < kEach; ++j) {
    const int i = lane_index() + j * kLanes;
    x[j] = i < n ? exp_contract(x[j] - largest) : 0.0f;
    if (i < n) s[i] = x[j];
  }
  float lane = 0;  // virtual lane i sums s[i], s[i + 16], ...
  UNROLLED_FOR (int j = 0; j < kEach; ++j) {
    const float upper = shuffle_xor(x[j], 16);
    lane = (lane + x[j]) + upper;
  }
  return {largest, fold_16(lane)};
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
    const MaxSum m = softmax_chunk(e, n);
    if (lane_index() == 0) {
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
inline constexpr int kQueryTiles = 4, kQueries = 8 * kQueryTiles;  // of a block
inline constexpr int kChunkTiles = kChunk / kKvTile;
inline constexpr int kScoreStride =
    kChunk + 4;  // floats; + 4: the 32 lanes of a C fragment hit 32 banks

// Queries [first, first + count) of a sequence's new (row, query head) pairs of one KV head.
struct QueryTile {
  int sequence, first, count;  // count 0: there is no such tile
};
DEVICE QueryTile query_tile(const Step* step, int group, int index) {
  const int n_sequences = early(step->n_sequences), first_new = early(step->first_new);
  for (int s = 0; s < n_sequences; ++s) {
    const int first_row = early(step->sequences[s].first_row),
              end = first_row + early(step->sequences[s].n_rows);
    const int pairs = most(0, end - most(first_row, first_new)) * group,
              n = ceil_div(pairs, kQueries);
    if (index < n) return {s, index * kQueries, least(kQueries, pairs - index * kQueries)};
    index -= n;
  }
  return {0, 0, 0};
}

struct AttentionShared {
  float* scores;  // (kQueries, kScoreStride); then e
  uint16_t* v;    // ... and then, in the same place, as k
  uint32_t* e;    // B fragments: (position tile, query tile, lane, 2)
  uint32_t* q;    // B fragments: (query tile, dim tile, lane, 2)
  uint16_t* k;    // (tail_slots + 1, padded_dim + 8): what is gathered, a slot in a row; zeros
  int* row;       // (kQueries) row of the tile and head of the group that a query is
  int* head;
  int* length;      // (rows of the tile) positions that a row sees
  int* direct;      // (rows of the tile) positions below stand in the slot of the same number
  int16_t* parent;  // (rows of the step) in shared memory, where a walk takes no time
  uint8_t* slot;    // ... - committed
  uint8_t* path;    // (rows of the tile, kMaxRows): slot of the ancestor at depth i, - committed
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
BOTH constexpr int score_bytes(int padded_dim) {
  return most(kQueries * kScoreStride * 4, tail_bytes(padded_dim));
}
BOTH constexpr size_t attention_shared_bytes(int padded_dim) {
  return static_cast<size_t>(score_bytes(padded_dim) + kChunkTiles * kQueryTiles * kLanes * 8 +
                             kQueryTiles * padded_dim / kKvTile * kLanes * 8 +
                             tail_bytes(padded_dim) + kQueries * 16 + Step::kMaxRows * 3 +
                             kQueries * Step::kMaxRows);
}
static_assert(attention_shared_bytes(256) <= 99 * 1024);
DEVICE AttentionShared carve_attention(int padded_dim) {
  AttentionShared s;
  s.scores = reinterpret_cast<float*>(shared_memory());
  s.v = reinterpret_cast<uint16_t*>(s.scores);
  s.e = reinterpret_cast<uint32_t*>(shared_memory() + score_bytes(padded_dim));
  s.q = s.e + kChunkTiles * kQueryTiles * kLanes * 2;
  s.k = reinterpret_cast<uint16_t*>(s.q + kQueryTiles * (padded_dim / kKvTile) * kLanes * 2);
  s.row = reinterpret_cast<int*>(s.k + tail_bytes(padded_dim) / 2);
  s.head = s.row + kQueries;
  s.length = s.head + kQueries;
  s.direct = s.length + kQueries;
  s.parent = reinterpret_cast<int16_t*>(s.direct + kQueries);
  s.slot = reinterpret_cast<uint8_t*>(s.parent + Step::kMaxRows);
  s.path = s.slot + Step::kMaxRows;
  return s;
}

KERNEL(kAttentionThreads, 2) void attention_kernel(AttentionParams p) {
  const Step* step = p.step;
  const int chunk = block_x(), kv_head = block_y(), begin = chunk * kChunk;
  const int group = p.heads.n_heads / p.heads.n_kv_heads, dim = p.heads.head_dim;
  const QueryTile queries = query_tile(step, group, block_z());
  // A block without work waits as well: when a kernel is done, so must be all before it.
  if (queries.count == 0) return wait_for_previous();
  const Step::Sequence& sequence = step->sequences[queries.sequence];
  const int committed = early(sequence.committed);
  if (begin >= committed + early(sequence.n_rows)) return wait_for_previous();
  const int sequence_row = early(sequence.first_row), dim_tiles = p.kv.padded_dim / kKvTile;
  // Rows of the block: n_rows from first_row on.
  const int skipped = queries.first / group,
            n_rows = (queries.first + queries.count - 1) / group - skipped + 1;
  const int first_row = most(sequence_row, early(step->first_new)) + skipped;
  const int query_tiles = ceil_div(queries.count, 8);
  const AttentionShared s = carve_attention(p.kv.padded_dim);
  if (thread_index() < queries.count) {
    const int pair = queries.first + thread_index();
    s.row[thread_index()] = pair / group - skipped;
    s.head[thread_index()] = kv_head * group + pair % group;
  }
  // Where each row's ancestors are.
  for (int row = sequence_row + thread_index(); row < first_row + n_rows;
       row += kAttentionThreads) {
    s.parent[row] = static_cast<int16_t>(early(step->parent[row]));
    s.slot[row] = static_cast<uint8_t>(early(step->slot[row]) - committed);
  }
  const int position =
      thread_index() < n_rows ? early(step->position[first_row + thread_index()]) : committed;
  sync_threads();
  if (thread_index() < n_rows) {
    uint8_t* path = s.path + thread_index() * Step::kMaxRows;
    int depth = position - committed;
    for (int node = first_row + thread_index(); node >= 0; node = s.parent[node])
      path[depth--] = s.slot[node];
    int direct = committed;
    while (direct <= position && path[direct - committed] == direct - committed) ++direct;
    s.length[thread_index()] = position + 1;
    s.direct[thread_index()] = direct;
  }
  sync_threads();
  int longest = 0, least_direct = committed + Step::kMaxRows, most_direct = 0;
  for (int r = 0; r < n_rows; ++r) {
    longest = most(longest, s.length[r]);
    least_direct = least(least_direct, s.direct[r]);
    most_direct = most(most_direct, s.direct[r]);
  }
  if (longest <= begin) return wait_for_previous();
  const int tiles =
      least(kChunkTiles, ceil_div(longest - begin, kKvTile));  // of the chunk that anyone sees
  // Tiles below `shared` are direct for some row; those below `whole` for all: none is gathered.
  const int shared = most(0, least(tiles, (most_direct - begin) / kKvTile)),
            whole = most(0, least(tiles, (least_direct - begin) / kKvTile));

  const int g = lane_index() / 4, t = lane_index() % 4;
  const int64_t base = p.kv.head_offset(queries.sequence, kv_head);
  const auto* k_cache = static_cast<const uint16_t*>(p.kv.k) + base;
  const auto* v_cache = static_cast<const uint16_t*>(p.kv.v) + base;
  const auto slot_of = [&](int row, int position) {
    return position < committed ? position
                                : committed + s.path[row * Step::kMaxRows + position - committed];
  };
  // Does the tile that ends at `end` stand in its own slots for a row? Else it is gathered.
  const auto is_direct = [&](int row, int end) { return end <= s.direct[row]; };
  // Of the two queries of each of a lane's C fragments: row, and how far it is direct; -1: no
  // query.
  int row_of[kQueryTiles][2], direct_of[kQueryTiles][2];
  UNROLLED_FOR (int j = 0; j < kQueryTiles; ++j)
    UNROLLED_FOR (int i = 0; i < 2; ++i) {
      const int query = j * 8 + 2 * t + i;
      row_of[j][i] = query < queries.count ? s.row[query] : -1;
      direct_of[j][i] = query < queries.count ? s.direct[row_of[j][i]] : -1;
    }
  // Has a tile of queries any of a row?
  const auto has = [&](int query_tile, int row) {
    return query_tile < query_tiles && s.row[query_tile * 8] <= row &&
           s.row[least(query_tile * 8 + 7, queries.count - 1)] >= row;
  };
  const auto load_tile = [&](const uint16_t* cache, int slot_tile, int dim_tile, uint32_t(&a)[4]) {
    const Words4 w = load_16(cache + p.kv.tile(slot_tile, dim_tile) + lane_index() * 8);
    UNROLLED_FOR (int r = 0; r < 4; ++r) a[r] = w.word[r];
  };
  // What is gathered: positions from tail_from on, which stand in slots from there on. Laid out in
  // rows, a fragment of any 16 slots is one load_matrices(). (From the cache itself it is 32 loads
  // of 2 or 4 bytes, a sector each: only for trees that are larger than the tail.)
  const int tail_from = begin + whole * kKvTile,
            n_tail = committed + s.slot[first_row + n_rows - 1] + 1 - tail_from,
            zeros = tail_slots(p.kv.padded_dim), stride = tail_stride(p.kv.padded_dim);
  const bool gathers = whole < tiles, staged = gathers && n_tail <= zeros;
  const auto stage = [&](const uint16_t* cache, uint16_t* to, auto put) {
    for (int i = thread_index(); i < stride; i += kAttentionThreads) to[zeros * stride + i] = 0;
    for (int dim_tile = warp_index(); dim_tile < dim_tiles; dim_tile += kAttentionWarps) {
      UNROLL_BY(5)
      for (int slot = 0; slot < n_tail; slot += kKvTile) {
        uint32_t a[4];
        load_tile(cache, (tail_from + slot) / kKvTile, dim_tile, a);
        UNROLLED_FOR (int r = 0; r < 4; ++r) put(to + slot * stride + dim_tile * kKvTile, r, a[r]);
      }
    }
  };
  // So far only the Step was needed, which rope_append, just before, does not write. Keys and
  // values of the chunk, tile by tile, are on their way to L2, those that are there already, while
  // the rows before this kernel's turn are made.
  const int wanted = staged ? most(tiles, whole + ceil_div(n_tail, kKvTile)) : tiles;
  for (int i = 128 * thread_index(); i < wanted * dim_tiles * 512; i += 128 * kAttentionThreads) {
    prefetch_l2(reinterpret_cast<const std::byte*>(k_cache + p.kv.tile(begin / kKvTile, 0)) + i);
    prefetch_l2(reinterpret_cast<const std::byte*>(v_cache + p.kv.tile(begin / kKvTile, 0)) + i);
  }
  wait_for_previous();

  // Queries, rounded, as B fragments: k = coordinate, column = query.
  for (int query = warp_index(); query < query_tiles * 8; query += kAttentionWarps) {
    const float* q =
        query < queries.count ? p.query(first_row + s.row[query], s.head[query]) : nullptr;
    for (int d = 2 * lane_index(); d < p.kv.padded_dim; d += 2 * kLanes) {
      const uint16_t low = q != nullptr && d < dim ? saturate_f16(q[d]) : uint16_t{0};
      const uint16_t high = q != nullptr && d + 1 < dim ? saturate_f16(q[d + 1]) : uint16_t{0};
      const Place16 at = place_b(d % 16, query % 8);
      s.q[((query / 8 * dim_tiles + d / 16) * kLanes + at.lane) * 2 + at.reg] = pack(low, high);
    }
  }
  if (staged)
    stage(k_cache, s.k, [&](uint16_t* to, int r, uint32_t two) {
      *reinterpret_cast<uint32_t*>(to + (g + 8 * (r % 2)) * stride + 2 * t + 8 * (r / 2)) = two;
    });
  // The row of s.k or s.v that holds what a row sees at a position.
  const auto staged_row = [&](int row, int position) {
    return (position < s.length[row] ? slot_of(row, position) - tail_from : zeros) * stride;
  };

  sync_threads();

  // 1. Scores.
  const auto store = [&](const float(&c)[4], int tile, int j, auto wanted) {
    UNROLLED_FOR (int i = 0; i < 4; ++i)
      if (wanted(row_of[j][i % 2], direct_of[j][i % 2]))
        s.scores[(j * 8 + 2 * t + i % 2) * kScoreStride + tile * kKvTile + g + 8 * (i / 2)] = c[i];
  };
  const auto query_fragment = [&](int query_tile, int dim_tile, uint32_t(&b)[2]) {
    const Words2 w =
        load_8(s.q + ((query_tile * dim_tiles + dim_tile) * kLanes + lane_index()) * 2);
    b[0] = w.word[0];
    b[1] = w.word[1];
  };
  for (int tile = warp_index(); tile < shared; tile += kAttentionWarps) {
    const int from = begin + tile * kKvTile, end = from + kKvTile;
    float c[kQueryTiles][4] = {};
    UNROLL_BY(8)
    for (int dim_tile = 0; dim_tile < dim_tiles; ++dim_tile) {
      uint32_t a[4], b[2];
      load_tile(k_cache, from / kKvTile, dim_tile, a);
      UNROLLED_FOR (int j = 0; j < kQueryTiles; ++j) {
        if (j >= query_tiles) break;
        query_fragment(j, dim_tile, b);
        mma_f16(c[j], a, b);
      }
    }
    UNROLLED_FOR (int j = 0; j < kQueryTiles; ++j)
      store(c[j], tile, j, [&](int /*row*/, int direct) { return end <= direct; });
  }
  // Gathered tiles are few, but there is one of each for every row: the pairs are dealt to all
  // warps.
  for (int pair = warp_index(); pair < (tiles - whole) * n_rows; pair += kAttentionWarps) {
    const int tile = whole + pair / n_rows, row = pair % n_rows;
    const int from = begin + tile * kKvTile, end = from + kKvTile;
    if (is_direct(row, end) || s.length[row] <= from) continue;
    // Lanes 4 g .. 4 g + 3 load positions g and g + 8 of the tile, as this row sees them.
    int64_t at[2];
    bool seen[2];
    UNROLLED_FOR (int i = 0; i < 2; ++i) {
      const int position = from + g + 8 * i;
      seen[i] = position < s.length[row];
      at[i] = seen[i] ? p.kv.k_index(slot_of(row, position), 2 * t) : 0;
    }
    UNROLLED_FOR (int j = 0; j < kQueryTiles; ++j) {
      if (!has(j, row)) continue;
      float c[4] = {};
      if (staged) {
        const uint16_t* k = s.k + staged_row(row, from + lane_index() % 16) + lane_index() / 16 * 8;
        UNROLL_BY(8)
        for (int dim_tile = 0; dim_tile < dim_tiles; ++dim_tile) {
          uint32_t a[4], b[2];
          load_matrices<false>(k + dim_tile * kKvTile, a);
          query_fragment(j, dim_tile, b);
          mma_f16(c, a, b);
        }
      } else {
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
      }
      store(c, tile, j, [&](int r, int /*direct*/) { return r == row; });
    }
  }
  sync_threads();

  // 2. Softmax of the chunk, and e as B fragments: k = position, column = query.
  for (int query = warp_index(); query < queries.count; query += kAttentionWarps) {
    const int row = s.row[query], n = least(kChunk, s.length[row] - begin);
    if (n <= 0) continue;
    float* e = s.scores + query * kScoreStride;
    const MaxSum m = softmax_chunk(e, n);
    sync_warp();
    UNROLL_BY(4)
    for (int i = 2 * lane_index(); i < tiles * kKvTile; i += 2 * kLanes) {
      const Place16 at = place_b(i % 16, query % 8);
      s.e[((i / 16 * kQueryTiles + query / 8) * kLanes + at.lane) * 2 + at.reg] =
          pack(i < n ? float_to_f16(e[i]) : uint16_t{0},
               i + 1 < n ? float_to_f16(e[i + 1]) : uint16_t{0});
    }
    if (lane_index() == 0) {
      float* partial = p.partial(first_row + row, s.head[query], chunk);
      partial[0] = m.max;
      partial[1] = m.sum;
    }
  }
  sync_threads();

  // 3. Output.
  if (staged) {
    stage(v_cache, s.v, [&](uint16_t* to, int r, uint32_t two) {
      to += (2 * t + 8 * (r / 2)) * stride + g + 8 * (r % 2);
      to[0] = static_cast<uint16_t>(two);
      to[stride] = static_cast<uint16_t>(two >> 16);
    });
    sync_threads();
  }
  for (int dim_tile = warp_index(); dim_tile < dim_tiles; dim_tile += kAttentionWarps) {
    float o[kQueryTiles][4] = {};
    const auto e_fragment = [&](int tile, int query_tile, uint32_t(&b)[2]) {
      const Words2 w =
          load_8(s.e + ((tile * kQueryTiles + query_tile) * kLanes + lane_index()) * 2);
      b[0] = w.word[0];
      b[1] = w.word[1];
    };
    // o of the wanted rows' columns becomes mma(a, e, o); the others stay.
    const auto add = [&](int tile, int j, const uint32_t(&a)[4], auto wanted) {
      uint32_t b[2];
      e_fragment(tile, j, b);
      float c[4] = {o[j][0], o[j][1], o[j][2], o[j][3]};
      mma_f16(c, a, b);
      UNROLLED_FOR (int i = 0; i < 4; ++i)
        if (wanted(row_of[j][i % 2], direct_of[j][i % 2])) o[j][i] = c[i];
    };
    UNROLL_BY(8)
    for (int tile = 0; tile < whole; ++tile) {
      uint32_t a[4], b[2];
      load_tile(v_cache, begin / kKvTile + tile, dim_tile, a);
      UNROLLED_FOR (int j = 0; j < kQueryTiles; ++j) {
        if (j >= query_tiles) break;
        e_fragment(tile, j, b);
        mma_f16(o[j], a, b);
      }
    }
    for (int tile = whole; tile < tiles; ++tile) {
      const int from = begin + tile * kKvTile, end = from + kKvTile;
      if (tile < shared) {
        uint32_t a[4];
        load_tile(v_cache, from / kKvTile, dim_tile, a);
        UNROLLED_FOR (int j = 0; j < kQueryTiles; ++j)
          if (j < query_tiles)
            add(tile, j, a, [&](int /*row*/, int direct) { return end <= direct; });
      }
      for (int row = 0; row < n_rows; ++row) {
        if (is_direct(row, end) || s.length[row] <= from) continue;
        uint32_t a[4];
        if (staged) {
          const int position = from + lane_index() % 8 + lane_index() / 16 * 8;
          load_matrices<true>(
              s.v + staged_row(row, position) + dim_tile * kKvTile + lane_index() / 8 % 2 * 8, a);
        } else {
          const int n = s.length[row];
          // Rows: coordinates g, g + 8; k: positions 2 t, 2 t + 1, + 8.
          UNROLLED_FOR (int r = 0; r < 4; ++r) {
            const int position = from + 2 * t + 8 * (r / 2),
                      d = dim_tile * kKvTile + g + 8 * (r % 2);
            const auto value = [&](int at) {
              return at < n ? v_cache[p.kv.v_index(slot_of(row, at), d)] : uint16_t{0};
            };
            a[r] = pack(value(position), value(position + 1));
          }
        }
        UNROLLED_FOR (int j = 0; j < kQueryTiles; ++j)
          if (has(j, row)) add(tile, j, a, [&](int r, int /*direct*/) { return r == row; });
      }
    }
    UNROLLED_FOR (int j = 0; j < kQueryTiles; ++j)
      UNROLLED_FOR (int i = 0; i < 4; ++i) {
        const int row = row_of[j][i % 2];
        if (row < 0 || s.length[row] <= begin) continue;
        float* partial = p.partial(first_row + row, s.head[j * 8 + 2 * t + i % 2], chunk);
        partial[2 + dim_tile * kKvTile + g + 8 * (i / 2)] = o[j][i];
      }
  }
}

// ---- Chunks together ---------------------------------------------------------------------------

// (M, L, O) = the first chunk's, and then, ascending,
//   M' = max(M, max); a = exp(M - M'); b = exp(max - M'); L = fma(L, a, sum * b); O = fma(O, a, o *
//   b)
// Block (row, part): the coordinates of all heads.
KERNEL(kInputThreads, 1) void combine_kernel(AttentionParams p) {
  const int row = early(p.step->first_new) + block_x(), dim = p.heads.head_dim;
  const int head = (block_y() * kInputThreads + thread_index()) / dim,
            d = (block_y() * kInputThreads + thread_index()) % dim;
  if (row >= early(p.step->n_rows) || head >= p.heads.n_heads) return wait_for_previous();
  const int chunks = early(p.step->position[row]) / kChunk + 1;
  wait_for_previous();
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
    const Grid grid{n_chunks, p.heads.n_kv_heads,
                    ceil_div(max_rows * group, kQueries) + n_sequences};
    launch("attention", attention_kernel, stream, grid, kAttentionThreads,
           attention_shared_bytes(p.kv.padded_dim), p);
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
