// Units of work in one share for each thread. A thread takes from the front of its own; when that
// is empty and another was held up, it takes from the back of the other's.
//
// Each share is written by its owner alone as long as nobody is held up, and dealing writes none:
// what one core has written costs another tens or hundreds of nanoseconds to read, and a job may
// take no more than two microseconds.
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

  struct Deal {
    int64_t n;        // units, below 2^24
    uint64_t number;  // of the deal: 1 .. kDeals, and again
    Deal next(int64_t units) const { return {units, number + 1}; }
  };
  // n units, divided evenly. By one thread; they can be taken when nothing is left of the deals
  // before. When starts_anew(), all that was dealt has been taken, and no thread looks for more.
  // times: deals that follow each other; deal.next(n) is the one after the first.
  Deal deal(int64_t n, int times = 1) {
    if (starts_anew(times)) {  // a share may not have been touched since the deal of that number
      number_ = 0;
      for (Share& share : shares_) share.left.store(0, std::memory_order_relaxed);
    }
    const Deal first{n, number_ + 1};
    number_ += static_cast<uint64_t>(times);
    return first;
  }
  bool starts_anew(int times = 1) const { return number_ + static_cast<uint64_t>(times) > kDeals; }
  // Where a thread's share of n units begins.
  int64_t first_of(int64_t n, size_t thread) const {
    return n * static_cast<int64_t>(thread) / static_cast<int64_t>(shares_.size());
  }

  // Units [begin, end) for a thread, half of what is left where it takes them: few steps, and no
  // large one at the end. begin == end: nothing is left that is worth taking.
  std::pair<int64_t, int64_t> take(const Deal& deal, int thread) {
    const auto own = static_cast<size_t>(thread);
    const int64_t piece = std::max<int64_t>(1, deal.n / static_cast<int64_t>(8 * shares_.size()));
    for (size_t i = 0; i < shares_.size(); ++i) {
      const size_t t = (own + i) % shares_.size();
      std::atomic<uint64_t>& left = shares_[t].left;
      uint64_t old = left.load(std::memory_order_relaxed);
      for (;;) {
        // A share that nobody has touched since the deal is whole.
        const bool whole = old >> 48 != deal.number;
        const int64_t begin = whole ? first_of(deal.n, t) : static_cast<int64_t>(old >> 24 & kMask),
                      end = whole ? first_of(deal.n, t + 1) : static_cast<int64_t>(old & kMask);
        if (begin == end || (i > 0 && end - begin < 2 * piece)) break;
        const int64_t n = std::min(end - begin, std::max(piece, (end - begin + 1) / 2));
        const auto taken = i == 0 ? std::pair(begin, begin + n) : std::pair(end - n, end);
        const uint64_t rest = i == 0 ? pack(deal, begin + n, end) : pack(deal, begin, end - n);
        if (left.compare_exchange_weak(old, rest, std::memory_order_relaxed)) return taken;
      }
    }
    return {0, 0};
  }

 private:
  static constexpr uint64_t kMask = (1u << 24) - 1, kDeals = (1u << 16) - 1;
  struct alignas(64) Share {
    std::atomic<uint64_t> left{0};  // number of the deal: 16 bits; begin, end: 24 bits each
  };
  static uint64_t pack(const Deal& deal, int64_t begin, int64_t end) {
    return deal.number << 48 | static_cast<uint64_t>(begin) << 24 | static_cast<uint64_t>(end);
  }
  std::vector<Share> shares_;
  alignas(64) uint64_t number_ = 0;  // of the last deal; takers do not look at this line
};

}  // namespace chimera::cpu
