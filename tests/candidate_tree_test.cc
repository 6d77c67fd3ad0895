#include "engine/candidate_tree.h"

#include <gtest/gtest.h>

#include <random>

namespace chimera {
namespace {

TEST(CandidateTree, ANewProbabilityMovesWhatHangsBelow) {
  CandidateTree tree;
  tree.clear();
  const int a = tree.add(CandidateTree::kRoot, 1, 0.5f), b = tree.add(a, 2, 0.25f),
            c = tree.add(CandidateTree::kRoot, 3, 0.25f), d = tree.add(b, 4, 0.125f),
            e = tree.add(c, 5, 0.25f);
  tree.set_probability(a, 0.25f);
  EXPECT_EQ(tree[a].probability, 0.25f);
  EXPECT_EQ(tree[b].probability, 0.125f);
  EXPECT_EQ(tree[d].probability, 0.0625f);
  EXPECT_EQ(tree[c].probability, 0.25f);
  EXPECT_EQ(tree[e].probability, 0.25f);
  tree.set_probability(e, 0.9f);
  EXPECT_EQ(tree[e].probability, 0.25f) << "no more than its parent's";
  // From nothing: a probability of its own, and still nothing below.
  tree.set_probability(a, 0);
  EXPECT_EQ(tree[d].probability, 0);
  tree.set_probability(a, 0.5f);
  EXPECT_EQ(tree[a].probability, 0.5f);
  EXPECT_EQ(tree[b].probability, 0);
}

// Choosing relies on it, to the last bit: the most probable nodes must be a tree.
TEST(CandidateTree, NoChildIsMoreProbableThanItsParent) {
  std::mt19937 random(3);
  std::uniform_real_distribution<float> share(0.0f, 1.0f);
  for (int round = 0; round < 300; ++round) {
    CandidateTree tree;
    tree.clear();
    for (int i = 0; i < 40; ++i) {
      const int parent = static_cast<int>(random() % static_cast<unsigned>(tree.size() + 1)) - 1;
      tree.add(parent, i, tree.probability_of(parent) * (i % 3 == 0 ? 1.0f : share(random)));
      const int node = static_cast<int>(random() % static_cast<unsigned>(tree.size()));
      tree.set_probability(node, tree.probability_of(tree[node].parent) * share(random));
    }
    for (int i = 0; i < tree.size(); ++i)
      ASSERT_LE(tree[i].probability, tree.probability_of(tree[i].parent)) << round << " " << i;
    tree.choose(10, 40, nullptr, 0, 1);
    std::vector<int> chosen(tree.chosen().begin(), tree.chosen().end());
    for (const int i : chosen) {
      const int parent = tree[i].parent;
      EXPECT_TRUE(parent == CandidateTree::kRoot ||
                  std::find(chosen.begin(), chosen.end(), parent) != chosen.end());
    }
  }
}

}  // namespace
}  // namespace chimera
