// The draft model against the golden values of a prototype that others trained and evaluated in
// float64, and its drafter against plain decoding.
#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <numeric>
#include <random>

#include "engine/candidate_tree.h"
#include "engine/chimera/chimera_drafter.h"
#include "engine/train/cpu_ops.h"
#include "engine/train/draft_gradient.h"
#include "engine/worth.h"
#include "loader/draft_file.h"
#include "tests/allocation_counter.h"
#include "tests/prototype.h"
#include "tests/support.h"

namespace chimera::test {
namespace {

const std::string kPrototype = shared("draft_prototype/");

// Slots 0 .. n-1 in chains, then the root's row and n_steps - 1 more along the true tokens.
void roll_out(DraftModel& model, std::span<const int32_t> ids, std::span<const float> states, int n,
              int n_steps,
              const std::function<void(int k, const float* feature, const float* f,
                                       const float* logits)>& visit) {
  const int64_t hidden = model.config().hidden_size;
  model.set_committed(0, 0);
  Step& step = model.step();
  const auto run = [&](int first_position, int count,
                       const float* f) {  // rows for tokens first_position ..
    if (f == nullptr) {  // after row 0, which holds the feature of the token before
      step.clear();
      step.n_rows = 1;
      step.begin_sequence(0);
    }
    const int first = step.n_rows, features = f != nullptr ? count : count + 1;
    std::vector<int32_t> trigrams;
    for (int p = first_position + count - features; p < first_position + count; ++p)
      for (int j = p - 2; j <= p; ++j) trigrams.push_back(ids[static_cast<size_t>(std::max(0, j))]);
    model.fill_features(first + count - features, features, trigrams.data());
    for (int i = 0; i < count; ++i) {
      const int row = step.add_row(ids[static_cast<size_t>(first_position + i)],
                                   step.n_rows == 1 ? -1 : step.n_rows - 1, false);
      model.link(row, row - 1, f != nullptr ? row - 1 : i);
    }
    step.first_new = first;
    model.forward(model.pass(), f != nullptr ? f : states.data() + (first_position - 1) * hidden);
  };
  for (int p = 1; p <= n; p += 30) {  // rows for tokens 1 .. n bring the slots 0 .. n-1
    run(p, std::min(30, n + 1 - p), nullptr);
    model.set_committed(0, std::min(p + 29, n));
  }
  for (int k = 0; k < n_steps; ++k) {
    run(n + 1 + k, 1, k == 0 ? nullptr : model.f());
    model.run_head(model.pass(), k, states.data() + n * hidden);
    visit(k, model.feature(k + 1), model.f(k + 1), model.logits(k + 1));
  }
}

// The encoder without one of its parts or with both, and slots with and without features.
std::vector<DraftConfig> forms_of(const DraftConfig& usual) {
  std::vector<DraftConfig> forms;
  for (const bool slot_features : {true, false})
    for (const auto& [trigram, skip] : {std::pair{true, true}, {true, false}, {false, true}}) {
      DraftConfig& c = forms.emplace_back(usual);
      c.trigram = trigram, c.skip = skip, c.slot_features = slot_features;
    }
  return forms;
}
std::string name_of(const DraftConfig& c) {
  return std::string(c.trigram ? "trigram " : "") + (c.skip ? "skip " : "") +
         (c.slot_features ? "features" : "states");
}

TEST(Draft, TakesTheMemoryThatWasPlanned) {
  SKIP_WITHOUT(kSmolLm2);
  const Loaded target = load(kSmolLm2, isas().back(), 2);
  const DraftTensors ours = load_draft("models/smollm2-135m-instruct.chimera.safetensors");
  for (const DraftConfig& form : forms_of(ours.config)) {
    DraftTensors draft = training::initial_draft(form, std::vector<float>(576, 1.0f), 1);
    draft.vocabulary = ours.vocabulary;
    for (const int context : {64, 4000}) {
      const DraftModel model(*target.model, draft, 2, context);
      const auto planned =
          static_cast<double>(DraftModel::plan(draft, target.model->backend(), 2, context));
      EXPECT_NEAR(planned / static_cast<double>(model.allocated_bytes()), 1, 0.005)
          << name_of(form) << ", context " << context;
    }
  }
}

TEST(Draft, ReproducesThePrototypesGoldenValues) {
  SKIP_WITHOUT(kPrototype + "prototype.safetensors");
  SKIP_WITHOUT(kSmolLm2);
  const Loaded target = load(kSmolLm2, isas().back(), 2);
  const auto golden = nlohmann::json::parse(read_text(kPrototype + "golden.json"));
  const auto ids = golden["ids"].get<std::vector<int32_t>>();
  std::vector<float> states;
  for (const uint16_t h : read_array<uint16_t>(kPrototype + "hidden.f16"))
    states.push_back(f16_to_f32(h));
  DraftModel model(*target.model, load_prototype(kPrototype + "prototype.safetensors"), 1, 256,
                   DType::kF32);
  for (const auto& [start, steps] : golden["starts"].items()) {
    const auto check = [&](int k, const float* feature, const float* f, const float* logits) {
      const auto& g = steps[static_cast<size_t>(k)];
      for (size_t i = 0; i < 8; ++i) {
        EXPECT_NEAR(feature[i], g["feature"][i].get<float>(), 2e-3)
            << "start " << start << " step " << k;
        EXPECT_NEAR(f[i], g["f"][i].get<float>(), 5e-3) << "start " << start << " step " << k;
        const auto& v = model.vocabulary();
        const auto at = std::find(v.begin(), v.end(), g["top_ids"][i].get<int32_t>()) - v.begin();
        EXPECT_NEAR(logits[at], g["top_logits"][i].get<float>(), 2e-2)
            << "start " << start << " step " << k;
      }
    };
    roll_out(model, ids, states, std::stoi(start), 4, check);
  }
}

// What runs is what was trained, in every form that a draft may have.
TEST(Draft, IsTheTrainersInEveryForm) {
  const Loaded target = load(tiny("f32"), isas().back(), 2);
  const LlamaTensors& tensors = target.file.tensors;
  const int vocab = tensors.config.vocab_size;
  const size_t d = 256;
  const std::vector<float> embedding = floats_of(tensors.embedding), head = floats_of(tensors.head);
  std::mt19937 random(4);
  std::normal_distribution<float> normal;
  training::TrainingText text;
  text.tokens = random_tokens(random, 50, vocab);
  text.first_start = 2;
  for (size_t i = 0; i < static_cast<size_t>(text.n_positions()) * d; ++i)
    text.states.push_back(normal(random));
  training::SoftTarget none;
  std::fill_n(none.token, training::SoftTarget::kMost, -1);
  text.targets.assign(static_cast<size_t>(text.n_starts()), none);

  DraftConfig usual = training::config_for(tensors.config);
  usual.ffn_size = 64, usual.head_rank = 32, usual.n_steps = 3;
  for (const DraftConfig& form : forms_of(usual)) {
    SCOPED_TRACE(name_of(form));
    DraftTensors draft = training::initial_draft(form, std::vector<float>(d, 1.0f), 1);
    std::vector<float> parameters = training::pack_parameters(draft);
    for (float& p : parameters) p += 0.03f * normal(random);  // norms too, and heads that are zero
    training::unpack_parameters(parameters, &draft);
    for (int32_t id = 5; id < vocab; id += 23) draft.vocabulary.push_back(id);
    training::CpuOps<float> ops(1);
    training::DraftGradient<float> trainer(&ops, form, embedding.data(), head.data(), vocab,
                                           draft.vocabulary, 0);
    const training::TrainingText* batch[] = {&text};
    trainer.run(parameters.data(), batch, 4, 1, nullptr);

    DraftModel model(*target.model, draft, 1, 64, DType::kF32);
    for (const int n : {2, 40}) {
      const auto check = [&](int k, const float* feature, const float* f, const float* logits) {
        const size_t row = static_cast<size_t>(k * text.n_starts() + n - text.first_start) * d;
        for (size_t i = 0; i < d; ++i) {
          const size_t at = static_cast<size_t>(n + 1 + k) * d + i;
          ASSERT_NEAR(feature[i], trainer.features().data()[at], 1e-3) << n << " step " << k;
          ASSERT_NEAR(f[i], trainer.f().data()[row + i], 1e-3) << n << " step " << k;
        }
        for (size_t v = 0; v < draft.vocabulary.size(); ++v) {
          const float* w = head.data() + static_cast<size_t>(draft.vocabulary[v]) * d;
          ASSERT_NEAR(logits[v],
                      std::inner_product(w, w + d, trainer.head_input().data() + row, 0.0f), 1e-3)
              << n << " step " << k;
        }
      };
      roll_out(model, text.tokens, text.states, n, 4, check);
    }
  }
}

TEST(Draft, ChangesNoText) {
  SKIP_WITHOUT(kPrototype + "prototype.safetensors");
  SKIP_WITHOUT(kSmolLm2);
  SKIP_WITHOUT(shared("prompts/mt_bench.jsonl"));
  const Loaded target = load(kSmolLm2, isas().back(), 2);
  const DraftTensors tensors = load_prototype(kPrototype + "prototype.safetensors");
  Session session(*target.model, {.context = 512, .max_nodes = 60});
  double tau = 0, runs = 0;
  for (const ChimeraOptions& o :
       {ChimeraOptions{.nodes = 3, .depth = 4}, ChimeraOptions{.nodes = 16},
        ChimeraOptions{.nodes = 60, .depth = 8, .width = 8},
        ChimeraOptions{.nodes = 16, .ngrams = false}}) {
    const auto drafter = make_chimera_drafter(*target.model, tensors, o, 1, 512);
    for (const auto& prompt : test_prompts(2, target.file.vocabulary))
      for (const float temperature : {0.0f, 1.0f}) {
        const GenerateOptions options{48, {2}, {.temperature = temperature, .seed = 3}};
        const Generation plain = generate(session, nullptr, prompt, options),
                         tree = generate(session, drafter.get(), prompt, options);
        EXPECT_EQ(tree.ids, plain.ids)
            << drafter->name() << " nodes " << o.nodes << " T " << temperature;
        if (temperature == 0) tau += tree.tokens_per_step(), ++runs;
      }
  }
  EXPECT_GT(tau / runs, 1.6) << "the prototype drafts better than this";
}

// The draft in models/, needed by `make run`: it fits the model, changes no text, and after the
// first step nothing is allocated, with a tree of fixed size and with one that follows the costs.
TEST(Draft, TheOneThatShips) {
  SKIP_WITHOUT(kSmolLm2);
  const Loaded target = load(kSmolLm2, isas().back(), 2);
  const DraftTensors tensors = load_draft(kDraft);
  EXPECT_EQ(tensors.target_fingerprint, fingerprint(target.file.tensors, target.file.vocabulary));
  const Message message{"user", "Count from one to twenty in words, twice. Then explain why."};
  const std::vector<int32_t> prompt = encode_chat(Tokenizer(target.file.vocabulary),
                                                  ChatFormat::kChatMl, {&message, 1}, "assistant");
  for (const bool costs : {false, true}) {
    Session session(*target.model, {.context = 256, .max_nodes = 16, .prefill_rows = 16});
    if (costs) session.measure_cost();
    for (const bool ngrams : {false, true}) {
      const auto drafter =
          make_chimera_drafter(*target.model, tensors, {.nodes = 16, .ngrams = ngrams}, 1, 256);
      const Sampling sampling{
          .temperature = 0.7f, .top_k = 100, .top_p = 0.95f, .min_p = 0.01f, .seed = 5};
      const Generation plain =
          generate(session, nullptr, prompt, {.max_tokens = 60, .eos = {}, .sampling = sampling});
      session.start(0, prompt, sampling);
      session.step(drafter.get());  // the first of several for the prompt
      const int64_t before = allocation_count();
      while (session.tokens(0).size() < prompt.size() + plain.ids.size())
        session.step(drafter.get());
      EXPECT_EQ(allocation_count() - before, 0) << drafter->name();
      const auto text = session.tokens(0).subspan(prompt.size(), plain.ids.size());
      EXPECT_TRUE(std::equal(text.begin(), text.end(), plain.ids.begin())) << drafter->name();
    }
  }
}

// While the draft model rests, n-grams go on: many rows at once may end its waiting, but not its
// rest.
TEST(Draft, InARestTheDraftModelDoesNothing) {
  SKIP_WITHOUT(kSmolLm2);
  const Loaded target = load(kSmolLm2, isas().back(), 2);
  const DraftTensors tensors = load_draft(kDraft);
  std::vector<int32_t> prompt;  // a text that repeats itself
  for (int i = 0; i < 120; ++i) prompt.push_back(1000 + i % 12);
  Session session(*target.model, {.context = 700, .max_nodes = 8});
  CostCurve cost;
  for (int rows = 1; rows <= CostCurve::kMaxRows; ++rows) cost.set(rows, 1e-9);
  const auto drafter =
      make_chimera_drafter(*target.model, tensors, {.nodes = 8, .ngrams = true}, 1, 700);
  session.start(0, prompt, {});
  session.set_cost(cost);
  int steps = 0;
  while (session.tokens(0).size() < 600) steps += session.step(drafter.get()) ? 1 : 0;
  EXPECT_LT(steps, 300) << "the n-grams are right";
  EXPECT_LT(drafter->spent().steps, 6);
}

// Drafts as another does, and keeps what the draft model thinks at each root: its logits, as far as
// they do not depend on what was learnt on the way.
class Overheard final : public Drafter {
 public:
  Overheard(ChimeraDrafter* drafter, size_t n_static) : drafter_(drafter), n_static_(n_static) {}
  std::string name() const override { return drafter_->name(); }
  void observe(const KeptRows& kept) override { drafter_->observe(kept); }
  void draft(const DraftContext& c, Step* step) override {
    drafter_->draft(c, step);
    drafter_->follow(c, c.tokens.last(1), [&](int, std::span<const float> logits, int) {
      const auto fixed = logits.first(n_static_);
      logits_of[c.tokens.size()].assign(fixed.begin(), fixed.end());
      return false;
    });
  }
  std::map<size_t, std::vector<float>> logits_of;  // by the length of the text

