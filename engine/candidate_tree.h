// Grows a candidate tree below a row of a step, path by path: paths that begin alike share nodes.
#pragma once

#include "engine/step.h"

namespace chimera {

class CandidateTree {
 public:
  CandidateTree(Step* step, int root, int max_nodes, int max_depth)
      : step_(step), root_(root), max_nodes_(max_nodes), max_depth_(max_depth) {}

  int size() const { return nodes_; }
  bool full() const { return nodes_ >= max_nodes_; }

  // The child of `parent` with this token, added if there is none; -1 if there is no room for it.
  int child(int parent, int32_t token) {
    for (int r = parent + 1; r < step_->n_rows; ++r)
      if (step_->parent[r] == parent && step_->token[r] == token) return r;
    if (full() || step_->position[parent] - step_->position[root_] >= max_depth_ || step_->n_rows == Step::kMaxRows)
      return -1;
    ++nodes_;
    return step_->add_row(token, parent, true);
  }

 private:
  Step* step_;
  int root_, max_nodes_, max_depth_;
  int nodes_ = 0;
};

}  // namespace chimera
