// A step is data: what one pass through the target works on, and what it decided.
//
// Everything that varies from step to step - the candidate tree, positions, committed lengths,
// random state - is the content of one Step in the backend's memory. The ops (backend.h) read and
// write it; their list never changes. So the CPU can run the list, and CUDA can capture it once as
// a graph.
//
// A row is (token, parent, sequence). One forward pass serves them all:
//
//   decoding       one row: the last token, the root of an empty tree
//   verification   the root and a tree of candidates below it
//   prefill        a chain of prompt tokens
//   batches        any of these for many sequences at once
//
// A candidate tree for a sequence with 7 committed positions (0..6); the root is the token that the
// target chose last, "the". Its children are two guesses for the next token:
//
//                        row   token  parent  position  slot    sees
//        the              0    the      -1       7        7     0..6, 0
//       /   \             1    cat       0       8        8     0..6, 0 1
//     cat    dog          2    dog       0       8        9     0..6, 0   2
//    /   \      \         3    sat       1       9       10     0..6, 0 1   3
//  sat   ran    ran       4    ran       1       9       11     0..6, 0 1     4
//                         5    ran       2       9       12     0..6, 0   2     5
//
// A row attends to the committed positions and to its ancestors, itself included. Its `position`
// (RoPE, order of sums) is committed + depth; its `slot` is where its key and value are written:
// behind the committed ones, in row order, siblings side by side. If the target says "dog" after
// row 0 and "ran" after row 2, rows 0, 2, 5 are kept: their keys and values move from slots 7, 9,
// 12 to 7, 8, 9, and the token that the target chooses after row 5 is the next root.
#pragma once

#include <cstdint>

#include "engine/sampler.h"

namespace chimera {

struct Step {
  static constexpr int kMaxRows = 256;
  static constexpr int kMaxSequences = 128;

  struct Sequence {
    int32_t committed;  // positions kept by earlier steps; accept() advances it
    int32_t first_row;  // the rows of a sequence are contiguous, parents before children
    int32_t n_rows;     // 0: the sequence sits this step out
    int32_t root;       // row where the acceptance walk starts; all its ancestors are kept.
                        // -1: the rows are a chain of prompt tokens, all kept, nothing sampled
    Sampling sampling;
    // Written by accept():
    int32_t n_kept;  // rows kept
    int32_t next;    // token sampled after the last kept row: the next root. -1 without a root
  };

  int32_t n_sequences;
  int32_t n_rows;
  int32_t first_new;  // rows before it were computed by an earlier pass over this step, which a
                      // draft model grows depth by depth; passes work on rows [first_new, n_rows)
  int32_t n_logits;  // rows whose logits are wanted

  int32_t token[kMaxRows];
  int32_t parent[kMaxRows];  // row of the parent, -1: the last committed position
  int32_t sequence[kMaxRows];
  int32_t position[kMaxRows];
  int32_t slot[kMaxRows];
  int32_t logits_index[kMaxRows];  // index into the logits, -1: none wanted
  int32_t logits_row[kMaxRows];    // inverse: [0, n_logits) -> row
  int32_t kept_at[kMaxRows];       // written by accept(): the position a row is kept at, or -1

  Sequence sequences[kMaxSequences];

  // Starts a step without rows; the sequences' committed lengths and sampling stay.
  void clear();
  // Appends a row for the sequence opened last (begin_sequence) and returns its index.
  // parent: a row of the same sequence, or -1. Throws Error past kMaxRows.
  int add_row(int32_t token_id, int parent_row, bool wants_logits);
  void begin_sequence(int s);
  // The rows root, root + 1, ... become the tree; see Sequence::root.
  void set_root(int row) { sequences[sequence[row]].root = row; }
  int depth(int row) const { return position[row] - sequences[sequence[row]].committed; }

 private:
  int32_t open_sequence;
};

}  // namespace chimera
