// Acceptance on the device (backend.h): a token is sampled at every row whose logits are wanted,
// all rows at once; then the walk from the root, to the child that carries the sampled token, and
// so on, only looks tokens up. What is sampled in vain costs nothing: the other multiprocessors
// would wait for the walk.
//
// # Sampling in parallel, one answer
// The token is the one with the largest logit / temperature + noise (sampler.h): a maximum, exact
// in any order, so kSampleParts blocks share a row and the walk takes the best of theirs. Cuts are
// defined by sums over the vocabulary, and sampler.h makes them exact: e = exp(..) in [0, 1] is
// rounded down to a multiple of 2^-34, so a sum of 2^19 of them fits the 53 bits of a double, or
// here a 64-bit integer, in any order. A row with cuts is one block's.
//
// e is never stored: it would take as much memory as the logits. It is computed anew in each pass
// over the row, of which a cut has five and seldom one more, for two divisions and a polynomial,
// some 60 instructions. What survives top-k and top-p is a threshold: e > limit, or e = limit and
// id <= last_id (ties go to the lowest ids). Both cuts find it by radix selection: a histogram (of
// counts, or of e itself) of eight bits at a time, from the top.
#pragma once

#include "cuda/numeric.cuh"
#include "cuda/reduce.cuh"
#include "cuda/runtime.cuh"
#include "engine/philox.h"
#include "engine/step.h"

