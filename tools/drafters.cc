#include "tools/drafters.h"

#include "engine/error.h"
#include "engine/resident_drafter.h"
#include "loader/draft_file.h"
#include "tools/tree_file.h"

namespace chimera {
namespace {

bool needs_draft(const std::string& drafter) {
  return drafter != "none" && drafter != "ngram";
}

}  // namespace

std::vector<Flag> DrafterFlags::flags() {
  return {
      {0, "draft", "FILE", "a draft model that was trained for this model", file(&draft)},
      {0, "nodes", "N",
       "guesses that a pass checks, at most (default: as many as\npay on this machine, which is "
       "measured once and kept)",
       integer(&nodes, 1, 255)},
      {0, "depth", "N", "... and how far ahead of the text (with --draft)", integer(&depth, 1, 32)},
      {0, "width", "N",
       "guesses that the draft model goes on from at each depth\n(default: 4, or a fifth of "
       "--nodes if that is more)",
       integer(&width, 1, 32)},
      {0, "tree", "SPEC",
       "a static tree for the draft model: its widths such as\n3,2,1, or a file (chimera "
       "tune-tree)",
       tree_value(&tree)},
      {0, "tune", "", "measure again what passes cost on this machine", on(&tune)}};
}

void DrafterFlags::check() const {
  if (!tree.empty() && !draft)
    throw UsageError("--tree", "a draft model, which makes the guesses", "none",
                     "give one with --draft FILE");
  if (tune && nodes)
    throw UsageError("--tune", "trees of a size that is to be found out", "--nodes",
                     "leave one out");
}

void DrafterFlags::check(const std::string& drafter) const {
  check();
  if (needs_draft(drafter) && !draft)
    throw UsageError("--drafter " + drafter, "a draft model", "none", "give one with --draft FILE");
  if (drafter == "static" && tree.empty())
    throw UsageError("--drafter static", "a tree", "none", "give one with --tree SPEC");
  if (drafter != "static" && !tree.empty())
    throw UsageError("--tree", "--drafter static", "--drafter " + drafter, "leave one out");
  if (nodes && drafter == "static")
    throw UsageError("--nodes", "a drafter that sizes its trees", "--drafter static",
                     "leave one out: --tree says how many");
  if (tune && (drafter == "none" || drafter == "static"))
    throw UsageError("--tune", "a drafter that sizes its trees", "--drafter " + drafter,
                     "leave one out");
}

std::optional<DraftTensors> load_draft_for(const Model& target, const DrafterFlags& flags) {
  if (!flags.draft) return std::nullopt;
  DraftTensors draft = load_draft(*flags.draft);
  if (draft.target_fingerprint != target.fingerprint) {
    // The name may be the same: the file is another quantisation, or other weights.
    const auto named = [](const std::string& name, const std::string& fingerprint) {
      return name + " (fingerprint " + fingerprint + ")";
    };
    throw Error(
        printable(*flags.draft, 4096), "a draft for " + named(target.name(), target.fingerprint),
        "one for " + named(printable(draft.target_name), printable(draft.target_fingerprint)),
        "a draft is for one file of weights: train one with chimera train");
  }
  return draft;
}

std::unique_ptr<Drafter> make_drafter(const std::string& name, const DrafterFlags& flags,
                                      const std::optional<DraftTensors>& draft, const Llama& target,
                                      int context) {
  const bool has_draft = needs_draft(name);
  const NgramOptions ngram{.nodes = flags.most_nodes()};
  if (target.backend().tree_ops() != nullptr) {
    ResidentOptions options{.nodes = name == "none" ? 0 : flags.most_nodes(),
                            .depth = flags.depth,
                            .width = flags.most_width()};
    if (name == "ngram") {
      // What is launched for the largest tree is launched for none, too: a pass of 8 rows.
      options.nodes = flags.nodes.value_or(7);
      options.min_match = ngram.min_match;
      options.max_match = ngram.max_match;
    } else if (name == "hybrid") {
      options.min_match = kHybridMinMatch;
      options.max_match = kHybridMaxMatch;
    } else if (name == "static") {
      options.tree = flags.tree;
    }
    auto drafter = make_resident_drafter(target, has_draft ? &*draft : nullptr, options, context);
    if (drafter) return drafter;
  }
  if (name == "none") return nullptr;
  if (name == "ngram") return make_ngram_drafter(ngram, 1, context);
  ChimeraOptions options{.nodes = flags.most_nodes(),
                         .depth = flags.depth,
                         .width = flags.most_width(),
                         .ngrams = name == "hybrid"};
  if (name == "static") {
    options.tree = flags.tree;
    options.nodes = flags.tree.size();
  }
  return make_chimera_drafter(target, *draft, options, 1, context);
}

}  // namespace chimera
