// Sessions and decoding: where texts end, what is refused, what a step does, and that nothing is
// allocated once it runs.
#include "engine/session.h"

#include <atomic>
#include <cmath>
#include <functional>
#include <tuple>
#include <utility>

#include "engine/candidate_tree.h"
#include "engine/cpu/thread_pool.h"
#include "engine/cpu/work_shares.h"
#include "engine/error.h"
#include "engine/rope.h"
#include "tests/allocation_counter.h"
#include "tests/support.h"

namespace chimera::test {
namespace {

class SessionTest : public ::testing::Test {
 protected:
  const Llama& model() { return *loaded_.model; }
  const Loaded loaded_ = load(tiny("q4_1"), isas().back(), 2);
};

TEST(StepTest, TheDrawingInTheHeader) {
  auto step = std::make_unique<Step>();
  step->n_sequences = 1;
  step->sequences[0].committed = 7;
  step->clear();
  step->begin_sequence(0);
  enum { kThe = 10, kCat, kDog, kSat, kRan };
  const int the = step->add_row(kThe, -1, true), cat = step->add_row(kCat, the, true),
            dog = step->add_row(kDog, the, true);
  const int sat = step->add_row(kSat, cat, true), cat_ran = step->add_row(kRan, cat, true),
            dog_ran = step->add_row(kRan, dog, true);
  step->set_root(the);
  const std::vector<int> positions(step->position, step->position + 6),
      slots(step->slot, step->slot + 6);
  EXPECT_EQ(positions, (std::vector<int>{7, 8, 8, 9, 9, 9}));
  EXPECT_EQ(slots, (std::vector<int>{7, 8, 9, 10, 11, 12}));
  EXPECT_EQ(step->depth(dog_ran), 2);
  (void)sat;
  (void)cat_ran;

  // The target says "dog" after "the", "ran" after "dog", then "off".
  const int vocab = 32, off = 20;
  std::vector<float> logits(static_cast<size_t>(6 * vocab), 0.0f);
  logits[static_cast<size_t>(the * vocab + kDog)] = 1;
  logits[static_cast<size_t>(dog * vocab + kRan)] = 1;
  logits[static_cast<size_t>(dog_ran * vocab + off)] = 1;
  const auto backend = backend_of("scalar", 1);
  backend->reserve(8, 64, 64, {1, 1, 16}, vocab);
  backend->accept(step.get(), logits.data(), vocab);
  const std::vector<int> kept(step->kept_at, step->kept_at + 6);
  EXPECT_EQ(kept, (std::vector<int>{7, -1, 8, -1, -1, 9}));
  EXPECT_EQ(step->sequences[0].n_kept, 3);
  EXPECT_EQ(step->sequences[0].committed, 10);
  EXPECT_EQ(step->sequences[0].next, off);

  float states[6] = {0, 1, 2, 3, 4, 5};
  backend->keep_rows(step.get(), 1, states);
  EXPECT_EQ(states[0], 0);
  EXPECT_EQ(states[1], 2);
  EXPECT_EQ(states[2], 5);
}

TEST_F(SessionTest, TextsEndWherePlainDecodingEndsThem) {
  Session session(model(), {.context = 128, .max_nodes = 8});
  const std::vector<int32_t> prompt = {1, 403, 407};
  const Generation whole =
      generate(session, nullptr, prompt, {.max_tokens = 100, .eos = {}, .sampling = {}});
  ASSERT_EQ(whole.ids.size(), 100u);
  const auto ngram = make_ngram_drafter({.nodes = 8, .min_match = 1}, 1, 128);
  for (size_t n : {1u, 2u, 17u, 60u, 100u}) {  // the limit, inside accepted paths too
    const Generation g = generate(session, ngram.get(), prompt,
                                  {.max_tokens = static_cast<int>(n), .eos = {}, .sampling = {}});
    EXPECT_EQ(g.ids, std::vector<int32_t>(whole.ids.begin(),
                                          whole.ids.begin() + static_cast<std::ptrdiff_t>(n)));
    EXPECT_EQ(g.stop, Stop::kLength);
  }
  for (size_t i = 5; i < 100; i += 9) {  // any token as the end of text: the first time it comes up
    const int32_t eos = whole.ids[i];
    const auto first = std::find(whole.ids.begin(), whole.ids.end(), eos);
    const Generation g =
        generate(session, ngram.get(), prompt, {.max_tokens = 100, .eos = {eos}, .sampling = {}});
    EXPECT_EQ(g.ids, std::vector<int32_t>(whole.ids.begin(), first + 1));
    EXPECT_EQ(g.stop, Stop::kEos);
  }
}

TEST_F(SessionTest, TheContextIsTheEnd) {
  Session session(model(), {.context = 40, .max_nodes = 8});
  const auto ngram = make_ngram_drafter({.nodes = 8, .min_match = 1}, 1, 40);
  std::vector<int32_t> prompt(30, 403);
  prompt[0] = 1;
  const Generation plain = generate(session, nullptr, prompt, {}),
                   tree = generate(session, ngram.get(), prompt, {});
  EXPECT_EQ(plain.ids.size(), 10u);
  EXPECT_EQ(tree.ids, plain.ids);
  EXPECT_EQ(plain.stop, Stop::kLength);
  prompt.resize(40, 403);
  EXPECT_TRUE(generate(session, nullptr, prompt, {}).ids.empty());
  prompt.resize(41, 403);
  EXPECT_THROW(generate(session, nullptr, prompt, {}), Error);
  EXPECT_THROW(session.start(0, {}, {}), Error);
  EXPECT_THROW(session.start(0, std::vector<int32_t>{512}, {}), Error);
  EXPECT_THROW(session.start(0, std::vector<int32_t>{-1}, {}), Error);
}

TEST_F(SessionTest, OptionsOutOfRangeAreRefused) {
  for (const SessionOptions& o :
       {SessionOptions{.context = 0}, SessionOptions{.context = -1},
        SessionOptions{.context = 1 << 30}, SessionOptions{.n_sequences = 0},
        SessionOptions{.n_sequences = 1000}, SessionOptions{.max_nodes = -1},
        SessionOptions{.max_nodes = 100000}, SessionOptions{.prefill_rows = 0},
        SessionOptions{.prefill_rows = 1000}, SessionOptions{.kv_type = DType::kQ4_0}})
    EXPECT_THROW(Session(model(), o), Error);
}

TEST_F(SessionTest, CancelStopsBeforeTheNextStep) {
  Session session(model(), {.context = 128, .prefill_rows = 16});
  int seen = 0, asked = 0;
  GenerateOptions options;
  options.cancelled = [&] { return seen == 5; };
  const Generation text =
      generate(session, nullptr, std::vector<int32_t>{1}, options, [&](int32_t) { ++seen; });
  EXPECT_EQ(text.ids.size(), 5u);
  EXPECT_EQ(text.stop, Stop::kCancelled);

  options.cancelled = [&] { return ++asked == 3; };  // inside the prompt
  const Generation none = generate(session, nullptr, std::vector<int32_t>(100, 1), options);
  EXPECT_TRUE(none.ids.empty());
  EXPECT_EQ(none.stop, Stop::kCancelled);
  EXPECT_EQ(session.last_step().sequences[0].committed, 2 * 16);
}

// What passes cost decides how many nodes are drafted, and nothing else.
TEST_F(SessionTest, TreesFollowTheCosts) {
  const std::vector<int32_t> prompt(40, 100);  // repeats itself: there is much to propose
  const auto run = [&](double of_a_row) {
    Session session(model(), {.context = 160, .max_nodes = 8});
    CostCurve cost;
    for (int rows = 1; rows <= CostCurve::kMaxRows; ++rows)
      cost.set(rows, 1000 * (1 + of_a_row * rows));
    session.set_cost(cost);
    const auto drafter = make_ngram_drafter({}, 1, 160);
    return generate(session, drafter.get(), prompt, {60, {}, {}});
  };
  const Generation steep = run(1000), flat = run(1e-4);
  EXPECT_EQ(steep.drafted, 0);
  EXPECT_GT(flat.drafted, 0);
  EXPECT_EQ(steep.ids, flat.ids);
}

// ... and so does what attention adds to a row's price in a long text.
TEST_F(SessionTest, TreesFollowThePriceOfAttention) {
  const auto drafted = [&](size_t prompt) {
    Session session(model(), {.context = 340, .max_nodes = 8});
    CostCurve cost;
    for (int rows = 1; rows <= CostCurve::kMaxRows; ++rows) cost.set(rows, 1000 + rows);
    cost.set_attention(5);  // of 300 positions: more than a pass
    session.set_cost(cost);
    const auto drafter = make_ngram_drafter({}, 1, 340);
    return generate(session, drafter.get(), std::vector<int32_t>(prompt, 100), {30, {}, {}})
        .drafted;
  };
  EXPECT_GT(drafted(20), 0);
  EXPECT_EQ(drafted(300), 0);
}

// A machine whose memory is half as fast as when it was measured, then one whose arithmetic is a
// third as fast: trees of a few sizes with a plain step now and then tell the two apart.
TEST(CostCurve, LearnsFirstRowAndFurtherRowsApart) {
  for (const auto& [first, further] : {std::pair{2.0, 1.0}, std::pair{1.0, 3.0}}) {
    CostCurve curve;
    curve.set(1, 1.0);
    curve.set(8, 1.2);
    curve.set(32, 4.0);
    const auto truly = [&](int rows) {
      return first + further * (curve.measured(rows) > 0 ? curve.measured(rows) - 1 : 0.6);
    };
    for (int i = 0; i < 2000; ++i) {
      const int rows = i % 48 == 0 ? 1 : i % 2 == 0 ? 8 : 32;
      curve.learn(rows, truly(rows) * (i % 7 == 0 ? 1.02 : 1.0));
    }
    for (const int rows : {1, 8, 32})
      EXPECT_NEAR(curve.seconds(rows) / truly(rows), 1, 0.03) << first << " " << rows;
    EXPECT_EQ(curve.measured(8), 1.2) << "what is kept in a file is what was measured";
  }
  CostCurve flat;  // a tree's pass after drafting is not what it was without
  for (const int rows : {1, 4}) flat.set(rows, 1.0);
  for (int i = 0; i < 200; ++i) flat.learn(i % 48 == 0 ? 1 : 4, i % 48 == 0 ? 1.0 : 1.2);
  EXPECT_NEAR(flat.seconds(1), 1.0, 0.04);
  EXPECT_NEAR(flat.seconds(4), 1.2, 0.04);
  for (int i = 0; i < 200; ++i) flat.learn(i % 48 == 0 ? 1 : 4, i % 48 == 0 ? 1.0 : 0.8);
  EXPECT_GE(flat.seconds(4), flat.seconds(1)) << "more rows never cost less";

  CostCurve curve;  // one pass that took for ever
  curve.set(1, 1.0);
  curve.set(8, 2.0);
  curve.learn(8, 1e6);
  EXPECT_LT(curve.seconds(1), 1.2);
  EXPECT_LT(curve.seconds(8), 2.4);
}

// A while in which trees were dear must not end drafting: plain passes alone bring their price
// back.
TEST(CostCurve, ForgetsADearWhile) {
  CostCurve curve;
  curve.set(1, 1.0);
  curve.set(8, 3.0);
  for (int i = 0; i < 400; ++i) curve.learn(i % 48 == 0 ? 1 : 8, i % 48 == 0 ? 1.0 : 9.0);
  EXPECT_GT(curve.seconds(8) / curve.seconds(1), 5);
  for (int i = 0; i < 400; ++i) curve.learn(1, 1.0);
  EXPECT_NEAR(curve.seconds(8), 3.0, 0.05);
}

// Rows beyond the first are dearer the longer the text; what is learnt of it at one length holds at
// another.
TEST(CostCurve, AttentionAddsToFurtherRows) {
  CostCurve curve;
  for (const int rows : {1, 8, 64}) curve.set(rows, 1 + 0.1 * rows);
  curve.set_attention(0.001);
  curve.at_context(500);
  EXPECT_DOUBLE_EQ(curve.seconds(1), 1.1);
  EXPECT_NEAR(curve.seconds(8), 1.8 + 7 * 0.5, 1e-9);
  EXPECT_NEAR(curve.seconds(100), 1 + 10 + 99 * 0.5, 1e-9);
  EXPECT_EQ(curve.measured(8), 1 + 0.1 * 8) << "what is kept in a file is of the start of a text";
  for (int i = 0; i < 2000; ++i) {  // twice as dear as measured
    const int rows = i % 48 == 0 ? 1 : 8;
    curve.at_context(i % 100);
    curve.learn(rows, 1.1 + (rows - 1) * (0.2 + 0.002 * (i % 100)));
  }
  curve.at_context(500);
  EXPECT_NEAR(curve.seconds(8), 1.1 + 7 * (0.2 + 1.0), 0.1);
  curve.set_attention(-1);
  EXPECT_EQ(curve.attention(), 0) << "a measurement that was disturbed";
}

// A measurement that was disturbed must not make the next larger tree look as cheap.
TEST(CostCurve, RowsBeyondTheLastMeasuredCostAsMuchAgain) {
  CostCurve curve;
  for (const int rows : {1, 32, 64}) curve.set(rows, 1 + 0.1 * rows);
  for (const int rows : {48, 65, 100, 255}) EXPECT_NEAR(curve.seconds(rows), 1 + 0.1 * rows, 1e-9);
}

TEST(CostCurve, FewerRowsNeverCostMore) {
  CostCurve curve;
  for (const auto& [rows, seconds] : {std::pair{1, 2.2}, {2, 3.0}, {3, 1.8}, {4, 2.0}, {8, 3.6}})
    curve.set(rows, seconds);
  EXPECT_EQ(curve.measured(2), 3.0);
  for (const int rows : {1, 2, 3}) EXPECT_DOUBLE_EQ(curve.seconds(rows), 1.8);
  EXPECT_DOUBLE_EQ(curve.seconds(4), 2.0);
  EXPECT_DOUBLE_EQ(curve.seconds(6), 2.8);
  EXPECT_DOUBLE_EQ(curve.seconds(16), 6.8) << "beyond the last: as from the one before it";
  CostCurve single;
  single.set(2, 3.0);
  EXPECT_DOUBLE_EQ(single.seconds(8), 12.0) << "in proportion";
}

// Always has something to propose.
class Eager final : public Drafter {
 public:
  std::string name() const override { return "eager"; }
  void draft(const DraftContext& c, Step* step) override {
    if (c.max_depth > 0) step->add_row(7, c.root, true);
    ++calls;
  }
  int calls = 0;
};

// Where costs are known a plain step comes now and then, and changes nothing but the number of
// steps.
TEST_F(SessionTest, PlainStepsNowAndThen) {
  const std::vector<int32_t> prompt(40, 100);
  Session session(model(), {.context = 320, .max_nodes = 4});
  CostCurve cost;
  for (int rows = 1; rows <= CostCurve::kMaxRows; ++rows) cost.set(rows, 1e-3 * (1 + 1e-6 * rows));
  session.set_cost(cost);
  Eager drafter;
  const Generation g = generate(session, &drafter, prompt, {250, {}, {}});
  EXPECT_GE(g.steps - drafter.calls, 2);
  EXPECT_LE(g.steps - drafter.calls, 6);
  Session plain(model(), {.context = 320});
  EXPECT_EQ(generate(plain, nullptr, prompt, {250, {}, {}}).ids, g.ids);
}

// ... also where several texts are decoded at once, and a plain step has more than one row.
TEST_F(SessionTest, PlainStepsOfABatchNowAndThen) {
  Session session(model(), {.context = 160, .n_sequences = 2, .max_nodes = 4});
  CostCurve cost;
  for (int rows = 1; rows <= CostCurve::kMaxRows; ++rows) cost.set(rows, 1e-3 * (1 + 1e-6 * rows));
  session.set_cost(cost);
  Eager drafter;
  const std::vector<int32_t> prompt(20, 100);
  for (const int s : {0, 1}) session.start(s, prompt, {});
  int steps = 0, drafting = 0;
  for (int calls = 0; session.step(&drafter); calls = drafter.calls, ++steps)
    drafting += drafter.calls > calls;
  EXPECT_GT(steps, 60);
  EXPECT_GT(drafting, steps - 6);
  EXPECT_LT(drafting, steps - 1);  // the prompts' step apart
}

TEST_F(SessionTest, TimingAPlainStepAddsNothing) {
  const std::vector<int32_t> prompt(40, 100);
  const Sampling sampling{.temperature = 1, .seed = 3};
  Session plain(model(), {.context = 50}), timed(model(), {.context = 50});
  plain.start(0, prompt, sampling);
  timed.start(0, prompt, sampling);
  while (plain.step(nullptr)) {
    timed.step(nullptr);
    EXPECT_GT(timed.plain_seconds(), 0);
    ASSERT_TRUE(std::ranges::equal(plain.tokens(0), timed.tokens(0)));
  }
  EXPECT_FALSE(timed.step(nullptr));
  timed.stop(0);
  EXPECT_GT(timed.plain_seconds(), 0);
  EXPECT_TRUE(std::ranges::equal(plain.tokens(0), timed.tokens(0)));
}

// The states that a draft model reads: after a step they belong to the rows kept, in order, and
// they are behind the final norm: over its weights their root mean square is 1.
TEST_F(SessionTest, StatesOfTheRowsKept) {
  const std::vector<int32_t> prompt = {1, 403, 407, 261};
  Session session(model(), {.context = 64, .max_nodes = 4}),
      row_by_row(model(), {.context = 64, .prefill_rows = 1});
  session.start(0, prompt, {});
  row_by_row.start(0, prompt, {});
  ASSERT_TRUE(session.step(nullptr));
  EXPECT_EQ(session.last_step().sequences[0].n_kept, 4);
  EXPECT_EQ(session.emitted(0), 1);
  const std::vector<float> weight = floats_of(loaded_.file.tensors.output_norm);
  for (size_t row = 0; row < prompt.size(); ++row) {
    ASSERT_TRUE(row_by_row.step(nullptr));
    const float* state = session.states() + row * weight.size();
    EXPECT_TRUE(std::equal(state, state + weight.size(), row_by_row.states())) << row;
    double squares = 0;
    for (size_t i = 0; i < weight.size(); ++i)
      squares += std::pow(static_cast<double>(state[i] / weight[i]), 2);
    EXPECT_NEAR(squares / static_cast<double>(weight.size()), 1, 1e-3) << row;
  }
}

TEST_F(SessionTest, NothingIsAllocatedAfterTheFirstStep) {
  Session session(model(), {.context = 512, .max_nodes = 8});
  const auto ngram = make_ngram_drafter({.nodes = 8, .min_match = 1}, 1, 512);
  const Sampling sampling{
      .temperature = 0.8f, .top_k = 50, .top_p = 0.9f, .min_p = 0.01f, .seed = 1};
  session.start(0, std::vector<int32_t>{1, 403, 407, 261, 378}, sampling);
  session.step(ngram.get());
  const int64_t before = allocation_count();
  while (session.tokens(0).size() < 450) session.step(ngram.get());
  EXPECT_EQ(allocation_count() - before, 0);
}

TEST_F(SessionTest, ThePlanAddsUp) {
  const SessionOptions options{.context = 100, .max_nodes = 4};
  LlamaConfig config = model().config();
  config.n_layers = 5, config.n_kv_heads = 4, config.head_dim = 8;
  const MemoryPlan plan = Session::plan(config, model().backend(), options);
  size_t sum = 0, kv = 0;
  for (const MemoryPlan::Entry& e : plan.entries()) {
    EXPECT_EQ(e.offset, sum);
    sum += (e.bytes + 63) / 64 * 64;
    if (e.name == "kv cache") kv = e.bytes;
  }
  EXPECT_EQ(sum, plan.total());
  EXPECT_EQ(kv, 5u * 4 * 256 * (8 + 16) *
                    2);  // layers, kv heads, slots (164 in chunks of 256), K + padded V, f16
}

TEST(NgramTest, DraftsWhatFollowedBefore) {
  const auto backend = backend_of("scalar", 1);
  auto step = std::make_unique<Step>();
  const auto drafted = [&](const std::vector<int32_t>& text, const NgramOptions& options,
                           int max_depth = 100) {
    const auto drafter = make_ngram_drafter(options, 1, 64);
    step->n_sequences = 1;
    step->sequences[0].committed = static_cast<int32_t>(text.size()) - 1;
    step->clear();
    step->begin_sequence(0);
    const int root = step->add_row(text.back(), -1, true);
    step->set_root(root);
    drafter->draft({*backend, 0, 1, text, root, options.nodes, max_depth, nullptr, {}}, step.get());
    std::vector<std::pair<int, int>> nodes;  // (parent row, token)
    for (int r = 1; r < step->n_rows; ++r) nodes.emplace_back(step->parent[r], step->token[r]);
    return nodes;
  };
  using Nodes = std::vector<std::pair<int, int>>;
  EXPECT_EQ(drafted({1, 2, 3, 4, 5, 9, 1, 2}, {.nodes = 3}), (Nodes{{0, 3}, {1, 4}, {2, 5}}));
  EXPECT_EQ(drafted({1, 2, 3, 4, 5, 6}, {}), Nodes{});                // no match
  EXPECT_EQ(drafted({1, 2, 3, 9, 8, 2}, {.min_match = 2}), Nodes{});  // too short a match
  EXPECT_EQ(drafted({1, 2, 3, 9, 8, 2}, {.nodes = 1, .min_match = 1}), (Nodes{{0, 3}}));
  EXPECT_EQ(drafted({1, 2, 3, 4, 1, 2, 3, 5, 1, 2}, {.nodes = 3}),
            (Nodes{{0, 3}, {1, 5}, {2, 1}}));  // newest first
  EXPECT_EQ(drafted({1, 2, 3, 4, 7, 1, 2, 3, 5, 7, 1, 2},
                    {.nodes = 6}),  // and the older one shares its first node
            (Nodes{{0, 3}, {1, 5}, {2, 7}, {3, 1}, {4, 2}, {1, 4}}));
  EXPECT_EQ(drafted({1, 2, 3, 4, 5, 9, 1, 2}, {.nodes = 3}, 2),
            (Nodes{{0, 3}, {1, 4}}));  // depth left in the context
}

TEST(NgramTest, APromptIsNoGuessThatCameTrue) {
  const auto backend = backend_of("scalar", 1);
  const std::vector<int32_t> text = {1, 2, 3, 4, 5, 9, 1, 2};
  CostCurve cost;
  for (const int rows : {1, 64}) cost.set(rows, 1);  // so that all are tried
  // What the matches are worth, after a prompt of that many rows and guesses that failed; or what
  // they are in a text beside it.
  const auto believed = [&](int prompt_rows, int failed, bool beside = false) {
    const auto drafter = make_ngram_drafter({.nodes = 3}, 2, 64);
    auto step = std::make_unique<Step>();
    step->n_sequences = 1;
    const auto observe = [&](int rows) {
      step->clear();
      step->begin_sequence(0);
      int row = -1;
      for (int i = 0; i < rows; ++i) row = step->add_row(7, row, i + 1 == rows);
      step->set_root(row);
      drafter->observe({0, 1, text, rows, rows, nullptr, step.get(), nullptr, 16});
    };
    observe(prompt_rows);
    for (int i = 0;; ++i) {
      const CandidateTree& tree = drafter->candidates({*backend, 0, 1, text, 0, 3, 100, &cost, {}});
      if (i == failed && !beside) return tree.expected_tokens() - 1;
      if (i == failed)
        return drafter->candidates({*backend, 1, 2, text, 0, 3, 100, &cost, {}}).expected_tokens() -
               1;
      observe(1);
    }
  };
  EXPECT_LT(believed(1, 8), 0.7 * believed(1, 0));
  EXPECT_EQ(believed(40, 8), believed(1, 8));
  EXPECT_GT(believed(1, 8, /*beside=*/true), 1.2 * believed(1, 8));
}

// Matches of one token that never come true: a text may lose a hundredth of its time to them, and
// its first tries. Better ones are followed all the same.
TEST(NgramTest, ATextWithoutLuckLosesLittle) {
  const auto backend = backend_of("scalar", 1);
  std::vector<int32_t> text = {1, 2, 3, 2};
  CostCurve cost;
  for (int rows = 1; rows <= 64; ++rows) cost.set(rows, 1 + 0.1 * (rows - 1));
  const auto drafter = make_ngram_drafter({.nodes = 3}, 1, 64);
  auto step = std::make_unique<Step>();
  step->n_sequences = 1;
  const auto tries = [&](int64_t number, int steps) {
    int rows = 0;
    for (int i = 0; i < steps; ++i) {
      const CandidateTree& tree =
          drafter->candidates({*backend, 0, number, text, 0, 3, 100, &cost, {}});
      rows += static_cast<int>(tree.chosen().size());
      step->clear();
      step->begin_sequence(0);
      step->set_root(step->add_row(7, -1, true));
      drafter->observe({0, number, text, 1, 1, nullptr, step.get(), nullptr, 16});
    }
    return rows;
  };
  const int first = tries(1, 10), all = first + tries(1, 190);
  EXPECT_GE(first, 2);
  EXPECT_GE(all, 15);
  EXPECT_LE(0.1 * all, 0.15 + 0.01 * 200 + 0.1);
  text = {1, 2, 3, 2, 7, 1, 2, 3};
  EXPECT_GE(tries(1, 1), 1) << "three tokens agree";
  text = {1, 2, 3, 2};
  EXPECT_EQ(tries(2, 10), first) << "another text";
}

// Heads whose rows stand in another order are read from further on than they are written.
TEST(Prepare, ReadsNothingThatItCalledConsumed) {
  constexpr int64_t kRows = 384, kCols = 4096;  // 64 rows are a megabyte, a head has 128
  std::vector<float> weights(kRows * kCols);
  for (size_t i = 0; i < weights.size(); ++i) weights[i] = static_cast<float>(i * 7919 % 1013);
  const auto products = [&](std::vector<float> rows, bool destroy) {
    const auto backend = make_cpu_backend({.threads = 2});
    backend->reserve(1, 16, kCols, {1, 1, 16}, 0);
    const TensorView view{
        "w", DType::kF32, kRows, kCols, reinterpret_cast<const std::byte*>(rows.data()), 128};
    const auto matrix = backend->prepare({&view, 1}, [&](std::span<const std::byte> bytes) {
      if (destroy) std::memset(const_cast<std::byte*>(bytes.data()), 0xff, bytes.size());
    });
    auto step = std::make_unique<Step>();
    step->n_sequences = 1;
    step->begin_sequence(0);
    step->add_row(0, -1, false);
    std::vector<float> x(kCols, 1.0f), y(kRows);
    backend->linear(step.get(), {.weights = matrix.get(), .x = x.data(), .y = y.data()});
    return y;
  };
  EXPECT_EQ(products(weights, true), products(weights, false));
}

TEST(RopeTable, IsWhatItSays) {
  LlamaConfig config;
  config.head_dim = 64;
  for (const double base : {10000.0, 100000.0, 500000.0}) {
    config.rope_base = base;
    std::vector<float> cos(3000 * 32), sin(3000 * 32);
    fill_rope_table(config, 3000, cos.data(), sin.data());
    for (size_t p = 0; p < 3000; p += 7)
      for (size_t i = 0; i < 32; ++i) {
        const double angle =
            static_cast<double>(p) * std::pow(base, -2.0 * static_cast<double>(i) / 64);
        ASSERT_NEAR(cos[p * 32 + i], std::cos(angle), 1e-7);
        ASSERT_NEAR(sin[p * 32 + i], std::sin(angle), 1e-7);
      }
  }
}

TEST(ThreadPoolTest, EveryThreadRunsAndBarriersHold) {
  for (const int n : {1, 2, 3, 5}) {
    cpu::ThreadPool pool(n);
    std::vector<int> first(static_cast<size_t>(n)), second(static_cast<size_t>(n));
    for (int round = 1; round <= 200; ++round) {
      pool.run([&](int t) {
        first[static_cast<size_t>(t)] = round;
        pool.barrier(t);
        int sum = 0;
        for (const int v : first) sum += v;
        second[static_cast<size_t>(t)] = sum;
        pool.barrier(t);
      });
      for (const int v : second) ASSERT_EQ(v, round * n);
    }
  }
}

// In a list an op is handed out while other threads finish the one before: those that the caller
// does alone wait for them, and so does the end of the list.
TEST(CpuBackendTest, OpsOfAListFollowEachOther) {
  constexpr int64_t kRows = 4096, kCols = 256;
  std::vector<float> weights(kRows * kCols), x(kCols), row(kRows);
  for (size_t i = 0; i < weights.size(); ++i) weights[i] = static_cast<float>(i * 7919 % 1013);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 7) - 3;
  const auto run = [&](int threads, int rounds) {
    const auto backend = make_cpu_backend({.threads = threads});
    backend->reserve(1, 16, kCols, {1, 1, 16}, 0);
    const TensorView view{"w", DType::kF32, kRows, kCols,
                          reinterpret_cast<const std::byte*>(weights.data())};
    const auto matrix = backend->prepare({&view, 1}, nullptr);
    auto step = std::make_unique<Step>();
    step->n_sequences = 1;
    step->begin_sequence(0);
    step->add_row(0, -1, false);
    step->set_root(0);
    std::vector<float> y(kRows), copy(kRows), joined(2 * kRows), sum(kRows), norm(kRows),
        seen(kRows);
    const auto product = [&] {
      backend->linear(step.get(), {.weights = matrix.get(), .x = x.data(), .y = y.data()});
    };
    // What comes after the product, and where its result stands.
    const std::pair<std::function<void()>, std::vector<float>*> after[] = {
        {[] {}, &y},
        {[&] {
           backend->copy_rows(step.get(), {y.data(), kRows, copy.data()});
         },
         &copy},
        {[&] {
           backend->join_rows(step.get(), row.data(), 1.0f, y.data(), kRows, joined.data(),
                              sum.data());
         },
         &sum},
        {[&] { backend->rms_norm(step.get(), y.data(), y.data(), 1e-5f, kRows, norm.data()); },
         &norm},
        {[&] { backend->on_host([&] { seen = y; }); }, &seen},
        {[&] {
           backend->on_host([&] {  // what the host calls has been done when it returns
             std::fill(y.begin(), y.end(), 0.0f);
             product();
             seen = y;
           });
         },
         &seen},
    };
    std::vector<std::vector<float>> results;
    for (int round = 0; round < rounds; ++round)
      for (const auto& [op, result] : after) {
        std::fill(y.begin(), y.end(), 0.0f);
        backend->submit(0, [&] {
          product();
          op();
        });
        results.push_back(*result);
      }
    return results;
  };
  const auto alone = run(1, 1);
  for (const int threads : {2, 3}) {
    const auto together = run(threads, 200);
    for (size_t i = 0; i < together.size(); ++i)
      ASSERT_EQ(together[i], alone[i % alone.size()])
          << threads << " threads, list " << i % alone.size();
  }
}

// The tiles of many rows and heads go through in two waves or four; those of eight rows in one.
TEST(CpuBackendTest, AttentionOfManyRowsInWaves) {
  constexpr int kFew = 8, kSlots = 512;
  const Heads heads{16, 16, 16};
  constexpr size_t kQkv = 3 * 16 * 16, kOut = 16 * 16;
  const auto backend = make_cpu_backend({.threads = 2});
  const KvShape shape{DType::kF16, 1, heads.n_kv_heads, heads.head_dim, 1, kSlots};
  backend->reserve(Step::kMaxRows, kSlots, kOut, heads, 0);
  const auto memory = backend->allocate(backend->kv_bytes(shape));
  const KvCache kv = backend->bind_kv(shape, memory.get());
  const std::vector<float> cos(kSlots * 8, 0.6f), sin(kSlots * 8, 0.8f);
  for (const int rows : {128, 256}) {
    const auto n = static_cast<size_t>(rows);
    std::vector<float> qkv(n * kQkv);
    for (size_t i = 0; i < qkv.size(); ++i) qkv[i] = static_cast<float>(i * 7919 % 1013) / 500 - 1;
    auto step = std::make_unique<Step>();
    step->n_sequences = 1;
    step->begin_sequence(0);
    for (int r = 0; r < rows; ++r) step->add_row(0, r - 1, false);
    std::vector<float> all(n * kOut, NAN), few(n * kOut);
    backend->rope_append(step.get(), qkv.data(), heads, {cos.data(), sin.data()}, kv, 0);
    backend->attention(step.get(), qkv.data(), heads, kv, 0, all.data());
    for (int r = 0; r < rows; r += kFew) {
      step->first_new = r;
      step->n_rows = step->sequences[0].n_rows = r + kFew;
      backend->attention(step.get(), qkv.data(), heads, kv, 0, few.data());
    }
    EXPECT_EQ(all, few);
  }
}

// Each job reads what all threads wrote in the one before, which thread 0 does not wait for.
TEST(ThreadPoolTest, StartedJobsFollowEachOther) {
  for (const int n : {1, 2, 3, 5}) {
    cpu::ThreadPool pool(n);
    std::vector<int64_t> sums[2];
    for (auto& of_threads : sums) of_threads.assign(static_cast<size_t>(n), 1);
    constexpr int kJobs = 2000;
    for (int job = 1; job <= kJobs; ++job)
      pool.start([&sums, job](int t) {
        int64_t sum = job;
        for (const int64_t v : sums[(job - 1) % 2]) sum = (sum + v) % 1000003;
        for (int i = 0; t == 1 && i < job % 64; ++i) std::this_thread::yield();  // one comes late
        sums[job % 2][static_cast<size_t>(t)] = sum;
      });
    pool.join();
    int64_t expected = 1;
    for (int job = 1; job <= kJobs; ++job) expected = (job + n * expected) % 1000003;
    for (const int64_t v : sums[kJobs % 2]) EXPECT_EQ(v, expected) << n << " threads";
  }
}

TEST(WorkSharesTest, EveryUnitIsTakenOnce) {
  for (const int threads : {1, 2, 3, 5})
    for (const int64_t n : {0, 1, 2, 7, 100}) {
      cpu::ThreadPool pool(threads);
      cpu::WorkShares work(threads);
      for (const bool late : {false, true}) {  // late: the others come when thread 0 is done
        std::vector<std::atomic<int>> taken(static_cast<size_t>(n));
        const cpu::WorkShares::Deal deal = work.deal(n);
        const auto take_all = [&](int t) {
          for (;;) {
            const auto [begin, end] = work.take(deal, t);
            if (begin == end) break;
            for (int64_t i = begin; i < end; ++i) ++taken[static_cast<size_t>(i)];
          }
        };
        if (late) {
          take_all(0);
          const auto done = std::count(taken.begin(), taken.end(), 1);
          EXPECT_GE(done, n / threads);
          EXPECT_GE(done, n < 100 ? 0 : 75) << "most of the others' shares, too";
        }
        pool.run([&](int t) { take_all(t); });
        for (const auto& times : taken) EXPECT_EQ(times, 1) << threads << " threads, " << n;
      }
    }
}

// Deals are told apart by a number of 16 bits; a share may lie untouched for as many of them.
TEST(WorkSharesTest, DealsAreToldApart) {
  for (const int between : {65530, 65531, 65532, 65533, 65534, 65535, 65536}) {
    cpu::WorkShares work(2);
    const auto take_all = [&](const cpu::WorkShares::Deal& deal) {
      int64_t taken = 0;
      for (const int t : {1, 0})
        for (auto [begin, end] = work.take(deal, t); begin < end;
             std::tie(begin, end) = work.take(deal, t))
          taken += end - begin;
      return taken;
    };
    EXPECT_EQ(take_all(work.deal(2)), 2);
    for (int i = 0; i < between; ++i) EXPECT_EQ(take_all(work.deal(0)), 0);
    // Three at once, and the one after them dealt before they are taken.
    const cpu::WorkShares::Deal first = work.deal(2, 3), second = first.next(4),
                                third = second.next(6), after = work.deal(8);
    EXPECT_EQ(take_all(first), 2) << between;
    EXPECT_EQ(take_all(second), 4) << between;
    EXPECT_EQ(take_all(third), 6) << between;
    EXPECT_EQ(take_all(after), 8) << between;
  }
}

}  // namespace
}  // namespace chimera::test
