#include "engine/step.h"

#include "engine/error.h"

namespace chimera {

void Step::clear() {
  n_rows = 0;
  first_new = 0;
  n_logits = 0;
  for (int s = 0; s < n_sequences; ++s) {
    sequences[s].n_rows = 0;
    sequences[s].root = -1;
    sequences[s].n_kept = 0;
    sequences[s].next = -1;
  }
}

void Step::begin_sequence(int s) {
  open_sequence = s;
  sequences[s].first_row = n_rows;
}

int Step::add_row(int32_t token_id, int parent_row, bool wants_logits) {
  if (n_rows == kMaxRows)
    throw Error("step", "at most " + std::to_string(kMaxRows) + " rows", "one more");
  Sequence& s = sequences[open_sequence];
  const int row = n_rows++;
  token[row] = token_id;
  parent[row] = parent_row;
  sequence[row] = open_sequence;
  position[row] = parent_row < 0 ? s.committed : position[parent_row] + 1;
  slot[row] = s.committed + s.n_rows++;
  kept_at[row] = -1;
  logits_index[row] = -1;
  if (wants_logits) {
    logits_index[row] = n_logits;
    logits_row[n_logits++] = row;
  }
  return row;
}

}  // namespace chimera
