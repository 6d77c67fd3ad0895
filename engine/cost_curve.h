// What a pass of the target costs by its number of rows, on this machine: the price of a node.
//
// Where memory binds, rows beyond the first are nearly free; where arithmetic binds, each costs the
// same again. A tree that ignores this is slower than no tree on one machine and too small on
// another.
#pragma once

#include <algorithm>
#include <array>

namespace chimera {

class CostCurve {
 public:
  static constexpr int kMaxRows = 64;

  bool known() const { return known_; }

  // A measurement. Points between measured ones are interpolated; costs never fall with more rows.
  void set(int rows, double seconds) {
    known_ = true;
    measured_[static_cast<size_t>(rows)] = seconds;
    interpolate();
  }

  // A pass over `rows` rows has taken this long. What made it dearer than expected (a longer
  // context, another program) does the same to the rest, so the curve moves as a whole and slowly:
  // its shape stays as it was measured, on which the choice of trees depends.
  void learn(int rows, double seconds) {
    if (!known_ || rows > kMaxRows) return;
    const double change = std::clamp(seconds / this->seconds(rows), 0.5, 2.0) - 1;
    for (double& m : measured_) m *= 1 + change / 32;
    interpolate();
  }

  // Of a pass over `rows` rows, 1 or more.
  double seconds(int rows) const { return seconds_[static_cast<size_t>(std::min(rows, kMaxRows))]; }

  // The same where it was measured or learned, 0 elsewhere.
  double measured(int rows) const { return measured_[static_cast<size_t>(rows)]; }

 private:
  void interpolate() {
    int last = 0;
    for (int m = 1; m <= kMaxRows; ++m) {
      if (measured_[static_cast<size_t>(m)] <= 0) continue;
      const double to = std::max(measured_[static_cast<size_t>(m)],
                                 last > 0 ? seconds_[static_cast<size_t>(last)] : 0.0);
      const double from = last > 0 ? seconds_[static_cast<size_t>(last)] : to;
      for (int i = last + 1; i <= m; ++i)
        seconds_[static_cast<size_t>(i)] = from + (to - from) * (i - last) / (m - last);
      last = m;
    }
    for (int i = last + 1; i <= kMaxRows; ++i)  // beyond the last: in proportion
      seconds_[static_cast<size_t>(i)] =
          seconds_[static_cast<size_t>(last)] * i / std::max(1, last);
  }

  bool known_ = false;
  std::array<double, kMaxRows + 1> measured_{}, seconds_{};
};

}  // namespace chimera
