// The row kernels written over 16 lanes: one text for every instruction set with a lanes_*.h, which
// must be included first. reference.cc says the same in plain loops.
#pragma once

#include <algorithm>
#include <cstddef>

#include "engine/cpu/exp.h"
#include "engine/cpu/kernels.h"
#include "engine/cpu/log.h"

namespace chimera::cpu {
namespace {

constexpr float kInfinity = __builtin_inff();

inline Lanes exp(Lanes x) {
  const Lanes round = broadcast(kExpRound);
  const Lanes n = (x * broadcast(kExpLog2e) + round) - round;
  Lanes r = fma(n, broadcast(-kExpLn2High), x);
  r = fma(n, broadcast(-kExpLn2Low), r);
  Lanes p = broadcast(kExpTaylor[7]);
  for (int i = 6; i >= 0; --i) p = fma(p, r, broadcast(kExpTaylor[i]));
  Lanes y = p * power_of_two(n);
  y = where_less(x, broadcast(kExpLow), broadcast(0.0f), y);
  y = where_less(broadcast(kExpHigh), x, broadcast(kInfinity), y);
  return where_nan(x, x, y);
}

inline float exp_one(float x) {
  float y[16];
  store(y, exp(broadcast(x)));
  return y[0];
}

void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* y) {
  Lanes sum = broadcast(0.0f);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const Lanes v = load(x + i);
    sum = fma(v, v, sum);
  }
  if (i < n) {
    const Lanes v = load_first(x + i, n - i);
    sum = fma(v, v, sum);
  }
  const float mean = fold(sum) / static_cast<float>(n) + eps;
  const Lanes r = broadcast(1.0f / square_root(mean));
  for (i = 0; i + 16 <= n; i += 16) store(y + i, (load(x + i) * r) * load(weight + i));
  if (i < n)
    store_first(y + i, (load_first(x + i, n - i) * r) * load_first(weight + i, n - i), n - i);
}

void swiglu(const float* gate_up, int64_t n, float* y) {
  const Lanes one = broadcast(1.0f);
  const auto silu_times = [one](Lanes gate, Lanes up) {
    return (gate / (one + exp(negate(gate)))) * up;
  };
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(y + i, silu_times(load(gate_up + i), load(gate_up + n + i)));
  if (i < n)
    store_first(y + i,
                silu_times(load_first(gate_up + i, n - i), load_first(gate_up + n + i, n - i)),
                n - i);
}

void silu(const float* x, int64_t n, float* y) {
  const Lanes one = broadcast(1.0f);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(y + i, load(x + i) / (one + exp(negate(load(x + i)))));
  if (i < n)
    store_first(y + i, load_first(x + i, n - i) / (one + exp(negate(load_first(x + i, n - i)))),
                n - i);
}

void quantize_q8(const float* x, int64_t n, int8_t* q, float* scale, int32_t* sum) {
  for (int64_t b = 0; b < n / 32; ++b, x += 32, q += 32) {
    const Lanes lo = load(x), hi = load(x + 16);
    // As integers the bits of magnitudes order like the numbers, with infinity and NaN on top.
    const int32_t bits = fold_max(max(magnitude_bits(lo), magnitude_bits(hi)));
    float largest;
    __builtin_memcpy(&largest, &bits, 4);
    const bool finite = bits < 0x7f800000, zero = largest < 0x1p-100f;
    const Lanes inverse = broadcast(127.0f / largest);
    if (!finite || zero) {
      scale[b] = finite ? 0.0f : __builtin_nanf("");
      sum[b] = 0;
      __builtin_memset(q, 0, 32);
      continue;
    }
    const IntLanes a = round_to_int(lo * inverse), c = round_to_int(hi * inverse);
    store_int8(q, a);
    store_int8(q + 16, c);
    scale[b] = largest / 127.0f;
    sum[b] = fold_sum(a + c);
  }
}

