// The draft's candidate tree on the device: the best tokens of a row of logits, growth, choice
// (engine/tree_ops.h). The definitions are those of engine/candidate_tree.h and
// engine/chimera/chimera_drafter.cc; here everything that is a loop there is done side by side.
//
// # Why a sort is a count
// "The n-th most probable", "the w most probable of this depth", "in descending order": each is a
// question for a candidate's rank, which is the number of candidates before it, (probability
// descending, index ascending). Every thread counts for itself, over a copy in shared memory. That
// is N^2 / 256 comparisons for N <= 1024, but nobody waits for anybody, and N is some 200 as a
// rule.
#pragma once

#include "cuda/draft.cuh"
#include "cuda/tape.cuh"
#include "engine/philox.h"

namespace chimera::cuda {
inline namespace CHIMERA_CUDA_BODY {

inline constexpr int kBranch = DraftState::kBranch;

// ---- The best of a row -------------------------------------------------------------------------

struct TopKParams {
  const Step* rows;     // of the draft model
  const float* logits;  // (rows, stride)
  int64_t stride;
  int depth;  // of the rows
  DraftState* state;
};
KERNEL(kDraftThreads, 1) void top_k_kernel(TopKParams p) {
  wait_for_previous();
  const int row = p.rows->first_new + block_x();
  if (row >= p.rows->n_rows) return;
  DraftState* s = p.state;
  auto* scratch = reinterpret_cast<uint64_t*>(shared_memory());
  const float* logits = p.logits + row * p.stride;
  const int n = s->n_static + s->n_dynamic;
  const Sampling sampling = s->sampling;
  // The target's own noise at that position: see engine/sampler.h.
  const bool noisy = sampling.temperature >= kLeastTemperature;
  const auto position = static_cast<uint64_t>(s->length + p.depth);
  const auto value = [&](int i) {
    const float x = logits[i];
    if (!noisy) return x;
    const uint32_t bits =
        token_bits(sampling.seed, position, static_cast<uint32_t>(s->vocabulary[i]));
    return x + sampling.temperature * gumbel(bits);
  };
  uint64_t top[kBranch];
  block_top<kDraftThreads>(scratch, n, value, top);
  const float largest = value(key_index(top[0]));
  const int calibrated = least(p.depth, DraftState::kMostDepths - 1);
  const float scale = divide(1.0f, s->temperature[calibrated]);
  float sum = 0;
  for (int i = thread_index(); i < n; i += kDraftThreads)
    sum = sum + exp_contract((value(i) - largest) * scale);
  sum = block_sum<kDraftThreads>(reinterpret_cast<float*>(scratch), sum);
  if (thread_index() == 0) {
    s->n_best = least(n, kBranch);
    UNROLLED_FOR (int r = 0; r < kBranch; ++r) {
      if (r >= n) continue;
      const int32_t i = key_index(top[r]);
      const float share =
          divide(s->coverage[calibrated] * exp_contract((value(i) - largest) * scale), sum);
      s->best[row][r] = i;
      s->share[row][r] = is_nan(share) ? 0.0f : share;
    }
  }
}
inline void top_k(Stream stream, const TopKParams& p, int max_rows) {
  launch("top_k", top_k_kernel, stream, {max_rows}, kDraftThreads, kDraftWarps * 8, p);
}

// ---- The vocabulary ----------------------------------------------------------------------------

struct VocabularyParams {
  const Step* step;     // of the target
  const float* logits;  // (n_logits, vocab), of the target
  int32_t vocab;
  DraftState* state;
  DType from_type, to_type;
  const std::byte* from;  // tape of the target's head, (vocab, cols)
  std::byte* to;          // tape of the draft's, (n_static + kMostDynamic, cols), F32 or Q8_0
  int64_t cols;
};

// Block r: row r of the step, if it was kept and has logits.
KERNEL(kDraftThreads, 1) void target_best_kernel(VocabularyParams p) {
  wait_for_previous();
  const Step::Sequence& seq = p.step->sequences[0];
  const int row = seq.first_row + block_x();
  if (seq.n_rows == 0 || row >= seq.first_row + seq.n_rows || p.step->kept_at[row] < 0) return;
  const int at = p.step->kept_at[row] - kept_of(p.step).first;
  const int logits_row = p.step->logits_index[row];
  if (at >= DraftState::kMaxRows) return;
  int32_t* best = p.state->target_best[at];
  if (logits_row < 0) {
    if (thread_index() == 0) best[0] = -1;
    return;
  }
  auto* scratch = reinterpret_cast<uint64_t*>(shared_memory());
  const float* logits = p.logits + static_cast<int64_t>(logits_row) * p.vocab;
  uint64_t top[kBranch];
  block_top<kDraftThreads>(
      scratch, p.vocab, [logits](int i) { return logits[i]; }, top);
  if (thread_index() == 0)
    UNROLLED_FOR (int r = 0; r < kBranch; ++r) best[r] = r < p.vocab ? key_index(top[r]) : -1;
}

// One block. Nearly all of the tokens are known, so all threads look that up for all of them; what
// is left is done by one thread, in the order of the text, since a token may come twice, and one
// that comes may put out another.
struct LearnShared {
  static constexpr int kEach = 1 + kBranch, kMost = 1 + DraftState::kMaxRows * kEach;
  int32_t token[kMost];  // -1: none
  uint8_t known[kMost];
};
KERNEL(kDraftThreads, 1) void learn_vocabulary_kernel(VocabularyParams p) {
  wait_for_previous();
  DraftState* s = p.state;
  auto* shared = reinterpret_cast<LearnShared*>(shared_memory());
  const Kept kept = kept_of(p.step);
  const int rows = least(kept.n, DraftState::kMaxRows), n = 1 + rows * LearnShared::kEach;
  for (int i = thread_index(); i < n; i += kDraftThreads) {
    const int row = (i - 1) / LearnShared::kEach, rank = (i - 1) % LearnShared::kEach;
    int32_t token = -1;
    if (i == 0)
      token = kept.n > 0 && kept.first == 0 ? s->text[0] : -1;
    else if (rank == 0)
      token = s->text[kept.first + row + 1];
    else if (s->target_best[row][0] >= 0)
      token = s->target_best[row][rank - 1];
    shared->token[i] = token;
    shared->known[i] = token < 0 || s->known[token] != 0 ? 1 : 0;
  }
  sync_threads();
  if (thread_index() > 0) return;
  for (int i = 0; i < n; ++i) {
    const int32_t token = shared->token[i];
    // One that was known may have been put out since.
    if (token < 0 || (shared->known[i] != 0 && s->n_dynamic < DraftState::kMostDynamic)) continue;
    if (s->known[token] != 0) continue;
    s->known[token] = 1;
    int at = s->n_dynamic;
    if (at < DraftState::kMostDynamic) {
      s->n_dynamic = at + 1;
    } else {
      at = s->oldest;
      s->oldest = (at + 1) % DraftState::kMostDynamic;
      s->known[s->vocabulary[s->n_static + at]] = 0;
    }
    s->vocabulary[s->n_static + at] = token;
    s->stale[at] = 1;
  }
}

// Row `row` of an F32 or Q8_0 tape = f(row), as prepare() would have packed it. A warp has 32
// columns; for Q8_0 they are a block (engine/dtype.h).
template <typename Value>
DEVICE void store_tape_row(DType type, std::byte* tape, int64_t cols, int64_t row,
                           const Value& value) {
  for (int64_t k = thread_index(); k < round_up<int64_t>(cols, kLanes); k += block_threads()) {
    const float x = k < cols ? value(k) : 0.0f;
    if (type == DType::kF32) {
      if (k < cols)
        reinterpret_cast<float*>(
            tape)[(row / kF32PanelRows * cols + k) * kF32PanelRows + row % kF32PanelRows] = x;
      continue;
    }
    float largest = float_of(bits_of(x) & 0x7fffffffu);
    for (int width = kLanes / 2; width > 0; width /= 2)
      largest = most(largest, shuffle_xor(largest, width));
    const uint16_t scale = float_to_f16(divide(largest, 127.0f));
    const float d = f16_to_float(scale);
    const float q = d > 0 ? ::nearbyintf(divide(x, d)) : 0.0f;
    const SlabLayout l = slab_layout(type);
    std::byte* slab = tape + (row / kTileRows * tape_slabs(type, cols) + k / l.k) * l.bytes;
    const int r = static_cast<int>(row % kTileRows), i = static_cast<int>(k % l.k);
    const Place16 at = place_a(r, i % 16);
    slab[at.lane * 16 + i / 16 * 8 + at.reg * 2 + at.half] = static_cast<std::byte>(
        static_cast<int>(least(most(q, -127.0f), 127.0f)) + quant_offset(type));
    if (lane_index() == 0) *reinterpret_cast<uint16_t*>(slab + l.scales + r * 2) = scale;
  }
}

// Brings the rows of the head up to date with the vocabulary. Few blocks: few rows are stale.
inline constexpr int kHeadBlocks = 16;
KERNEL(kDraftThreads, 1) void copy_head_kernel(VocabularyParams p) {
  wait_for_previous();
  DraftState* s = p.state;
  for (int i = block_x(); i < s->n_dynamic; i += kHeadBlocks) {
    if (s->stale[i] == 0) continue;
    const int64_t row = s->n_static + i, token = s->vocabulary[row];
    store_tape_row(p.to_type, p.to, p.cols, row,
                   [&](int64_t k) { return tape_weight(p.from_type, p.from, p.cols, token, k); });
    sync_threads();
    if (thread_index() == 0) s->stale[i] = 0;
    sync_threads();
  }
}
inline void learn_vocabulary(Stream stream, const VocabularyParams& p, int max_rows) {
  launch("target_best", target_best_kernel, stream, {max_rows}, kDraftThreads, kDraftWarps * 8, p);
  launch("learn_vocabulary", learn_vocabulary_kernel, stream, {}, kDraftThreads,
         sizeof(LearnShared), p);
  launch("copy_head", copy_head_kernel, stream, {kHeadBlocks}, kDraftThreads, 0, p);
}

// ---- Growth ------------------------------------------------------------------------------------

struct TreeShared {
  float probability[DraftState::kMostCandidates];
  int32_t token[DraftState::kMostCandidates];
  int16_t parent[DraftState::kMostCandidates];
  uint8_t wanted[DraftState::kMostCandidates];  // who takes part in a ranking
  float share[DraftState::kMaxRows];            // by row: of its node's probability, the draft's
  // By row: a bit for each rank that adds no candidate, being a match or not of the shape.
  uint32_t left_out[DraftState::kMaxRows];
  int32_t first_child[DraftState::kMaxRows];  // by row: of the candidates that it adds
  float place;                                // of the nodes-th most probable
  uint32_t n_chosen;

  DEVICE float probability_of(int node) const { return node < 0 ? 1.0f : probability[node]; }
  // How many of those that are wanted come before candidate i.
  DEVICE int rank(int n, int i) const {
    int before = 0;
    for (int j = 0; j < n; ++j)
      before += wanted[j] != 0 &&
                (probability[j] > probability[i] || (probability[j] == probability[i] && j < i));
    return before;
  }
  DEVICE void load(const DraftState* s) {
    for (int i = thread_index(); i < s->n_candidates; i += kDraftThreads) {
      probability[i] = s->probability[i];
      token[i] = s->token[i];
      parent[i] = static_cast<int16_t>(s->parent[i]);
    }
  }
  // CandidateTree::set_probability(), by a warp. Only n-gram matches hang below a node whose
  // children the draft has not proposed yet, and they come first. A descendant may be no more
  // probable than any node on its path; these shrink or grow by one factor and were in order
  // before, so the bound is the node's own new probability.
  DEVICE void set_probability(int node, float p, int n_matches) {
    const float before = probability[node], factor = before > 0 ? divide(p, before) : 0.0f;
    const float bounded = least(p, probability_of(parent[node]));
    sync_warp();
    for (int i = node + 1 + lane_index(); i < n_matches; i += kLanes) {
      int ancestor = parent[i];
      while (ancestor > node) ancestor = parent[ancestor];
      if (ancestor == node) probability[i] = least(probability[i] * factor, bounded);
    }
    if (lane_index() == 0) probability[node] = bounded;
    sync_warp();
  }
};

struct GrowParams {
  int depth;  // of the nodes that were expanded
  DraftState* state;
  DraftPass draft;
};

// Of a tree of one shape, the node of it that hangs below a candidate; -1: none.
DEVICE int child_in_shape(const DraftState* s, int candidate, int rank) {
  return s->shape[candidate < 0 ? 0 : s->shape_of[candidate]][rank];
}

// What the draft says below the new rows' nodes. A warp for each: the subtrees of two nodes of one
// depth have nothing in common. An n-gram match that is there already keeps kMatchTrust of its
// probability; the draft's word counts for the rest of the node's, and adds to a match of the same
// token.
DEVICE void add_candidates(TreeShared* shared, DraftState* s, int first, int end) {
  const int before = s->n_candidates, n_matches = s->n_matches, n_best = s->n_best;
  for (int row = first + warp_index(); row < end; row += kDraftWarps) {
    const int node = s->candidate_of_row[row];
    const float above = shared->probability_of(node);
    float left = above;
    for (int i = node + 1; i < n_matches; ++i) {
      if (shared->parent[i] != node) continue;
      shared->set_probability(i, kMatchTrust * shared->probability[i], n_matches);
      left -= shared->probability[i];
    }
    const float share = above * (above > 0 ? most(divide(left, above), 0.0f) : 1.0f);
    uint32_t left_out = 0;
    for (int rank = 0; rank < n_best; ++rank) {
      if (s->n_shape > 0 && child_in_shape(s, node, rank) < 0) {
        left_out |= 1u << rank;
        continue;
      }
      const int32_t token = s->vocabulary[s->best[row][rank]];
      int match = node + 1;
      while (match < n_matches && (shared->parent[match] != node || shared->token[match] != token))
        ++match;
      if (match >= n_matches) continue;
      left_out |= 1u << rank;
      shared->set_probability(match, shared->probability[match] + share * s->share[row][rank],
                              n_matches);
    }
    if (lane_index() == 0) {
      shared->share[row] = share;
      shared->left_out[row] = left_out;
    }
  }
  sync_threads();
  if (thread_index() == 0) {
    int next = before;
    for (int row = first; row < end; ++row) {
      shared->first_child[row] = next;
      for (int rank = 0; rank < n_best; ++rank) next += (shared->left_out[row] >> rank & 1u) == 0;
    }
    s->n_candidates = least(next, DraftState::kMostCandidates);
  }
  sync_threads();
  for (int i = thread_index(); i < (end - first) * kBranch; i += kDraftThreads) {
    const int row = first + i / kBranch, rank = i % kBranch;
    if (rank >= n_best || (shared->left_out[row] >> rank & 1u) != 0) continue;
    int at = shared->first_child[row];
    for (int r = 0; r < rank; ++r) at += (shared->left_out[row] >> r & 1u) == 0;
    if (at >= DraftState::kMostCandidates) continue;
    const int node = s->candidate_of_row[row];
    s->token[at] = shared->token[at] = s->vocabulary[s->best[row][rank]];
    s->parent[at] = node;
    shared->parent[at] = static_cast<int16_t>(node);
    s->depth_of[at] = node < 0 ? 1 : s->depth_of[node] + 1;
    s->probability[at] = shared->probability[at] =
        least(shared->share[row] * s->share[row][rank], shared->probability_of(node));
    s->row[at] = -1;
    if (s->n_shape > 0) s->shape_of[at] = 1 + child_in_shape(s, node, rank);
  }
  for (int i = thread_index(); i < n_matches; i += kDraftThreads)
    s->probability[i] = shared->probability[i];
  sync_threads();
}

KERNEL(kDraftThreads, 1) void grow_kernel(GrowParams p) {
  wait_for_previous();
  DraftState* s = p.state;
  Step* rows = p.draft.rows;
  auto* shared = reinterpret_cast<TreeShared*>(shared_memory());
  const int t = thread_index(), first = rows->first_new, end = rows->n_rows;
  shared->load(s);
  sync_threads();
  add_candidates(shared, s, first, end);

  // The next rows: the most probable candidates of the next depth, as far as what comes below them
  // can still be among the best; of a shape, those that have children in it.
  const int n = s->n_candidates, next = p.depth + 1,
            depths = least(s->depth, s->context - s->length),
            width = next < depths ? least(s->width, DraftState::kMaxRows - end) : 0;
  for (int i = t; i < n; i += kDraftThreads) shared->wanted[i] = 1;
  if (t == 0) {
    shared->place = 0;
    shared->n_chosen = 0;
  }
  sync_threads();
  for (int i = t; i < n; i += kDraftThreads)
    if (shared->rank(n, i) == s->nodes - 1) shared->place = shared->probability[i];
  sync_threads();
  const auto promising = [&](int i) {
    if (s->n_shape == 0) return shared->probability[i] > shared->place;
    for (const int16_t child : s->shape[s->shape_of[i]])
      if (child >= 0) return true;
    return false;
  };
  for (int i = t; i < n; i += kDraftThreads) {
    const int parent = shared->parent[i];
    shared->wanted[i] =
        s->depth_of[i] == next && promising(i) && (parent < 0 || s->row[parent] >= 0) ? 1 : 0;
  }
  sync_threads();
  const int committed = rows->sequences[0].committed;
  for (int i = t; i < n; i += kDraftThreads) {
    if (shared->wanted[i] == 0) continue;
    const int rank = shared->rank(n, i);
    if (rank >= width) continue;
    const int row = end + rank, above = shared->parent[i] < 0 ? 0 : s->row[shared->parent[i]];
    rows->token[row] = shared->token[i];
    rows->parent[row] = above == 0 ? -1 : above;
    rows->sequence[row] = 0;
    rows->position[row] = above == 0 ? committed : rows->position[above] + 1;
    rows->slot[row] = committed + row - 1;
    int32_t* trigram = p.draft.trigrams->token + 3 * row;
    trigram[2] = shared->token[i];
    trigram[1] = rows->token[above];
    trigram[0] =
        above == 0 ? s->text[most(0, s->length - 2)] : rows->token[most(0, rows->parent[above])];
    p.draft.links->feature[row] = p.draft.links->state[row] = above;
    s->row[i] = row;
    s->candidate_of_row[row] = i;
    atomic_add(&shared->n_chosen, 1);
  }
  sync_threads();
  if (t > 0) return;
  const int added = static_cast<int>(shared->n_chosen);
  rows->first_new = p.draft.features->first_new = end;
  rows->n_rows = p.draft.features->n_rows = end + added;
  p.draft.trigrams->first_new = 3 * end;
  p.draft.trigrams->n_rows = 3 * (end + added);
  rows->sequences[0].n_rows += added;
}
inline void grow(Stream stream, const GrowParams& p) {
  launch("grow", grow_kernel, stream, {}, kDraftThreads, sizeof(TreeShared), p);
}

// ---- Choice ------------------------------------------------------------------------------------

struct ChooseShared {
  TreeShared tree;
  int16_t rank[DraftState::kMostCandidates];
  float sorted[Step::kMaxRows];  // probabilities
};

struct ChooseParams {
  DraftState* state;
  Step* step;  // of the target
};
KERNEL(kDraftThreads, 1) void choose_kernel(ChooseParams p) {
  wait_for_previous();
  DraftState* s = p.state;
  Step* step = p.step;
  auto* shared = reinterpret_cast<ChooseShared*>(shared_memory());
  TreeShared& tree = shared->tree;
  const int t = thread_index(), n = s->n_candidates, root = s->length - 1,
            max_depth = s->context - s->length;
  tree.load(s);
  for (int i = t; i < n; i += kDraftThreads) tree.wanted[i] = s->depth_of[i] <= max_depth ? 1 : 0;
  if (t == 0) tree.n_chosen = 0;
  sync_threads();
  const int budget = least(s->nodes, Step::kMaxRows - 1);
  for (int i = t; i < n; i += kDraftThreads) {
    if (tree.wanted[i] == 0) continue;
    const int rank = tree.rank(n, i);
    shared->rank[i] = static_cast<int16_t>(rank);
    if (rank >= budget) continue;
    shared->sorted[rank] = tree.probability[i];
    atomic_add(&tree.n_chosen, 1);
  }
  sync_threads();
  if (t == 0) {
    int chosen = static_cast<int>(tree.n_chosen);
    if (s->has_costs != 0) {  // CandidateTree::worthwhile(); some 31 candidates as a rule
      const double drafting = static_cast<double>(s->drafting_seconds),
                   trust = static_cast<double>(s->trust.share());
      double tokens = 1, best = 1 / (drafting + static_cast<double>(s->seconds[1]));
      int worthwhile = 0;
      for (int i = 0; i < chosen; ++i) {
        tokens += trust * static_cast<double>(shared->sorted[i]);
        const double rate = tokens / (drafting + static_cast<double>(s->seconds[i + 2]));
        if (rate > best) {
          best = rate;
          worthwhile = i + 1;
        }
      }
      chosen = worthwhile;
    }
    tree.n_chosen = static_cast<uint32_t>(chosen);
    for (int i = 0; i < chosen; ++i) s->trust.promised += shared->sorted[i];

    const bool live = max_depth > 0;
    Step::Sequence& q = step->sequences[0];
    q.committed = root;
    q.first_row = 0;
    q.n_rows = live ? 1 + chosen : 0;
    q.root = live ? 0 : -1;
    q.sampling = s->sampling;
    q.n_kept = 0;
    q.next = -1;
    step->n_rows = step->n_logits = q.n_rows;
    step->first_new = 0;
    step->token[0] = s->text[root];
    step->parent[0] = -1;
    step->position[0] = step->slot[0] = root;
  }
  sync_threads();
  const int rows = 1 + static_cast<int>(tree.n_chosen);
  for (int row = t; row < rows; row += kDraftThreads) {
    step->sequence[row] = 0;
    step->logits_index[row] = step->logits_row[row] = row;
    step->kept_at[row] = -1;
  }
  for (int i = t; i < n; i += kDraftThreads) {
    if (tree.wanted[i] == 0 || shared->rank[i] + 1 >= rows) continue;
    const int row = 1 + shared->rank[i], parent = tree.parent[i];
    step->token[row] = tree.token[i];
    step->parent[row] = parent < 0 ? 0 : 1 + shared->rank[parent];
    step->position[row] = root + s->depth_of[i];
    step->slot[row] = root + row;
  }
}
inline void choose(Stream stream, const ChooseParams& p) {
  launch("choose", choose_kernel, stream, {}, kDraftThreads, sizeof(ChooseShared), p);
}

}  // namespace CHIMERA_CUDA_BODY
}  // namespace chimera::cuda
