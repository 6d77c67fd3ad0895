// Chimera drafting: a candidate tree grown best-first by the draft model's probabilities, with
// n-gram matches competing for the same nodes; or a tree of a given shape.
//
// Depth by depth the draft model expands the most probable nodes, at most `width` of them; every
// token it proposes below a node is a candidate whose path probability is the product of the
// probabilities along its path. The `nodes` candidates with the highest path probability are
// verified. (After EAGLE-2, arXiv 2406.16858; a parent is never less probable than its child, so
// they form a tree.) An n-gram match enters its continuation with the probability that such a match
// has (ngram_index.h), of which less counts once the draft has had its say about the same token.
//
// Where the target samples, its noise is known beforehand (sampler.h), and the draft's logits get
// the same noise: what comes out on top is what the target would emit if it thought as the draft
// does.
//
// Where the cost of a pass is known, a further depth is drafted only if it pays: if the tokens that
// it may add, to those expected so far, are more than its time to the time spent so far.
#pragma once

#include <memory>

#include "engine/chimera/draft_model.h"
#include "engine/drafter.h"
#include "engine/function_ref.h"
#include "engine/static_tree.h"

namespace chimera {

inline constexpr int kHybridMinMatch = 1, kHybridMaxMatch = kLongestMatch;  // tokens of a match

struct ChimeraOptions {
  int nodes = 16;      // candidates verified a step
  int depth = 8;       // of the tree
  int width = 4;       // nodes expanded at a depth
  bool ngrams = true;  // hybrid
  StaticTree tree{};   // not empty: the draft's guesses of this shape, and nothing else
};

class ChimeraDrafter : public TreeDrafter {
 public:
  // For measuring: runs the draft model along the tokens that really follow, as long as visit says
  // to go on. visit(depth, logits, truth), depth from 1: logits of the draft's vocabulary, noise of
  // the sampling included, index of the true token in them, -1 if it is not there.
  virtual void follow(
      const DraftContext& context, std::span<const int32_t> next,
      FunctionRef<bool(int depth, std::span<const float> logits, int truth)> visit) = 0;
  // What a further depth took, proposals included, averaged over the last ones.
  virtual double depth_seconds() const = 0;
  // ... and what observe() took, which every step pays whatever its tree.
  virtual double observe_seconds() const = 0;

  // All that drafting has taken, from the first step on (a prompt's apart).
  struct Spent {
    double seconds = 0;
    int64_t steps = 0, depths = 0;  // that drafted; depths that they drafted
  };
  virtual const Spent& spent() const = 0;
};

// target and tensors: the tensors are no longer needed once this returns.
std::unique_ptr<ChimeraDrafter> make_chimera_drafter(const Llama& target,
                                                     const DraftTensors& tensors,
                                                     const ChimeraOptions& options, int n_sequences,
                                                     int context);

}  // namespace chimera
