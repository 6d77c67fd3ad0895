// The trainer: gradients against finite differences, the forward against the prototype's golden
// values, products, resuming.
#include "tools/train/train.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <numbers>
#include <random>
#include <set>

#include "engine/chimera/chimera_drafter.h"
#include "engine/error.h"
#include "engine/train/batch_gradient.h"
#include "engine/train/cpu_ops.h"
#include "engine/train/gemm.h"
#include "engine/train/on_policy.h"
#include "engine/train/optimizer.h"
#include "engine/train/target_features.h"
#include "loader/draft_file.h"
#include "loader/feature_file.h"
#include "loader/mapped_file.h"
#include "loader/safetensors.h"
#include "tests/prototype.h"
#include "tests/support.h"
#include "tools/train/training_texts.h"

namespace chimera::training {
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

// A target's answers are three tokens each: even ones, an odd one, and a part of them may lie
// outside the draft's static vocabulary, the tokens below `draft`.
std::vector<SoftTarget> tiny_targets(std::mt19937& random, int64_t n, int vocab, int draft) {
  std::vector<SoftTarget> targets(static_cast<size_t>(n));
  for (SoftTarget& target : targets) {
    std::fill_n(target.token, SoftTarget::kMost, -1);
    const float p[3] = {0.5f, 0.3f, 0.1f};
    for (int j = 0; j < 3; ++j) {
      const auto even = static_cast<int32_t>((random() % static_cast<unsigned>(draft / 2)) * 2);
      target.token[j] = j == 1 ? vocab - 1 : even + j / 2;
      target.probability[j] = p[j];
    }
  }
  return targets;
}

TrainingText tiny_text(std::mt19937& random, int length, int first_start, int d, int vocab,
                       int draft) {
  TrainingText t;
  for (int i = 0; i < length; ++i)
    t.tokens.push_back(static_cast<int32_t>(random() % static_cast<unsigned>(vocab)));
  t.first_start = first_start;
  for (const double x : random_values(random, static_cast<size_t>((length - 1) * d), 1))
    t.states.push_back(static_cast<float>(x));
  t.targets = tiny_targets(random, t.n_starts(), vocab, draft);
  return t;
}

struct Tiny {
  DraftConfig config = tiny_config();
  int vocab = 13, draft = 10;
  std::vector<double> embedding, head, parameters;
  std::vector<int32_t> vocabulary;
  std::vector<TrainingText> texts;
  std::vector<const TrainingText*> batch;
  explicit Tiny(const DraftConfig& c) : config(c) {
    std::mt19937 random(1);
    const auto d = static_cast<size_t>(config.hidden_size);
    embedding = random_values(random, static_cast<size_t>(vocab) * d, 1);
    head = random_values(random, static_cast<size_t>(vocab) * d, 0.5);
    for (int32_t i = draft; i-- > 0;) vocabulary.push_back(i);
    parameters = random_values(random, ParameterLayout(config).total, 0.4);
    texts.push_back(tiny_text(random, 9, 2, config.hidden_size, vocab, draft));
    texts.push_back(tiny_text(random, 4, 1, config.hidden_size, vocab, draft));  // one start
    texts.push_back(tiny_text(random, 7, 0, config.hidden_size, vocab, draft));
    for (const TrainingText& t : texts) batch.push_back(&t);
  }
  // At the first and the last start of the texts, below nodes of the text and of each other; one is
  // longer than a rollout, of one every answer is learnt.
  void branch() {
    std::mt19937 random(2);
    const auto answers = [&](int64_t n) { return tiny_targets(random, n, vocab, draft); };
    texts[0].branches = {{2, {1, 12}, answers(2)},
                         {4, {texts[0].tokens[6], 3, 5}, answers(2)},
                         {4, {texts[0].tokens[6], 3, 12, 4}, answers(2)},
                         {6, {0}, answers(1)}};
    texts[2].branches = {{0, {texts[2].tokens[2], texts[2].tokens[3], 9}, answers(1)}};
  }
};

void check_gradient(const DraftConfig& config, int dynamic_best, bool branches = false) {
  Tiny tiny(config);
  if (branches) tiny.branch();
  CpuOps<double> ops(1);
  DraftGradient<double> model(&ops, config, tiny.embedding.data(), tiny.head.data(), tiny.vocab,
                              tiny.vocabulary, dynamic_best);
  std::vector<double> gradient(tiny.parameters.size());
  const Score score = model.run(tiny.parameters.data(), tiny.batch, 4, 0.8, gradient.data());
  EXPECT_EQ(score.starts, 5 + 1 + 5);
  EXPECT_EQ(score.step[0].rows, 11);
  EXPECT_EQ(score.step[1].rows, 8 + (branches ? 2 : 0));
  EXPECT_EQ(score.step[3].rows, 4 + (branches ? 3 : 0));
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
    EXPECT_TRUE(p.size() == 0 || largest > 1e-5) << p.name;
  }
}

TEST(Train, GradientOfEveryParameterIsThatOfFiniteDifferences) {
  check_gradient(tiny_config(), 0);
}
TEST(Train, GradientWithTheDynamicVocabulary) {
  check_gradient(tiny_config(), 2);
}
TEST(Train, GradientWithBranches) {
  check_gradient(tiny_config(), 2, true);
}
TEST(Train, GradientOfThePaperForm) {
  DraftConfig c = tiny_config();
  c.skip = c.slot_features = false;
  c.head_rank = 0;
  c.rope_kv_heads = 2;  // on every head
  check_gradient(c, 0);
}
TEST(Train, GradientOfEveryForm) {
  for (const auto& [trigram, skip, slot_features] : {std::array{true, false, true},
                                                     {false, true, true},
                                                     {true, true, false},
                                                     {false, true, false}}) {
    SCOPED_TRACE(std::to_string(trigram) + std::to_string(skip) + std::to_string(slot_features));
    DraftConfig c = tiny_config();
    c.trigram = trigram, c.skip = skip, c.slot_features = slot_features;
    check_gradient(c, 0);
  }
}

