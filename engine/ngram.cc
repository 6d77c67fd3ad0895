// N-gram drafting: find where the last few tokens stood before, and propose what came next there.
#include "engine/candidate_tree.h"
#include "engine/drafter.h"
#include "engine/ngram_index.h"

namespace chimera {
namespace {

class NgramDrafter final : public Drafter {
 public:
  NgramDrafter(const NgramOptions& options, int n_sequences, int context) : options_(options) {
    indexes_.assign(static_cast<size_t>(n_sequences),
                    NgramIndex(options.min_match, options.max_match, context));
  }
  std::string name() const override { return "ngram"; }

  void draft(const DraftContext& c, Step* step) override {
    c.backend.on_host([&] { grow(c, step); });
  }

 private:
  void grow(const DraftContext& c, Step* step) {
    tree_.clear();
    propose_ngrams(indexes_[static_cast<size_t>(c.sequence)], c.text, c.tokens, options_.min_match,
                   options_.max_match, &tree_);
    tree_.write(step, c.root, std::min(c.max_nodes, options_.nodes), c.max_depth, c.cost, 0);
  }

  NgramOptions options_;
  std::vector<NgramIndex> indexes_;
  CandidateTree tree_;
};

}  // namespace

std::unique_ptr<Drafter> make_ngram_drafter(const NgramOptions& options, int n_sequences,
                                            int context) {
  return std::make_unique<NgramDrafter>(options, n_sequences, context);
}

}  // namespace chimera
