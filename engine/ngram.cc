// N-gram drafting: find where the last few tokens stood before, and propose what came next there.
#include <algorithm>

#include "engine/candidate_tree.h"
#include "engine/drafter.h"
#include "engine/ngram_index.h"
#include "engine/trust.h"

namespace chimera {
namespace {

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
    if (c.text != s.text) s.trust = {};
    s.text = c.text;
    tree_.choose(std::min(c.max_nodes, options_.nodes), c.max_depth, c.cost, 0, s.trust.share());
    s.trust.promised += tree_.promised();
    return tree_;
  }

  void observe(const KeptRows& kept) override {
    const Step::Sequence& s = kept.step->sequences[kept.sequence];
    if (s.root < 0) return;                        // a piece of the prompt
    const int prompt_rows = s.root - s.first_row;  // were no guesses
    sequences_[static_cast<size_t>(kept.sequence)].trust.observe(kept.n_kept - 1 - prompt_rows);
  }

 private:
  struct Sequence {
    NgramIndex index;
    int64_t text = -1;
    Trust trust{};
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