// A branch is what a text would be that goes on with its tokens; what the draft makes of the text
// itself stays the same. And its answers count like those of a start, at its own steps alone.
TEST(Train, ABranchIsATextThatGoesOnThere) {
  Tiny tiny(tiny_config());
  tiny.branch();
  CpuOps<double> ops(1);
  DraftGradient<double> model(&ops, tiny.config, tiny.embedding.data(), tiny.head.data(),
                              tiny.vocab, tiny.vocabulary, 0);
  constexpr int kSteps = 4;
  const auto run = [&](const TrainingText& text) {
    const TrainingText* one[] = {&text};
    const double loss =
        model.run(tiny.parameters.data(), one, kSteps, 0.8, nullptr).weighted_loss(0.8);
    return std::pair{loss, ops.get(model.head_input())};
  };
  const auto d = static_cast<size_t>(tiny.config.hidden_size);
  for (const TrainingText& text : tiny.texts) {
    const auto starts = static_cast<size_t>(text.n_starts()), all = starts + text.branches.size();
    const auto [loss, u] = run(text);
    const auto row = [&d](const std::vector<double>& of, size_t rows, size_t k, size_t r) {
      const auto at = of.begin() + static_cast<std::ptrdiff_t>((k * rows + r) * d);
      return std::vector<double>(at, at + static_cast<std::ptrdiff_t>(d));
    };
    TrainingText alone = text;
    alone.branches.clear();
    const auto [loss_alone, u_alone] = run(alone);
    for (size_t k = 0; k < kSteps; ++k)
      for (size_t s = 0; s < starts; ++s) EXPECT_EQ(row(u, all, k, s), row(u_alone, starts, k, s));
    double of_branches = 0;
    for (size_t b = 0; b < text.branches.size(); ++b) {
      const Branch& branch = text.branches[b];
      const auto until_root = static_cast<size_t>(branch.start + 2);
      TrainingText other = text;
      other.branches.clear();
      other.tokens.resize(until_root);
      other.tokens.insert(other.tokens.end(), branch.tokens.begin(), branch.tokens.end());
      other.tokens.push_back(0);  // what is to be guessed last
      other.first_start = branch.start;
      other.states.resize((other.tokens.size() - 1) * d);
      other.targets.assign(branch.tokens.size() + 1, branch.targets[0]);
      const auto [ignored, u_other] = run(other);
      for (size_t k = 0; k < kSteps && k <= branch.tokens.size(); ++k)
        for (size_t i = 0; i < d; ++i)
          EXPECT_NEAR(row(u, all, k, starts + b)[i], row(u_other, other.targets.size(), k, 0)[i],
                      1e-12)
              << b << ", step " << k;
      // Its losses, by hand.
      for (size_t j = 0; j < branch.targets.size(); ++j) {
        const size_t k = branch.tokens.size() + 1 - branch.targets.size() + j;
        if (k >= kSteps) continue;
        const std::vector<double> x = row(u, all, k, starts + b);
        std::map<int32_t, double> logit;
        double sum = 0;
        for (const int32_t token : tiny.vocabulary) {
          double dot = 0;
          for (size_t i = 0; i < d; ++i)
            dot += x[i] * tiny.head[static_cast<size_t>(token) * d + i];
          logit[token] = dot;
          sum += std::exp(dot);
        }
        for (int t = 0; t < SoftTarget::kMost; ++t) {
          const int32_t token = branch.targets[j].token[t];
          if (!logit.contains(token)) continue;
          of_branches += std::pow(0.8, static_cast<double>(k)) *
                         static_cast<double>(branch.targets[j].probability[t]) *
                         (std::log(sum) - logit[token]);
        }
      }
    }
    EXPECT_NEAR((loss - loss_alone) * static_cast<double>(starts), of_branches, 1e-9);
  }
}

// Tokens of the text, and the target's best, are to be had although the static vocabulary lacks
// them; the next text is without them again.
TEST(Train, TheDynamicVocabularyIsThatOfTheBatch) {
  Tiny tiny(tiny_config());
  const int32_t rare = tiny.vocab - 1;  // the target's second best everywhere
  CpuOps<double> ops(1);
  const auto loss = [&](int best, const TrainingText& text) {
    DraftGradient<double> model(&ops, tiny.config, tiny.embedding.data(), tiny.head.data(),
                                tiny.vocab, tiny.vocabulary, best);
    const TrainingText* one[] = {&text};
    return model.run(tiny.parameters.data(), one, 1, 1, nullptr).weighted_loss(1);
  };
  TrainingText text = tiny.texts[0];
  for (int32_t& token : text.tokens) token %= tiny.draft;
  EXPECT_EQ(loss(1, text), loss(0, text));  // its best token is in the static vocabulary
  EXPECT_GT(loss(2, text), loss(1, text));  // a part of the probability that had been dropped
  TrainingText with = text;
  with.tokens[0] = rare;  // seen by no rollout but as a slot
  const double outside = loss(0, with);
  EXPECT_GT(loss(1, with), outside);

  DraftGradient<double> model(&ops, tiny.config, tiny.embedding.data(), tiny.head.data(),
                              tiny.vocab, tiny.vocabulary, 1);
  const TrainingText *first[] = {&with}, *second[] = {&text};
  model.run(tiny.parameters.data(), first, 1, 1, nullptr);
  EXPECT_EQ(model.run(tiny.parameters.data(), second, 1, 1, nullptr).weighted_loss(1),
            loss(1, text));
}

// ---- Products ----------------------------------------------------------------------------------

