// The stages of training; see commands.h for what they return.
#pragma once

#include <string>
#include <vector>

namespace chimera {

int train_all(const std::vector<std::string>& args);  // every stage in turn
int train_data(const std::vector<std::string>& args);
int train_merge(const std::vector<std::string>& args);
int train_fit(const std::vector<std::string>& args);
int train_average(const std::vector<std::string>& args);
int train_eval(const std::vector<std::string>& args);

}  // namespace chimera
