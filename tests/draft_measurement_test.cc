// What is said about trees without decoding with them is what decoding with them gives.
#include "tools/train/draft_measurement.h"

#include "engine/ngram_index.h"
#include "loader/draft_file.h"
#include "tests/support.h"
#include "tools/tree_file.h"

namespace chimera::test {
namespace {

const std::string kDraft = "models/smollm2-135m-instruct.chimera.safetensors";

// Tokens per pass of decoding all prompts, which must be as many as were simulated.
PassCount decode(Session& session, Drafter* drafter,
                 const std::vector<std::vector<int32_t>>& prompts, GenerateOptions options) {
  PassCount count;
  for (const auto& prompt : prompts) {
    const Generation g = generate(session, drafter, prompt, options);
    count.tokens += g.step_tokens;
    count.passes += g.steps;
    ++options.sampling.seed;
  }
  return count;
}

// The target's noise is in the draft's logits, that of the right seed and position: sampled text is
// then guessed far more often than by taking the likeliest token (a quarter to a third of the
// time).
TEST(DraftMeasurement, SampledTextIsGuessedThroughItsNoise) {
  SKIP_WITHOUT(kSmolLm2);
  SKIP_WITHOUT(kDraft);
  SKIP_WITHOUT(shared("prompts/mt_bench.jsonl"));
  const Loaded target = load(kSmolLm2, isas().back(), 1);
  Session session(*target.model, {.context = 256});
  const Measurement m = measure_draft(session, load_draft(kDraft), {.depth = 3, .width = 3}, false,
                                      test_prompts(3, target.file.vocabulary),
                                      {64, {2}, {.temperature = 1, .seed = 5}}, [](double) {});
  for (const DepthAccuracy& depth : m.depths) {
    const double right = static_cast<double>(depth.at_rank[0]) / static_cast<double>(depth.n);
    std::printf("right: %.3f of %d\n", right, static_cast<int>(depth.n));
    EXPECT_GT(right, 0.3);
  }
}

TEST(DraftMeasurement, IsWhatDecodingGives) {
  SKIP_WITHOUT(kSmolLm2);
  SKIP_WITHOUT(kDraft);
  SKIP_WITHOUT(shared("prompts/mt_bench.jsonl"));
  const Loaded target = load(kSmolLm2, isas().back(), 1);
  const DraftTensors draft = load_draft(kDraft);
  const auto prompts = test_prompts(2, target.file.vocabulary);
  constexpr int kContext = 256;
  Session session(*target.model, {.context = kContext, .max_nodes = kLargestTree});
  for (const float temperature : {0.0f, 1.0f}) {
    const GenerateOptions options{32, {2}, {.temperature = temperature, .seed = 5}};
    const ChimeraOptions chimera{.depth = 5, .width = 3};
    const Measurement m =
        measure_draft(session, draft, chimera, true, prompts, options, [](double) {});
    ASSERT_EQ(m.texts.size(), prompts.size());
    double most = 0;
    const StaticTree tree = read_tree("3,2,1,1,1");
    {
      ChimeraOptions own = chimera;
      own.nodes = tree.size();
      own.tree = tree;
      const auto drafter = make_chimera_drafter(*target.model, draft, own, 1, kContext);
      PassCount simulated;
      for (const MeasuredText& text : m.texts)
        count_passes(
            text, [&](const MeasuredPosition& p) { return accepted_in(p, tree); }, &simulated);
      const PassCount decoded = decode(session, drafter.get(), prompts, options);
      EXPECT_EQ(simulated.tokens, decoded.tokens);
      EXPECT_EQ(simulated.passes, decoded.passes) << "static, T " << temperature;
      EXPECT_GT(decoded.tokens_per_pass(), 1.2);
    }
    int longest = 0;
    for (const int nodes : {4, kLargestTree}) {  // chains: as deep as they are long
      ChimeraOptions own = chimera;
      own.nodes = nodes;
      for (int i = 0; i < nodes; ++i) own.tree.add(i - 1, 0);
      const auto drafter = make_chimera_drafter(*target.model, draft, own, 1, kContext);
      PassCount simulated;
      for (const MeasuredText& text : m.texts)
        count_passes(
            text,
            [&](const MeasuredPosition& p) {
              longest = std::max(longest, p.chain);
              return std::min(nodes, p.chain);
            },
            &simulated);
      const PassCount decoded = decode(session, drafter.get(), prompts, options);
      EXPECT_EQ(simulated.passes, decoded.passes) << "chain of " << nodes << ", T " << temperature;
    }
    EXPECT_GT(longest, temperature == 0 ? chimera.depth : 2) << "or this proves little";
    for (const int nodes : {4, kLargestTree})
      for (const TreeSource source : {kNgramTree, kDraftTree, kHybridTree}) {
        ChimeraOptions own = chimera;
        own.nodes = nodes;
        own.ngrams = source == kHybridTree;
        std::unique_ptr<Drafter> drafter;
        if (source == kNgramTree)
          drafter = make_ngram_drafter({.nodes = nodes}, 1, kContext);
        else
          drafter = make_chimera_drafter(*target.model, draft, own, 1, kContext);
        PassCount simulated;
        for (const MeasuredText& text : m.texts)
          count_passes(
              text, [&](const MeasuredPosition& p) { return accepted_in(p.place[source], nodes); },
              &simulated);
        const PassCount decoded = decode(session, drafter.get(), prompts, options);
        EXPECT_EQ(simulated.tokens, decoded.tokens) << drafter->name() << " " << nodes;
        EXPECT_EQ(simulated.passes, decoded.passes)
            << drafter->name() << ", " << nodes << " nodes, T " << temperature;
        most = std::max(most, decoded.tokens_per_pass());
      }
    EXPECT_GT(most, 1.3) << "candidates must be accepted for this to prove anything";
  }
}

// A match is believed as far as those of its length came true in this text.
TEST(DraftMeasurement, NgramsLearnFromTheText) {
  NgramIndex same(2, 6, 256), other(2, 6, 256);
  std::vector<int32_t> repeated, changed;
  for (int i = 0; i < 100; ++i) {
    repeated.push_back(i % 10);
    changed.push_back(i % 3 == 2 ? 100 + i : i % 3);  // 0 1 x 0 1 y ..
  }
  same.update(1, repeated);
  other.update(1, changed);
  const float usual = NgramIndex(2, 6, 16).probability(6, 0);
  EXPECT_GT(same.probability(6, 0), usual);
  EXPECT_LT(other.probability(2, 0), 0.25f);
  EXPECT_LT(other.probability(2, 1), other.probability(2, 0));
  const float before = same.probability(2, 0);
  same.update(1, repeated);  // nothing new
  EXPECT_EQ(same.probability(2, 0), before);
  same.update(2, changed);  // another text: all is forgotten
  EXPECT_EQ(same.probability(2, 0), other.probability(2, 0));
  EXPECT_EQ(same.probability(6, 0), usual);
}

TEST(DraftMeasurement, ReliabilityCountsWhatCameTrue) {
  Reliability r;
  for (int i = 0; i < 100; ++i) r.add(0.25, i < 30);
  r.add(1.0, true);
  r.add(0.0, false);
  EXPECT_EQ(r.bins[5].n, 100);
  EXPECT_EQ(r.bins[5].came_true, 30);
  EXPECT_EQ(r.bins.back().n, 1);
  EXPECT_EQ(r.bins.front().n, 1);
  EXPECT_NEAR(r.expected_error(), 5.0 / 102, 1e-12);
}

TEST(DraftMeasurement, BestTemperatureIsBetweenTheMeasured) {
  DepthAccuracy a;
  a.known = 1;
  for (size_t i = 0; i < a.loss.size(); ++i) {
    const double t = DepthAccuracy::kTemperatures[i] - 0.87;
    a.loss[i] = 2 + 3 * t * t;
  }
  EXPECT_NEAR(a.best_temperature(), 0.87, 1e-9);
}

// The most frequent paths, and how far a text goes along with them.
TEST(DraftMeasurement, BestStaticTree) {
  const auto position = [](std::vector<uint8_t> ranks) {
    MeasuredPosition p;
    p.rank.fill(kNotThere);
    std::copy(ranks.begin(), ranks.end(), p.rank.begin());
    return p;
  };
  RankPaths paths;
  for (const auto& ranks :
       {std::vector<uint8_t>{0, 0}, {0, 1}, {0, 1}, {2, 0}, {2}, {kNotThere, 0}})
    paths.add(position(ranks));
  paths.rank();
  EXPECT_EQ(paths.positions(), 6);
  ASSERT_EQ(paths.nodes().size(), 5u);
  EXPECT_EQ(paths.nodes()[0].rank, 0);
  EXPECT_EQ(paths.nodes()[0].count, 3);
  EXPECT_EQ(paths.nodes()[1].count, 2);
  EXPECT_EQ(paths.accepted(position({0, 1, 0}), 5), 2);
  EXPECT_EQ(paths.accepted(position({0, 1}), 1), 1);
  EXPECT_EQ(paths.accepted(position({1}), 5), 0);
}

}  // namespace
}  // namespace chimera::test
