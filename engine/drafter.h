// Where candidate trees come from. A drafter guesses; it never changes the text.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "engine/backend.h"
#include "engine/cost_curve.h"
#include "engine/ngram_match.h"
#include "engine/step.h"

namespace chimera {

// What a drafter may look at for one sequence of a step.
struct DraftContext {
  Backend& backend;
  int sequence;
  int64_t text;                     // a number that changes when the sequence starts another text
  std::span<const int32_t> tokens;  // the text so far; the last token is the root
  int root;                         // its row in the step
  int max_nodes;                    // candidates to add at most, without the root
  int max_depth;                    // below the root; longer paths would leave the context
  const CostCurve* cost;            // what nodes cost here; nullptr: as many as max_nodes
  Sampling sampling;                // of the target
};

// What a pass of the target left for one sequence: n_kept rows, whose states follow each other.
struct KeptRows {
  int sequence;
  int64_t text;  // as above
  // The text, up to and including the token after the last kept row.
  std::span<const int32_t> tokens;
  int n_kept;
  int committed;        // positions kept in all; the kept rows are the last n_kept of them
  const float* states;  // (n_kept, hidden) after the target's final norm
  const Step* step;     // for logits_index of the rows
  const float* logits;
  int32_t vocab;
};

class ResidentDrafter;

class Drafter {
 public:
  virtual ~Drafter() = default;
  virtual std::string name() const = 0;
  // Writes candidates below the root into the step, before its list of ops: rows of the same
  // sequence, parents before children, siblings with different tokens, all wanting logits.
  virtual void draft(const DraftContext& context, Step* step) = 0;
  // Called after every step, prompt's included, for each sequence that kept rows.
  virtual void observe(const KeptRows& /*kept*/) {}
  // Not nullptr: it drafts on the device, and has no use for the above (resident_drafter.h).
  virtual ResidentDrafter* resident() { return nullptr; }
};

class CandidateTree;

// A drafter that gathers candidates and has the best of them verified.
class TreeDrafter : public Drafter {
 public:
  // The candidates below the root, with a choice made. Valid until the next call.
  virtual CandidateTree& candidates(const DraftContext& context) = 0;
  void draft(const DraftContext& context, Step* step) override;
};

struct NgramOptions {
  int nodes = 8;      // candidates a step
  int min_match = 1;  // tokens that must agree
  int max_match = kLongestMatch;
};
// Continuations of earlier occurrences of the text's last few tokens ("prompt lookup").
// context: positions of a sequence at most. Allocates here and never again.
std::unique_ptr<TreeDrafter> make_ngram_drafter(const NgramOptions& options, int n_sequences,
                                                int context);

}  // namespace chimera