void round_bf16(const float* x, int64_t n, uint16_t* y) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store_bf16(y + i, load(x + i));
  if (i < n) {
    store_bf16(y + i, load_first(x + i, n - i));
    i += 16;
  }
  if (i % 32 != 0) store_bf16(y + i, broadcast(0.0f));
}

void round_f16(const float* x, int64_t n, uint16_t* y) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store_f16(y + i, load(x + i));
  if (i < n) {
    uint16_t rest[16];
    store_f16(rest, load_first(x + i, n - i));
    __builtin_memcpy(y + i, rest, static_cast<size_t>(n - i) * 2);
  }
}

void rotate(float* x, const float* cos, const float* sin, int head_dim, float scale) {
  const int half = head_dim / 2;
  const Lanes s = broadcast(scale);
  float* z = x + half;
  int i = 0;
  for (; i + 16 <= half; i += 16) {
    const Lanes a = load(x + i), b = load(z + i), c = load(cos + i), d = load(sin + i);
    store(x + i, fma(a, c, negate(b * d)) * s);
    store(z + i, fma(b, c, a * d) * s);
  }
  if (i < half) {
    const int rest = half - i;
    const Lanes a = load_first(x + i, rest), b = load_first(z + i, rest);
    const Lanes c = load_first(cos + i, rest), d = load_first(sin + i, rest);
    store_first(x + i, fma(a, c, negate(b * d)) * s, rest);
    store_first(z + i, fma(b, c, a * d) * s, rest);
  }
}

// ---- Attention --------------------------------------------------------------------------------

template <int N>
struct Constant {
  static constexpr int value = N;
};
// Calls f(Constant<n>), n from 1 to Most.
template <int Most, typename F>
void with_constant(int n, const F& f) {
  if constexpr (Most > 1) {
    if (n < Most) return with_constant<Most - 1>(n, f);
  }
  f(Constant<Most>{});
}

inline Lanes load_kv(const uint16_t* p) {
  return load_f16(p);
}
inline Lanes load_kv(const float* p) {
  return load(p);
}
// Inlined by force: g++ drops calls of a function that does nothing but prefetch.
template <typename T>
[[gnu::always_inline]] inline void prefetch(const T* p) {
  __builtin_prefetch(p, 0, 2);  // to L2
}

template <typename T>
inline const T* keys_at(const AttentionChunk& c, int slot) {  // of a block of 16
  return static_cast<const T*>(c.k) + slot / kChunk * c.k_stride +
         static_cast<int64_t>(slot % kChunk) * c.head_dim;
}
template <typename T>
inline const T* values_at(const AttentionChunk& c, int slot) {
  return static_cast<const T*>(c.v) + slot / kChunk * c.v_stride +
         static_cast<int64_t>(slot % kChunk) * c.padded_dim;
}

// The sums of the two tiles below are arrays that the compiler keeps in registers only if every
// loop over them is unrolled; left in memory, each multiply-add waits for a load and a store.

// Scores of `B` blocks of 16 keys against `Q` queries: each key element is loaded and widened once
// for all queries, and Q * B independent chains hide the latency of a multiply-add.
template <int Q, int B, typename T>
[[gnu::always_inline]] inline void score_tile(const T* block, const T* values, int head_dim,
                                              const AttentionChunk::Query* query,
                                              float (*scores)[kChunk + 32], int at) {
  Lanes s[Q][B];
  const float* x[Q];
#pragma GCC unroll 8
  for (int q = 0; q < Q; ++q) {
    x[q] = query[q].q;
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) s[q][b] = broadcast(0.0f);
  }
#pragma GCC unroll 2
  for (int d = 0; d < head_dim; ++d) {
    Lanes key[B];
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      key[b] = load_kv(block + (b * head_dim + d) * kKeyBlock);
      if (d % 2 == 0) prefetch(values + (b * head_dim + d) * kKeyBlock);
    }
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) {
      const Lanes element = broadcast(x[q][d]);
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b) s[q][b] = fma(element, key[b], s[q][b]);
    }
  }
#pragma GCC unroll 8
  for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) store(scores[q] + at + b * kKeyBlock, s[q][b]);
  }
}

