#include "tools/train/draft_measurement.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "engine/candidate_tree.h"

namespace chimera {

int accepted_in(const MeasuredPosition& position, const StaticTree& tree) {
  int node = -1, depth = 0;
  for (; depth < kMeasuredDepths; ++depth) {
    node = tree.find(node, position.rank[static_cast<size_t>(depth)]);
    if (node < 0) break;
  }
  return depth;
}

void RankPaths::add(const MeasuredPosition& position) {
  ++positions_;
  int node = -1;
  for (int depth = 1; depth <= kMeasuredDepths; ++depth) {
    const int rank = position.rank[static_cast<size_t>(depth - 1)];
    if (rank >= static_cast<int>(DepthAccuracy::kRanks)) return;
    const auto [it, added] = child_.try_emplace({node, rank}, static_cast<int>(nodes_.size()));
    if (added) nodes_.push_back({node, rank, depth, 0});
    node = it->second;
    ++nodes_[static_cast<size_t>(node)].count;
  }
}

void RankPaths::rank() {
  std::vector<int> order(nodes_.size()), place(nodes_.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [this](int a, int b) {
    return nodes_[static_cast<size_t>(a)].count > nodes_[static_cast<size_t>(b)].count;
  });
  for (size_t i = 0; i < order.size(); ++i)
    place[static_cast<size_t>(order[i])] = static_cast<int>(i);
  std::vector<Node> ranked;
  child_.clear();
  for (const int i : order) {
    Node node = nodes_[static_cast<size_t>(i)];
    if (node.parent >= 0) node.parent = place[static_cast<size_t>(node.parent)];
    child_[{node.parent, node.rank}] = static_cast<int>(ranked.size());
    ranked.push_back(node);
  }
  nodes_ = std::move(ranked);
}

int RankPaths::accepted(const MeasuredPosition& position, int nodes) const {
  int node = -1, depth = 0;
  for (; depth < kMeasuredDepths; ++depth) {
    const auto it = child_.find({node, position.rank[static_cast<size_t>(depth)]});
    if (it == child_.end() || it->second >= nodes) break;
    node = it->second;
  }
  return depth;
}

void Reliability::add(double probability, bool came_true) {
  const auto edge = std::upper_bound(std::begin(kEdges) + 1, std::end(kEdges) - 1, probability);
  Bin& bin = bins[static_cast<size_t>(edge - std::begin(kEdges)) - 1];
  ++bin.n;
  bin.came_true += came_true;
  bin.probability += probability;
}

double Reliability::expected_error() const {
  double error = 0;
  int64_t n = 0;
  for (const Bin& bin : bins) {
    error += std::abs(bin.probability - static_cast<double>(bin.came_true));
    n += bin.n;
  }
  return n > 0 ? error / static_cast<double>(n) : 0;
}

// The minimum of the parabola through the best temperature measured and its neighbours.
double DepthAccuracy::best_temperature() const {
  const auto i = static_cast<size_t>(std::min_element(loss.begin(), loss.end()) - loss.begin());
  const double t = kTemperatures[i];
  if (known == 0) return 1;
  if (i == 0 || i + 1 == loss.size()) return t;
  const double a = kTemperatures[i - 1] - t, b = kTemperatures[i + 1] - t,
               fa = loss[i - 1] - loss[i], fb = loss[i + 1] - loss[i];
  const double bend = fb * a - fa * b;
  return bend == 0 ? t : t + (fb * a * a - fa * b * b) / (2 * bend);
}

void DepthAccuracy::add(const DepthAccuracy& other) {
  n += other.n;
  known += other.known;
  for (size_t i = 0; i < at_rank.size(); ++i) at_rank[i] += other.at_rank[i];
  for (size_t i = 0; i < loss.size(); ++i) loss[i] += other.loss[i];
}

DraftCalibration calibration(const std::vector<DepthAccuracy>& depths) {
  DraftCalibration c;
  for (const DepthAccuracy& depth : depths) {
    if (depth.known == 0) break;
    c.temperature.push_back(static_cast<float>(depth.best_temperature()));
    c.coverage.push_back(std::max(DraftCalibration::kLeast, static_cast<float>(depth.coverage())));
  }
  return c;
}

int64_t Measurement::positions() const {
  int64_t n = 0;
  for (const MeasuredText& text : texts) n += static_cast<int64_t>(text.size());
  return n;
}

namespace {

// Stands where a drafter would and asks the drafters that are measured, but verifies nothing.
class Spectator final : public Drafter {
 public:
  Spectator(const Llama& target, const DraftTensors& tensors, ChimeraOptions options, bool trees,
            int context, Measurement* result)
      : result_(result) {
    options.nodes = kLargestTree;
    options.ngrams = false;
    draft_ = make_chimera_drafter(target, tensors, options, 1, context);
    if (trees) {
      options.ngrams = true;
      hybrid_ = make_chimera_drafter(target, tensors, options, 1, context);
      ngram_ = make_ngram_drafter({.nodes = kLargestTree}, 1, context);
    }
    result_->depths.resize(static_cast<size_t>(std::min(options.depth, kMeasuredDepths)));
  }
  std::string name() const override { return "spectator"; }
  const ChimeraDrafter& drafter() const { return *draft_; }

  // The text that is going to be gone through.
  void watch(std::span<const int32_t> text, size_t prompt_size) {
    text_ = text;
    prompt_size_ = prompt_size;
    result_->texts.emplace_back();
  }