// Small integers: sums are exact in any order.
TEST(Train, ProductsOfEveryShapeAndTile) {
  std::mt19937 random(3);
  std::vector<const TileKernel*> tiles = {&kTileScalar};
  if (cpu::machine_has(cpu::Isa::kAvx2)) tiles.push_back(&kTileAvx2);
  if (cpu::machine_has(cpu::Isa::kAvx512)) tiles.push_back(&kTileAvx512);
  if (machine_has(Precision::kBF16)) tiles.push_back(&kTileAvx512Bf16);
  const auto integers = [&](int64_t n) {
    std::vector<float> v(static_cast<size_t>(n));
    for (float& x : v) x = static_cast<float>(static_cast<int>(random() % 9) - 4);
    return v;
  };
  GemmScratch scratch;
  for (const TileKernel* tile : tiles) {
    for (const int64_t m : {1, 13, 14, 29}) {
      for (const int64_t n : {1, 31, 33, 530}) {
        for (const int64_t k : {1, 7, 34, 321, 650, 1300}) {
          const std::vector<float> a = integers(m * k), b = integers(k * n);
          for (int shape = 0; shape < 4; ++shape) {
            const Operand<float> x = shape & 1 ? transposed(a.data(), m) : by_rows(a.data(), k);
            const Operand<float> y = shape & 2 ? transposed(b.data(), k) : by_rows(b.data(), n);
            std::vector<float> c(static_cast<size_t>(m * n), 2.0f);
            gemm(*tile, &scratch, m, n, k, x, y, c.data(), n, /*accumulate=*/shape == 3);
            for (int64_t i = 0; i < m; ++i) {
              for (int64_t j = 0; j < n; j += 1 + n / 40) {
                float sum = shape == 3 ? 2.0f : 0.0f;
                for (int64_t p = 0; p < k; ++p) sum += *x.offset(i, p).data * *y.offset(p, j).data;
                ASSERT_EQ(c[static_cast<size_t>(i * n + j)], sum)
                    << tile->rows << "x" << tile->cols << " " << m << " " << n << " " << k << " "
                    << shape;
              }
            }
          }
        }
      }
    }
  }
}

// ---- Learning ----------------------------------------------------------------------------------

// f32 on several threads against f64 on one.
TEST(Train, GradientInF32IsThatInF64) {
  Tiny tiny(tiny_config());
  const auto narrow = [](const std::vector<double>& v) {
    return std::vector<float>(v.begin(), v.end());
  };
  const std::vector<float> embedding = narrow(tiny.embedding), head = narrow(tiny.head),
                           parameters = narrow(tiny.parameters);
  CpuOps<double> wide_ops(1);
  CpuOps<float> ops(2);
  DraftGradient<double> wide(&wide_ops, tiny.config, tiny.embedding.data(), tiny.head.data(),
                             tiny.vocab, tiny.vocabulary, 2);
  DraftGradient<float> model(&ops, tiny.config, embedding.data(), head.data(), tiny.vocab,
                             tiny.vocabulary, 2);
  std::vector<double> expected(parameters.size());
  std::vector<float> gradient(parameters.size());
  wide.run(tiny.parameters.data(), tiny.batch, 4, 0.8, expected.data());
  model.run(parameters.data(), tiny.batch, 4, 0.8, gradient.data());
  for (size_t i = 0; i < gradient.size(); ++i)
    EXPECT_NEAR(gradient[i], expected[i], 1e-4 * (1 + std::abs(expected[i]))) << i;
}

// Micro-batches sum to the gradient of the whole, with the same bits for any number of threads.
TEST(Train, MicroBatchesAreOneBatch) {
  Tiny tiny(tiny_config());
  const auto narrow = [](const std::vector<double>& v) {
    return std::vector<float>(v.begin(), v.end());
  };
  const std::vector<float> embedding = narrow(tiny.embedding), head = narrow(tiny.head),
                           parameters = narrow(tiny.parameters);
  const auto run = [&](int threads, std::vector<MicroBatch> parts) {
    TrainingDevice device = cpu_training_device(2, threads);
    BatchGradient model(&device, tiny.config, embedding.data(), head.data(), tiny.vocab,
                        tiny.vocabulary, 0);
    std::vector<float> gradient(parameters.size(), 7.0f);
    const Score score = model.run(parameters.data(), parts, 4, 0.8, gradient.data());
    EXPECT_EQ(score.starts, 11);
    return gradient;
  };
  const TrainingText *a = &tiny.texts[0], *b = &tiny.texts[1], *c = &tiny.texts[2];
  const std::vector<float> whole = run(1, {{a, b, c}}), parts = run(1, {{a, b}, {c}});
  for (size_t i = 0; i < whole.size(); ++i)
    EXPECT_NEAR(parts[i], whole[i], 1e-5 * (1 + std::abs(whole[i]))) << i;
  EXPECT_EQ(run(2, {{a, b}, {c}}), parts);
  EXPECT_EQ(run(4, {{a, b}, {c}}), parts);
  EXPECT_EQ(run(2, {{a}, {b}, {c}}), run(1, {{a}, {b}, {c}}));
}

// An error on a thread of its own reaches the caller, as one on the caller's own does.
TEST(Train, MemoryThatRunsOutInABatchIsAnError) {
  class Narrow : public CpuOps<float> {
   public:
    explicit Narrow(int left) : CpuOps(1), left_(left) {}
    std::shared_ptr<void> allocate(size_t bytes) override {
      if (--left_ < 0) throw MemoryError(bytes);
      return CpuOps::allocate(bytes);
    }

   private:
    int left_;
  };
  Tiny tiny(tiny_config());
  const std::vector<float> embedding(tiny.embedding.begin(), tiny.embedding.end()),
      head(tiny.head.begin(), tiny.head.end()),
      parameters(tiny.parameters.begin(), tiny.parameters.end());
  for (const int narrow : {0, 1}) {
    TrainingDevice device = cpu_training_device(2, 2);
    device.side_by_side[static_cast<size_t>(narrow)] = std::make_unique<Narrow>(3);
    BatchGradient model(&device, tiny.config, embedding.data(), head.data(), tiny.vocab,
                        tiny.vocabulary, 0);
    std::vector<float> gradient(parameters.size());
    const MicroBatch parts[] = {{&tiny.texts[0], &tiny.texts[1]}, {&tiny.texts[2]}};
    EXPECT_THROW(model.run(parameters.data(), parts, 4, 0.8, gradient.data()), MemoryError);
  }
}

