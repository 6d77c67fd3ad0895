// The candidates for one tree, and the choice of which to verify.
//
// Drafters put in guesses with the probability that the text takes the path to them; paths that
// begin alike share nodes. The most probable ones go into the step. How many: a fixed number, or,
// where the cost of a pass is known, the number n that makes the most of it,
//   max over n of (1 + p_1 + .. + p_n) / (drafting + seconds(1 + n)),   p_1 >= p_2 >= ..,
// the tokens that the pass is expected to give for each second.
#pragma once

#include <algorithm>
#include <vector>

#include "engine/cost_curve.h"
#include "engine/step.h"

namespace chimera {

class CandidateTree {
 public:
  struct Node {
    int32_t token;
    int parent;         // index of a node, kRoot: child of the root
    int depth;          // 1: child of the root
    float probability;  // of the path to it; never more than its parent's
    int row = -1;       // for the drafter's use
  };
  static constexpr int kRoot = -1;

  CandidateTree() {
    nodes_.reserve(kMostNodes);
    order_.reserve(kMostNodes);
    row_of_.reserve(kMostNodes);
  }

  void clear() { nodes_.clear(); }
  int size() const { return static_cast<int>(nodes_.size()); }
  Node& operator[](int i) { return nodes_[static_cast<size_t>(i)]; }
  float probability_of(int node) const {
    return node == kRoot ? 1.0f : nodes_[static_cast<size_t>(node)].probability;
  }
  int depth_of(int node) const {
    return node == kRoot ? 0 : nodes_[static_cast<size_t>(node)].depth;
  }

  // The child of `parent` with this token. If two drafters propose it, the higher probability
  // counts. Returns kRoot - 1 if there are too many nodes already.
  int add(int parent, int32_t token, float probability) {
    for (int i = parent + 1; i < size(); ++i) {
      Node& node = (*this)[i];
      if (node.parent != parent || node.token != token) continue;
      node.probability = std::max(node.probability, probability);
      return i;
    }
    if (size() == kMostNodes) return kRoot - 1;
    nodes_.push_back({token, parent, depth_of(parent) + 1, probability});
    return size() - 1;
  }

  // Writes the chosen candidates into the step, as rows below `root`, and returns how many.
  // cost: nullptr for as many as fit into max_nodes. drafting: seconds spent on these candidates.
  int write(Step* step, int root, int max_nodes, int max_depth, const CostCurve* cost,
            double drafting) {
    order_.clear();
    for (int i = 0; i < size(); ++i)
      if ((*this)[i].depth <= max_depth) order_.push_back(i);
    std::sort(order_.begin(), order_.end(), [this](int a, int b) {  // parents before children
      const Node &x = (*this)[a], &y = (*this)[b];
      return x.probability != y.probability ? x.probability > y.probability : a < b;
    });
    if (static_cast<int>(order_.size()) > max_nodes) order_.resize(static_cast<size_t>(max_nodes));
    if (cost != nullptr && cost->known()) order_.resize(worthwhile(*cost, drafting));
    row_of_.assign(nodes_.size(), -1);
    for (const int i : order_) {
      const Node& node = (*this)[i];
      const int parent = node.parent == kRoot ? root : row_of_[static_cast<size_t>(node.parent)];
      row_of_[static_cast<size_t>(i)] = step->add_row(node.token, parent, true);
    }
    return static_cast<int>(order_.size());
  }

 private:
  static constexpr int kMostNodes = 1024;

  size_t worthwhile(const CostCurve& cost, double drafting) const {
    double tokens = 1, best = 1 / (drafting + cost.seconds(1));
    size_t n = 0;
    for (size_t i = 0; i < order_.size(); ++i) {
      tokens += static_cast<double>(nodes_[static_cast<size_t>(order_[i])].probability);
      const double rate = tokens / (drafting + cost.seconds(static_cast<int>(i) + 2));
      if (rate > best) {
        best = rate;
        n = i + 1;
      }
    }
    return n;
  }

  std::vector<Node> nodes_;
  std::vector<int> order_, row_of_;
};

}  // namespace chimera
