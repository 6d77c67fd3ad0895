// The candidates for one tree, and the choice of which to verify.
//
// Drafters put in guesses with the probability that the text takes the path to them; paths that
// begin alike share nodes. The most probable ones go into the step. How many: a fixed number, or,
// where the cost of a pass is known, the number n that makes the most of it,
//   max over n of (1 + trust (p_1 + .. + p_n)) / (drafting + seconds(1 + n)),   p_1 >= p_2 >= ..,
// the tokens that the pass is expected to give for each second.
//
// A choice of n is the beginning of a choice of more, so that one tree measures all sizes.
#pragma once

#include <algorithm>
#include <functional>
#include <span>
#include <vector>

#include "engine/cost_curve.h"
#include "engine/ngram_match.h"
#include "engine/step.h"

namespace chimera {

class CandidateTree {
 public:
  static constexpr int kMostNodes = 1024;
  struct Node {
    int32_t token;
    int parent;         // index of a node, kRoot: child of the root
    int depth;          // 1: child of the root
    float probability;  // of the path to it; never more than its parent's
    int row = -1;       // of the draft's step, -1: not expanded
  };
  static constexpr int kRoot = -1, kNone = -2;

  CandidateTree() {
    nodes_.reserve(kMostNodes);
    chosen_.reserve(kMostNodes);
    row_of_.reserve(kMostNodes);
    order_.reserve(kMostNodes);
    probabilities_.reserve(kMostNodes);
  }

  void clear() {
    nodes_.clear();
    chosen_.clear();
  }
  int size() const { return static_cast<int>(nodes_.size()); }
  Node& operator[](int i) { return nodes_[static_cast<size_t>(i)]; }
  const Node& operator[](int i) const { return nodes_[static_cast<size_t>(i)]; }
  float probability_of(int node) const {
    return node == kRoot ? 1.0f : nodes_[static_cast<size_t>(node)].probability;
  }
  int depth_of(int node) const {
    return node == kRoot ? 0 : nodes_[static_cast<size_t>(node)].depth;
  }

  // The child of `parent` with this token, kNone if there is none.
  int find(int parent, int32_t token) const {
    for (int i = parent + 1; i < size(); ++i) {
      const Node& node = nodes_[static_cast<size_t>(i)];
      if (node.parent == parent && node.token == token) return i;
    }
    return kNone;
  }

  // Adds a child, and returns it. If two drafters propose it, the higher probability counts.
  // Returns kNone if there are too many nodes already.
  int add(int parent, int32_t token, float probability) {
    probability = std::min(probability, probability_of(parent));
    if (const int i = find(parent, token); i != kNone) {
      (*this)[i].probability = std::max((*this)[i].probability, probability);
      return i;
    }
    if (size() == kMostNodes) return kNone;
    nodes_.push_back({token, parent, depth_of(parent) + 1, probability});
    return size() - 1;
  }

  // Gives a node another probability, and what hangs below it in proportion (nothing, if it was 0).
  void set_probability(int node, float probability) {
    const float before = (*this)[node].probability;
    const float factor = before > 0 ? probability / before : 0;
    (*this)[node].probability = std::min(probability, probability_of((*this)[node].parent));
    for (int i = node + 1; i < size(); ++i) {
      int ancestor = (*this)[i].parent;
      while (ancestor > node) ancestor = (*this)[ancestor].parent;
      if (ancestor != node) continue;
      Node& n = (*this)[i];
      n.probability = std::min(n.probability * factor, probability_of(n.parent));
    }
  }

  // Of the probability of a node, what its children so far leave.
  float left_below(int parent) const {
    float left = probability_of(parent);
    for (int i = parent + 1; i < size(); ++i)
      if ((*this)[i].parent == parent) left -= (*this)[i].probability;
    return std::max(left, 0.0f);
  }

  // An n-gram match, the parent's child already, and the draft say two things about one token. The
  // match holds on its own with kMatchTrust of its probability, which knew nothing of the draft;
  // else the draft's word counts. Returns the share of the parent's probability that is left for
  // that. To be called once, before ...
  float discount_matches(int parent) {
    const float above = probability_of(parent);
    float left = above;
    for (int i = parent + 1; i < size(); ++i) {
      if ((*this)[i].parent != parent) continue;
      set_probability(i, kMatchTrust * (*this)[i].probability);
      left -= (*this)[i].probability;
    }
    return above > 0 ? std::max(left / above, 0.0f) : 1.0f;
  }
  // ... the draft's children of that parent are added, to a match of the same token if there is
  // one.
  int add_drafted(int parent, int32_t token, float probability) {
    const int node = find(parent, token);
    if (node == kNone) return add(parent, token, probability);
    set_probability(node, (*this)[node].probability + probability);
    return node;
  }

