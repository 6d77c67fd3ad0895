// The merge loop of BPE, in O(n log n): a linked list of symbols, and a queue of adjacent pairs
// that could merge.
//
//   symbols   h   e   l   l   o        queue  "he" rank 2, "ll" rank 7
//             '-he'   l   l   o        merge the best; its new neighbours may add pairs ("hel")
//             '-he'   '-ll'   o        ... until no pair is left
//
// A pair whose symbols have merged with others since it was queued is stale. Symbols only grow, so
// it is enough to compare its length with that of the two symbols that stand there now.
#pragma once

#include <cstdint>
#include <queue>
#include <vector>

namespace chimera {

struct Symbol {
  int32_t id;              // the token that it is; -1: none
  uint32_t begin, length;  // bytes of the text; length 0: it was merged into its left neighbour
  uint32_t previous, next;
};

struct Merge {
  uint32_t rank;  // the lowest merges first; among equals the leftmost
  int32_t id;     // the token that the pair becomes; -1: the pair does not merge
};
inline constexpr Merge kNoMerge = {UINT32_MAX, -1};

class MergeQueue {
 public:
  static constexpr uint32_t kEnd = UINT32_MAX;

  void clear() { symbols_.clear(); }

  void add(int32_t id, uint32_t begin, uint32_t length) {
    const auto index = static_cast<uint32_t>(symbols_.size());
    if (index > 0) symbols_.back().next = index;
    symbols_.push_back({id, begin, length, index > 0 ? index - 1 : kEnd, kEnd});
  }

  // `find_merge(left, right)` says what two neighbours become.
  template <typename FindMerge>
  void run(FindMerge find_merge) {
    for (uint32_t i = 1; i < symbols_.size(); ++i) propose(i - 1, i, find_merge);
    while (!pairs_.empty()) {
      const Pair pair = pairs_.top();
      pairs_.pop();
      Symbol& left = symbols_[pair.left];
      if (left.length == 0 || left.next == kEnd) continue;
      Symbol& right = symbols_[left.next];
      if (left.length + right.length != pair.length) continue;

      left.id = pair.id;
      left.length = pair.length;
      left.next = right.next;
      right.length = 0;
      if (left.next != kEnd) {
        symbols_[left.next].previous = pair.left;
        propose(pair.left, left.next, find_merge);
      }
      if (left.previous != kEnd) propose(left.previous, pair.left, find_merge);
    }
  }

  // What is left, in the order of the text.
  template <typename Visit>
  void for_each(Visit visit) const {
    if (symbols_.empty()) return;
    for (uint32_t i = 0; i != kEnd; i = symbols_[i].next) visit(symbols_[i]);
  }

 private:
  struct Pair {
    uint32_t rank, left, length;
    int32_t id;
    bool operator<(const Pair& other) const {  // std::priority_queue pops its greatest
      return rank != other.rank ? rank > other.rank : left > other.left;
    }
  };

  template <typename FindMerge>
  void propose(uint32_t left, uint32_t right, FindMerge& find_merge) {
    const Merge merge = find_merge(symbols_[left], symbols_[right]);
    if (merge.id < 0) return;
    pairs_.push({merge.rank, left, symbols_[left].length + symbols_[right].length, merge.id});
  }

  std::vector<Symbol> symbols_;
  std::priority_queue<Pair> pairs_;
};

}  // namespace chimera