// ... of the slots [first, last) of a chunk, whole blocks of them: scores[q][slot - first].
template <int Q, typename T>
void score_queries(const AttentionChunk& c, int first, int last, const AttentionChunk::Query* query,
                   float (*scores)[kChunk + 32]) {
  constexpr int kBlocks = kScoreTile / Q > 4 ? 4 : kScoreTile / Q;
  const size_t size = static_cast<size_t>(c.head_dim) * kKeyBlock;
  const T* block = keys_at<T>(c, first);
  const T* values = values_at<T>(c, first);
  const int end = (last - first + kKeyBlock - 1) / kKeyBlock * kKeyBlock;
  int at = 0;
  for (; at + kBlocks * kKeyBlock <= end;
       at += kBlocks * kKeyBlock, block += kBlocks * size, values += kBlocks * size)
    score_tile<Q, kBlocks>(block, values, c.head_dim, query, scores, at);
  if constexpr (kBlocks > 2) {
    for (; at + 2 * kKeyBlock <= end; at += 2 * kKeyBlock, block += 2 * size, values += 2 * size)
      score_tile<Q, 2>(block, values, c.head_dim, query, scores, at);
  }
  if constexpr (kBlocks > 1) {
    for (; at < end; at += kKeyBlock, block += size, values += size)
      score_tile<Q, 1>(block, values, c.head_dim, query, scores, at);
  }
}

template <typename T>
void score_slots(const AttentionChunk& c, int first, int last, float (*scores)[kChunk + 32]) {
  for (int q = 0; q < c.n_queries; q += kScoreQueries) {
    const AttentionChunk::Query* query = c.query + q;
    const int n = c.n_queries - q;
    if (n >= kScoreQueries)
      score_queries<kScoreQueries, T>(c, first, last, query, scores + q);
    else
      with_constant<kScoreQueries - 1>(
          n, [&](auto count) { score_queries<count.value, T>(c, first, last, query, scores + q); });
  }
}

// o += e(p) v(p) over positions [begin, end) that stand in slots of the same number, for Q queries
// and J * 16 dimensions: each value is loaded and widened once for all queries. Memory never rests:
// while scores are taken the values of the chunk are on their way (score_tile), and meanwhile here
// the keys of the chunk that comes next. (A fetch of what is being read already only takes room.)
template <int Q, int J, typename T>
void weigh_values(const T* values, int stride, int begin, int end, const float (*e)[kChunk + 32],
                  int chunk_begin, float* const* o, int at, const T* next) {
  Lanes sum[Q][J];
#pragma GCC unroll 8
  for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) sum[q][j] = load(o[q] + at + 16 * j);
  }
  const T* row = values + at;
  for (int p = begin; p < end; ++p, row += stride) {
    Lanes v[J];
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      v[j] = load_kv(row + 16 * j);
      if (j % 2 == 0) prefetch(next + (p - begin) * stride + 16 * j);
    }
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) {
      const Lanes weight = broadcast(e[q][p - chunk_begin]);
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) sum[q][j] = fma(weight, v[j], sum[q][j]);
    }
  }
#pragma GCC unroll 8
  for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) store(o[q] + at + 16 * j, sum[q][j]);
  }
}

template <int J, typename T>
void weigh_values_all(const AttentionChunk& c, int begin, int end, const float (*e)[kChunk + 32],
                      float* const* o, int at) {
  const T* values = values_at<T>(c, begin);
  const T* next = c.next_k != nullptr ? static_cast<const T*>(c.next_k) : values;
  for (int q = 0; q < c.n_queries; q += kQueryTile) {
    const int n = c.n_queries - q;
    with_constant<kQueryTile>(n < kQueryTile ? n : kQueryTile, [&](auto count) {
      weigh_values<count.value, J>(values, c.padded_dim, begin, end, e + q, c.begin, o + q, at,
                                   next);
    });
  }
}

