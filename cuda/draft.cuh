// Drafting on the device, but for the tree (tree.cuh): the text, n-gram matches, and the vocabulary
// that the draft chooses from (engine/tree_ops.h). All of it is small: single blocks, or one for
// each kept row, that read a few kilobytes. What a step pays for it is launches.
#pragma once

#include "cuda/numeric.cuh"
#include "cuda/reduce.cuh"
#include "cuda/runtime.cuh"
#include "cuda/tape.cuh"
#include "engine/draft_state.h"

namespace chimera::cuda {
inline namespace CHIMERA_CUDA_BODY {

inline constexpr int kDraftThreads = 256, kDraftWarps = kDraftThreads / kLanes;

// Rows that accept() kept, and the position of the first of them.
struct Kept {
  int n, first;
};
DEVICE Kept kept_of(const Step* step) {
  const Step::Sequence& s = step->sequences[0];
  const int n = s.n_rows > 0 ? s.n_kept : 0;
  return {n, s.committed - n};
}

// ---- The text ----------------------------------------------------------------------------------

struct AdvanceParams {
  const Step* step;
  DraftState* state;
  DraftPass draft;
};
KERNEL(kDraftThreads, 1) void advance_kernel(AdvanceParams p) {
  wait_for_previous();
  const Step* step = p.step;
  DraftState* s = p.state;
  const Step::Sequence seq = step->sequences[0];
  const Kept kept = kept_of(step);
  const int committed = seq.committed, t = thread_index();
  if (kept.n > 0) {
    const bool sampled = seq.root >= 0;  // else a piece of a prompt, which is in the text already
    const int root = sampled ? step->position[seq.root] : 0, end = seq.first_row + seq.n_rows;
    PassResult* result = s->results + s->n_passes % 2;
    // A kept row's position is its place in the text, so no row needs to know of another.
    for (int row = sampled ? seq.root + 1 + t : end; row < end; row += kDraftThreads) {
      const int at = step->kept_at[row];
      if (at < 0) continue;
      s->text[at] = result->token[at - root - 1] = step->token[row];
    }
    sync_threads();
    if (t == 0 && sampled) {
      s->text[committed] = seq.next;
      s->length = committed + 1;
      result->token[committed - root - 1] = seq.next;
      result->emitted = committed - root;
      result->drafted = seq.first_row + seq.n_rows - seq.root - 1;
      result->number = s->n_passes++;
      s->trust.observe(committed - root - 1);
    }
    sync_threads();
  } else if (t == 0) {
    PassResult* result = s->results + s->n_passes % 2;
    result->emitted = result->drafted = 0;
    result->number = s->n_passes++;
  }
  if (p.draft.rows == nullptr) return;

  // Row i > 0 stands for the token at first + i, and brings the slot of the position before.
  Step* rows = p.draft.rows;
  const int n = kept.n;
  for (int i = t; n > 0 && i <= n; i += kDraftThreads) {
    const int at = kept.first + i;
    for (int j = 0; j < 3; ++j) p.draft.trigrams->token[3 * i + j] = s->text[most(0, at - 2 + j)];
    rows->token[i] = s->text[at];
    rows->parent[i] = i == 1 ? -1 : i - 1;
    rows->sequence[i] = 0;
    rows->position[i] = rows->slot[i] = at - 1;
    p.draft.links->feature[i] = p.draft.links->state[i] = i - 1;
  }
  if (t == 0) {
    const int all = n > 0 ? n + 1 : 0;
    rows->n_rows = p.draft.features->n_rows = all;
    p.draft.trigrams->n_rows = 3 * all;
    rows->first_new = n > 0 ? 1 : 0;
    Step::Sequence& q = rows->sequences[0];
    q.committed = kept.first;
    q.first_row = 1;
    q.n_rows = n;
    q.root = -1;
    p.draft.root->n_rows = n > 0 ? 1 : 0;
    p.draft.links->root = n;
    p.draft.links->root_state = n - 1;
  }
}
inline void advance(Stream stream, const AdvanceParams& p) {
  launch("advance", advance_kernel, stream, {}, kDraftThreads, 0, p);
}

// ---- N-gram matches ----------------------------------------------------------------------------

// Tokens that agree, most_match of them at most, from positions a and b back.
DEVICE int match_length(const int32_t* text, int a, int b, int most_match) {
  int n = 0;
  while (n < most_match && a - n >= 0 && text[a - n] == text[b - n]) ++n;
  return n;
}
// The longest match first, of those the newest. (A context has 2^20 tokens at most.)
BOTH uint32_t match_key(int length, int position) {
  return static_cast<uint32_t>(length) << 24 | static_cast<uint32_t>(position);
}
BOTH int match_position(uint32_t key) { return static_cast<int>(key & 0xffffffu); }

// Block i: the kept position first + i, whose next token is now known.
struct LearnMatchesParams {
  const Step* step;
  DraftState* state;
};
KERNEL(kDraftThreads, 1) void learn_matches_kernel(LearnMatchesParams p) {
  wait_for_previous();
  DraftState* s = p.state;
  const Kept kept = kept_of(p.step);
  if (block_x() >= kept.n) return;
  auto* scratch = reinterpret_cast<uint32_t*>(shared_memory());
  const int at = kept.first + block_x();
  uint32_t best = 0;
  for (int i = thread_index(); i < at; i += kDraftThreads) {
    const int n = match_length(s->text, i, at, s->max_match);
    if (n >= s->min_match) best = most(best, match_key(n, i));
  }
  best = block_max<kDraftThreads>(scratch, best);
  if (thread_index() > 0 || best == 0) return;
  const int n = least(static_cast<int>(best >> 24), kLongestMatch);
  atomic_add(&s->matched[n], 1);
  if (s->text[match_position(best) + 1] == s->text[at + 1]) atomic_add(&s->came_true[n], 1);
}
inline void learn_matches(Stream stream, const LearnMatchesParams& p, int max_rows) {
  launch("learn_matches", learn_matches_kernel, stream, {max_rows}, kDraftThreads, kDraftWarps * 4,
         p);
}

// The candidates that n-grams propose, in shared memory while they are put together.
struct MatchTree {
  static constexpr int kMost = kContinuations * kMatchDepth;
  int32_t token[kMost], parent[kMost], depth[kMost];
  float probability[kMost];
  int n;

  DEVICE float probability_of(int node) const { return node < 0 ? 1.0f : probability[node]; }
  DEVICE int find(int above, int32_t wanted) const {
    for (int i = above + 1; i < n; ++i)
      if (parent[i] == above && token[i] == wanted) return i;
    return n;
  }
  DEVICE float left_below(int above) const {
    float left = probability_of(above);
    for (int i = above + 1; i < n; ++i)
      if (parent[i] == above) left -= probability[i];
    return most(left, 0.0f);
  }
  // What followed `position`, where n_match tokens agree. Whether it was new.
  DEVICE bool add(const DraftState* s, int n_match, int position) {
    const int before = n;
    int node = DraftState::kRoot;
    for (int i = 0; i < kMatchDepth && position + 1 + i < s->length; ++i) {
      const int32_t next = s->text[position + 1 + i];
      // Below a node that was just added there is nothing to look for.
      int child = node >= before ? n : find(node, next);
      if (child == n) {
        const float left = node >= before ? probability[node] : left_below(node);
        const float scale = left < probability_of(node) ? kOlderMatch : 1.0f;
        const int length = least(n_match + i, kLongestMatch);
        const float p = left * scale *
                        match_probability(n_match + i, s->sampling.temperature,
                                          static_cast<float>(s->matched[length]),
                                          static_cast<float>(s->came_true[length]));
        token[n] = next;
        parent[n] = node;
        depth[n] = node < 0 ? 1 : depth[node] + 1;
        probability[n] = least(p, probability_of(node));
        ++n;
      }
      node = child;
    }
    return n > before;
  }
};

// The occurrences of the last token that are looked at: as many as fit, the newest. They are
// collected in any order of a tile, tile by tile from the end of the text, and a tile goes in whole
// or not at all, so that the same text always gives the same list.
struct ProposeShared {
  static constexpr int kTile = 8 * kDraftThreads, kMost = 2 * kTile;
  uint32_t key[kMost], scratch[kDraftWarps];
  uint32_t n_keys;
  int continuations;
  MatchTree tree;
};

struct ProposeParams {
  DraftState* state;
  DraftPass draft;
};
KERNEL(kDraftThreads, 1) void propose_kernel(ProposeParams p) {
  wait_for_previous();
  DraftState* s = p.state;
  auto* shared = reinterpret_cast<ProposeShared*>(shared_memory());
  const int t = thread_index(), last = s->length - 1;
  const bool live = s->length < s->context && s->nodes > 0;
  if (t == 0) {
    shared->n_keys = 0;
    shared->continuations = 0;
    shared->tree.n = 0;
  }
  sync_threads();
  if (live && s->max_match > 0) {
    for (int end = last; end > 0 && shared->n_keys + ProposeShared::kTile <= ProposeShared::kMost;
         end -= ProposeShared::kTile) {
      sync_threads();  // the number of keys has been read
      for (int i = end - 1 - t; i >= most(0, end - ProposeShared::kTile); i -= kDraftThreads) {
        const int n = match_length(s->text, i, last, s->max_match);
        if (n >= s->min_match) shared->key[atomic_add(&shared->n_keys, 1)] = match_key(n, i);
      }
      sync_threads();
    }
    uint32_t below = 0xffffffffu;
    for (int looked = 0, length = 0; shared->continuations < kContinuations;) {
      uint32_t best = 0;
      for (uint32_t i = static_cast<uint32_t>(t); i < shared->n_keys; i += kDraftThreads)
        if (shared->key[i] < below) best = most(best, shared->key[i]);
      best = block_max<kDraftThreads>(shared->scratch, best);
      if (best == 0) break;
      const int n = static_cast<int>(best >> 24);
      looked = n == length ? looked + 1 : 1;
      length = n;
      below = looked < kMatchesPerLength ? best : match_key(n, 0);
      if (t == 0) shared->continuations += shared->tree.add(s, n, match_position(best)) ? 1 : 0;
      sync_threads();
    }
  }
  const MatchTree& tree = shared->tree;
  for (int i = t; i < tree.n; i += kDraftThreads) {
    s->token[i] = tree.token[i];
    s->parent[i] = tree.parent[i];
    s->depth_of[i] = tree.depth[i];
    s->probability[i] = tree.probability[i];
    s->row[i] = -1;
  }
  if (t > 0) return;
  s->n_candidates = s->n_matches = tree.n;
  if (p.draft.rows == nullptr) return;
  Step* rows = p.draft.rows;
  rows->n_rows = live ? 1 : 0;
  rows->first_new = 0;
  rows->token[0] = s->text[last];
  s->candidate_of_row[0] = DraftState::kRoot;
  Step::Sequence& q = rows->sequences[0];
  q.committed = last;
  q.first_row = 1;
  q.n_rows = 0;
  q.root = -1;
}
inline void propose(Stream stream, const ProposeParams& p) {
  launch("propose", propose_kernel, stream, {}, kDraftThreads, sizeof(ProposeShared), p);
}

}  // namespace CHIMERA_CUDA_BODY
}  // namespace chimera::cuda
