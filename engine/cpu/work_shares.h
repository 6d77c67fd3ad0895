// Units of work in one share for each thread. A thread takes from the front of its own; when that
// is empty it takes from the back of another's, so that a thread that was held up holds up nobody.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>
#include <vector>

namespace chimera::cpu {

class WorkShares {
 public:
  explicit WorkShares(int threads) : shares_(static_cast<size_t>(threads)) {}

  // n units, divided evenly. By one thread, before the others begin to take.
  void reset(int64_t n) {
    for (size_t t = 0; t < shares_.size(); ++t)
      shares_[t].left.store(pack(first_of(n, t), first_of(n, t + 1)), std::memory_order_relaxed);
  }
  // Where a thread's share of n units begins.
  int64_t first_of(int64_t n, size_t thread) const {
    return n * static_cast<int64_t>(thread) / static_cast<int64_t>(shares_.size());
  }

  // Units [begin, end) for a thread, half of what is left where it takes them: few steps, and no
  // large one at the end. begin == end: nothing is left anywhere.
  std::pair<int64_t, int64_t> take(int thread) {
    const auto own = static_cast<size_t>(thread);
    for (size_t i = 0; i < shares_.size(); ++i) {
      std::atomic<uint64_t>& left = shares_[(own + i) % shares_.size()].left;
      uint64_t old = left.load(std::memory_order_relaxed);
      for (;;) {
        const auto begin = static_cast<int64_t>(old >> 32),
                   end = static_cast<int64_t>(old & 0xffffffffu);
        if (begin == end) break;
        const int64_t n = (end - begin + 1) / 2;
        const auto taken = i == 0 ? std::pair(begin, begin + n) : std::pair(end - n, end);
        const uint64_t rest = i == 0 ? pack(begin + n, end) : pack(begin, end - n);
        if (left.compare_exchange_weak(old, rest, std::memory_order_relaxed)) return taken;
      }
    }
    return {0, 0};
  }

 private:
  struct alignas(64) Share {
    std::atomic<uint64_t> left{0};  // begin, end: 32 bits each
  };
  static uint64_t pack(int64_t begin, int64_t end) {
    return static_cast<uint64_t>(begin) << 32 | static_cast<uint64_t>(end);
  }
  std::vector<Share> shares_;
};

}  // namespace chimera::cpu
