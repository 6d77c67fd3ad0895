// A drafter whose trees never leave the device: a pass of the target and the drafting of the next
// tree are one list of ops, so one graph, and the host does nothing but launch it and read tokens.
//
//   the host     launch 1   launch 2   read 1   launch 3   read 2   ...
//   the device              1 1 1 1 1 1 1 1 1   2 2 2 2 2 2 2 2 2   3 3 3 ...
//
// One pass is always launched ahead. If the text ends in the one before (an end-of-text token, a
// limit, the user), it was in vain and is forgotten: it has changed nothing but positions behind
// the text. Prompts go through the Session's own Step, each piece followed by the same ops.
//
// Depth and width are those of the options at every step, since launches cannot depend on data; how
// many candidates are verified follows the costs, as everywhere. One sequence.
#pragma once

#include <memory>

#include "engine/chimera/draft_tensors.h"
#include "engine/drafter.h"
#include "engine/llama.h"
#include "engine/static_tree.h"
#include "engine/tree_ops.h"

namespace chimera {

struct ResidentOptions {
  int nodes = 8;                     // candidates verified a step; 0: plain decoding
  int depth = 8, width = 4;          // of the draft model's tree
  int min_match = 0, max_match = 0;  // tokens of an n-gram match; max_match 0: none
  StaticTree tree{};                 // if not empty, the tree of every step: the rest is ignored
};

class ResidentDrafter : public Drafter {
 public:
  // The session whose text it is: what a pass of it leaves, and the ops of one.
  struct Target {
    const float* states;  // (rows, hidden), the kept rows first
    const float* logits;
    int max_nodes;
    FunctionRef<void(Step*)> pass;  // forward, accept, keep
  };

  // A text starts, or goes on after steps that this drafter had no part in. `text`: a number that
  // tells texts apart. cost: nullptr: as many nodes as there are. Waits for the device.
  virtual void start(const Target& target, int64_t text, std::span<const int32_t> tokens,
                     const Sampling& sampling, const CostCurve* cost) = 0;
  // Whether this drafter has seen all of the text but its pending tokens, and nothing else.
  virtual bool follows(int64_t text, size_t length) const = 0;
  // Rows of a prompt that it can follow in one pass.
  virtual int most_rows() const = 0;

  // A pass over the host's Step: tokens that are pending. Waits for it. Where it reaches the last
  // of them, a tree is drafted below the token that it samples, and the next pass launched.
  virtual void run(const Target& target, Step* step) = 0;
  // Launches the next pass over the device's own Step, then waits for the one before and returns
  // what it gave. After a run() that reached the last token.
  virtual const PassResult& advance(const Target& target) = 0;
  // Such a pass is under way.
  virtual bool ahead() const = 0;

  // For tests: the next tree and what it was grown from, in the device's memory.
  struct OnDevice {
    const Step* step;
    const DraftState* state;
  };
  virtual OnDevice on_device() const = 0;

  void draft(const DraftContext& context, Step* step) override;  // throws: this is not its way
  ResidentDrafter* resident() override { return this; }
};

// nullptr where the backend cannot draft, or not a tree of that shape: DraftState::kBranch ranks
// and kMostDepths depths are the most. tensors: nullptr without a draft model; no longer needed
// once this returns.
std::unique_ptr<ResidentDrafter> make_resident_drafter(const Llama& target,
                                                       const DraftTensors* tensors,
                                                       const ResidentOptions& options, int context);

}  // namespace chimera
