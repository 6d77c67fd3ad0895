// What drafts would do on texts of the target, without decoding with each of them.
//
// The text is the same whatever the tree. So it is written once, by plain decoding, and gone
// through again token by token; at every position each drafter says which candidates it would have
// verified. How far the known text goes along with them is what decoding would have accepted, and
// adding up the passes gives its tokens per pass exactly, for every kind and size of tree at once.
#pragma once

#include <array>
#include <functional>
#include <map>
#include <vector>

#include "engine/chimera/chimera_drafter.h"
#include "engine/generate.h"

namespace chimera {

inline constexpr int kMeasuredDepths = 16;  // further depths are not measured
inline constexpr int kLargestTree = 60;     // nodes
inline constexpr uint8_t kNotThere = 255;   // a rank or place
enum TreeSource : size_t { kNgramTree, kDraftTree, kHybridTree, kTreeSources };

// How the text goes on after one root, as far as it goes (kNotThere beyond).
struct MeasuredPosition {
  using Path = std::array<uint8_t, kMeasuredDepths>;
  Path rank;  // of the true tokens among the draft's guesses, the likeliest 0, when it is told the
              // true tokens before
  int chain = 0;  // of the draft's likeliest guesses, one after the other, that are right
  std::array<Path, kTreeSources> place;  // of their nodes in the trees, the most probable node 0
};
using MeasuredText = std::vector<MeasuredPosition>;  // a position for each root in turn

// Tokens and passes of decoding with some tree.
struct PassCount {
  int64_t tokens = 0, passes = 0;
  double tokens_per_pass() const {
    return passes > 0 ? static_cast<double>(tokens) / static_cast<double>(passes) : 0;
  }
};
// accepted(position): candidates that a pass at it would accept.
template <typename F>
void count_passes(const MeasuredText& text, const F& accepted, PassCount* count) {
  for (size_t at = 0; at < text.size(); ++count->passes) {
    const size_t tokens = std::min(static_cast<size_t>(accepted(text[at])) + 1, text.size() - at);
    count->tokens += static_cast<int64_t>(tokens);
    at += tokens;
  }
}
// ... with the `nodes` most probable candidates of one source.
inline int accepted_in(const MeasuredPosition::Path& place, int nodes) {
  int depth = 0;
  while (depth < kMeasuredDepths && place[static_cast<size_t>(depth)] < nodes) ++depth;
  return depth;
}
// ... with a static tree of the draft's guesses.
int accepted_in(const MeasuredPosition& position, const StaticTree& tree);

// Static trees: a node is the path of ranks to it. The best tree of n nodes has the n paths that
// the text took most often.
class RankPaths {
 public:
  void add(const MeasuredPosition& position);
  void rank();  // to be called when all are added
  struct Node {
    int parent;  // index of a node, -1: child of the root
    int rank, depth;
    int64_t count;  // positions whose text took the path
  };
  // Most frequent first, parents before children.
  const std::vector<Node>& nodes() const { return nodes_; }
  int64_t positions() const { return positions_; }
  // Nodes of the best tree of `nodes` that the text goes along.
  int accepted(const MeasuredPosition& position, int nodes) const;

 private:
  int64_t positions_ = 0;
  std::vector<Node> nodes_;
  std::map<std::pair<int, int>, int> child_;  // (parent, rank) -> node
};

// How often candidates that were given a probability came true.
struct Reliability {
  static constexpr double kEdges[] = {0, .01, .02, .05, .1, .2, .3, .4, .5, .6, .7, .8, .9, 1};
  static constexpr size_t kBins = std::size(kEdges) - 1;
  struct Bin {
    int64_t n = 0, came_true = 0;
    double probability = 0;  // sum
  };
  std::array<Bin, kBins> bins;

  void add(double probability, bool came_true);
  double expected_error() const;  // mean over candidates of |given - true| of their bin
};

// The draft's guesses at one depth, when it is told the true tokens before.
struct DepthAccuracy {
  static constexpr size_t kRanks = 10;
  int64_t n = 0, known = 0;               // positions; true token in the draft's vocabulary
  std::array<int64_t, kRanks> at_rank{};  // true token there

  // Mean of -log p(true token) over `known`, p softened by each of these temperatures.
  static constexpr double kTemperatures[] = {.2, .3, .4, .5, .6, .7, .8, .9, 1, 1.15, 1.3};
  std::array<double, std::size(kTemperatures)> loss{};
  double best_temperature() const;
  double coverage() const {
    return n > 0 ? static_cast<double>(known) / static_cast<double>(n) : 1;
  }
  void add(const DepthAccuracy& other);
};

struct Measurement {
  std::vector<MeasuredText> texts;
  std::array<Reliability, kTreeSources> reliability;  // of trees of kReliabilityNodes
  static constexpr int kReliabilityNodes = 16;
  std::vector<DepthAccuracy> depths;              // [0]: children of the root
  double depth_seconds = 0, observe_seconds = 0;  // chimera_drafter.h
  int64_t positions() const;
};

// What makes the draft's probabilities true on such texts.
DraftCalibration calibration(const std::vector<DepthAccuracy>& depths);

// Decodes the prompts, up to generation.max_tokens each, with the sampling's seed counted up from
// one to the next. progress(share done, from 0 to 1). generation.cancelled ends it early, anywhere.
// trees: also of the trees that grow by probabilities, which takes most of the time.
Measurement measure_draft(Session& session, const DraftTensors& draft, ChimeraOptions options,
                          bool trees, const std::vector<std::vector<int32_t>>& prompts,
                          const GenerateOptions& generation,
                          const std::function<void(double)>& progress);

}  // namespace chimera
