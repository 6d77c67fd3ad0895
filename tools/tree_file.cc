#include "tools/tree_file.h"

#include <charconv>

#include "engine/error.h"
#include "loader/mapped_file.h"
#include "loader/output_file.h"

namespace chimera {
namespace {

constexpr char kNodes[] = "at most 63 nodes";
static_assert(StaticTree::kMostNodes == 63);

// The numbers from 1 to `most` in a text that separates them, nothing if it holds anything else.
std::vector<int> read_numbers(std::string_view text, char separator, int most) {
  std::vector<int> numbers;
  while (true) {
    int n = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), n);
    if (error != std::errc() || n < 1 || n > most) return {};
    numbers.push_back(n);
    text.remove_prefix(static_cast<size_t>(end - text.data()));
    if (text.empty()) return numbers;
    if (text.front() != separator) return {};
    text.remove_prefix(1);
  }
}

StaticTree of_widths(const std::string& text) {
  const std::vector<int> widths = read_numbers(text, ',', StaticTree::kMostRanks);
  if (widths.empty())
    throw UsageError("--tree", "widths from 1 to 32 such as 3,2,1, or a file", in_quotes(text));
  StaticTree tree;
  std::vector<int> parents = {-1};
  for (const int width : widths) {
    std::vector<int> children;
    for (const int parent : parents)
      for (int rank = 0; rank < width; ++rank) {
        if (tree.size() == StaticTree::kMostNodes)
          throw UsageError("--tree", kNodes, "more in " + in_quotes(text));
        children.push_back(tree.add(parent, rank));
      }
    parents = std::move(children);
  }
  return tree;
}

StaticTree of_file(const std::string& path) {
  const MappedFile file(path);
  std::string_view rest(reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size());
  StaticTree tree;
  for (int number = 1; !rest.empty(); ++number) {
    std::string_view line = rest.substr(0, rest.find('\n'));
    rest.remove_prefix(std::min(rest.size(), line.size() + 1));
    while (!line.empty() && (line.back() == '\r' || line.back() == ' ')) line.remove_suffix(1);
    if (line.empty() || line.front() == '#') continue;
    const std::string where = file.name() + ": line " + std::to_string(number);
    const std::vector<int> ranks = read_numbers(line, ' ', StaticTree::kMostRanks);
    if (ranks.empty())
      throw Error(where, "ranks from 1 to 32 with a space between", in_quotes(line.substr(0, 60)));
    int parent = -1;
    for (size_t i = 0; i + 1 < ranks.size(); ++i) {
      parent = tree.find(parent, ranks[i] - 1);
      if (parent < 0)
        throw Error(where, "a node below one of an earlier line", in_quotes(line.substr(0, 60)));
    }
    if (tree.find(parent, ranks.back() - 1) >= 0)
      throw Error(where, "every node once", in_quotes(line.substr(0, 60)) + " again");
    if (tree.size() == StaticTree::kMostNodes) throw Error(where, kNodes, "more");
    tree.add(parent, ranks.back() - 1);
  }
  if (tree.empty()) throw Error(file.name(), "a tree: a line for each node", "none");
  return tree;
}

}  // namespace

FlagValue tree_value(StaticTree* target) {
  const auto set = [=](std::string_view text) {
    *target = read_tree(std::string(text));
    return true;
  };
  return {set, "", ""};
}

StaticTree read_tree(const std::string& text) {
  const bool widths = text.find_first_not_of("0123456789,") == std::string::npos;
  return widths ? of_widths(text) : of_file(text);
}

void write_tree(const StaticTree& tree, const std::string& comment, const std::string& path) {
  std::string out, line;
  for (const char c : comment + "\n") {
    if (c != '\n') {
      line += c;
      continue;
    }
    out += "# " + line + "\n";
    line.clear();
  }
  std::vector<std::string> paths;
  for (const StaticTree::Node& node : tree.nodes) {
    paths.push_back((node.parent < 0 ? "" : paths[static_cast<size_t>(node.parent)] + " ") +
                    std::to_string(node.rank + 1));
    out += paths.back() + "\n";
  }
  OutputFile file(path);
  file.write(out);
  file.commit();
}

}  // namespace chimera
