// The stages of training; see commands.h for what they return.
#pragma once

#include <string>
#include <vector>

namespace chimera {

// Where the features of a shard's texts are kept (feature_file.h).
inline std::string features_path(const std::string& shard) {
  return shard + ".features";
}

int train_all(const std::vector<std::string>& args);  // every stage in turn
int train_data(const std::vector<std::string>& args);
int train_merge(const std::vector<std::string>& args);
int train_fit(const std::vector<std::string>& args);
int train_eval(const std::vector<std::string>& args);

}  // namespace chimera