struct Folder {
  std::filesystem::path path =
      std::filesystem::temp_directory_path() / ("chimera_train_" + std::to_string(getpid()));
  Folder() { std::filesystem::create_directories(path); }
  ~Folder() { std::filesystem::remove_all(path); }
  std::string operator()(const std::string& name) const { return (path / name).string(); }
};

// A target, what it answers to a prompt, and a draft that has tried to learn that by heart.
struct LearntByHeart {
  test::Loaded target = test::load(test::tiny("q8_0"), test::isas().back(), 2);
  const Llama& llama = *target.model;
  std::vector<int32_t> prompt = {1, 300, 41, 77, 205};
  GenerateOptions options;
  Generation answer;
  DraftTensors draft;
  Score score;  // of the last step

  std::vector<int32_t> text() const {
    std::vector<int32_t> all = prompt;
    all.insert(all.end(), answer.ids.begin(), answer.ids.end());
    return all;
  }
  int64_t first_start() const { return static_cast<int64_t>(prompt.size()) - 1; }

  LearntByHeart(int tokens, int steps) {
    options.max_tokens = tokens;
    Session plain(llama, {.context = 128});
    answer = generate(plain, nullptr, prompt, options);
    EXPECT_EQ(answer.ids.size(), static_cast<size_t>(tokens));

    const LlamaTensors& tensors = target.file.tensors;
    DraftConfig config = config_for(tensors.config);
    config.ffn_size = 64, config.head_rank = 32, config.n_steps = 4;
    const std::vector<float> embedding = test::floats_of(tensors.embedding),
                             head = test::floats_of(tensors.head);
    draft = initial_draft(config, test::floats_of(tensors.output_norm), 1);
    draft.vocabulary = answer.ids;
    std::sort(draft.vocabulary.begin(), draft.vocabulary.end());
    draft.vocabulary.erase(std::unique(draft.vocabulary.begin(), draft.vocabulary.end()),
                           draft.vocabulary.end());
    EXPECT_GT(draft.vocabulary.size(), 20u) << "a text that repeats itself is no test";
    TrainingText learnt = TargetFeatures(llama, 128).read(text(), first_start());
    for (int64_t i = 0; i < learnt.n_starts(); ++i) {  // a tiny target's own probabilities are flat
      SoftTarget& t = learnt.targets[static_cast<size_t>(i)];
      std::fill_n(t.token, SoftTarget::kMost, -1);
      t.token[0] = learnt.tokens[static_cast<size_t>(learnt.first_start + 2 + i)];
      t.probability[0] = 1;
    }
    CpuOps<float> ops(2);
    OptimizerState state = start_optimizer(&ops, pack_parameters(draft));
    DraftGradient<float> model(&ops, config, embedding.data(), head.data(),
                               tensors.config.vocab_size, draft.vocabulary, 8);
    const ParameterLayout layout(config);
    std::vector<float> gradient(layout.total);
    const TrainingText* batch[] = {&learnt};
    const OptimizerOptions learning{.rate = 6e-3};
    Optimizer optimizer(learning, layout, &ops);
    for (int step = 0; step < steps; ++step) {
      score = model.run(state.values.data(), batch, 4, 0.8, gradient.data());
      optimizer.step(learning_rate(learning, static_cast<double>(step) / steps), gradient.data(),
                     &state);
    }
    unpack_parameters(ops.get(state.values), &draft);
  }
};

// Every token right, four steps ahead; and in its file the draft decodes the text in a few passes.
TEST(Train, ADraftThatKnowsTheTextDecodesIt) {
  const LearntByHeart learnt(40, 30);
  for (size_t k = 0; k < 4; ++k)
    EXPECT_EQ(learnt.score.step[k].correct, learnt.score.step[k].rows) << k;
  EXPECT_LT(learnt.score.weighted_loss(0.8), 0.2);
  const Folder folder;
  save_draft(learnt.draft, folder("draft"));

  Session session(learnt.llama, {.context = 128, .max_nodes = 8});
  const auto drafter = make_chimera_drafter(learnt.llama, load_draft(folder("draft")),
                                            {.nodes = 8, .depth = 8, .ngrams = false}, 1, 128);
  const Generation got = generate(session, drafter.get(), learnt.prompt, learnt.options);
  EXPECT_EQ(got.ids, learnt.answer.ids);
  EXPECT_GT(got.tokens_per_step(), 4);
}

TEST(Train, AStepThatIsNotFiniteChangesNothing) {
  const ParameterLayout layout(tiny_config());
  CpuOps<float> ops(1);
  OptimizerState state = start_optimizer(&ops, std::vector<float>(layout.total, 1.0f));
  std::vector<float> gradient(layout.total, 0.1f);
  gradient[7] = NAN;
  const OptimizerOptions options;
  EXPECT_FALSE(std::isfinite(Optimizer(options, layout, &ops).step(1e-3, gradient.data(), &state)));
  EXPECT_EQ(state.step, 0);
  EXPECT_EQ(ops.get(state.values), std::vector<float>(layout.total, 1.0f));
}