template <typename T>
void attention_chunk(const AttentionChunk& c) {
  float e[kMaxQueries][kChunk + 32];  // scores, then weights, by logical position
  const int chunk_end = c.begin + kChunk;
  int direct_end = c.begin, shared_end = chunk_end;
  bool tree = false;
  for (int q = 0; q < c.n_queries; ++q) {
    const AttentionChunk::Query& query = c.query[q];
    const int end = query.length < chunk_end ? query.length : chunk_end;
    const int direct = query.direct < end ? query.direct : end;
    if (direct > direct_end) direct_end = direct;
    if (direct < shared_end) shared_end = direct;
    if (direct < end) tree = true;
  }
  score_slots<T>(c, c.begin, direct_end, e);

  // Nodes of a tree: their last positions stand somewhere behind the committed ones, among
  // siblings. The scores of that whole tail are taken, 16 keys at a time, and picked by the path.
  if (tree) {
    int last = c.committed;
    for (int q = 0; q < c.n_queries; ++q)
      for (int p = c.query[q].direct; p < c.query[q].length; ++p) {
        const int slot = c.query[q].path[p - c.committed];
        if (slot > last) last = slot;
      }
    for (int first = c.committed / kKeyBlock * kKeyBlock, end; first <= last; first = end) {
      float tail[kMaxQueries][kChunk + 32];
      const int chunk_border = (first / kChunk + 1) * kChunk;
      end = last + 1 < chunk_border ? last + 1 : chunk_border;
      score_slots<T>(c, first, end, tail);
      for (int q = 0; q < c.n_queries; ++q) {
        const AttentionChunk::Query& query = c.query[q];
        for (int p = query.direct > c.begin ? query.direct : c.begin;
             p < query.length && p < chunk_end; ++p) {
          const int slot = query.path[p - c.committed];
          if (slot >= first && slot < end) e[q][p - c.begin] = tail[q][slot - first];
        }
      }
    }
  }

  float* o[kMaxQueries];
  for (int q = 0; q < c.n_queries; ++q) {
    const AttentionChunk::Query& query = c.query[q];
    const int n = (query.length < chunk_end ? query.length : chunk_end) - c.begin;
    const int padded = (n + 15) / 16 * 16;
    for (int i = n; i < padded; ++i) e[q][i] = -kInfinity;  // exp gives 0, which changes no sum
    Lanes largest = broadcast(-kInfinity);
    for (int i = 0; i < padded; i += 16) largest = max(load(e[q] + i), largest);
    const float chunk_max = fold_max(largest);
    const Lanes shift = broadcast(chunk_max);
    Lanes sum = broadcast(0.0f);
    for (int i = 0; i < padded; i += 16) {
      const Lanes weight = exp(load(e[q] + i) - shift);
      store(e[q] + i, weight);
      sum = sum + weight;
    }
    query.partial[0] = chunk_max;
    query.partial[1] = fold(sum);
    o[q] = query.partial + 2;
    for (int d = 0; d < c.padded_dim; d += 16) store(o[q] + d, broadcast(0.0f));
  }

  const int n16 = c.padded_dim / 16;
  int j = 0;
  for (; j + kHeadTile <= n16; j += kHeadTile)
    weigh_values_all<kHeadTile, T>(c, c.begin, shared_end, e, o, 16 * j);
  for (; j < n16; ++j) weigh_values_all<1, T>(c, c.begin, shared_end, e, o, 16 * j);
  for (int q = 0; q < c.n_queries; ++q) {
    const AttentionChunk::Query& query = c.query[q];
    const int end = query.length < chunk_end ? query.length : chunk_end;
    for (int p = shared_end > c.begin ? shared_end : c.begin; p < end; ++p) {
      const int slot = p < query.direct ? p : query.path[p - c.committed];
      const T* row = values_at<T>(c, slot);
      const Lanes weight = broadcast(e[q][p - c.begin]);
      for (int d = 0; d < c.padded_dim; d += 16)
        store(o[q] + d, fma(weight, load_kv(row + d), load(o[q] + d)));
    }
  }
}

