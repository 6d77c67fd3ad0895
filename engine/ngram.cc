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
    indexes_.assign(static_cast<size_t>(n_sequences),
                    NgramIndex(options.min_match, options.max_match, context));
  }
  std::string name() const override { return "ngram"; }

  CandidateTree& candidates(const DraftContext& c) override {
    tree_.clear();
    propose_ngrams(indexes_[static_cast<size_t>(c.sequence)], c.text, c.tokens, options_.min_match,
                   options_.max_match, c.sampling.temperature, &tree_);
    if (c.text != text_) trust_ = {};
    text_ = c.text;
    tree_.choose(std::min(c.max_nodes, options_.nodes), c.max_depth, c.cost, 0, trust_.share());
    trust_.promised += tree_.promised();
    return tree_;
  }

  void observe(const KeptRows& kept) override {
    const Step::Sequence& s = kept.step->sequences[kept.sequence];
    if (s.root < 0) return;                                    // a piece of the prompt
    trust_.observe(kept.n_kept - 1 - (s.root - s.first_row));  // the prompt's rows were no guesses
  }

 private:
  int64_t text_ = -1;
  Trust trust_;
  NgramOptions options_;
  std::vector<NgramIndex> indexes_;
  CandidateTree tree_;
};

}  // namespace

void TreeDrafter::draft(const DraftContext& context, Step* step) {
  context.backend.on_host([&] { candidates(context).write(step, context.root); });
}

std::unique_ptr<TreeDrafter> make_ngram_drafter(const NgramOptions& options, int n_sequences,
                                                int context) {
  return std::make_unique<NgramDrafter>(options, n_sequences, context);
}

}  // namespace chimera
