// What a pass of the target costs by its number of rows, on this machine: the price of a node.
//
// Where memory binds, rows beyond the first are nearly free; where arithmetic binds, each costs the
// same again. A tree that ignores this is slower than no tree on one machine and too small on
// another.
#pragma once

#include <algorithm>
#include <array>
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

  // A pass over `rows` rows of a text has taken this long. Two factors are fitted to such passes:
  // of the first row and of the further ones,
  //   seconds(m) = first * s(1) + further * (s(m) - s(1)),   s: as measured,
  // since memory and arithmetic change apart from each other: with the context, with what else runs
  // here. Trees alone cannot tell the two apart, so a plain pass is needed now and then. The fit is
  // slow (normalised least mean squares), and its gradient is that of relative error: one pass that
  // was interrupted changes little.
  void learn(int rows, double seconds) {
    if (!known_ || rows > kMaxRows) return;
    const double expected = this->seconds(rows);
    const double error = std::clamp(seconds / expected, 0.5, 2.0) - 1;
    const double x = at(1) / at(rows), y = 1 - x;  // shares of the first row and of the others
    const double step = (rows == 1 ? 0.25 : 0.0625) * error * expected / at(rows) / (x * x + y * y);
    first_ = std::clamp(first_ + step * x, 0.1, 10.0);
    further_ = std::clamp(further_ + step * y, 0.1, 10.0);
    // Where no tree pays, none is timed: a price that rose for a while falls back to what was
    // measured, until one is tried again.
    if (rows == 1) further_ += (1 - further_) / 64;
  }

  // Of a pass over `rows` rows, 1 or more.
  double seconds(int rows) const { return first_ * at(1) + further_ * (at(rows) - at(1)); }

  // The same where it was measured, 0 elsewhere.
  double measured(int rows) const { return measured_[static_cast<size_t>(rows)]; }

 private:
  double at(int rows) const { return seconds_[static_cast<size_t>(std::min(rows, kMaxRows))]; }
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
  double first_ = 1, further_ = 1;
  std::array<double, kMaxRows + 1> measured_{}, seconds_{};
};

}  // namespace chimera
