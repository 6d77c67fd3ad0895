// A figure measured once a round: its median, and how far it moved.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "tools/output.h"

namespace chimera {

class Series {
 public:
  void add(double value) {
    last_ = value;
    values_.insert(std::upper_bound(values_.begin(), values_.end(), value), value);
  }
  bool empty() const { return values_.empty(); }
  double last() const { return last_; }
  double median() const {
    const size_t n = values_.size();
    return n == 0 ? 0 : (values_[(n - 1) / 2] + values_[n / 2]) / 2;
  }
  std::vector<double> spread() const { return {values_.front(), values_.back()}; }
  std::string text(int decimals) const {  // "277.7 (270.1..280.3)"
    return fixed_text(median(), decimals) + " (" + fixed_text(values_.front(), decimals) + ".." +
           fixed_text(values_.back(), decimals) + ")";
  }

 private:
  std::vector<double> values_;  // ascending
  double last_ = 0;
};

}  // namespace chimera
