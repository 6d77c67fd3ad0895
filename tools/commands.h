// The sub-commands, one file each. They return the exit code: 0 success, 1 failure, 2 usage; and
// throw UsageError, other Errors, OutputClosed and Interrupted (main.cc catches them).
#pragma once

#include <string>
#include <vector>

namespace chimera {

int run(const std::vector<std::string>& args);
int info(const std::vector<std::string>& args);
int bench(const std::vector<std::string>& args);
int tune_tree(const std::vector<std::string>& args);
int train(const std::vector<std::string>& args);  // train/train.cc, and its stages

}  // namespace chimera
