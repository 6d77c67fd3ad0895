#include "engine/drafter.h"

#include "engine/candidate_tree.h"

namespace chimera {

void TreeDrafter::draft(const DraftContext& context, Step* step) {
  context.backend.on_host([&] { candidates(context).write(step, context.root); });
}

}  // namespace chimera
