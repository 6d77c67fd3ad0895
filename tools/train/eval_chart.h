// What chimera train eval found, and a picture of it.
#pragma once

#include <string>
#include <vector>

#include "tools/train/draft_measurement.h"

namespace chimera {

inline constexpr int kTreeSizes[] = {3, 4, 8, 16, 32, kLargestTree};  // nodes without the root

struct TreeCurve {
  std::string tree;                     // "ngram", "chain", "static", "dynamic", "hybrid"
  std::vector<double> tokens_per_pass;  // for each of kTreeSizes
};

// A prompt file at one temperature.
struct EvalRow {
  std::string file, title;
  float temperature = 0;
  int64_t prompts = 0;
  Measurement measurement;
  std::vector<TreeCurve> curves;
  int tree_nodes = 0;  // of the tree that was given
  double tree_tokens_per_pass = 0;
};

// Draws an SVG file: a row of three panels for each. Throws Error; there is never half a file.
void write_eval_chart(const std::vector<EvalRow>& rows, const std::string& path);

}  // namespace chimera