  // The most probable candidates of a depth, `width` at most, as far as the path to them was
  // expanded and what comes below them can still be among the best `budget`. Valid until the next
  // call.
  std::span<const int> worth_expanding(int depth, int budget, size_t width) {
    const float least = probability_of_place(budget);
    order_.clear();
    for (int i = 0; i < size(); ++i) {
      const Node& node = (*this)[i];
      if (node.depth == depth && node.probability > least &&
          (node.parent == kRoot || (*this)[node.parent].row >= 0))
        order_.push_back(i);
    }
    width = std::min(width, order_.size());
    std::partial_sort(order_.begin(), order_.begin() + static_cast<std::ptrdiff_t>(width),
                      order_.end(), [this](int a, int b) { return before(a, b); });
    order_.resize(width);
    return order_;
  }

  // Chooses the candidates to verify, as many as fit into max_nodes where cost is nullptr.
  // drafting: seconds spent on these candidates. trust: what a probability is worth (Trust).
  void choose(int max_nodes, int max_depth, const CostCurve* cost, double drafting, float trust) {
    trust_ = static_cast<double>(trust);
    chosen_.clear();
    for (int i = 0; i < size(); ++i)
      if ((*this)[i].depth <= max_depth) chosen_.push_back(i);
    std::sort(chosen_.begin(), chosen_.end(), [this](int a, int b) { return before(a, b); });
    if (chosen_.size() > static_cast<size_t>(max_nodes))
      chosen_.resize(static_cast<size_t>(max_nodes));
    if (cost != nullptr && cost->known()) chosen_.resize(worthwhile(*cost, drafting));
  }

  // What choose() chose, the most probable first.
  std::span<const int> chosen() const { return chosen_; }

  // Sum of their probabilities: tokens that the target will accept of them, if they are right.
  float promised() const {
    float tokens = 0;
    for (const int i : chosen_) tokens += (*this)[i].probability;
    return tokens;
  }
  // Tokens that a pass over them is expected to give, the root's own included.
  double expected_tokens() const { return 1 + trust_ * static_cast<double>(promised()); }

  // Writes the chosen candidates into the step, as rows below `root`.
  void write(Step* step, int root) {
    row_of_.assign(nodes_.size(), -1);
    for (const int i : chosen_) {
      const Node& node = (*this)[i];
      const int parent = node.parent == kRoot ? root : row_of_[static_cast<size_t>(node.parent)];
      row_of_[static_cast<size_t>(i)] = step->add_row(node.token, parent, true);
    }
  }

 private:
  bool before(int a, int b) const {  // so parents before children
    const float x = (*this)[a].probability, y = (*this)[b].probability;
    return x != y ? x > y : a < b;
  }

  // Of the n-th most probable candidate so far, 0 if there are fewer.
  float probability_of_place(int n) {
    if (size() < n) return 0;
    probabilities_.clear();
    for (const Node& node : nodes_) probabilities_.push_back(node.probability);
    const auto place = probabilities_.begin() + (n - 1);
    std::nth_element(probabilities_.begin(), place, probabilities_.end(), std::greater<>());
    return *place;
  }

  size_t worthwhile(const CostCurve& cost, double drafting) const {
    double tokens = 1, best = 1 / (drafting + cost.seconds(1));
    size_t n = 0;
    for (size_t i = 0; i < chosen_.size(); ++i) {
      tokens += trust_ * static_cast<double>(nodes_[static_cast<size_t>(chosen_[i])].probability);
      const double rate = tokens / (drafting + cost.seconds(static_cast<int>(i) + 2));
      if (rate > best) {
        best = rate;
        n = i + 1;
      }
    }
    return n;
  }

  std::vector<Node> nodes_;
  std::vector<int> chosen_, row_of_, order_;
  std::vector<float> probabilities_;
  double trust_ = 1;
};

}  // namespace chimera
