// Drafting as data: all that a tree of candidates is grown from, in the backend's memory, so that a
// device can draft, verify and go on without the host (tree_ops.h, resident_drafter.h). What Step
// is to a pass of the target, DraftState is to the drafting between two passes. One sequence.
//
// The host writes it when a text starts and never touches it again; ops read and write it. Buffers
// whose size depends on the model or the context are pointers into the backend's memory.
#pragma once

#include <cstdint>

#include "engine/ngram_match.h"
#include "engine/sampler.h"
#include "engine/static_tree.h"
#include "engine/step.h"
#include "engine/trust.h"

namespace chimera {

// What a pass gave. Ops write it where the host reads it.
struct PassResult {
  int64_t number;                     // of the pass, from 0 in each text
  int32_t emitted;                    // tokens added to the text
  int32_t drafted;                    // candidates that were verified
  int32_t token[Step::kMaxRows + 1];  // those added, in order
};

// Where the inputs of each row of a draft model's pass come from.
struct DraftLinks {
  static constexpr int kMaxRows = 64;
  int32_t feature[kMaxRows];  // row that holds the feature of the token before
  int32_t state[kMaxRows];    // row of the states that are handed to forward()
  int32_t root, root_state;   // of the rows kept by a pass of the target, the last: the next root
};
// What a pass of the draft model works on (draft_model.h): its rows; the rows whose features are to
// be computed, which are rows of the same buffers; and three rows of tokens for each of these.
struct DraftPass {
  Step *rows = nullptr, *features = nullptr, *trigrams = nullptr;
  Step* root = nullptr;  // row 0, if a pass of the target kept anything
  DraftLinks* links = nullptr;
};

struct DraftState {
  static constexpr int kMostCandidates = 1024;  // as CandidateTree::kMostNodes
  static constexpr int kBranch = 8;             // candidates taken from one expanded node, and
                                                // tokens that the target found likely
  static constexpr int kMostDepths = 32, kMostDynamic = 512;
  static constexpr int kMaxRows = DraftLinks::kMaxRows;  // of a pass of the draft model
  static constexpr int kRoot = -1;                       // as a parent

  // ---- The text ----
  int32_t* text;        // (context + 1); those behind the length are anything
  int32_t length;       // the last token is the root: all but it are in the KV cache
  int32_t context;      // a text of this length is full
  int32_t n_passes;     // that gave tokens
  PassResult* results;  // [2], memory of the host; pass n writes results[n % 2]
  Sampling sampling;

  // ---- Options ----
  int32_t nodes;                 // candidates verified at most
  int32_t depth, width;          // of the draft's tree; 0: no draft model
  int32_t min_match, max_match;  // of n-gram matches; max_match 0: none
  // seconds[m]: of a pass over m rows of the target. has_costs 0: as many nodes as there are.
  int32_t has_costs;
  float seconds[Step::kMaxRows + 1];
  float drafting_seconds;  // of all that is not the target's pass

  // ---- A tree of one shape, if n_shape > 0: of all that could grow, its nodes alone ----
  int32_t n_shape;
  // shape[i + 1][rank]: the child of node i (0: of the root) of that rank, as its index in the
  // shape; -1: none.
  int16_t shape[StaticTree::kMostNodes + 1][kBranch];

  // ---- N-gram matches ----
  uint32_t matched[kLongestMatch + 1], came_true[kLongestMatch + 1];  // by length

  // ---- The candidates: as CandidateTree::Node; the first n_matches are those of the n-grams ----
  Trust trust;  // where costs are known
  int32_t n_candidates, n_matches;
  int32_t token[kMostCandidates];
  int32_t parent[kMostCandidates];
  int32_t depth_of[kMostCandidates];
  float probability[kMostCandidates];
  int32_t row[kMostCandidates];        // of the draft's pass, -1: not expanded
  int32_t shape_of[kMostCandidates];   // its row of `shape`, if there is one
  int32_t candidate_of_row[kMaxRows];  // inverse; row 0 stands for the root

  // ---- What the draft's logits say, by row ----
  int32_t n_best;                          // kBranch, or all that there are
  int32_t best[kMaxRows][kBranch];         // indices into the vocabulary, likeliest first
  float share[kMaxRows][kBranch];          // their softmax, calibrated
  int32_t target_best[kMaxRows][kBranch];  // tokens; by kept row; [0] is -1 where it had no logits

  // ---- What the draft can propose: n_static tokens, then dynamic ones, replaced oldest first ----
  int32_t* vocabulary;  // (n_static + kMostDynamic)
  uint8_t* known;       // (vocab of the target): whether a token is in it
  int32_t n_static, n_dynamic, oldest;
  uint8_t stale[kMostDynamic];  // the row of the head is not this token's yet

  // ---- Calibration (draft_tensors.h), mixed for this text's temperature, by depth ----
  float temperature[kMostDepths], coverage[kMostDepths];
};

}  // namespace chimera
