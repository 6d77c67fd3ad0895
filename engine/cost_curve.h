// What a pass of the target costs by its number of rows, on this machine: the price of a node.
//
// Where memory binds, rows beyond the first are nearly free; where arithmetic binds, each costs the
// same again. A tree that ignores this is slower than no tree on one machine and too small on
// another. And each row attends to all that was written: in a long text that alone can be more than
// the rest of its price.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

namespace chimera {

class CostCurve {
 public:
  static constexpr int kMaxRows = 64;

  bool known() const { return known_; }

  // A measurement. Whatever disturbs one only adds, and a pass over more rows never costs less: so
  // one of more rows that took less time is the better word on fewer rows, too. Points between
  // measured ones are interpolated.
  void set(int rows, double seconds) {
    known_ = true;
    measured_[static_cast<size_t>(rows)] = seconds;
    interpolate();
  }

  // The measurements were of the start of a text. What the attention of a further row adds for each
  // position before it, and ...
  void set_attention(double seconds) { attention_ = std::max(seconds, 0.0); }
  double attention() const { return attention_; }
  // ... how many those are now, in all that follows.
  void at_context(int positions) { context_ = positions; }

  // A pass over `rows` rows of a text has taken this long. Three factors are fitted to such passes:
  //   seconds(m) = first * s(1) + further * (s(m) - s(1)) + tree * s(1) if m > 1,
  // where s is what was measured, attention included. Memory and arithmetic change apart from each
  // other, with what else runs here; and a pass over a tree comes after drafting, which has filled
  // the caches with other things, and was measured without.
  void learn(int rows, double seconds) {
    if (!known_ || rows > kMaxRows) return;
    // Least squares of the relative error, in which a pass counts less the longer it is ago. Trees
    // alone hardly tell the factors apart, so a plain pass is needed now and then, and counts for
    // many. One that was interrupted changes little.
    constexpr double kMemory = 64, kPlain = 16;  // passes
    const double expected = this->seconds(rows);
    const double found = std::clamp(seconds, 0.8 * expected, 1.25 * expected) / at(rows);
    const double kept = std::pow(1 - 1 / kMemory, rows == 1 ? kPlain : 1);
    const Factors x = shares(rows);
    for (size_t i = 0; i < x.size(); ++i) {
      const double weight = kMemory * (1 - kept) * x[i];
      for (size_t j = 0; j < x.size(); ++j) squares_[i][j] = kept * squares_[i][j] + weight * x[j];
      products_[i] = kept * products_[i] + weight * found;
    }
    fit();
  }

  // Of a pass over `rows` rows, 1 or more.
  double seconds(int rows) const {
    const Factors x = shares(rows);
    return at(rows) * (x[0] * factors_[0] + x[1] * factors_[1] + x[2] * factors_[2]);
  }

  // The same where it was measured, 0 elsewhere.
  double measured(int rows) const { return measured_[static_cast<size_t>(rows)]; }

 private:
  using Factors = std::array<double, 3>;  // first, further, tree

  // What a factor is multiplied by in seconds(rows), as a share of what was measured.
  Factors shares(int rows) const {
    const double first = at(1) / at(rows);
    return {first, 1 - first, rows > 1 ? first : 0};
  }
  // A little weight holds `further` near `first` and `tree` near 0: where no tree pays, none is
  // timed, and a price that rose for a while falls back, until one is tried again.
  void fit() {
    constexpr double kTogether = 0.05, kNoTree = 2;
    auto a = squares_;
    a[0][0] += kTogether, a[0][1] -= kTogether, a[1][0] -= kTogether, a[1][1] += kTogether;
    a[2][2] += kNoTree;
    Factors b = products_;
    // a x = b by Gauss and Jordan; no pivoting, since a is symmetric and positive definite.
    for (size_t i = 0; i < b.size(); ++i)
      for (size_t r = 0; r < b.size(); ++r) {
        if (r == i) continue;
        const double q = a[r][i] / a[i][i];
        for (size_t j = 0; j < b.size(); ++j) a[r][j] -= q * a[i][j];
        b[r] -= q * b[i];
      }
    for (size_t i = 0; i < b.size(); ++i) factors_[i] = b[i] / a[i][i];
    factors_ = {std::clamp(factors_[0], 0.1, 10.0), std::clamp(factors_[1], 0.1, 10.0),
                std::max(factors_[2], 0.0)};
  }
  double at(int rows) const {
    const double attention = (rows - 1) * (context_ * attention_);
    if (rows <= kMaxRows) return seconds_[static_cast<size_t>(rows)] + attention;
    return seconds_[kMaxRows] + attention +
           (rows - kMaxRows) * (seconds_[kMaxRows] - seconds_[kMaxRows - 1]);
  }
  void interpolate() {
    std::array<double, kMaxRows + 1> least = measured_;  // 0 where nothing was measured
    double lowest = 0;                                   // of those with as many rows or more
    for (int m = kMaxRows; m >= 1; --m) {
      double& l = least[static_cast<size_t>(m)];
      if (l > 0) lowest = l = lowest > 0 ? std::min(l, lowest) : l;
    }
    int last = 0, previous = 0;  // points; seconds_[0] is 0
    for (int m = 1; m <= kMaxRows; ++m) {
      const double to = least[static_cast<size_t>(m)];
      if (to <= 0) continue;
      const double from = last > 0 ? seconds_[static_cast<size_t>(last)] : to;
      for (int i = last + 1; i <= m; ++i)
        seconds_[static_cast<size_t>(i)] = from + (to - from) * (i - last) / (m - last);
      previous = std::exchange(last, m);
    }
    // Beyond the last: as from the one before it; in proportion, if there is none.
    const auto l = static_cast<size_t>(last), before = static_cast<size_t>(previous);
    const double slope = (seconds_[l] - seconds_[before]) / std::max(1, last - previous);
    for (int i = last + 1; i <= kMaxRows; ++i)
      seconds_[static_cast<size_t>(i)] = seconds_[l] + slope * (i - last);
  }

  bool known_ = false;
  int context_ = 0;
  double attention_ = 0;
  Factors factors_{1, 1, 0};
  // Sums over the passes learnt from, beginning as if a few had been what was measured.
  std::array<Factors, 3> squares_{{{16, 0, 0}, {0, 0.05, 0}, {0, 0, 0.05}}};
  Factors products_{16, 0.05, 0};
  std::array<double, kMaxRows + 1> measured_{}, seconds_{};
};

}  // namespace chimera
