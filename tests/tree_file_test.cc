#include "tools/tree_file.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <sstream>

#include "engine/error.h"

namespace chimera {
namespace {

class TreeFile : public testing::Test {
 protected:
  ~TreeFile() override { std::filesystem::remove(path_); }
  std::string error(const std::string& content) {
    std::ofstream(path_, std::ios::binary) << content;
    return error_of(path_);
  }
  static std::string error_of(const std::string& spec) {
    try {
      read_tree(spec);
    } catch (const Error& e) {
      return e.what();
    }
    return "no error";
  }
  const std::string path_ =
      std::filesystem::temp_directory_path() / ("chimera_tree_" + std::to_string(getpid()));
};

void expect_same(const StaticTree& a, const StaticTree& b) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.nodes.size(); ++i) {
    EXPECT_EQ(a.nodes[i].parent, b.nodes[i].parent) << i;
    EXPECT_EQ(a.nodes[i].rank, b.nodes[i].rank) << i;
    EXPECT_EQ(a.nodes[i].depth, b.nodes[i].depth) << i;
  }
}

TEST_F(TreeFile, Widths) {
  const StaticTree tree = read_tree("3,2,1");
  EXPECT_EQ(tree.size(), 3 + 6 + 6);
  EXPECT_EQ(tree.depth(), 3);
  EXPECT_EQ(tree.nodes[4].parent, 0);
  EXPECT_EQ(tree.nodes[4].rank, 1);
  EXPECT_EQ(read_tree("1,1,1,1").depth(), 4);
  EXPECT_EQ(read_tree("32").size(), 32);
}

TEST_F(TreeFile, IsReadBackAsWritten) {
  StaticTree tree;
  tree.add(-1, 0);
  tree.add(0, 2);
  tree.add(-1, 31);
  tree.add(1, 0);
  write_tree(tree, "two\nlines", path_);
  expect_same(read_tree(path_), tree);
  std::ifstream file(path_);
  std::ostringstream text;
  text << file.rdbuf();
  EXPECT_EQ(text.str(), "# two\n# lines\n1\n1 3\n32\n1 3 1\n");
}

TEST_F(TreeFile, Errors) {
  for (const std::string spec : {"0", "3,", "3,,1", ",", "33", "99999999999999999999"})
    EXPECT_NE(error_of(spec).find("widths from 1 to 32"), std::string::npos) << error_of(spec);
  EXPECT_NE(error_of("8,8").find("at most 63 nodes"), std::string::npos);
  EXPECT_NE(error_of("/nowhere/tree").find("/nowhere/tree"), std::string::npos);
  EXPECT_NE(error("").find("expected"), std::string::npos) << error("");
  EXPECT_NE(error("# nothing\n").find("a line for each node"), std::string::npos);
  for (const std::string line : {"0", "1  1", "x", "1,1", "-1", "33", "\xff"})
    EXPECT_NE(error("1\n" + line + "\n").find(": line 2: expected ranks"), std::string::npos)
        << error("1\n" + line + "\n");
  EXPECT_NE(error("1\n2 1\n").find("line 2: expected a node below one of an earlier line"),
            std::string::npos);
  EXPECT_NE(error("1\n2\n1\n").find("line 3: expected every node once"), std::string::npos);
  std::string many;
  for (int i = 1; i <= 32; ++i) many += std::to_string(i) + "\n1 " + std::to_string(i) + "\n";
  EXPECT_NE(error(many).find("line 64: expected at most 63 nodes"), std::string::npos);
}

}  // namespace
}  // namespace chimera
