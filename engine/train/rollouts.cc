#include "engine/train/rollouts.h"

#include <algorithm>

namespace chimera::training {

Rollouts::Rollouts(std::span<const TrainingText* const> batch, int n_steps) : steps(n_steps) {
  int64_t rows = 0, queries = 0;
  for (const TrainingText* t : batch) {
    const auto branches = static_cast<int64_t>(t->branches.size());
    texts.push_back({.first_slot = n_positions(),
                     .n_slots = t->first_start + t->n_starts(),
                     .first_query = queries,
                     .n_queries = t->n_starts() + branches * steps,
                     .first_row = rows,
                     .n_rows = t->n_starts() + branches});
    queries += texts.back().n_queries;
    rows += texts.back().n_rows;
    n_starts += t->n_starts();
    const auto first = static_cast<int32_t>(n_positions());
    for (int32_t p = 0; p < t->n_positions(); ++p) {
      token.push_back(t->tokens[static_cast<size_t>(p)]);
      for (int32_t j = 0; j < 3; ++j) trigram.push_back(first + std::max(p - 2 + j, 0));
      position.push_back(p);
      next.push_back(first + p + 1);
    }
  }
  if (!next.empty()) --next.back();  // (A text's last slot is never seen.)

  const auto cells = static_cast<size_t>(steps * rows);
  for (auto* list : {&ahead, &query, &ahead_position}) list->resize(cells);
  target_of.assign(cells, -1);
  for (size_t i = 0; i < batch.size(); ++i) {
    const TrainingText& text = *batch[i];
    const int64_t first = texts[i].first_slot + text.first_start, first_query = n_queries();
    const auto first_target = static_cast<int64_t>(targets.size());
    targets.insert(targets.end(), text.targets.begin(), text.targets.end());
    for (int64_t s = 0; s < text.n_starts(); ++s)
      add_query(first + s + 1, text.first_start + s + 1);
    for (int64_t s = 0; s < text.n_starts(); ++s) {
      for (int64_t k = 0; k < std::min<int64_t>(steps, text.n_starts() - s); ++k)
        target_of[static_cast<size_t>(k * rows + size())] =
            static_cast<int32_t>(first_target + s + k);
      add_rollout(first + s, first_query + s, n_queries() - 1);
    }
    for (const Branch& b : text.branches) add_branch(text, texts[i].first_slot, b);
  }
}

void Rollouts::add_query(int64_t of_token, int64_t at) {
  query_token.push_back(static_cast<int32_t>(of_token));
  query_position.push_back(static_cast<int32_t>(at));
}

void Rollouts::add_rollout(int64_t n, int64_t first_query, int64_t last_query) {
  const size_t rows = query.size() / static_cast<size_t>(steps), row = start.size();
  for (size_t k = 0; k < static_cast<size_t>(steps); ++k) {
    const int64_t q = std::min(first_query + static_cast<int64_t>(k), last_query);
    query[k * rows + row] = static_cast<int32_t>(q);
    ahead[k * rows + row] = query_token[static_cast<size_t>(q)];
    ahead_position[k * rows + row] = query_position[static_cast<size_t>(q)];
  }
  start.push_back(static_cast<int32_t>(n));
}

void Rollouts::add_branch(const TrainingText& text, int64_t first_slot, const Branch& b) {
  const int64_t root = n_tokens(), first_query = n_queries();  // the root's, a second time
  const int64_t rows = static_cast<int64_t>(query.size()) / steps;
  const auto n_tokens_of_it = static_cast<int64_t>(b.tokens.size());
  for (int64_t k = 0; k < steps; ++k) {
    token.push_back(k == 0 ? text.tokens[static_cast<size_t>(b.start + 1)]
                           : b.tokens[static_cast<size_t>(std::min(k, n_tokens_of_it) - 1)]);
    for (int64_t j = k - 2; j <= k; ++j)
      trigram.push_back(static_cast<int32_t>(
          j >= 0 ? root + j : first_slot + std::max<int64_t>(b.start + 1 + j, 0)));
    add_query(root + k, b.start + 1 + k);
  }
  // The answer after token number k of the branch, from 1 on, is that of step k.
  const int64_t first_learnt = n_tokens_of_it + 1 - static_cast<int64_t>(b.targets.size());
  for (int64_t k = first_learnt; k <= std::min<int64_t>(n_tokens_of_it, steps - 1); ++k)
    target_of[static_cast<size_t>(k * rows + size())] =
        static_cast<int32_t>(targets.size()) + static_cast<int32_t>(k - first_learnt);
  targets.insert(targets.end(), b.targets.begin(), b.targets.end());
  add_rollout(first_slot + b.start, first_query, first_query + steps - 1);
}

}  // namespace chimera::training