void attention(const AttentionChunk& chunk) {
  if (chunk.type == DType::kF16)
    attention_chunk<uint16_t>(chunk);
  else
    attention_chunk<float>(chunk);
}

void combine(const float* partials, int n, int64_t stride, int head_dim, int padded_dim,
             float* out) {
  float o[kMaxHeadDim];
  for (int d = 0; d < padded_dim; d += 16) store(o + d, load(partials + 2 + d));
  float m = partials[0], l = partials[1];
  for (int c = 1; c < n; ++c) {
    const float* p = partials + c * stride;
    const float larger = p[0] > m ? p[0] : m;
    const float a = exp_one(m - larger), b = exp_one(p[0] - larger);
    l = __builtin_fmaf(l, a, p[1] * b);
    for (int d = 0; d < padded_dim; d += 16)
      store(o + d, fma(load(o + d), broadcast(a), load(p + 2 + d) * broadcast(b)));
    m = larger;
  }
  const Lanes total = broadcast(l);
  int d = 0;
  for (; d + 16 <= head_dim; d += 16) store(out + d, load(o + d) / total);
  if (d < head_dim) store_first(out + d, load(o + d) / total, head_dim - d);
}

// ---- Sampling ---------------------------------------------------------------------------------

int32_t argmax(const float* x, int64_t n) {
  Lanes best = broadcast(-kInfinity);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) best = max(load(x + i), best);
  float largest = fold_max(best);
  for (; i < n; ++i)
    if (x[i] > largest) largest = x[i];
  if (!(largest > -kInfinity)) return 0;
  for (i = 0; i + 16 <= n; i += 16) {
    const uint32_t equal = equal_mask(load(x + i), largest);
    if (equal != 0) return static_cast<int32_t>(i + __builtin_ctz(equal));
  }
  for (; i < n; ++i)
    if (x[i] == largest) return static_cast<int32_t>(i);
  return 0;
}

int top_k(const float* x, int64_t n, int k, int32_t* index) {
  int found = 0;
  float least = -kInfinity;  // of the k
  const auto take = [&](int64_t i) {
    if (found == k && !(x[i] > least)) return;
    int at = found < k ? found++ : k - 1;
    for (; at > 0 && x[index[at - 1]] < x[i]; --at) index[at] = index[at - 1];
    index[at] = static_cast<int32_t>(i);
    if (found == k) least = x[index[k - 1]];
  };
  int64_t i = 0;
  while (i < n && i < k) take(i++);
  // Nearly all runs of 64 hold nothing that is large enough.
  for (; i + 64 <= n; i += 64) {
    const Lanes largest =
        max(max(load(x + i), load(x + i + 16)), max(load(x + i + 32), load(x + i + 48)));
    if (greater_mask(largest, least) == 0) continue;
    for (int64_t j = i; j < i + 64; j += 16)
      for (uint32_t larger = greater_mask(load(x + j), least); larger != 0; larger &= larger - 1)
        take(j + __builtin_ctz(larger));
  }
  for (; i < n; ++i) take(i);
  return found;
}

float sum_of_exp(const float* x, int64_t n, float shift, float scale) {
  const Lanes by = broadcast(scale), from = broadcast(shift);
  Lanes sum = broadcast(0.0f);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) sum = sum + exp((load(x + i) - from) * by);
  if (i < n) {
    float last[16];
    store(last, broadcast(-kInfinity));
    for (int64_t j = i; j < n; ++j) last[j - i] = x[j];
    sum = sum + exp((load(last) - from) * by);
  }
  return fold(sum);
}

void exp_scaled(const float* x, int64_t n, float largest, float divisor, float* out) {
  const Lanes t = broadcast(divisor), shift = broadcast(largest / divisor);
  const Lanes up = broadcast(0x1p34f), down = broadcast(0x1p-34f);
  const auto one = [&](Lanes v) {
    return where_nan(v, broadcast(0.0f), floor(exp(v / t - shift) * up) * down);
  };
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(out + i, one(load(x + i)));
  if (i < n) store_first(out + i, one(load_first(x + i, n - i)), n - i);
}

