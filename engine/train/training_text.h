// What there is to learn from a text.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/sampler.h"

namespace chimera::training {

// What the target answered at a position.
using SoftTarget = LikelyTokens;

// Where a draft would have gone from a text and the target did not: a path of candidates below a
// root. What the target says there is learnt as well.
struct Branch {
  int64_t start;                // n, of which the root is the token x_{n + 1}
  std::vector<int32_t> tokens;  // after the root, one at least
  // The target's answers after the last ones of them. After those before, the text or another
  // branch, which go along, have them.
  std::vector<SoftTarget> targets;
};

// Tokens x_0..x_{L-1}, of which x_{first_start + 2}.. are to be predicted.
struct TrainingText {
  std::vector<int32_t> tokens;      // L
  int64_t first_start = 0;          // the first n: the last known state of a rollout
  std::vector<float> states;        // (L - 1, d)  the target's final states h_0..h_{L-2}
  std::vector<SoftTarget> targets;  // row i: the target's answer at position first_start + 1 + i
  std::vector<Branch> branches;

  int64_t n_positions() const { return static_cast<int64_t>(tokens.size()) - 1; }
  // Starts whose first prediction is known.
  int64_t n_starts() const { return n_positions() - 1 - first_start; }
};

}  // namespace chimera::training
