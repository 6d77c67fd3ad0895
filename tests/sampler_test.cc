// Sampling as a pure function: its order of cuts, its ties, its distribution, its random numbers.
#include "engine/sampler.h"

#include <cmath>
#include <numeric>

#include "engine/error.h"
#include "engine/philox.h"
#include "tests/support.h"

namespace chimera::test {
namespace {

int32_t draw(const std::vector<float>& logits, const Sampling& sampling, int64_t position) {
  std::vector<float> e(logits.size()), noise(logits.size());
  std::vector<int32_t> order(logits.size());
  return sample(cpu::kScalarKernels.sampling, logits.data(), static_cast<int32_t>(logits.size()),
                sampling, position, {e.data(), noise.data(), order.data()});
}

std::vector<double> frequencies(const std::vector<float>& logits, const Sampling& sampling,
                                int n = 40000) {
  std::vector<double> f(logits.size());
  for (int p = 0; p < n; ++p) f[static_cast<size_t>(draw(logits, sampling, p))] += 1.0 / n;
  return f;
}

// The known-answer vectors that the authors publish with their implementation (Random123).
TEST(Philox, KnownAnswers) {
  const PhiloxBlock zero = philox4x32(0, 0, 0);
  EXPECT_EQ(zero.word[0], 0x6627e8d5u);
  EXPECT_EQ(zero.word[1], 0xe169c58du);
  EXPECT_EQ(zero.word[2], 0xbc57ac4cu);
  EXPECT_EQ(zero.word[3], 0x9b00dbd8u);
  const PhiloxBlock ones = philox4x32(~uint64_t{0}, ~uint64_t{0}, ~uint64_t{0});
  EXPECT_EQ(ones.word[0], 0x408f276du);
  EXPECT_EQ(ones.word[1], 0x41c83b0eu);
  EXPECT_EQ(ones.word[2], 0xa20bc7c6u);
  EXPECT_EQ(ones.word[3], 0x6d5451fdu);
}

// Tokens share blocks of random numbers, and no two the same word of one.
TEST(Philox, EveryTokenHasBitsOfItsOwn) {
  std::vector<std::pair<uint32_t, uint32_t>> places;
  for (uint32_t token = 0; token < 4096; ++token)
    for (uint32_t block = 0; block < 1024; ++block)
      for (uint32_t word = 0; word < 4; ++word)
        if (block == (token >> 6 << 4 | (token & 15)) && word == (token >> 4 & 3)) {
          places.emplace_back(block, word);
          ASSERT_EQ(token_bits(7, 11, token), philox4x32(7, 11, block).word[word]);
        }
  std::sort(places.begin(), places.end());
  EXPECT_EQ(places.size(), 4096u);
  EXPECT_EQ(std::adjacent_find(places.begin(), places.end()), places.end());
}

TEST(Sampler, GreedyTakesTheLowestOfEqualIds) {
  EXPECT_EQ(draw({1, 3, 2, 3, 3}, {}, 0), 1);
  EXPECT_EQ(draw({NAN, -1, NAN, -2}, {}, 0), 1);
}

TEST(Sampler, FollowsTheDistribution) {
  const std::vector<float> logits = {0.0f, 1.0f, 2.0f, -1.0f, NAN};
  for (const float t : {0.5f, 1.0f, 2.0f}) {
    double sum = 0;
    for (int i = 0; i < 4; ++i)
      sum += std::exp(static_cast<double>(logits[static_cast<size_t>(i)] / t));
    const auto f = frequencies(logits, {.temperature = t, .seed = 5});
    for (size_t i = 0; i < 4; ++i)
      EXPECT_NEAR(f[i], std::exp(static_cast<double>(logits[i] / t)) / sum, 0.01);
    EXPECT_EQ(f[4], 0);
  }
}

TEST(Sampler, CutsKeepWhatTheySay) {
  const std::vector<float> logits = {std::log(0.1f), std::log(0.4f), std::log(0.2f), std::log(0.2f),
                                     std::log(0.1f)};
  const auto kept = [&](Sampling s) {
    s.temperature = 1;
    std::vector<int> ids;
    const auto f = frequencies(logits, s, 4000);
    for (size_t i = 0; i < f.size(); ++i)
      if (f[i] > 0) ids.push_back(static_cast<int>(i));
    return ids;
  };
  using Ids = std::vector<int>;
  EXPECT_EQ(kept({}), (Ids{0, 1, 2, 3, 4}));
  EXPECT_EQ(kept({.top_k = 2}), (Ids{1, 2}));  // 2 and 3 tie: the lower id stays
  EXPECT_EQ(kept({.top_k = 1}), (Ids{1}));
  EXPECT_EQ(kept({.top_k = 99}), (Ids{0, 1, 2, 3, 4}));
  EXPECT_EQ(kept({.top_p = 0.35f}), (Ids{1}));
  EXPECT_EQ(kept({.top_p = 0.55f}), (Ids{1, 2}));
  EXPECT_EQ(kept({.top_p = 0.75f}), (Ids{1, 2, 3}));
  EXPECT_EQ(kept({.min_p = 0.3f}), (Ids{1, 2, 3}));
  EXPECT_EQ(kept({.min_p = 1.0f}), (Ids{1}));
  // top-p counts within what top-k left: 0.4 of 0.6 reaches 60%.
  EXPECT_EQ(kept({.top_k = 2, .top_p = 0.6f}), (Ids{1}));
}

// The nucleus is found in a head of the order that grows: its border must not matter.
TEST(Sampler, NucleusOfAFlatDistribution) {
  std::vector<float> logits(5000, 0.0f);
  const auto f = frequencies(logits, {.temperature = 1, .top_p = 0.5f, .seed = 3}, 1000);
  EXPECT_NEAR(std::accumulate(f.begin(), f.begin() + 2500, 0.0), 1.0, 1e-9);
  EXPECT_EQ(std::accumulate(f.begin() + 2500, f.end(), 0.0), 0.0);
  EXPECT_NEAR(std::accumulate(f.begin() + 2250, f.begin() + 2500, 0.0), 0.1, 0.03);
}

TEST(Sampler, IsAFunctionOfSeedAndPosition) {
  std::mt19937 random(1);
  std::vector<float> logits(1000);
  for (float& x : logits) x = static_cast<float>(random() % 1000) / 200.0f;
  const Sampling a{.temperature = 1, .seed = 1}, b{.temperature = 1, .seed = 2};
  int different_seed = 0, different_position = 0;
  for (int p = 0; p < 100; ++p) {
    EXPECT_EQ(draw(logits, a, p), draw(logits, a, p));
    different_seed += draw(logits, a, p) != draw(logits, b, p);
    different_position += draw(logits, a, p) != draw(logits, a, p + 1);
  }
  EXPECT_GT(different_seed, 90);
  EXPECT_GT(different_position, 90);
}

TEST(Sampler, RefusesWhatMakesNoSense) {
  for (const Sampling& s : {Sampling{.temperature = -1}, Sampling{.temperature = NAN},
                            Sampling{.top_k = -1}, Sampling{.top_p = 0}, Sampling{.top_p = 2},
                            Sampling{.min_p = -0.1f}, Sampling{.min_p = NAN}})
    EXPECT_THROW(check(s), Error);
  EXPECT_NO_THROW(check(Sampling{.temperature = 1, .top_k = 40, .top_p = 0.9f, .min_p = 0.05f}));
}

}  // namespace
}  // namespace chimera::test
