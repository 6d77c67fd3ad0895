// What the target says where a draft leads it: along a text, and at the candidates that the draft
// would have had verified while decoding it, those that are rejected as well. (Ross, Gordon,
// Bagnell, AISTATS 2011: learn in the states that the learner itself brings about.)
//
// The text is one that the target wrote. So decoding with the draft would write it again, and what
// every pass would accept is known beforehand: the text is gone through in larger pieces, with the
// trees of all roots of a piece in one pass.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "engine/chimera/chimera_drafter.h"
#include "engine/train/target_features.h"

namespace chimera::training {

class OnPolicyFeatures {
 public:
  static constexpr int kMostNodes = 64;

  // Of texts up to `context` tokens; trees of up to `nodes` candidates (1..kMostNodes) and `depth`
  // deep.
  OnPolicyFeatures(const Llama& target, int context, int nodes, int depth);

  // Whose trees they are from now on.
  void use(const DraftTensors& draft);

  // As TargetFeatures::read(), with the same bits, and the branches: every path of candidates that
  // decoding greedily with the draft would have seen rejected.
  TrainingText read(std::span<const int32_t> tokens, int64_t first_start);

 private:
  // A rejected candidate.
  struct Guess {
    int64_t root;     // position of its tree's root
    int64_t left_at;  // position of the text's last token on the path to it
    int parent;       // a guess, or -1: the text
    int32_t token;
    bool is_leaf, is_learnt;  // by a branch
  };
  // Tokens that a pass at this root accepts, its own included. Those it rejects join guesses_.
  int verify(const CandidateTree& tree, int64_t root, const TrainingText& text);
  void observe(const TrainingText& text, int64_t first, int64_t root, int n_kept);
  // From guesses_, and what the target says after each of them.
  void add_branches(const LikelyTokens* answers, TrainingText* text);

  ChimeraOptions options_;
  TargetPass pass_;
  std::unique_ptr<ChimeraDrafter> drafter_;
  int64_t texts_read_ = 0;
  std::vector<Guess> guesses_;
  struct Place {  // of a candidate: of the text at a position, or a guess
    int64_t at;
    int guess;
  };
  std::vector<Place> place_;    // of the tree's nodes
  std::unique_ptr<Step> kept_;  // as a pass of the decoding would have left it
};

}  // namespace chimera::training