Lanes log(Lanes x) {
  const IntLanes sqrt_half = broadcast(kLogSqrtHalfBits), i = bits_of(x) - sqrt_half;
  const Lanes n = to_float(shift_right_signed<23>(i));
  const Lanes f = from_bits((i & broadcast(0x7fffff)) + sqrt_half) - broadcast(1.0f);
  const Lanes s = f / (f + broadcast(2.0f)), z = s * s;
  Lanes p = broadcast(kLogArtanh[4]);
  for (int k = 3; k >= 0; --k) p = fma(p, z, broadcast(kLogArtanh[k]));
  return fma(n, broadcast(kLogLn2), s * p);
}

Lanes gumbel_of(IntLanes word) {
  const Lanes one = broadcast(1.0f);
  const Lanes w = to_float(shift_right<1>(word) | broadcast(int32_t{1})) * broadcast(kGumbelUnit);
  const Lanes t = max(one - w, broadcast(kGumbelLeast));
  return negate(log(negate(log(t) + ((one - t) - w))));
}

// Philox 4x32-10 (philox.h) of 16 counters (position, block).
void philox(uint64_t seed, uint64_t position, IntLanes block, IntLanes* word) {
  auto k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  IntLanes c0 = broadcast(static_cast<int32_t>(static_cast<uint32_t>(position))),
           c1 = broadcast(static_cast<int32_t>(static_cast<uint32_t>(position >> 32))), c2 = block,
           c3 = broadcast(int32_t{0});
  for (int round = 0; round < 10; ++round) {
    IntLanes high0, high2;
    const IntLanes low0 = multiply_wide(c0, 0xD2511F53u, &high0),
                   low2 = multiply_wide(c2, 0xCD9E8D57u, &high2);
    c0 = high2 ^ c1 ^ broadcast(static_cast<int32_t>(k0));
    c2 = high0 ^ c3 ^ broadcast(static_cast<int32_t>(k1));
    c1 = low2;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  word[0] = c0, word[1] = c1, word[2] = c2, word[3] = c3;
}

void gumbel(const int32_t* ids, int64_t first, int64_t n, uint64_t seed, int64_t position,
            float* out) {
  const auto at = static_cast<uint64_t>(position);
  constexpr int32_t kCount[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const auto put = [&](int64_t i, IntLanes word) {
    if (i + 16 <= n)
      store(out + i, gumbel_of(word));
    else if (i < n)
      store_first(out + i, gumbel_of(word), n - i);
  };
  IntLanes word[4];
  if (ids == nullptr) {  // a block of random numbers serves four runs of 16 ids
    for (int64_t i = 0; i < n; i += 64) {
      philox(seed, at, load(kCount) + broadcast(static_cast<int32_t>((first + i) / 4)), word);
      for (int w = 0; w < 4; ++w) put(i + 16 * w, word[w]);
    }
    return;
  }
  for (int64_t i = 0; i < n; i += 16) {
    int32_t padded[16] = {};
    const bool whole = i + 16 <= n;
    for (int64_t j = i; !whole && j < n; ++j) padded[j - i] = ids[j];
    const IntLanes id = load(whole ? ids + i : padded);
    philox(seed, at, shift_left<4>(shift_right<6>(id)) | (id & broadcast(int32_t{15})), word);
    const IntLanes which = shift_right<4>(id) & broadcast(int32_t{3});
    for (int w = 0; w < 3; ++w) word[3] = where_equal(which, broadcast(w), word[w], word[3]);
    put(i, word[3]);
  }
}

// All of the above with an instruction set's products.
constexpr Kernels table(Isa isa, const char* name, const ProductFunction* products) {
  return {isa,
          name,
          products,
          rms_norm,
          swiglu,
          silu,
          quantize_q8,
          round_bf16,
          round_f16,
          rotate,
          attention,
          combine,
          {argmax, exp_scaled, gumbel, top_k, sum_of_exp}};
}

}  // namespace
}  // namespace chimera::cpu