// A matrix with known singular vectors, a cosine basis, and singular values from 1 down to 1/100:
// afterwards the vectors are the same and the values nearly 1.
TEST(Train, OrthogonalizedMatricesHaveSingularValuesNearOne) {
  const auto basis = [](int64_t n, int64_t i, int64_t j) {  // entry j of vector i
    const double size = std::sqrt((i == 0 ? 1.0 : 2.0) / static_cast<double>(n));
    return size * std::cos(std::numbers::pi * (static_cast<double>(j) + 0.5) *
                           static_cast<double>(i) / static_cast<double>(n));
  };
  constexpr int64_t kShapes[][2] = {{16, 24}, {24, 16}, {16, 16}, {1, 8}, {8, 1}};
  for (const auto& [rows, cols] : kShapes) {
    const int64_t rank = std::min(rows, cols);
    std::vector<float> x(static_cast<size_t>(rows * cols));
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; ++c) {
        double sum = 0;
        for (int64_t i = 0; i < rank; ++i)
          sum += std::pow(0.01, static_cast<double>(i) / static_cast<double>(rank)) *
                 basis(rows, i, r) * basis(cols, i, c);
        x[static_cast<size_t>(r * cols + c)] = static_cast<float>(sum);
      }
    }
    CpuOps<float> ops(2);
    const ParameterLayout layout(tiny_config());
    Optimizer({}, layout, &ops).orthogonalize(rows, cols, x.data());
    for (int64_t i = 0; i < rank; ++i) {
      for (int64_t j = 0; j < rank; ++j) {
        double value = 0;
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t c = 0; c < cols; ++c)
            value += basis(rows, i, r) * static_cast<double>(x[static_cast<size_t>(r * cols + c)]) *
                     basis(cols, j, c);
        if (i == j) {
          EXPECT_GT(value, 0.65) << rows << " x " << cols << ", " << i;
          EXPECT_LT(value, 1.25) << rows << " x " << cols << ", " << i;
        } else {
          EXPECT_NEAR(value, 0, 1e-3) << rows << " x " << cols << ", " << i << ", " << j;
        }
      }
    }
  }
}

// ---- Features ----------------------------------------------------------------------------------

// Recorded while the text is written, among others, with a prompt in pieces: the same bits as
// those of the finished text; and the file gives back what it was given, in F16.
TEST(Train, RecordedFeaturesAreThoseOfTheFinishedText) {
  const std::string path = test::tiny("q8_0");
  SKIP_WITHOUT(path);
  const ModelFile model = load_model(path);
  const auto backend = make_backend("cpu", {.threads = 2});
  const Llama llama(*backend, model.tensors, {});
  Session session(llama, {.context = 64, .n_sequences = 3, .prefill_rows = 4});
  FeatureRecorder recorder(llama.config(), 3);
  const std::vector<int32_t> prompts[] = {{1, 5, 9, 17, 3, 8}, {2, 7}, {4, 4, 4}};
  for (int s = 0; s < 3; ++s) {
    session.start(s, prompts[s], {});
    recorder.start(s, static_cast<int>(prompts[s].size()));
  }
  for (int step = 0; step < 12; ++step) session.step(&recorder);

  const Folder folder;
  const std::string fingerprint = "0123456789abcdef";
  TargetFeatures again(llama, 64);
  for (int s = 0; s < 3; ++s) {
    const auto tokens = session.tokens(s);
    const auto first_start = static_cast<int64_t>(prompts[s].size()) - 1;
    const TrainingText expected = again.read(tokens, first_start),
                       recorded = recorder.take(s, tokens);
    EXPECT_EQ(recorded.states, expected.states);
    EXPECT_EQ(recorded.first_start, first_start);
    ASSERT_EQ(recorded.targets.size(), static_cast<size_t>(expected.n_starts()));
    for (size_t i = 0; i < expected.targets.size(); ++i)
      EXPECT_EQ(std::memcmp(&recorded.targets[i], &expected.targets[i], sizeof(SoftTarget)), 0);
    FeatureFile(folder("features"), fingerprint, llama.config().hidden_size).append(s, recorded);
  }
  std::filesystem::resize_file(folder("features"),
                               std::filesystem::file_size(folder("features")) - 1);
  FeatureFile file(folder("features"), fingerprint, llama.config().hidden_size);
  TrainingText text;
  EXPECT_FALSE(file.read(2, session.tokens(2), 2, &text)) << "it was cut short";
  EXPECT_FALSE(file.read(1, session.tokens(0), 1, &text)) << "it is of another text";
  ASSERT_TRUE(file.read(1, session.tokens(1), 1, &text));
  const TrainingText expected = again.read(session.tokens(1), 1);
  for (size_t i = 0; i < expected.states.size(); ++i)
    EXPECT_EQ(text.states[i], f16_to_f32(f32_to_f16(expected.states[i])));
  EXPECT_EQ(std::memcmp(text.targets.data(), expected.targets.data(),
                        expected.targets.size() * sizeof(SoftTarget)),
            0);
  EXPECT_THROW(FeatureFile(folder("features"), "another", llama.config().hidden_size), Error);
}

// A path of candidates: position of its root, then their tokens.
using Path = std::vector<int64_t>;

// Decodes as the drafter does, and notes what is rejected.
class RejectedPaths final : public Drafter {
 public:
  explicit RejectedPaths(ChimeraDrafter* drafter) : drafter_(drafter) {}
  std::set<Path> paths;
  int64_t accepted = 0;

  std::string name() const override { return drafter_->name(); }
  void draft(const DraftContext& context, Step* step) override { drafter_->draft(context, step); }
  void observe(const KeptRows& kept) override {
    const Step& step = *kept.step;
    const Step::Sequence& s = step.sequences[0];
    for (int r = s.root + 1; s.root >= 0 && r < s.n_rows; ++r) {
      if (step.kept_at[r] >= 0) ++accepted;
      if (step.kept_at[r] >= 0) continue;
      Path path;
      for (int i = r; i != s.root; i = step.parent[i]) path.push_back(step.token[i]);
      path.push_back(step.position[s.root]);
      paths.insert({path.rbegin(), path.rend()});
    }
    drafter_->observe(kept);
  }

