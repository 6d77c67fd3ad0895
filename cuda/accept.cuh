// Acceptance on the device: sample at the root, walk to the child that carries the sampled token,
// sample there, and so on (backend.h). A block has a sequence.
//
// # Sampling in parallel, one answer
// The token is the one with the largest logit / temperature + noise (sampler.h): a maximum, exact
// in any order. Cuts are defined by sums over the vocabulary, and sampler.h makes them exact: e =
// exp(..) in [0, 1] is rounded down to a multiple of 2^-34, so a sum of 2^19 of them fits the 53
// bits of a double, or here a 64-bit integer, in any order.
//
// e is never stored: it is a few operations from the logit, cheaper than to keep 128 sequences x
// vocab. What survives top-k and top-p is a threshold: e > limit, or e = limit and id <= last_id
// (ties go to the lowest ids). Both cuts find it by radix selection: a histogram (of counts, or of
// e itself) of eight bits at a time, from the top.
#pragma once

#include "cuda/numeric.cuh"
#include "cuda/reduce.cuh"
#include "cuda/runtime.cuh"
#include "engine/philox.h"
#include "engine/step.h"

namespace chimera::cuda {
inline namespace CHIMERA_CUDA_BODY {

inline constexpr int kAcceptThreads = 512;
inline constexpr int kFixedBits = 34;

struct AcceptParams {
  Step* step;
  const float* logits;  // (n_logits, vocab)
  int32_t vocab;
};

struct AcceptShared {
  uint64_t value[kAcceptThreads];
  uint64_t histogram[256];
  uint64_t result[2];
};

// The sum of the values of the threads up to and including this one; total: of all.
DEVICE uint64_t block_scan(AcceptShared* s, uint64_t x, uint64_t* total) {
  const int t = thread_index();
  s->value[t] = x;
  sync_threads();
  for (int offset = 1; offset < kAcceptThreads; offset *= 2) {
    const uint64_t before = t >= offset ? s->value[t - offset] : 0;
    sync_threads();
    s->value[t] += before;
    sync_threads();
  }
  const uint64_t result = s->value[t];
  *total = s->value[kAcceptThreads - 1];
  sync_threads();
  return result;
}

// Logits of one row under one sequence's parameters.
struct Distribution {
  const float* logits;
  int32_t vocab;
  float max, temperature;
  uint64_t limit = 0;  // kept: e > limit, or e = limit and id <= last_id
  int32_t last_id = -1;

  DEVICE uint64_t e(int32_t id) const {  // times 2^34
    const float x = exp_contract(divide(logits[id], temperature) - divide(max, temperature));
    if (is_nan(logits[id]) || is_nan(x)) return 0;
    return static_cast<uint64_t>(x * static_cast<float>(uint64_t{1} << kFixedBits));
  }
  DEVICE uint64_t kept(int32_t id) const {  // e, or 0 if it is cut
    const uint64_t x = e(id);
    return x > limit || (x == limit && id <= last_id) ? x : 0;
  }
  // Ids of a thread when order matters: contiguous.
  DEVICE int32_t begin() const {
    return static_cast<int32_t>(static_cast<int64_t>(vocab) * thread_index() / kAcceptThreads);
  }
  DEVICE int32_t end() const {
    return static_cast<int32_t>(static_cast<int64_t>(vocab) * (thread_index() + 1) /
                                kAcceptThreads);
  }
};

// Cuts to the shortest run of tokens, e descending, ids ascending among equals, whose weights' sum
// reaches `wanted`; a token weighs 1 (kCount) or e. Does nothing if all of them together do not.
template <bool kCount>
DEVICE void cut(AcceptShared* s, Distribution* d, double wanted) {
  const int t = thread_index();
  uint64_t prefix = 0, above = 0;  // high digits found; the weight of all tokens above them
  for (int shift = 32; shift >= 0; shift -= 8) {
    for (int i = t; i < 256; i += kAcceptThreads) s->histogram[i] = 0;
    sync_threads();
    for (int32_t id = t; id < d->vocab; id += kAcceptThreads) {
      const uint64_t e = d->kept(id);
      if (e != 0 && e >> (shift + 8) == prefix)
        atomic_add(&s->histogram[e >> shift & 255], kCount ? uint64_t{1} : e);
    }
    sync_threads();
    if (t == 0) {
      int digit = 255;
      uint64_t sum = above;
      for (; digit >= 0; --digit) {
        if (static_cast<double>(sum + s->histogram[digit]) >= wanted) break;
        sum += s->histogram[digit];
      }
      s->result[0] = static_cast<uint64_t>(static_cast<int64_t>(digit));
      s->result[1] = sum;
    }
    sync_threads();
    const auto digit = static_cast<int64_t>(s->result[0]);
    above = s->result[1];
    sync_threads();
    if (digit < 0) return;
    prefix = prefix << 8 | static_cast<uint64_t>(digit);
  }
  // Of the tokens with e = prefix, the first few by id: as many as it takes.
  uint64_t ties = 0, total;
  for (int32_t id = d->begin(); id < d->end(); ++id) ties += d->kept(id) == prefix;
  const uint64_t through = block_scan(s, ties, &total);
  const uint64_t weight = kCount ? 1 : prefix;
  if (t == 0) s->result[0] = static_cast<uint64_t>(d->vocab - 1);
  sync_threads();
  const auto reached = [&](uint64_t n) {
    return static_cast<double>(above + n * weight) >= wanted;
  };
  if (reached(through) && !reached(through - ties)) {
    uint64_t n = through - ties;
    for (int32_t id = d->begin(); id < d->end(); ++id)
      if (d->kept(id) == prefix && reached(++n)) {
        s->result[0] = static_cast<uint64_t>(id);
        break;
      }
  }
  sync_threads();
  d->limit = prefix;
  d->last_id = static_cast<int32_t>(s->result[0]);
  sync_threads();
}

// The id in [0, vocab) with the largest value(id), the lowest of equal ones; NaN and -infinity
// never win; 0 if there is none.
template <typename Value>
DEVICE int32_t block_argmax(AcceptShared* s, int32_t vocab, const Value& value) {
  uint64_t best = order_key(-infinity(), 0);
  for (int32_t id = thread_index(); id < vocab; id += kAcceptThreads)
    if (const float x = value(id); x > -infinity())
      best = most(best, order_key(x, static_cast<uint32_t>(id)));
  return key_index(block_max<kAcceptThreads>(s->value, best));
}

DEVICE int32_t sample_row(AcceptShared* s, const float* logits, int32_t vocab,
                          const Sampling& sampling, int64_t position) {
  const int32_t best = block_argmax(s, vocab, [logits](int32_t id) { return logits[id]; });
  if (sampling.temperature < kLeastTemperature) return best;

  Distribution d{logits, vocab, logits[best], sampling.temperature};
  const bool top_k = sampling.top_k > 0 && sampling.top_k < vocab, top_p = sampling.top_p < 1.0f;
  if (top_k) cut<true>(s, &d, static_cast<double>(sampling.top_k));
  if (top_p) {
    uint64_t own = 0, sum;
    for (int32_t id = thread_index(); id < vocab; id += kAcceptThreads) own += d.kept(id);
    block_scan(s, own, &sum);
    cut<false>(s, &d, static_cast<double>(sampling.top_p) * static_cast<double>(sum));
  }
  const bool cuts = top_k || top_p || sampling.min_p > 0;
  return block_argmax(s, vocab, [&](int32_t id) {
    if (cuts) {
      const uint64_t e = d.kept(id);
      if (e == 0 || static_cast<float>(e) * (1.0f / static_cast<float>(uint64_t{1} << kFixedBits)) <
                        sampling.min_p)
        return -infinity();
    }
    return divide(logits[id], sampling.temperature) +
           gumbel(token_bits(sampling.seed, static_cast<uint64_t>(position),
                             static_cast<uint32_t>(id)));
  });
}

KERNEL(kAcceptThreads, 1) void accept_kernel(AcceptParams p) {
  wait_for_previous();
  Step* step = p.step;
  if (block_x() >= step->n_sequences) return;
  Step::Sequence& seq = step->sequences[block_x()];
  if (seq.n_rows == 0) return;
  auto* s = reinterpret_cast<AcceptShared*>(shared_memory());
  const int end = seq.first_row + seq.n_rows, root = seq.root, committed = seq.committed;
  const Sampling sampling = seq.sampling;
  for (int row = seq.first_row + thread_index(); row < end; row += kAcceptThreads)
    step->kept_at[row] = root < 0 ? step->position[row] : -1;
  sync_threads();
  int node = root, next = seq.next, n_kept = seq.n_rows;
  if (root >= 0) {
    if (thread_index() == 0)
      for (int row = root; row >= 0; row = step->parent[row])
        step->kept_at[row] = step->position[row];
    for (;;) {
      next = sample_row(s, p.logits + static_cast<int64_t>(step->logits_index[node]) * p.vocab,
                        p.vocab, sampling, step->position[node] + 1);
      uint64_t child = 0;  // kMaxRows - row: the first of them wins
      for (int row = node + 1 + thread_index(); row < end; row += kAcceptThreads)
        if (step->parent[row] == node && step->token[row] == next)
          child = most(child, static_cast<uint64_t>(Step::kMaxRows - row));
      child = block_max<kAcceptThreads>(s->value, child);
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
inline void accept(Stream stream, const AcceptParams& p, int n_sequences) {
  launch("accept", accept_kernel, stream, {n_sequences}, kAcceptThreads, sizeof(AcceptShared), p);
}

}  // namespace CHIMERA_CUDA_BODY
}  // namespace chimera::cuda