 private:
  ChimeraDrafter* drafter_;
  size_t n_static_;
};

// Beside a plain step that takes no time drafting is never worth its own, and rests but for a step
// now and then. Beside one that takes ever so long it always is: it catches up with what was
// written meanwhile, and thinks as if it had seen each step.
TEST(Draft, RestsWhereItDoesNotPay) {
  SKIP_WITHOUT(kSmolLm2);
  const Loaded target = load(kSmolLm2, isas().back(), 2);
  const DraftTensors tensors = load_draft(kDraft);
  const Message message{"user", "Count from one to fifty in words, twice."};
  const std::vector<int32_t> prompt = encode_chat(Tokenizer(target.file.vocabulary),
                                                  ChatFormat::kChatMl, {&message, 1}, "assistant");
  Session session(*target.model, {.context = 400, .max_nodes = 8});
  const Generation plain = generate(session, nullptr, prompt, {320, {}, {}});
  int last_steps[2];
  std::map<size_t, std::vector<float>> thought[2];
  for (const bool rests : {false, true}) {
    const auto drafter =
        make_chimera_drafter(*target.model, tensors, {.nodes = 8, .ngrams = false}, 1, 400);
    Overheard overheard(drafter.get(), tensors.vocabulary.size());
    session.start(0, prompt, {});
    int steps = 0, drafted = 0;
    const auto decode = [&](double seconds, size_t tokens) {
      CostCurve cost;
      for (int rows = 1; rows <= CostCurve::kMaxRows; ++rows) cost.set(rows, seconds);
      session.set_cost(cost);
      steps = drafted = 0;
      for (; session.tokens(0).size() < prompt.size() + tokens; ++steps) {
        session.step(&overheard);
        drafted += session.drafted(0) > 0 ? 1 : 0;
      }
    };
    decode(rests ? 1e-9 : 10, 90);
    EXPECT_GT(drafted, 0);
    EXPECT_EQ(drafted < steps / 4, rests) << drafted << " of " << steps;
    decode(10, 240);  // the last rest, longer than a pass has rows, ends in here
    decode(10, 320);
    last_steps[rests] = steps;
    const auto text = session.tokens(0).subspan(prompt.size(), plain.ids.size());
    EXPECT_TRUE(std::equal(text.begin(), text.end(), plain.ids.begin()));
    thought[rests] = overheard.logits_of;
  }
  EXPECT_NEAR(last_steps[true], last_steps[false], 2);
  EXPECT_LT(last_steps[true], 40) << "for 80 tokens";
  size_t before = 0, longest_rest = 0;
  int compared = 0;
  for (const auto& [length, logits] : thought[true]) {
    if (before > 0) longest_rest = std::max(longest_rest, length - before);
    before = length;
    const auto other = thought[false].find(length);
    if (other == thought[false].end()) continue;
    ASSERT_EQ(std::memcmp(logits.data(), other->second.data(), logits.size() * 4), 0) << length;
    ++compared;
  }
  EXPECT_GT(longest_rest, static_cast<size_t>(DraftModel::kMaxRows));
  EXPECT_GT(compared, 10);
}

// More tokens than the dynamic vocabulary holds, learnt at once or piece by piece with a tree
// drafted after each: the last ones can be proposed, with the same probabilities.
TEST(Draft, DynamicVocabularyGoesRound) {
  SKIP_WITHOUT(kSmolLm2);
  const Loaded target = load(kSmolLm2, isas().back(), 2);
  DraftTensors tensors = load_draft(kDraft);
  tensors.vocabulary.resize(1);
  constexpr int kTokens = 1400, kPiece = 350;
  std::vector<int32_t> text(kTokens + 1);
  for (int i = 0; i <= kTokens; ++i) text[static_cast<size_t>(i)] = 1000 + 7 * i;
  std::mt19937 random(4);
  std::normal_distribution<float> normal(0, 1);
  std::vector<float> states(size_t{kTokens} * 576);
  for (float& x : states) x = normal(random);
  const auto step = std::make_unique<Step>();
  const auto tree_after = [&](int piece) {
    const auto drafter = make_chimera_drafter(*target.model, tensors,
                                              {.nodes = 16, .ngrams = false}, 1, kTokens + 1);
    std::vector<std::pair<int32_t, float>> tree;
    for (int first = 0; first < kTokens; first += piece) {
      step->n_sequences = 1;
      for (int done = 0; done < piece; done += 70) {
        step->clear();
        step->sequences[0].committed = first + done;
        step->begin_sequence(0);
        for (int r = 0; r < 70; ++r)
          step->kept_at[step->add_row(text[static_cast<size_t>(first + done + r)], r - 1, false)] =
              first + done + r;
        drafter->observe({0, 1, std::span(text).first(static_cast<size_t>(first + done + 71)), 70,
                          first + done + 70,
                          states.data() + static_cast<size_t>(first + done) * 576, step.get(),
                          nullptr, 0});
      }
      const CandidateTree& t =
          drafter->candidates({*target.backend,
                               0,
                               1,
                               std::span(text).first(static_cast<size_t>(first + piece + 1)),
                               0,
                               16,
                               8,
                               nullptr,
                               {}});
      tree.clear();
      for (const int i : t.chosen()) tree.emplace_back(t[i].token, t[i].probability);
    }
    return tree;
  };
  const auto at_once = tree_after(kTokens);
  EXPECT_EQ(at_once.size(), 16u);
  EXPECT_EQ(tree_after(kPiece), at_once);
  EXPECT_EQ(tree_after(70), at_once);
  for (const auto& [token, probability] : at_once)
    EXPECT_TRUE(token == tensors.vocabulary[0] ||
                token > 1000 + 7 * (kTokens - DraftState::kMostDynamic))
        << token;
}

// A damaged target's states are no reason to sort by what cannot be compared.
TEST(Draft, StatesThatAreNoNumbers) {
  SKIP_WITHOUT(kSmolLm2);
  const Loaded target = load(kSmolLm2, isas().back(), 2);
  const auto drafter =
      make_chimera_drafter(*target.model, load_draft(kDraft), {.nodes = 16, .ngrams = false}, 1, 8);
  const std::vector<int32_t> text = {1, 2, 3, 4};
  const std::vector<float> states(3 * 576, std::nanf(""));
  const auto step = std::make_unique<Step>();
  step->n_sequences = 1;
  step->clear();
  step->begin_sequence(0);
  for (int r = 0; r < 3; ++r)
    step->kept_at[step->add_row(text[static_cast<size_t>(r)], r - 1, false)] = r;
  drafter->observe({0, 1, text, 3, 3, states.data(), step.get(), nullptr, 0});
  const CandidateTree& tree =
      drafter->candidates({*target.backend, 0, 1, text, 0, 16, 4, nullptr, {}});
  EXPECT_GT(tree.size(), 0);
  for (int i = 0; i < tree.size(); ++i) EXPECT_EQ(tree[i].probability, 0) << i;
}

// Steps until it rests, or 1,000; `every` of them gives a token.
int steps_until_rest(Worth* worth, double spent, double promised, int every) {
  int step = 0;
  for (; step < 1000 && !worth->rests(); ++step)
    worth->observe(step % every == every - 1 ? 1 : 0, spent, promised);
  return step;
}
int steps_of_rest(Worth* worth) {
  int step = 0;
  for (; worth->rests(); ++step) worth->observe(0, 0, 0);
  return step;
}

TEST(Draft, WorthRisksWhatARestCouldLose) {
  constexpr int kNever = 5000;
  Worth hopeless;  // finds nothing to propose
  for (const int rest : {8, 32, 128, 256, 256}) {
    EXPECT_LE(steps_until_rest(&hopeless, 0.1, 0, kNever), 8);
    EXPECT_EQ(steps_of_rest(&hopeless), rest);
  }
  Worth wrong;  // promises much, and nothing comes of it: that may be bad luck
  EXPECT_GE(steps_until_rest(&wrong, 0.4, 1.2, kNever), 10);
  for (const int rest : {8, 16, 32, 64, 128, 256, 256}) {
    EXPECT_EQ(steps_of_rest(&wrong), rest);
    EXPECT_LE(steps_until_rest(&wrong, 0.4, 1.2, kNever), 4);
  }
  Worth good;
  EXPECT_EQ(steps_until_rest(&good, 0.4, 1, 2), 1000);
  // What paid until now is given up as soon as what never did, and tried again soon.
  EXPECT_LE(steps_until_rest(&good, 0.4, 1, kNever), 16);
  EXPECT_EQ(steps_of_rest(&good), 8);
  Worth scarce;  // one token in five for a price of a tenth, and it is known to be so
  EXPECT_EQ(steps_until_rest(&scarce, 0.1, 0.2, 5), 1000);
  Worth late;  // pays from the third try on: its rests are short again
  for (int i = 0; i < 2; ++i) {
    steps_until_rest(&late, 0.4, 1, kNever);
    steps_of_rest(&late);
  }
  EXPECT_EQ(steps_until_rest(&late, 0.4, 1, 1), 1000);
  steps_until_rest(&late, 0.4, 1, kNever);
  EXPECT_EQ(steps_of_rest(&late), 8);
}

TEST(Draft, CalibrationByStepAndTemperature) {
  DraftConfig c;
  EXPECT_EQ(c.calibration(3, 1).temperature, 1) << "none: as it is";
  c.greedy = {{0.5f, 1.0f}, {1.0f, 0.5f}};
  c.sampled = {{1.5f, 2.0f, 3.0f}, {0.5f, 0.25f, 0.125f}};
  EXPECT_EQ(c.calibration(0, 0).temperature, 0.5f);
  EXPECT_EQ(c.calibration(5, 0).coverage, 0.5f) << "like the last";
  EXPECT_EQ(c.calibration(1, 0.5f).temperature, 1.5f) << "in between";
  EXPECT_EQ(c.calibration(2, 4).temperature, 3.0f) << "above 1 as at 1";
  EXPECT_EQ(c.calibration(2, 4).coverage, 0.125f / 16) << "less and less of the target's tokens";
}

}  // namespace
}  // namespace chimera::test
