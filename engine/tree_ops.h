// Ops that draft on the device: they grow a candidate tree in a DraftState and write it into the
// next Step of the target, without the host. A backend either has all of them or none
// (Backend::tree_ops()); on the CPU the host's drafters do the same (candidate_tree.h,
// ngram_index.h, chimera_drafter.h), and the tests hold one against the other.
//
//   forward, accept, keep    the target's pass over the tree
//   advance                  the kept tokens join the text; the host is told; the draft's rows
//   learn_matches            how far n-gram matches can be believed in this text
//   (draft model)            features and slots of the kept rows
//   learn_vocabulary         tokens that the draft may propose from now on
//   propose                  a new tree: continuations of earlier occurrences
//   (draft model, top_k, grow) x depth
//   choose                   the best of them, into the Step of the next pass
//
// Steps are those of make_device_step(), except that `step` may be the host's as well (a prompt).
// A step of no rows (the text was full) goes through all of them and changes nothing.
#pragma once

#include <cstdint>

#include "engine/backend.h"
#include "engine/draft_state.h"

namespace chimera {

class TreeOps {
 public:
  virtual ~TreeOps() = default;

  // After accept(). Adds the kept candidates and the sampled token to the text, and writes the
  // result. draft: the pass of the draft model over the kept rows, to be written; row 0 holds the
  // feature of the token before them. rows is nullptr without a draft model.
  virtual void advance(const Step* step, DraftState* state, const DraftPass& draft) = 0;
  // After advance(): what the longest match before each of the text's new tokens would have said.
  virtual void learn_matches(const Step* step, DraftState* state) = 0;
  // After advance(). The text's new tokens and the target's kBranch best of each kept row that has
  // logits, in the order of the text; then the rows of `head` that hold others are replaced by
  // those of target_head. head: prepare() of F32 or Q8_0 rows, n_static + kMostDynamic of them.
  virtual void learn_vocabulary(const Step* step, const float* logits, int32_t vocab,
                                DraftState* state, const Matrix& target_head, Matrix* head) = 0;

  // Starts a tree: as propose_ngrams(), or empty. draft: a pass whose row 0 stands for the root.
  virtual void propose(DraftState* state, const DraftPass& draft) = 0;
  // Of each new row, whose logits (rows, stride) choose the tokens `depth` + 1 below the root: the
  // kBranch best, the sampling's noise included, and their calibrated probabilities.
  virtual void top_k(const DraftPass& draft, const float* logits, int64_t stride, int depth,
                     DraftState* state) = 0;
  // Adds these below the nodes of the new rows, `depth` below the root. Then the most probable
  // candidates of the next depth get rows, `width` at most; none if it is the last. Of a tree of
  // one shape, its nodes are added, and those that have children get rows.
  virtual void grow(int depth, DraftState* state, const DraftPass& draft) = 0;
  // Writes the root and the most probable candidates into `step`; no rows if the text is full.
  virtual void choose(DraftState* state, Step* step) = 0;
};

}  // namespace chimera
