// Whether drafting is worth its time in the text at hand.
#pragma once

#include <algorithm>

namespace chimera {

// Drafting takes its time even where no tree is worth a pass. So there is an account in plain
// steps: tokens accepted come in, the time that they took goes out. Luck alone must not empty it,
// and it holds no more than that takes, so that drafting which pays no longer is found out: then it
// rests, and is tried again, after longer and longer rests as long as it does not pay. Nor does it
// hold more than the next rest could lose: where the trees themselves promise little more than they
// cost, little is risked to find out.
class Worth {
 public:
  bool rests() const { return resting_ > 0; }
  // promised: tokens, of which `gained` came.
  void observe(double gained, double spent, double promised) {
    if (resting_ > 0) {
      if (--resting_ > 0) return;
      balance_ = std::min(kAgain, most());
      earned_ = 0;
      return;
    }
    mean_ += (promised - spent - mean_) / ++n_;
    n_ = std::min(n_, kMemory - 1);
    earned_ += gained - spent;
    balance_ = std::min(most(), balance_ + gained - spent);
    if (earned_ >= kStart) next_rest_ = kShortest;
    if (balance_ >= 0) return;
    resting_ = next_rest_;
    next_rest_ = std::min((mean_ < 0 ? 4 : 2) * next_rest_, kLongest);
  }

 private:
  double most() const { return std::clamp(next_rest_ * mean_, kLeast, kMost); }

  static constexpr double kStart = 4, kAgain = 1.5, kLeast = 0.3, kMost = 6;
  static constexpr int kShortest = 8, kLongest = 256, kMemory = 8;  // steps
  double balance_ = kStart, earned_ = 0;
  double mean_ = kStart / kShortest;  // of what the trees of the last steps promised to earn
  int n_ = 1;                         // of how many
  int resting_ = 0, next_rest_ = kShortest;
};

}  // namespace chimera