  void observe(const KeptRows& kept) override {
    draft_->observe(kept);
    if (hybrid_) hybrid_->observe(kept);
  }

  void draft(const DraftContext& at, Step*) override {
    if (at.tokens.size() <= prompt_size_) return;
    DraftContext context = at;
    context.max_nodes = kLargestTree;
    context.cost = nullptr;
    const auto next = text_.subspan(at.tokens.size());
    MeasuredPosition& position = result_->texts.back().emplace_back();
    TreeDrafter* const drafters[] = {ngram_.get(), draft_.get(), hybrid_.get()};
    for (size_t source = 0; hybrid_ && source < kTreeSources; ++source)
      watch_tree(drafters[source]->candidates(context), next, &position.place[source],
                 &result_->reliability[source]);
    position.rank.fill(kNotThere);
    const auto depths = static_cast<int>(result_->depths.size());
    draft_->follow(context, next, [&](int depth, std::span<const float> logits, int truth) {
      const size_t rank = truth < 0 ? kNotThere : rank_of(logits, truth);
      const bool chained = position.chain == depth - 1 && rank == 0;
      if (chained) position.chain = depth;
      if (depth <= depths)
        watch_depth(static_cast<size_t>(depth - 1), logits, truth, rank, &position);
      return depth < depths || (chained && depth < kLargestTree);
    });
  }

 private:
  static void watch_tree(const CandidateTree& tree, std::span<const int32_t> next,
                         MeasuredPosition::Path* places, Reliability* reliability) {
    const std::span<const int> chosen = tree.chosen();
    places->fill(kNotThere);
    int node = CandidateTree::kRoot;
    for (size_t i = 0; i < std::min<size_t>(next.size(), kMeasuredDepths); ++i) {
      node = tree.find(node, next[i]);
      const auto place = std::find(chosen.begin(), chosen.end(), node);
      if (node == CandidateTree::kNone || place == chosen.end()) break;
      (*places)[i] = static_cast<uint8_t>(place - chosen.begin());
    }
    for (size_t i = 0; i < std::min<size_t>(chosen.size(), Measurement::kReliabilityNodes); ++i) {
      // What comes after the end of the text is not known.
      const CandidateTree::Node& candidate = tree[chosen[i]];
      if (static_cast<size_t>(candidate.depth) > next.size()) continue;
      const bool came_true = candidate.depth <= kMeasuredDepths &&
                             (*places)[static_cast<size_t>(candidate.depth - 1)] == i;
      reliability->add(static_cast<double>(candidate.probability), came_true);
    }
  }

  // Of equal ones, the first in the vocabulary comes first.
  static size_t rank_of(std::span<const float> logits, int truth) {
    const float own = logits[static_cast<size_t>(truth)];
    size_t rank = 0;
    for (size_t i = 0; i < logits.size(); ++i)
      rank += logits[i] > own || (logits[i] == own && static_cast<int>(i) < truth);
    return rank;
  }

  void watch_depth(size_t depth, std::span<const float> logits, int truth, size_t rank,
                   MeasuredPosition* position) {
    DepthAccuracy& accuracy = result_->depths[depth];
    ++accuracy.n;
    if (truth < 0) return;
    ++accuracy.known;
    const float own = logits[static_cast<size_t>(truth)],
                largest = *std::max_element(logits.begin(), logits.end());
    if (rank < DepthAccuracy::kRanks) ++accuracy.at_rank[rank];
    position->rank[depth] = static_cast<uint8_t>(std::min<size_t>(rank, kNotThere));
    for (size_t t = 0; t < accuracy.loss.size(); ++t) {
      const auto scale = static_cast<float>(1 / DepthAccuracy::kTemperatures[t]);
      float sum = 0;
      for (const float logit : logits) sum += std::exp((logit - largest) * scale);
      accuracy.loss[t] += static_cast<double>(std::log(sum) - (own - largest) * scale);
    }
  }

  Measurement* result_;
  std::unique_ptr<ChimeraDrafter> draft_, hybrid_;
  std::unique_ptr<TreeDrafter> ngram_;
  std::span<const int32_t> text_;
  size_t prompt_size_ = 0;
};

}  // namespace

Measurement measure_draft(Session& session, const DraftTensors& draft, ChimeraOptions options,
                          bool trees, const std::vector<std::vector<int32_t>>& prompts,
                          const GenerateOptions& generation,
                          const std::function<void(double)>& progress) {
  Measurement result;
  Spectator spectator(session.model(), draft, options, trees, session.options().context, &result);
  GenerateOptions own = generation;
  for (size_t i = 0; i < prompts.size(); ++i, ++own.sampling.seed) {
    progress(static_cast<double>(i) / static_cast<double>(prompts.size()));
    std::vector<int32_t> text = prompts[i];
    const Generation g = generate(session, nullptr, prompts[i], own);
    text.insert(text.end(), g.ids.begin(), g.ids.end());
    spectator.watch(text, prompts[i].size());
    session.start(0, prompts[i], own.sampling);
    const auto cancelled = [&] { return own.cancelled && own.cancelled(); };
    while (!cancelled() && session.tokens(0).size() < text.size()) session.step(&spectator);
    session.stop(0);
    if (cancelled()) return result;
  }
  progress(1);
  result.depth_seconds = spectator.drafter().depth_seconds();
  result.observe_seconds = spectator.drafter().observe_seconds();
  return result;
}

}  // namespace chimera