 private:
  ChimeraDrafter* drafter_;
};

// What is learnt on policy is what decoding with the draft sees: the text, with the same bits, and
// every candidate that is rejected, once, with what the target would answer to a text that goes on
// with it.
TEST(Train, OnPolicyFeaturesAreThoseOfDecoding) {
  for (const auto& [steps, nodes, depth] : {std::array{8, 8, 3}, {14, 64, 5}, {0, 3, 1}}) {
    SCOPED_TRACE(std::to_string(steps) + " steps learnt");
    const LearntByHeart learnt(110, steps);
    const auto drafter = make_chimera_drafter(
        learnt.llama, learnt.draft, {.nodes = nodes, .depth = depth, .ngrams = false}, 1, 128);
    RejectedPaths rejected(drafter.get());
    Session session(learnt.llama, {.context = 128, .max_nodes = nodes});
    ASSERT_EQ(generate(session, &rejected, learnt.prompt, learnt.options).ids, learnt.answer.ids);
    EXPECT_GT(rejected.paths.size(), 100u);
    EXPECT_GE(rejected.accepted, steps > 0 ? 20 : 0);

    OnPolicyFeatures features(learnt.llama, 128, nodes, depth);
    features.use(learnt.draft);
    TargetFeatures target(learnt.llama, 128);
    const std::vector<int32_t> tokens = learnt.text();
    for (const bool again : {false, true}) {
      SCOPED_TRACE(again);
      const TrainingText text = features.read(tokens, learnt.first_start()),
                         expected = target.read(tokens, learnt.first_start());
      EXPECT_EQ(text.tokens, expected.tokens);
      EXPECT_EQ(text.states, expected.states);
      const auto same = [](const SoftTarget& a, const SoftTarget& b) {
        return std::memcmp(&a, &b, sizeof a) == 0;
      };
      EXPECT_TRUE(std::equal(text.targets.begin(), text.targets.end(), expected.targets.begin(),
                             expected.targets.end(), same));
      std::set<Path> paths;
      for (const Branch& branch : text.branches) {
        std::vector<int32_t> other(tokens.begin(), tokens.begin() + branch.start + 2);
        other.insert(other.end(), branch.tokens.begin(), branch.tokens.end());
        other.push_back(0);
        ASSERT_GE(branch.start, text.first_start);
        ASSERT_LE(other.size(), 128u);
        const std::vector<SoftTarget> answers = target.read(other, branch.start).targets;
        ASSERT_LE(branch.targets.size(), branch.tokens.size());
        EXPECT_TRUE(
            std::equal(branch.targets.rbegin(), branch.targets.rend(), answers.rbegin(), same));
        for (size_t n = branch.tokens.size() - branch.targets.size() + 1; n <= branch.tokens.size();
             ++n) {
          Path path = {branch.start + 1};
          path.insert(path.end(), branch.tokens.begin(),
                      branch.tokens.begin() + static_cast<std::ptrdiff_t>(n));
          EXPECT_TRUE(paths.insert(path).second) << "learnt twice";
        }
      }
      // (After the last tokens of a text, what follows them is not known.)
      std::erase_if(rejected.paths, [&](const Path& path) {
        return path[0] + depth + 1 >= static_cast<int64_t>(tokens.size());
      });
      std::erase_if(paths, [&](const Path& path) {
        return path[0] + depth + 1 >= static_cast<int64_t>(tokens.size());
      });
      EXPECT_EQ(paths, rejected.paths);
    }
  }
}

// ---- The command -------------------------------------------------------------------------------

std::string write_shard(const Folder& folder) {
  const std::string path = folder("shard.jsonl");
  std::ofstream file(path);
  file << "{\"chimera_data\":1}\n";
  std::mt19937 random(9);
  for (int i = 0; i < 12; ++i) {
    nlohmann::json ids = nlohmann::json::array();
    for (int j = 0; j < 20 + i; ++j) ids.push_back(1 + static_cast<int>(random() % 20));
    file << nlohmann::json{{"prompt_len", 5}, {"ids", ids}}.dump() << "\n";
  }
  file << "{\"prompt_len\":5,\"ids\":[1,2";  // half written
  return path;
}

