// The rollouts of a batch of texts, as index lists: which tokens each of them goes along, what it
// sees, and which answers of the target it is to learn.
//
// For each text they are those along it, from every start, then those along its branches. G tokens
// have a feature each: those of the texts' P positions, then of every branch its root's and its
// own, K in all. Q of the tokens ask: of each text those that its rollouts go along. Lists over the
// K steps of N rollouts, (K, N), hold step 0, then step 1, ...
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "engine/train/ops.h"
#include "engine/train/training_text.h"

namespace chimera::training {

struct Rollouts {
  Rollouts() = default;
  Rollouts(std::span<const TrainingText* const> texts, int n_steps);

  int steps = 0;
  int64_t n_starts = 0;  // of the texts; rollouts along branches are more
  int64_t n_positions() const { return static_cast<int64_t>(position.size()); }
  int64_t n_tokens() const { return static_cast<int64_t>(token.size()); }
  int64_t n_queries() const { return static_cast<int64_t>(query_token.size()); }
  int64_t size() const { return static_cast<int64_t>(start.size()); }

  std::vector<AttentionText> texts;
  std::vector<int32_t> token;           // (G)
  std::vector<int32_t> trigram;         // (G, 3) tokens, as indices of G
  std::vector<int32_t> position;        // (P) in its text
  std::vector<int32_t> next;            // (P) the next one of P, at most the last
  std::vector<int32_t> query_token;     // (Q) of G
  std::vector<int32_t> query_position;  // (Q) in its text
  std::vector<int32_t> start;           // (N) position n, of P
  // Row k: the token 1 + k after position n. Behind the end of a text, or of a branch, its last.
  std::vector<int32_t> ahead;           // (K, N) of G
  std::vector<int32_t> query;           // (K, N) of Q
  std::vector<int32_t> ahead_position;  // (K, N) in its text

  std::vector<SoftTarget> targets;  // of the texts and their branches
  std::vector<int32_t> target_of;   // (K, N); -1: nothing is learnt there

 private:
  void add_query(int64_t of_token, int64_t at);
  void add_rollout(int64_t n, int64_t first_query, int64_t last_query);
  void add_branch(const TrainingText& text, int64_t first_slot, const Branch& branch);
};

}  // namespace chimera::training