namespace chimera::cuda {
inline namespace CHIMERA_CUDA_BODY {

inline constexpr int kSampleThreads = 512, kSampleParts = 8;  // parts of the vocabulary
inline constexpr int kAcceptThreads = 256;
inline constexpr int kFixedBits = 34;

struct AcceptParams {
  Step* step;
  const float* logits;  // (n_logits, vocab)
  int32_t vocab;
  uint64_t* best;  // scratch: (n_logits, kSampleParts), order_key()s
};

struct SampleShared {
  uint64_t value[kSampleThreads];
  uint64_t histogram[256];
  uint64_t digit, above, at;
  int32_t last_id;
};

// The sum of the values of the threads up to and including this one; total: of all.
DEVICE uint64_t block_scan(SampleShared* s, uint64_t x, uint64_t* total) {
  const int t = thread_index();
  s->value[t] = x;
  sync_threads();
  for (int offset = 1; offset < kSampleThreads; offset *= 2) {
    const uint64_t before = t >= offset ? s->value[t - offset] : 0;
    sync_threads();
    s->value[t] += before;
    sync_threads();
  }
  const uint64_t result = s->value[t];
  *total = s->value[kSampleThreads - 1];
  sync_threads();
  return result;
}

// f(id, logit) for the ids [begin, end) of this thread. Four at a time, one load of 16 bytes, but
// for those before the first aligned address and behind the last: a row may start anywhere.
template <typename F>
DEVICE void each_logit(const float* logits, int32_t begin, int32_t end, const F& f) {
  const auto off = static_cast<int32_t>(reinterpret_cast<uintptr_t>(logits + begin) / 4 % 4);
  const int32_t first = least(end, begin + (4 - off) % 4), last = end - (end - first) % 4;
  for (int32_t id = first + 4 * thread_index(); id < last; id += 4 * kSampleThreads) {
    const Words4 four = load_16(logits + id);
    UNROLLED_FOR (int i = 0; i < 4; ++i) f(id + i, float_of(four.word[i]));
  }
  const int32_t before = first - begin, i = thread_index();
  if (i >= before + end - last) return;
  const int32_t id = i < before ? begin + i : last + i - before;
  f(id, logits[id]);
}

// Logits of one row under one sequence's parameters.
struct Distribution {
  const float* logits;
  int32_t vocab;
  float temperature, scaled_max;  // the largest logit / temperature
  uint64_t limit = 0;             // kept: e > limit, or e = limit and id <= last_id
  int32_t last_id = -1;

  DEVICE uint64_t e(float logit) const {  // times 2^34
    const float x = exp_contract(divide(logit, temperature) - scaled_max);
    if (is_nan(logit) || is_nan(x)) return 0;
    return static_cast<uint64_t>(x * static_cast<float>(uint64_t{1} << kFixedBits));
  }
  DEVICE uint64_t kept(int32_t id, float logit) const {  // e, or 0 if it is cut
    const uint64_t x = e(logit);
    return x > limit || (x == limit && id <= last_id) ? x : 0;
  }
  // f(id, e) for the ids of a thread that are not cut.
  template <typename F>
  DEVICE void each_kept(const F& f) const {
    each_logit(logits, 0, vocab, [&](int32_t id, float logit) {
      if (const uint64_t x = kept(id, logit); x != 0) f(id, x);
    });
  }
  // Ids of a thread when order matters: contiguous.
  DEVICE int32_t begin() const {
    return static_cast<int32_t>(static_cast<int64_t>(vocab) * thread_index() / kSampleThreads);
  }
  DEVICE int32_t end() const {
    return static_cast<int32_t>(static_cast<int64_t>(vocab) * (thread_index() + 1) /
                                kSampleThreads);
  }
};

// Cuts to the shortest run of tokens, e descending, ids ascending among equals, whose weights' sum
// reaches `wanted`; a token weighs 1 (kCount) or e. Does nothing if all of them together do not.
template <bool kCount>
DEVICE void cut(SampleShared* s, Distribution* d, double wanted) {
  const int t = thread_index();
  uint64_t prefix = 0, above = 0, at = 0;  // high digits found; the weight above them, and of them
  uint64_t total;
  for (int shift = 32; shift >= 0; shift -= 8) {
    for (int i = t; i < 256; i += kSampleThreads) s->histogram[i] = 0;
    if (t == 0) s->digit = 256;
    sync_threads();
    // Nearly all tokens are far less probable than the best: their digit is 0, and atomics on one
    // address take turns. So a thread counts those by itself.
    uint64_t zeros = 0;
    d->each_kept([&](int32_t /*id*/, uint64_t e) {
      if (e >> (shift + 8) != prefix) return;
      const uint64_t weight = kCount ? 1 : e;
      if (const uint64_t digit = e >> shift & 255; digit != 0)
        atomic_add(&s->histogram[digit], weight);
      else
        zeros += weight;
    });
    zeros = block_sum<kSampleThreads>(s->value, zeros);
    // Thread t has digit 255 - t: the first with which the sum from the top is enough.
    const uint64_t own = t < 255 ? s->histogram[255 - t] : t == 255 ? zeros : 0;
    const uint64_t through = above + block_scan(s, own, &total);
    const auto reached = [&](uint64_t sum) { return static_cast<double>(sum) >= wanted; };
    if (t < 256 && reached(through) && (t == 0 || !reached(through - own))) {
      s->digit = static_cast<uint64_t>(255 - t);
      s->above = through - own;
      s->at = own;
    }
    sync_threads();
    const uint64_t digit = s->digit;
    if (digit == 256) return;
    above = s->above;
    at = s->at;
    sync_threads();
    prefix = prefix << 8 | digit;
  }
  // Of the tokens with e = prefix, the first few by id, as many as it takes. As a rule there is but
  // one, or it takes all.
  const uint64_t weight = kCount ? 1 : prefix;
  const auto reached = [&](uint64_t n) {
    return static_cast<double>(above + n * weight) >= wanted;
  };
  int32_t last_id = prefix == d->limit ? d->last_id : d->vocab - 1;  // as an earlier cut has it
  if (at > weight && reached(at / weight - 1)) {
    uint64_t ties = 0;
    for (int32_t id = d->begin(); id < d->end(); ++id) ties += d->kept(id, d->logits[id]) == prefix;
    const uint64_t through = block_scan(s, ties, &total);
    if (reached(through) && !reached(through - ties)) {
      uint64_t n = through - ties;
      for (int32_t id = d->begin(); id < d->end(); ++id)
        if (d->kept(id, d->logits[id]) == prefix && reached(++n)) {
          s->last_id = id;
          break;
        }
    }
    sync_threads();
    last_id = s->last_id;
  }
  sync_threads();
  d->limit = prefix;
  d->last_id = last_id;
}

// The largest value(id, logit) of the ids [begin, end), the lowest id of equal ones, as an
// order_key(); NaN and -infinity never win; id 0 if there is none.
template <typename Value>
DEVICE uint64_t block_best(SampleShared* s, const float* logits, int32_t begin, int32_t end,
                           const Value& value) {
  uint64_t best = order_key(-infinity(), 0);
  each_logit(logits, begin, end, [&](int32_t id, float logit) {
    if (const float x = value(id, logit); x > -infinity())
      best = most(best, order_key(x, static_cast<uint32_t>(id)));
  });
  return block_max<kSampleThreads>(s->value, best);
}

// Block (logits row, part). Rows that no walk can come to are left out.
KERNEL(kSampleThreads, 1) void sample_kernel(AcceptParams p) {
  wait_for_previous();
  const Step* step = p.step;
  const int index = block_x(), part = block_y();
  if (index >= step->n_logits) return;
  const int row = step->logits_row[index];
  const Step::Sequence& seq = step->sequences[step->sequence[row]];
  if (seq.root < 0 || row < seq.root) return;
  auto* s = reinterpret_cast<SampleShared*>(shared_memory());
  const Sampling sampling = seq.sampling;
  const auto position = static_cast<uint64_t>(step->position[row] + 1);
  const float* logits = p.logits + static_cast<int64_t>(index) * p.vocab;
  const bool greedy = sampling.temperature < kLeastTemperature,
             top_k = !greedy && sampling.top_k > 0 && sampling.top_k < p.vocab,
             top_p = !greedy && sampling.top_p < 1.0f, cuts = top_k || top_p || sampling.min_p > 0;
  const auto largest = [](int32_t /*id*/, float logit) { return logit; };
  const auto noisy = [&](int32_t id, float logit) {
    return divide(logit, sampling.temperature) +
           gumbel(token_bits(sampling.seed, position, static_cast<uint32_t>(id)));
  };
  const auto bound = [&](int i) {
    return static_cast<int32_t>(static_cast<int64_t>(p.vocab) * i / kSampleParts);
  };
  const int32_t begin = bound(part), end = bound(part + 1);
  uint64_t best = order_key(-infinity(), 0);
  if (greedy) {
    best = block_best(s, logits, begin, end, largest);
  } else if (!cuts) {
    best = block_best(s, logits, begin, end, noisy);
  } else if (part == 0) {
    const int32_t top = key_index(block_best(s, logits, 0, p.vocab, largest));
    Distribution d{logits, p.vocab, sampling.temperature,
                   divide(logits[top], sampling.temperature)};
    if (top_k) cut<true>(s, &d, static_cast<double>(sampling.top_k));
    if (top_p) {
      uint64_t sum = 0;
      d.each_kept([&](int32_t /*id*/, uint64_t e) { sum += e; });
      sum = block_sum<kSampleThreads>(s->value, sum);
      cut<false>(s, &d, static_cast<double>(sampling.top_p) * static_cast<double>(sum));
    }
    best = block_best(s, logits, 0, p.vocab, [&](int32_t id, float logit) {
      const uint64_t e = d.kept(id, logit);
      const float share =
          static_cast<float>(e) * (1.0f / static_cast<float>(uint64_t{1} << kFixedBits));
      return e == 0 || share < sampling.min_p ? -infinity() : noisy(id, logit);
    });
  }
  if (thread_index() == 0) p.best[index * kSampleParts + part] = best;
}

// A block has a sequence.
KERNEL(kAcceptThreads, 1) void accept_kernel(AcceptParams p) {
  wait_for_previous();
  Step* step = p.step;
  if (block_x() >= step->n_sequences) return;
  Step::Sequence& seq = step->sequences[block_x()];
  if (seq.n_rows == 0) return;
  auto* scratch = reinterpret_cast<uint64_t*>(shared_memory());
  const int end = seq.first_row + seq.n_rows, root = seq.root, committed = seq.committed;
  for (int row = seq.first_row + thread_index(); row < end; row += kAcceptThreads)
    step->kept_at[row] = root < 0 ? step->position[row] : -1;
  sync_threads();
  int node = root, next = seq.next, n_kept = seq.n_rows;
  if (root >= 0) {
    if (thread_index() == 0)
      for (int row = root; row >= 0; row = step->parent[row])
        step->kept_at[row] = step->position[row];
    for (;;) {
      const uint64_t* parts = p.best + step->logits_index[node] * kSampleParts;
      uint64_t best = parts[0];
      UNROLLED_FOR (int part = 1; part < kSampleParts; ++part) best = most(best, parts[part]);
      next = key_index(best);
      uint64_t child = 0;  // kMaxRows - row: the first of them wins
      for (int row = node + 1 + thread_index(); row < end; row += kAcceptThreads)
        if (step->parent[row] == node && step->token[row] == next)
          child = most(child, static_cast<uint64_t>(Step::kMaxRows - row));
      child = block_max<kAcceptThreads>(scratch, child);
      if (child == 0) break;
      node = Step::kMaxRows - static_cast<int>(child);
      if (thread_index() == 0) step->kept_at[node] = step->position[node];
    }
    n_kept = step->position[node] + 1 - committed;
  }
  if (thread_index() == 0) {
    seq.next = next;
    seq.n_kept = n_kept;
    seq.committed = committed + n_kept;
  }
}
// max_logits, n_sequences: at least those of the step.
inline void accept(Stream stream, const AcceptParams& p, int max_logits, int n_sequences) {
  if (max_logits > 0)
    launch("sample", sample_kernel, stream, {max_logits, kSampleParts}, kSampleThreads,
           sizeof(SampleShared), p);
  launch("accept", accept_kernel, stream, {n_sequences}, kAcceptThreads,
         kAcceptThreads / kLanes * sizeof(uint64_t), p);
}

}  // namespace CHIMERA_CUDA_BODY
}  // namespace chimera::cuda
