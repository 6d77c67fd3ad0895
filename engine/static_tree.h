// A tree of one shape for every step, as in the Medusa and Chimera papers: each node is the draft's
// guess of some rank below its parent.
//
//   root --+-- 1 --+-- 1 1 --- 1 1 1      ranks of the path to each node, 1 the likeliest guess
//          |       +-- 1 2
//          +-- 2 ----- 2 1
#pragma once

#include <algorithm>
#include <vector>

namespace chimera {

struct StaticTree {
  static constexpr int kMostNodes = 63, kMostRanks = 32;
  struct Node {
    int parent;  // index of an earlier node, -1: child of the root
    int rank;    // 0: the draft's likeliest guess
    int depth;   // 1: child of the root
  };
  std::vector<Node> nodes{};

  bool empty() const { return nodes.empty(); }
  int size() const { return static_cast<int>(nodes.size()); }
  int depth() const {
    int deepest = 0;
    for (const Node& node : nodes) deepest = std::max(deepest, node.depth);
    return deepest;
  }
  // The most nodes of one depth that have children.
  int width() const {
    int widest = 1, at_depth[kMostNodes + 1] = {};
    for (int i = 0; i < size(); ++i) {
      const auto child_of = [i](const Node& node) { return node.parent == i; };
      if (std::any_of(nodes.begin() + i + 1, nodes.end(), child_of))
        widest = std::max(widest, ++at_depth[nodes[static_cast<size_t>(i)].depth]);
    }
    return widest;
  }
  int ranks() const {
    int most = 0;
    for (const Node& node : nodes) most = std::max(most, node.rank + 1);
    return most;
  }
  int find(int parent, int rank) const {  // -1 if it is not there
    for (int i = parent + 1; i < size(); ++i) {
      const Node& node = nodes[static_cast<size_t>(i)];
      if (node.parent == parent && node.rank == rank) return i;
    }
    return -1;
  }
  int add(int parent, int rank) {
    nodes.push_back({parent, rank, parent < 0 ? 1 : nodes[static_cast<size_t>(parent)].depth + 1});
    return size() - 1;
  }
};

}  // namespace chimera
