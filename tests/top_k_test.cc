// Top k against sorting, sums of exponentials against double.
#include "engine/top_k.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

namespace chimera {
namespace {

TEST(TopK, IsWhatSortingGives) {
  std::mt19937 random(1);
  for (const int n : {1, 3, 4, 31, 32, 33, 100, 5000}) {
    for (const int k : {1, 2, 8, 32}) {
      std::vector<float> x(static_cast<size_t>(n));
      for (float& v : x) v = static_cast<float>(static_cast<int>(random() % 400) - 200);  // ties
      std::vector<int32_t> order(x.size());
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
        return x[static_cast<size_t>(a)] > x[static_cast<size_t>(b)];
      });
      order.resize(std::min(order.size(), static_cast<size_t>(k)));
      std::vector<int32_t> found(static_cast<size_t>(k), -1);
      found.resize(static_cast<size_t>(top_k(x.data(), n, k, found.data())));
      EXPECT_EQ(found, order) << n << " " << k;
    }
  }
}

TEST(TopK, SumOfExponentials) {
  std::mt19937 random(2);
  std::normal_distribution<float> normal(0, 5);
  for (const int n : {1, 4, 5, 7, 2311}) {
    std::vector<float> x(static_cast<size_t>(n));
    for (float& v : x) v = normal(random);
    x[0] = -1000;
    const float largest = *std::max_element(x.begin(), x.end());
    for (const float scale : {1.0f, 0.7f}) {
      double sum = 0;
      for (const float v : x) sum += std::exp(double{scale} * (double{v} - double{largest}));
      EXPECT_NEAR(sum_of_exp(x.data(), n, largest, scale), sum, 1e-5 * sum) << n;
    }
  }
}

}  // namespace
}  // namespace chimera
