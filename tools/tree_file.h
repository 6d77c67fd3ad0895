// Static trees as people write them.
//
// On the command line, how many guesses hang below every node, depth by depth: 3,2,1 is three
// guesses for the next token, two after each of them, and one after each of those: 3 + 6 + 6 nodes.
// In a file, a node a line, as the path of ranks to it, parents before children:
//
//   # 1 is the draft's likeliest guess, 2 the second, ...
//   1
//   1 1
//   2
#pragma once

#include <string>

#include "engine/static_tree.h"
#include "tools/flags.h"

namespace chimera {

// The value of a flag --tree.
FlagValue tree_value(StaticTree* target);

// `text`: digits and commas, else a file's name. Throws Error, which names the file and the line.
StaticTree read_tree(const std::string& text);

// There is never half a file of that name. comment: lines without their '#'.
void write_tree(const StaticTree& tree, const std::string& comment, const std::string& path);

}  // namespace chimera
