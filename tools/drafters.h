// Drafters by name, and the flags about them: for run, bench and train eval.
#pragma once

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/chimera/chimera_drafter.h"
#include "engine/drafter.h"
#include "tools/flags.h"
#include "tools/model.h"

namespace chimera {

struct DrafterFlags {
  std::optional<std::string> draft{};  // path of a draft model
  StaticTree tree{};                   // empty: none
  std::optional<int> nodes{};          // not given: what this machine makes the most of
  bool tune = false;                   // measure that again, whatever was measured before
  int depth = 8;
  std::optional<int> width{};  // not given: a large tree is wide, too

  // That they go together; that `drafter` has what it needs, and no tree that it cannot use. Throw
  // UsageError.
  void check() const;
  void check(const std::string& drafter) const;

  int most_width() const { return width.value_or(std::max(4, nodes.value_or(0) / 5)); }
  int most_nodes() const { return std::max(nodes.value_or(kMostNodes), tree.size()); }
  int nodes_of(const std::string& drafter) const {
    return drafter == "none" ? 0 : drafter == "static" ? tree.size() : nodes.value_or(kMostNodes);
  }
  static constexpr int kMostNodes = 31;

  // The flags that set them.
  std::vector<Flag> flags();
};

// A draft model that was opened for its target: throws Error if it was made for another one, naming
// both. To be called before the target's weights are prepared, while its file is open.
std::optional<DraftTensors> load_draft_for(const Model& target, const DrafterFlags& flags);

// For a session of one sequence. Where the backend can draft, they do so there
// (resident_drafter.h), "none" too, but for trees that are too large for it. Else: "none"
// (nullptr), "ngram", "chimera" (the draft model alone), "hybrid" (both in one tree) or "static"
// (the draft model's guesses in the shape of
// --tree).
std::unique_ptr<Drafter> make_drafter(const std::string& name, const DrafterFlags& flags,
                                      const std::optional<DraftTensors>& draft, const Llama& target,
                                      int context);

}  // namespace chimera