TEST(Train, ResumedRunGivesTheSameBits) {
  const std::string model = test::tiny("f32");
  SKIP_WITHOUT(model);
  const Folder folder;
  const std::string shard = write_shard(folder);
  const auto fit = [&](const std::string& name, std::vector<std::string> more) {
    std::vector<std::string> args = {"-m",          model,        "--data",    shard,
                                     "-o",          folder(name), "--threads", "2",
                                     "--positions", "600",        "--batch",   "20"};
    if (std::ranges::find(more, "--init") == more.end())
      args.insert(args.end(), {"--vocabulary", "30", "--ffn", "32", "--rank", "32"});
    args.insert(args.end(), more.begin(), more.end());
    EXPECT_EQ(train_fit(args), 0);
    return test::read_text(folder(name));
  };
  const std::string whole = fit("whole.safetensors", {});
  const std::string half = fit("half.safetensors", {"--stop-after", "300", "--threads", "1"});
  EXPECT_NE(half, whole);
  fit("rest.safetensors", {"--resume", folder("half.safetensors.checkpoint")});
  const DraftTensors a = load_draft(folder("whole.safetensors")),
                     b = load_draft(folder("rest.safetensors"));
  EXPECT_EQ(pack_parameters(a), pack_parameters(b));
  EXPECT_EQ(a.vocabulary, b.vocabulary);

  // On policy a batch depends on the weights that have decoded it: it goes on with those.
  std::vector<std::string> own = {"--on-policy", "6",   "--init", folder("half.safetensors"),
                                  "--lr",        "0.02"};
  const auto with = [&own](std::vector<std::string> more) {
    more.insert(more.end(), own.begin(), own.end());
    return more;
  };
  fit("own.safetensors", with({}));
  fit("own_half.safetensors", with({"--stop-after", "200", "--threads", "1"}));
  // (All that it goes on with is in the checkpoint, not in the draft that it once started from.)
  std::filesystem::copy_file(folder("whole.safetensors"), folder("half.safetensors"),
                             std::filesystem::copy_options::overwrite_existing);
  fit("own_rest.safetensors", with({"--resume", folder("own_half.safetensors.checkpoint")}));
  const std::vector<float> at_once = pack_parameters(load_draft(folder("own.safetensors")));
  EXPECT_EQ(pack_parameters(load_draft(folder("own_rest.safetensors"))), at_once);
  own[1] = "0";
  EXPECT_THROW(fit("x", with({"--resume", folder("own_half.safetensors.checkpoint")})), Error);
  fit("texts.safetensors", with({}));
  EXPECT_NE(pack_parameters(load_draft(folder("texts.safetensors"))), at_once);

  // Of another run: refused, also where all shapes agree.
  EXPECT_THROW(
      train_fit({"-m",      model,       "--data",       shard,
                 "-o",      folder("x"), "--positions",  "600",
                 "--batch", "20",        "--vocabulary", "30",
                 "--ffn",   "32",        "--rank",       "32",
                 "--seed",  "2",         "--resume",     folder("half.safetensors.checkpoint")}),
      Error);
  EXPECT_THROW(train_fit({"-m", model, "--data", shard, "-o", folder("x"), "--positions", "600",
                          "--batch", "20", "--vocabulary", "30", "--ffn", "64", "--rank", "32",
                          "--resume", folder("half.safetensors.checkpoint")}),
               Error);
  EXPECT_THROW(train_fit({"-m", model, "--data", shard, "-o", folder("x"), "--resume", shard}),
               Error);

  // A checkpoint says its precision and the draft's form; one of before that is taken for "auto"
  // and the form that there was.
  const std::string half_way = folder("half.safetensors.checkpoint");
  const auto refused = [&](const std::string& flag, const std::string& value,
                           const std::string& checkpoint) {
    try {
      fit("other.safetensors", {flag, value, "--resume", checkpoint});
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string();
  };
  std::string old = test::read_text(half_way);
  for (const std::string said : {",\\\"precision\\\":\\\"auto\\\"", ",\\\"encoder\\\":\\\"both\\\"",
                                 ",\\\"slots\\\":\\\"features\\\"", ",\\\"on_policy\\\":0"}) {
    ASSERT_NE(old.find(said), std::string::npos);
    old.insert(old.find('{') + 1, said.size(), ' ');  // the header stays as long as it says
    old.erase(old.find(said), said.size());
  }
  std::ofstream(folder("old"), std::ios::binary) << old;
  for (const std::string& checkpoint : {half_way, folder("old")}) {
    for (const auto& [flag, value, start] :
         std::vector<std::array<std::string, 3>>{{"precision", "f32", "auto"},
                                                 {"encoder", "token", "both"},
                                                 {"slots", "states", "features"}})
      EXPECT_EQ(refused("--" + flag, value, checkpoint),
                checkpoint + ": settings: " + flag + ": expected \"" + value + "\", found \"" +
                    start +
                    "\"; give the flags and data that the run was started with, or remove the "
                    "checkpoint to begin anew");
    EXPECT_EQ(refused("--precision", "auto", checkpoint), "");
    EXPECT_EQ(pack_parameters(load_draft(folder("other.safetensors"))), pack_parameters(a));
  }
}

TEST(Train, HeldOutTextsDependOnTheirTokens) {
  const Folder folder;
  std::vector<std::string> lines;
  for (int i = 0; i < 300; ++i)  // in order of length, as answers are
    lines.push_back(nlohmann::json{{"prompt_len", 2}, {"ids", std::vector<int>(4 + i, i)}}.dump());
  const auto read = [&](const std::string& name) {
    std::ofstream file(folder(name));
    for (const std::string& line : lines) file << line << "\n";
    file.close();
    return TrainingTexts({folder(name)}, {"", "", 512}, 1024, 1);
  };
  const TrainingTexts sorted = read("sorted");
  ASSERT_EQ(sorted.held_out().size(), 3u);
  EXPECT_EQ(sorted.texts().size(), 297u);
  EXPECT_GT(sorted.held_out()[0].ids.size() + sorted.held_out()[1].ids.size() +
                sorted.held_out()[2].ids.size(),
            5u + 6u + 7u);
  std::reverse(lines.begin(), lines.end());
  const TrainingTexts reversed = read("reversed");
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(reversed.held_out()[i].ids, sorted.held_out()[i].ids);
    EXPECT_EQ(reversed.held_out()[i].number, 299 - sorted.held_out()[i].number);
  }
  EXPECT_NE(reversed.hash(), sorted.hash()) << "they are learnt from in another order";
}

TEST(Train, SkippedTextsAreThoseThatCame) {
  const Folder folder;
  std::ofstream file(folder("shard"));
  for (int i = 0; i < 8; ++i)
    file << nlohmann::json{{"prompt_len", 1}, {"ids", {1, 2, 3 + i}}}.dump() << "\n";
  file.close();
  for (const int64_t n : {0, 1, 6, 7, 8, 14, 40}) {
    TrainingTexts read({folder("shard")}, {"", "", 512}, 64, 5), skipped = read;
    for (int64_t i = 0; i < n; ++i) read.next();
    skipped.skip(n);
    for (int i = 0; i < 20; ++i) EXPECT_EQ(skipped.next().ids, read.next().ids) << n << ", " << i;
  }
  TrainingTexts texts({folder("shard")}, {"", "", 512}, 64, 5);
  texts.skip(999'999'999'999'999);  // at once
}

