// Finds where the last few tokens of a text stood before, and how far that can be believed.
//
// For each length n an index links the positions whose last n tokens hash alike, newest first:
//   head[n][hash] = newest position, previous[n][position] = the next older one.
// A position is indexed when a token follows it, so a match always has a continuation.
//
// Some texts repeat themselves and some do not, so every token that comes is compared with what
// the longest match would have proposed: the probability of a match is how often those of its
// length came true in this text, beginning with what is usual.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "engine/candidate_tree.h"
#include "engine/ngram_match.h"

namespace chimera {

class NgramIndex {
 public:
  NgramIndex(int min_match, int max_match, int context) : min_(min_match), max_(max_match) {
    size_t buckets = 16;
    while (buckets < 2 * static_cast<size_t>(context)) buckets *= 2;
    mask_ = buckets - 1;
    const auto lengths = static_cast<size_t>(max_ - min_ + 1);
    head_.assign(lengths * buckets, -1);
    previous_.assign(lengths * static_cast<size_t>(context), -1);
    stride_ = static_cast<size_t>(context);
  }

  // Brings the index up to date with a text that grew, or starts over with another one. `text`: a
  // number that tells them apart.
  void update(int64_t text, std::span<const int32_t> tokens) {
    if (text != text_ || tokens.size() < indexed_) {
      text_ = text;
      std::fill(head_.begin(), head_.end(), -1);
      indexed_ = 0;
      matched_.fill(0);
      came_true_.fill(0);
    }
    for (; indexed_ + 1 < tokens.size(); ++indexed_) {
      learn(tokens);
      for (int n = min_; n <= max_ && static_cast<size_t>(n) <= indexed_ + 1; ++n) {
        int32_t& head = head_[bucket(tokens, indexed_, n)];
        previous_[static_cast<size_t>(n - min_) * stride_ + indexed_] = head;
        head = static_cast<int32_t>(indexed_);
      }
    }
  }

  // match_probability() in this text.
  float probability(int n, float temperature) const {
    const auto i = static_cast<size_t>(std::min(n, kLongestMatch));
    return match_probability(n, temperature, matched_[i], came_true_[i]);
  }

  // Calls found(position) for earlier positions whose last n tokens are the text's last n, newest
  // first, until it returns false.
  template <typename F>
  void matches(std::span<const int32_t> tokens, int n, const F& found) const {
    if (static_cast<size_t>(n) > tokens.size()) return;
    const auto suffix = tokens.last(static_cast<size_t>(n));
    int seen = 0;
    for (int32_t p = head_[bucket(tokens, tokens.size() - 1, n)];
         p >= 0 && seen < kMatchesPerLength;
         p = previous_[static_cast<size_t>(n - min_) * stride_ + static_cast<size_t>(p)], ++seen) {
      const auto begin = tokens.begin() + p + 1 - n;
      if (std::equal(suffix.begin(), suffix.end(), begin) && !found(static_cast<size_t>(p))) return;
    }
  }

 private:
  size_t bucket(std::span<const int32_t> tokens, size_t last, int n) const {
    uint64_t h = static_cast<uint64_t>(n);
    for (size_t i = last + 1 - static_cast<size_t>(n); i <= last; ++i)
      h = (h ^ static_cast<uint32_t>(tokens[i])) * 0x9E3779B97F4A7C15u;
    return static_cast<size_t>(n - min_) * (mask_ + 1) + ((h >> 32) & mask_);
  }

  // What the longest match before the token after position indexed_ would have proposed.
  void learn(std::span<const int32_t> tokens) {
    const auto before = tokens.first(indexed_ + 1);
    bool found = false;
    for (int n = max_; n >= min_ && !found; --n)
      matches(before, n, [&](size_t position) {
        const auto i = static_cast<size_t>(std::min(n, kLongestMatch));
        matched_[i] += 1;
        came_true_[i] += tokens[position + 1] == tokens[indexed_ + 1] ? 1.0f : 0.0f;
        found = true;
        return false;
      });
  }

  int min_, max_;
  int64_t text_ = -1;
  size_t mask_, stride_, indexed_ = 0;
  std::vector<int32_t> head_;                                     // (lengths, buckets)
  std::vector<int32_t> previous_;                                 // (lengths, context)
  std::array<float, kLongestMatch + 1> matched_{}, came_true_{};  // by length: tokens of this text
};

// Proposes what followed the newest occurrences of the text's last tokens, longest match first.
inline void propose_ngrams(NgramIndex& index, int64_t text, std::span<const int32_t> tokens,
                           int min_match, int max_match, float temperature, CandidateTree* tree) {
  index.update(text, tokens);
  int continuations = 0;
  for (int n = max_match; n >= min_match && continuations < kContinuations; --n)
    index.matches(tokens, n, [&](size_t position) {
      const int before = tree->size();
      int node = CandidateTree::kRoot;
      for (int i = 0; i < kMatchDepth && position + 1 + static_cast<size_t>(i) < tokens.size();
           ++i) {
        const int32_t token = tokens[position + 1 + static_cast<size_t>(i)];
        int next = tree->find(node, token);
        if (next == CandidateTree::kNone) {
          // Where it parts from newer ones, it counts as far as they fail.
          const float left = tree->left_below(node);
          const bool parts = left < tree->probability_of(node);
          next = tree->add(
              node, token,
              left * (parts ? kOlderMatch : 1.0f) * index.probability(n + i, temperature));
        }
        if (next == CandidateTree::kNone) break;
        node = next;
      }
      continuations += tree->size() > before;  // a longer match comes up again as a shorter one
      return continuations < kContinuations;
    });
}

}  // namespace chimera
