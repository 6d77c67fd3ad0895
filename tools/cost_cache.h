// The cost curve (engine/cost_curve.h) of a machine and a model, kept between runs: one small file
// for each pair under the user's cache folder, $XDG_CACHE_HOME/chimera or ~/.cache/chimera. Losing
// one, or not being able to write one, costs the time of measuring again.
#pragma once

#include <string>

#include "engine/session.h"
#include "tools/model.h"

namespace chimera {

class CostCache {
 public:
  CostCache(const Model& model, const Llama& llama);

  // Gives the session the curve that was kept, or measures and keeps it: if there is none that
  // reaches the session's largest tree, if it no longer holds, or if `again`.
  void tune(Session* session, bool again) const;

 private:
  bool load(Session* session) const;
  bool holds(Session* session) const;
  void keep(const Session& session) const;

  std::string key_;   // all that the costs depend on
  std::string path_;  // empty: no folder is known
};

}  // namespace chimera