// ---- The mean of drafts -------------------------------------------------------------------------

TEST(Train, AverageOfDrafts) {
  const Folder folder;
  DraftConfig config;
  config.hidden_size = 64;
  config.n_heads = 2, config.n_kv_heads = 1, config.head_dim = 32, config.ffn_size = 32;
  config.greedy = {{0.8f}, {0.9f}};
  const std::vector<float> norm(64, 1.0f);
  std::vector<std::vector<float>> values;
  const auto save = [&](const std::string& name, uint64_t seed) {
    DraftTensors draft = initial_draft(config, norm, seed);
    draft.vocabulary = {3, 1};
    draft.target_fingerprint = "f";
    draft.training = "{\"seed\":" + std::to_string(seed) + "}";
    save_draft(draft, folder(name));
    values.push_back(pack_parameters(load_draft(folder(name))));  // as rounded in the file
    return folder(name);
  };
  const std::string a = save("a", 1), b = save("b", 2), c = save("c", 3), mean = folder("mean");
  ASSERT_EQ(train_average({"--drafts", a + "," + b + "," + c, "-o", mean}), 0);
  const DraftTensors draft = load_draft(mean);
  const std::vector<float> got = pack_parameters(draft);
  for (size_t i = 0; i < got.size(); ++i) {
    const float exact = (values[0][i] + values[1][i] + values[2][i]) / 3;
    ASSERT_NEAR(got[i], exact, std::fabs(exact) / 256 + 1e-30f) << i;  // BF16
  }
  EXPECT_EQ(draft.training, "{\"mean_of\":[{\"seed\":1},{\"seed\":2},{\"seed\":3}]}");
  EXPECT_TRUE(draft.config.greedy.temperature.empty());  // to be measured again

  const DraftConfig same = config;
  for (const auto& change : std::vector<std::function<void(DraftConfig*)>>{
           [](auto* c) { c->ffn_size = 64; }, [](auto* c) { c->trigram = false; },
           [](auto* c) { c->slot_features = false; }}) {
    change(&(config = same));
    const std::string other = save("other", 4);
    EXPECT_THROW(train_average({"--drafts", a + "," + other, "-o", mean}), Error);
  }
  EXPECT_THROW(train_average({"--drafts", a, "-o", mean}), Error);
}

// ---- The prototype -----------------------------------------------------------------------------

TEST(Train, ForwardIsThatOfThePrototype) {
  const std::string folder = test::shared("draft_prototype/");
  SKIP_WITHOUT(folder + "golden.json");
  SKIP_WITHOUT(test::kSmolLm2);
  const nlohmann::json golden = nlohmann::json::parse(test::read_text(folder + "golden.json"));
  const DraftTensors draft = test::load_prototype(folder + "prototype.safetensors");
  const ModelFile model = load_model(test::kSmolLm2);
  const TensorView& table = model.tensors.embedding;
  std::vector<float> embedding(static_cast<size_t>(table.rows) * 576);
  for (int64_t r = 0; r < table.rows; ++r)
    dequantize_row(table.type, table.row(r), 576, embedding.data() + r * 576);

  TrainingText text;
  text.tokens = golden["ids"].get<std::vector<int32_t>>();
  text.first_start = golden["prompt_len"].get<int>() - 1;
  for (const uint16_t h : test::read_array<uint16_t>(folder + "hidden.f16"))
    text.states.push_back(f16_to_f32(h));
  text.states.resize(static_cast<size_t>(text.n_positions()) * 576);
  SoftTarget none;
  std::fill_n(none.token, SoftTarget::kMost, -1);
  text.targets.assign(static_cast<size_t>(text.n_starts()), none);

  CpuOps<float> ops(1);
  DraftGradient<float> gradient(&ops, draft.config, embedding.data(), embedding.data(), table.rows,
                                draft.vocabulary, 0);
  const std::vector<float> parameters = pack_parameters(draft);
  const TrainingText* batch[] = {&text};
  gradient.run(parameters.data(), batch, 4, 0.8, nullptr);
  int compared = 0;
  for (const auto& [key, steps] : golden["starts"].items()) {
    const int64_t n = std::stoll(key);
    for (int64_t k = 0; k < 4; ++k) {
      const nlohmann::json& step = steps[static_cast<size_t>(k)];
      if (n + 1 + k >= text.n_positions()) continue;
      const int64_t row = k * text.n_starts() + n - text.first_start;
      for (int64_t i = 0; i < 8; ++i) {
        EXPECT_NEAR(gradient.features().data()[(n + 1 + k) * 576 + i],
                    step["feature"][static_cast<size_t>(i)].get<float>(), 1e-3);
        EXPECT_NEAR(gradient.f().data()[row * 576 + i],
                    step["f"][static_cast<size_t>(i)].get<float>(), 1e-3)
            << n << " " << k;
        const auto id = step["top_ids"][static_cast<size_t>(i)].get<int64_t>();
        double logit = 0;
        for (int64_t j = 0; j < 576; ++j)
          logit += double{gradient.head_input().data()[row * 576 + j]} *
                   double{embedding[static_cast<size_t>(id * 576 + j)]};
        EXPECT_NEAR(logit, step["top_logits"][static_cast<size_t>(i)].get<double>(), 1e-3)
            << n << " " << k;
        ++compared;
      }
    }
  }
  EXPECT_GT(compared, 8 * 28);
}

}  // namespace
}  // namespace chimera::training
