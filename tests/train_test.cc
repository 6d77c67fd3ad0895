// The trainer: gradients against finite differences, the forward against the prototype's golden
// values, products, resuming.
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>

#include "engine/train/adamw.h"
#include "engine/train/draft_gradient.h"
#include "loader/draft_file.h"
#include "loader/safetensors.h"
#include "tests/support.h"

namespace chimera::train {
namespace {

std::vector<double> random_values(std::mt19937& random, size_t n, double size) {
  std::normal_distribution<double> normal(0, size);
  std::vector<double> v(n);
  for (double& x : v) x = normal(random);
  return v;
}

DraftConfig tiny_config() {
  DraftConfig c;
  c.hidden_size = 8;
  c.n_heads = 4, c.n_kv_heads = 2, c.head_dim = 6;
  c.ffn_size = 5;
  c.n_steps = 3;  // the fourth step uses the third head
  c.head_rank = 2;
  return c;
}

TrainingText tiny_text(std::mt19937& random, int length, int first_start, int d, int vocab, int draft) {
  TrainingText t;
  for (int i = 0; i < length; ++i) t.tokens.push_back(static_cast<int32_t>(random() % static_cast<unsigned>(vocab)));
  t.first_start = first_start;
  for (const double x : random_values(random, static_cast<size_t>((length - 1) * d), 1)) t.states.push_back(static_cast<float>(x));
  t.targets.resize(static_cast<size_t>(t.n_starts()));
  for (SoftTarget& target : t.targets) {
    std::fill_n(target.index, SoftTarget::kMost, -1);
    // Three tokens, the second outside the draft's vocabulary.
    const float p[3] = {0.5f, 0.3f, 0.1f};
    for (int j = 0; j < 3; ++j) {
      target.index[j] = j == 1 ? -1 : static_cast<int32_t>((random() % static_cast<unsigned>(draft / 2)) * 2) + j / 2;
      target.probability[j] = p[j];
    }
  }
  return t;
}

struct Tiny {
  DraftConfig config = tiny_config();
  int vocab = 13, draft = 10;
  std::vector<double> embedding, head, parameters;
  std::vector<TrainingText> texts;
  std::vector<const TrainingText*> batch;
  explicit Tiny(const DraftConfig& c) : config(c) {
    std::mt19937 random(1);
    const auto d = static_cast<size_t>(config.hidden_size);
    embedding = random_values(random, static_cast<size_t>(vocab) * d, 1);
    head = random_values(random, static_cast<size_t>(draft) * d, 0.5);
    parameters = random_values(random, ParameterLayout(config).total, 0.4);
    texts.push_back(tiny_text(random, 9, 2, config.hidden_size, vocab, draft));
    texts.push_back(tiny_text(random, 4, 1, config.hidden_size, vocab, draft));  // one start
    texts.push_back(tiny_text(random, 7, 0, config.hidden_size, vocab, draft));
    for (const TrainingText& t : texts) batch.push_back(&t);
  }
};

void check_gradient(const DraftConfig& config, int threads) {
  Tiny tiny(config);
  DraftGradient<double> model(config, tiny.embedding.data(), tiny.head.data(), tiny.draft, threads);
  std::vector<double> gradient(tiny.parameters.size());
  const Score score = model.run(tiny.parameters.data(), tiny.batch, 4, 0.8, gradient.data());
  EXPECT_EQ(score.starts, 5 + 1 + 5);
  EXPECT_EQ(score.step[0].rows, 11);
  EXPECT_EQ(score.step[3].rows, 4);
  const ParameterLayout layout(config);
  for (const Parameter& p : layout.all) {
    double largest = 0, error = 0;
    for (size_t i = p.offset; i < p.offset + p.size(); ++i) {
      const double step = 1e-5, saved = tiny.parameters[i];
      const auto loss = [&](double x) {
        tiny.parameters[i] = x;
        return model.run(tiny.parameters.data(), tiny.batch, 4, 0.8, nullptr).weighted_loss(0.8);
      };
      const double numeric = (loss(saved + step) - loss(saved - step)) / (2 * step);
      tiny.parameters[i] = saved;
      largest = std::max(largest, std::abs(numeric));
      error = std::max(error, std::abs(numeric - gradient[i]));
    }
    EXPECT_LT(error, 1e-8 + 1e-6 * largest) << p.name << ", gradients up to " << largest;
    if (p.size() > 0) EXPECT_GT(largest, 1e-5) << p.name;
  }
}

TEST(Train, GradientOfEveryParameterIsThatOfFiniteDifferences) { check_gradient(tiny_config(), 1); }
TEST(Train, GradientOnSeveralThreads) { check_gradient(tiny_config(), 3); }
TEST(Train, GradientOfThePaperForm) {  // no skip, no correction, RoPE on every head
  DraftConfig c = tiny_config();
  c.skip = false;
  c.head_rank = 0;
  c.rope_kv_heads = 2;
  check_gradient(c, 2);
}

}  // namespace
}  // namespace chimera::train
