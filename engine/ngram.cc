// N-gram drafting: find where the last few tokens stood before, and propose what came next there.
#include <algorithm>
#include <utility>

#include "engine/candidate_tree.h"
#include "engine/drafter.h"
#include "engine/ngram_index.h"
#include "engine/trust.h"

namespace chimera {
namespace {

// What guesses that rarely come true may lose. One token in five after a match of a single one
// pays in the long run, and costs a short text that has bad luck. So there is an account, in plain
// steps: tokens accepted come in, the time that they took goes out, and a hundredth of the text is
// granted. While it is empty, only matches that come true half of the time are followed.
class Allowance {
 public:
  static constexpr float kSure = 0.5f;

  bool spent() const { return left_ < 0; }
  // Of a step: guesses accepted; price: its time in plain steps, less one.
  void observe(int accepted, double price) {
    constexpr double kGranted = 0.01, kMost = 3;
    left_ = std::min(kMost, left_ + kGranted * (1 + accepted) + accepted - price);
  }

 private:
  double left_ = 0.15;  // for the first tries
};

class NgramDrafter final : public TreeDrafter {
 public:
  NgramDrafter(const NgramOptions& options, int n_sequences, int context) : options_(options) {
    sequences_.assign(static_cast<size_t>(n_sequences),
                      {NgramIndex(options.min_match, options.max_match, context)});
  }
  std::string name() const override { return "ngram"; }

  CandidateTree& candidates(const DraftContext& c) override {
    Sequence& s = sequences_[static_cast<size_t>(c.sequence)];
    tree_.clear();
    propose_ngrams(s.index, c.text, c.tokens, options_.min_match, options_.max_match,
                   c.sampling.temperature, &tree_);
    if (c.text != s.text) {
      s.trust = {};
      s.allowance = {};
    }
    s.text = c.text;
    tree_.choose(std::min(c.max_nodes, options_.nodes), c.max_depth, c.cost, 0, s.trust.share());
    if (c.cost != nullptr) {
      const auto chosen = tree_.chosen();
      const float best = chosen.empty() ? 0 : s.trust.share() * tree_[chosen[0]].probability;
      if (s.allowance.spent() && best < Allowance::kSure) tree_.clear();
      const auto rows = 1 + static_cast<int>(tree_.chosen().size());
      s.price = c.cost->seconds(rows) / c.cost->seconds(1) - 1;
    }
    s.trust.promised += tree_.promised();
    return tree_;
  }

  void observe(const KeptRows& kept) override {
    const Step::Sequence& s = kept.step->sequences[kept.sequence];
    if (s.root < 0) return;                        // a piece of the prompt
    const int prompt_rows = s.root - s.first_row;  // were no guesses
    Sequence& sequence = sequences_[static_cast<size_t>(kept.sequence)];
    const int accepted = kept.n_kept - 1 - prompt_rows;
    sequence.trust.observe(accepted);
    sequence.allowance.observe(accepted, std::exchange(sequence.price, 0));
  }

 private:
  struct Sequence {
    NgramIndex index;
    int64_t text = -1;
    Trust trust{};
    Allowance allowance{};
    double price = 0;  // of the tree that is being verified, in plain steps
  };
  NgramOptions options_;
  std::vector<Sequence> sequences_;
  CandidateTree tree_;
};

}  // namespace

std::unique_ptr<TreeDrafter> make_ngram_drafter(const NgramOptions& options, int n_sequences,
                                                int context) {
  return std::make_unique<NgramDrafter>(options, n_sequences, context);
}

}  // namespace chimera
