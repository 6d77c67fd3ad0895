// Chimera drafting: a candidate tree grown best-first by the draft model's probabilities, with
// n-gram matches competing for the same nodes.
//
// Depth by depth the draft model expands the most probable nodes, at most `width` of them; every
// token it proposes below a node is a candidate whose path probability is the product of the
// probabilities along its path. The `nodes` candidates with the highest path probability are
// verified. (After EAGLE-2, arXiv 2406.16858; a parent is never less probable than its child, so
// they form a tree.) An n-gram match of length n enters its continuation with the probability that
// such a match was measured to have.
#pragma once

#include <memory>

#include "engine/chimera/draft_model.h"
#include "engine/drafter.h"
#include "engine/function_ref.h"

namespace chimera {

struct ChimeraOptions {
  int nodes = 16;      // candidates verified a step
  int depth = 6;       // of the tree
  int width = 4;       // nodes expanded at a depth
  bool ngrams = true;  // hybrid
  int static_vocabulary = 2048;
};

class ChimeraDrafter : public TreeDrafter {
 public:
  // For measuring: runs the draft model along the tokens that really follow, as far as its tree may
  // reach. visit(depth, logits, truth), depth from 1: logits of the draft's vocabulary, index of
  // the true token in them, -1 if it is not there.
  virtual void follow(
      const DraftContext& context, std::span<const int32_t> next,
      FunctionRef<void(int depth, std::span<const float> logits, int truth)> visit) = 0;
};

// target and tensors: the tensors are no longer needed once this returns.
std::unique_ptr<ChimeraDrafter> make_chimera_drafter(const Llama& target,
                                                     const DraftTensors& tensors,
                                                     const ChimeraOptions& options, int n_sequences,
                                                     int context);

}  // namespace chimera
