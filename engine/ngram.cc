// N-gram drafting: find where the last few tokens stood before, and propose what came next there.
#include "engine/candidate_tree.h"
#include "engine/drafter.h"
#include "engine/ngram_index.h"

namespace chimera {
namespace {

class NgramDrafter final : public Drafter {
 public:
  NgramDrafter(const NgramOptions& options, int n_sequences, int context) : options_(options) {
    indexes_.assign(static_cast<size_t>(n_sequences), NgramIndex(options.min_match, options.max_match, context));
  }
  std::string name() const override { return "ngram"; }

  void draft(const DraftContext& c, Step* step) override {
    c.backend.on_host([&] { grow(c, step); });
  }

 private:
  // Longest matches first, newest first among equals. A match of n tokens is trusted for 2 n more.
  void grow(const DraftContext& c, Step* step) {
    NgramIndex& index = indexes_[static_cast<size_t>(c.sequence)];
    index.update(c.text, c.tokens);
    CandidateTree tree(step, c.root, std::min(c.max_nodes, options_.nodes), c.max_depth);
    for (int n = options_.max_match; n >= options_.min_match && !tree.full(); --n)
      index.matches(c.tokens, n, [&](size_t position) {
        int node = c.root;
        for (size_t i = position + 1; i < std::min(c.tokens.size(), position + 1 + 2 * static_cast<size_t>(n)); ++i)
          if ((node = tree.child(node, c.tokens[i])) < 0) break;
        return !tree.full();
      });
  }

  NgramOptions options_;
  std::vector<NgramIndex> indexes_;
};

}  // namespace

std::unique_ptr<Drafter> make_ngram_drafter(const NgramOptions& options, int n_sequences, int context) {
  return std::make_unique<NgramDrafter>(options, n_sequences, context);
}

}  // namespace chimera
