// The signature: the logits of a token have the same bits whether it runs alone or inside a tree,
// among other sequences, in any chunking of its prompt, on any instruction set and number of
// threads.
#include <cstring>
#include <numeric>

#include "engine/chimera/chimera_drafter.h"
#include "engine/cpu/thread_pool.h"
#include "engine/train/parameters.h"
#include "loader/draft_file.h"
#include "tests/support.h"
#include "tools/tree_file.h"

namespace chimera::test {
namespace {

uint64_t hash(const float* x, size_t n,
              uint64_t h = 0xcbf29ce484222325u) {  // FNV-1a over the bytes
  const auto* p = reinterpret_cast<const unsigned char*>(x);
  for (size_t i = 0; i < n * 4; ++i) h = (h ^ p[i]) * 0x100000001b3u;
  return h;
}

// Logits and final states after `text` when every token runs alone in a step.
struct Alone {
  std::vector<float> logits, states;
};
Alone run_alone(const Llama& model, const std::vector<int32_t>& text, DType kv_type) {
  Session session(model, {.context = static_cast<int>(text.size()) + 1, .kv_type = kv_type});
  session.start(0, text, {});
  Step& step = session.edit_step();
  for (const int32_t id : text) {
    step.clear();
    step.begin_sequence(0);
    step.add_row(id, -1, true);
    session.forward();
    session.accept_and_keep();
  }
  const auto vocab = static_cast<size_t>(model.config().vocab_size),
             hidden = static_cast<size_t>(model.config().hidden_size);
  return {{session.logits(), session.logits() + vocab},
          {session.states(), session.states() + hidden}};
}

// A random tree of n nodes: the parent of each is any earlier one, or the last committed position.
struct Tree {
  std::vector<int32_t> token;
  std::vector<int> parent;
};
Tree random_tree(std::mt19937& random, int n, int vocab) {
  Tree tree;
  for (int i = 0; i < n; ++i) {
    tree.token.push_back(static_cast<int32_t>(random() % static_cast<unsigned>(vocab)));
    tree.parent.push_back(
        i == 0 || random() % 8 == 0 ? -1 : static_cast<int>(random() % static_cast<unsigned>(i)));
  }
  return tree;
}

// Commits `prefix` in steps of at most `chunk` rows, leaving the next step to the caller.
void commit(Session& session, int sequence, const std::vector<int32_t>& prefix, int chunk) {
  Step& step = session.edit_step();
  for (size_t at = 0; at < prefix.size();) {
    step.clear();
    step.begin_sequence(sequence);
    int row = -1;
    for (int i = 0; i < chunk && at < prefix.size(); ++i)
      row = step.add_row(prefix[at++], row, false);
    session.forward();
    session.accept_and_keep();
  }
}

void expect_same(const float* a, const float* b, size_t n, const std::string& what) {
  ASSERT_EQ(std::memcmp(a, b, n * 4), 0) << what << ": " << n << " values differ in bits";
}

// Appends the tree to the step as rows of a sequence and returns its first row.
int add_tree(Step& step, int sequence, const Tree& tree) {
  const int first = step.n_rows;
  step.begin_sequence(sequence);
  for (size_t i = 0; i < tree.token.size(); ++i)
    step.add_row(tree.token[i], tree.parent[i] < 0 ? -1 : first + tree.parent[i], true);
  return first;
}

// Every node of a random tree, between the trees of two other sequences, against the same text run
// token by token.
void check_tree(const Llama& model, std::mt19937& random, int committed, int nodes,
                int prompt_chunk, int check_every, DType kv_type) {
  const int vocab = model.config().vocab_size;
  const auto width = static_cast<size_t>(vocab),
             hidden = static_cast<size_t>(model.config().hidden_size);
  const std::vector<int32_t> prefix = random_tokens(random, committed, vocab);
  const Tree tree = random_tree(random, nodes, vocab);
  Session session(model, {.context = committed + nodes + 1,
                          .n_sequences = 3,
                          .max_nodes = nodes,
                          .prefill_rows = prompt_chunk,
                          .kv_type = kv_type});
  for (int s = 0; s < 3; ++s) {
    session.start(s, std::vector<int32_t>{0}, {});
    const int n = committed / (s + 1);
    commit(session, s, s == 1 ? prefix : random_tokens(random, n, vocab), prompt_chunk);
  }
  Step& step = session.edit_step();
  step.clear();
  add_tree(step, 0, random_tree(random, 1 + nodes / 5, vocab));
  const auto first = static_cast<size_t>(add_tree(step, 1, tree));
  add_tree(step, 2, random_tree(random, 1 + nodes / 3, vocab));
  session.forward();
  for (int i = static_cast<int>(random() % static_cast<unsigned>(check_every)); i < nodes;
       i += check_every) {
    std::vector<int32_t> text = prefix, path;
    for (int n = i; n >= 0; n = tree.parent[static_cast<size_t>(n)])
      path.push_back(tree.token[static_cast<size_t>(n)]);
    text.insert(text.end(), path.rbegin(), path.rend());
    const Alone alone = run_alone(model, text, kv_type);
    const std::string what = "node " + std::to_string(i) + " of " + std::to_string(nodes) +
                             " after " + std::to_string(committed);
    const size_t row = first + static_cast<size_t>(i);
    expect_same(session.logits() + row * width, alone.logits.data(), width, what + ", logits");
    expect_same(session.states() + row * hidden, alone.states.data(), hidden, what + ", states");
  }
}

struct Shape {
  int committed, nodes, chunk;
};
const Shape kShapes[] = {{0, 2, 1},    {1, 3, 7},      {15, 5, 16},  {17, 64, 64},
                         {255, 9, 64}, {250, 33, 100}, {257, 16, 31}};

// Weights that are packed anew for every pass, from where the file has them.
TEST(Lossless, WeightsReadInPlace) {
  std::mt19937 random(21);
  for (const std::string type : kQuantTypes)
    for (const std::string& isa : isas()) {
      const Loaded packed = load(tiny(type), isa, 2);
      ModelFile file = load_model(tiny(type));
      file.tensors.embedding.lasting = file.tensors.head.lasting = true;
      for (LlamaLayerTensors& l : file.tensors.layers)
        for (TensorView* w : {&l.wq, &l.wk, &l.wv, &l.wo, &l.w_gate, &l.w_up, &l.w_down})
          w->lasting = true;
      const auto backend = backend_of(isa, 2);
      const Llama in_place(*backend, file.tensors);
      const auto text = random_tokens(random, 5, in_place.config().vocab_size);
      const Alone a = run_alone(*packed.model, text, DType::kF16),
                  b = run_alone(in_place, text, DType::kF16);
      expect_same(a.logits.data(), b.logits.data(), a.logits.size(), type + " " + isa);
      if (isa != "scalar") check_tree(in_place, random, 7, 11, 4, 5, DType::kF16);
    }
}

TEST(Lossless, NodesOfTreesEveryTypeIsaThreads) {
  for (const std::string type : kQuantTypes)
    for (const std::string& isa : isas())
      for (const int threads : {1, 2, 3, 4}) {
        if (isa == "scalar" && threads > 1) continue;  // slow; its threads divide the same units
        const Loaded l = load(tiny(type), isa, threads);
        std::mt19937 random(42);
        const Shape& s =
            kShapes[static_cast<size_t>(threads + (type[1] - '0')) % std::size(kShapes)];
        SCOPED_TRACE(type + " " + isa + " " + std::to_string(threads) + " threads");
        const int committed = isa == "scalar" ? s.committed % 40 : s.committed;
        check_tree(*l.model, random, committed, isa == "scalar" ? std::min(s.nodes, 8) : s.nodes,
                   s.chunk, std::max(1, s.nodes / 3), DType::kF16);
        if (HasFatalFailure()) return;
      }
}

TEST(Lossless, F32KvCache) {
  const Loaded l = load(tiny("q4_1"), isas().back(), 2);
  std::mt19937 random(7);
  check_tree(*l.model, random, 260, 12, 64, 3, DType::kF32);
}

TEST(LosslessFull, NodesOfTreesEveryTypeIsaThreads) {
  for (const std::string type : kQuantTypes)
    for (const std::string& isa : isas())
      for (const int threads : {1, 2, 3, 4}) {
        const Loaded l = load(tiny(type), isa, threads);
        std::mt19937 random(static_cast<unsigned>(threads));
        SCOPED_TRACE(type + " " + isa + " " + std::to_string(threads) + " threads");
        for (const Shape& s : kShapes) {
          if (isa == "scalar" && (s.committed > 20 || s.nodes > 10)) continue;
          check_tree(*l.model, random, s.committed, s.nodes, s.chunk, 4, DType::kF16);
          if (HasFatalFailure()) return;
        }
        if (isa != "scalar") check_tree(*l.model, random, 509 + threads, 20, 64, 7, DType::kF16);
      }
}

// The hash of a text's logits: one number for each weight type, on every machine that ever runs
// this. It changes only together with the contract's version.
TEST(Lossless, ContractHashes) {
  const std::map<std::string, uint64_t> golden = {
#include "tests/contract_hashes.inc"
  };
  std::mt19937 random(2402);
  const std::vector<int32_t> text = random_tokens(random, 40, 512);
  for (const std::string type : kQuantTypes)
    for (const std::string& isa : isas()) {
      const Loaded l = load(tiny(type), isa, 2);
      Session session(*l.model, {.context = 64, .max_nodes = 39});
      session.start(0, text, {});
      Step& step = session.edit_step();
      step.clear();
      step.begin_sequence(0);
      int row = -1;
      for (const int32_t id : text) row = step.add_row(id, row, true);
      session.forward();
      const uint64_t h = hash(session.logits(), text.size() * 512);
      EXPECT_EQ(h, golden.count(type) ? golden.at(type) : 0)
          << "{\"" << type << "\", 0x" << std::hex << h << "u}, found with " << isa
          << " under contract version " << std::dec << cpu::kContractVersion;
    }
}

// Sequences of a batch, prefilled in different chunks, do not touch each other.
TEST(Lossless, SequencesOfABatch) {
  for (const std::string type : {"q4_0", "f16"}) {
    const Loaded l = load(tiny(type), isas().back(), 2);
    std::mt19937 random(11);
    constexpr int kSequences = 5, kTokens = 24;
    std::vector<std::vector<int32_t>> prompts, alone;
    std::vector<Sampling> sampling;
    for (int s = 0; s < kSequences; ++s) {
      prompts.push_back(random_tokens(random, 1 + 53 * s, 512));
      sampling.push_back({.temperature = s % 2 ? 0.8f : 0.0f, .seed = static_cast<uint64_t>(s)});
      Session single(*l.model, {.context = 300});
      const Generation g =
          generate(single, nullptr, prompts.back(),
                   {.max_tokens = kTokens, .eos = {}, .sampling = sampling.back()});
      alone.push_back(g.ids);
    }
    for (const int nodes : {0, 6}) {
      Session batch(*l.model, {.context = 300, .n_sequences = kSequences, .max_nodes = nodes});
      const auto drafter = make_ngram_drafter({.nodes = 6, .min_match = 1}, kSequences, 300);
      for (int s = 0; s < kSequences; ++s)
        batch.start(s, prompts[static_cast<size_t>(s)], sampling[static_cast<size_t>(s)]);
      for (bool busy = true; busy;) {
        busy = false;
        batch.step(nodes > 0 ? drafter.get() : nullptr);
        for (int s = 0; s < kSequences; ++s)
          busy = busy || batch.tokens(s).size() < prompts[static_cast<size_t>(s)].size() + kTokens;
      }
      for (int s = 0; s < kSequences; ++s) {
        const auto answer =
            batch.tokens(s).subspan(prompts[static_cast<size_t>(s)].size(), kTokens);
        EXPECT_EQ(std::vector<int32_t>(answer.begin(), answer.end()), alone[static_cast<size_t>(s)])
            << type << " sequence " << s << ", nodes " << nodes;
      }
    }
  }
}

// A drafter that knows the answer, and spoils some of it: trees with long accepted paths and
// siblings.
class OracleDrafter final : public Drafter {
 public:
  OracleDrafter(std::vector<int32_t> text, unsigned seed, int nodes)
      : text_(std::move(text)), random_(seed), nodes_(nodes) {}
  std::string name() const override { return "oracle"; }
  void draft(const DraftContext& c, Step* step) override {
    int truth = c.root, left = std::min(c.max_nodes, nodes_);
    for (size_t at = c.tokens.size(); left > 0 && at < text_.size() &&
                                      step->position[truth] - step->position[c.root] < c.max_depth;
         ++at) {
      const bool wrong_first = random_() % 2;
      int next = -1;
      for (int i = 0; i < 2 && left > 0; ++i, --left) {
        const bool wrong = (i == 0) == wrong_first;
        const int row = step->add_row(
            wrong ? (text_[at] + 1 + static_cast<int32_t>(random_() % 100)) % 256 : text_[at],
            truth, true);
        if (!wrong) next = row;
      }
      if (next < 0 || random_() % 6 == 0) break;
      truth = next;
    }
  }

 private:
  std::vector<int32_t> text_;
  std::mt19937 random_;
  int nodes_;
};

// A draft model that knows nothing yet: nearly all of its guesses are wrong.
DraftTensors untrained_draft(const LlamaConfig& target) {
  DraftConfig c = training::config_for(target);
  c.ffn_size = 64;
  const std::vector<float> norm(static_cast<size_t>(c.hidden_size), 1.0f);
  DraftTensors draft = training::initial_draft(c, norm, 1);
  draft.vocabulary.resize(256);
  std::iota(draft.vocabulary.begin(), draft.vocabulary.end(), 0);
  return draft;
}

// Whole texts: plain decoding against trees whose paths are accepted and kept, at three
// temperatures.
void check_whole_texts(const std::string& path, int tokens) {
  for (const std::string& isa : isas()) {
    const Loaded l = load(path, isa, 2);
    const DraftTensors draft = untrained_draft(l.model->config());
    for (const float temperature : {0.0f, 0.7f, 1.0f})
      for (const uint64_t seed : {1u, 2u}) {
        GenerateOptions options;
        options.max_tokens = isa == "scalar" ? tokens / 6 : tokens;
        options.sampling = {.temperature = temperature,
                            .top_k = seed == 2 ? 40 : 0,
                            .top_p = seed == 2 ? 0.9f : 1.0f,
                            .min_p = 0,
                            .seed = seed};
        const std::vector<int32_t> prompt = {1, 403, 407, 261, 378};
        Session plain(*l.model, {.context = 512});
        const Generation expected = generate(plain, nullptr, prompt, options);
        std::vector<int32_t> text = prompt;
        text.insert(text.end(), expected.ids.begin(), expected.ids.end());
        for (const int nodes : {1, 5, 40}) {
          SCOPED_TRACE(isa + ", T " + std::to_string(temperature) + ", nodes " +
                       std::to_string(nodes));
          Session tree(*l.model, {.context = 512, .max_nodes = nodes});
          OracleDrafter oracle(text, static_cast<unsigned>(seed), nodes);
          const Generation g = generate(tree, &oracle, prompt, options);
          EXPECT_EQ(g.ids, expected.ids);
          EXPECT_EQ(g.stop, expected.stop);
          EXPECT_GT(g.tokens_per_step(), nodes > 1 ? 1.5 : 1.1)
              << "paths must be accepted for this to prove anything";
          const auto ngram = make_ngram_drafter({.nodes = nodes, .min_match = 1}, 1, 512);
          EXPECT_EQ(generate(tree, ngram.get(), prompt, options).ids, expected.ids) << "ngram";
          if (nodes != 5) continue;
          const auto chimera = make_chimera_drafter(*l.model, draft, {.nodes = nodes}, 1, 512);
          const Generation drafted = generate(tree, chimera.get(), prompt, options);
          EXPECT_EQ(drafted.ids, expected.ids) << "draft model";
          EXPECT_GT(drafted.drafted, 0);
        }
      }
  }
}
TEST(Lossless, WholeTextsThroughAcceptedPaths) {
  check_whole_texts(tiny("q4_1"), 120);
}
TEST(Lossless, WholeStoriesThroughAcceptedPaths) {
  const std::string stories = shared("models/stories260K/stories260K.bin");
  SKIP_WITHOUT(stories);
  check_whole_texts(stories, 360);
}

// The real model and every kind of tree, at temperatures 0, 0.7 and 1, another seed for each
// prompt.
void check_smollm2(const std::string& file, size_t prompts, int tokens) {
  const std::string draft_file = "models/smollm2-135m-instruct.chimera.safetensors";
  const Loaded l = load(kSmolLm2, isas().back(), cpu::physical_cores());
  // `sized` knows what passes cost and sizes its trees by that, as `chimera run` does.
  Session session(*l.model, {.context = 1024, .max_nodes = 60}),
      sized(*l.model, {.context = 1024, .max_nodes = 31});
  sized.measure_cost();
  std::vector<std::unique_ptr<Drafter>> drafters;
  std::unique_ptr<Drafter> of_sized = make_ngram_drafter({.nodes = 31}, 1, 1024);
  drafters.push_back(make_ngram_drafter({}, 1, 1024));
  if (std::filesystem::exists(draft_file)) {
    DraftTensors draft = load_draft(draft_file);
    const auto chimera = [&](const ChimeraOptions& options) {
      drafters.push_back(make_chimera_drafter(*l.model, draft, options, 1, 1024));
    };
    of_sized = make_chimera_drafter(*l.model, draft, {.nodes = 31}, 1, 1024);
    chimera({.nodes = 8, .ngrams = false});
    chimera({.nodes = 60, .depth = 8, .width = 8});
    const StaticTree chain = read_tree("1,1,1,1"), bush = read_tree("4,2,1,1,1");
    chimera({.nodes = chain.size(), .tree = chain});
    chimera({.nodes = bush.size(), .tree = bush});
    draft.config.greedy = {{0.5f, 0.8f}, {0.9f, 0.7f}};
    draft.config.sampled = {{1.5f}, {0.5f}};
    chimera({.nodes = 16});
  }
  std::map<std::string, std::pair<double, double>> taken;  // tokens, steps
  uint64_t seed = 0;
  for (const auto& prompt : test_prompts(prompts, l.file.vocabulary, file)) {
    ++seed;
    for (const float temperature : {0.0f, 0.7f, 1.0f}) {
      const GenerateOptions options{tokens, {2}, {.temperature = temperature, .seed = seed}};
      const Generation plain = generate(session, nullptr, prompt, options);
      ASSERT_EQ(generate(sized, of_sized.get(), prompt, options).ids, plain.ids)
          << "sized by cost, T " << temperature << " seed " << seed;
      for (size_t d = 0; d < drafters.size(); ++d) {
        const Generation tree = generate(session, drafters[d].get(), prompt, options);
        const std::string name = std::to_string(d) + " " + drafters[d]->name();
        ASSERT_EQ(tree.ids, plain.ids) << name << ", T " << temperature << " seed " << seed;
        ASSERT_EQ(tree.stop, plain.stop) << name;
        taken[name].first += tree.step_tokens;
        taken[name].second += tree.steps;
      }
    }
  }
  for (const auto& [name, count] : taken) {
    std::printf("%s: %.2f tokens per step\n", name.c_str(), count.first / count.second);
    EXPECT_GT(count.first / count.second, name == "0 ngram" ? 1.0 : 1.2) << name;
  }
}
TEST(Lossless, SmolLm2WholeTexts) {
  SKIP_WITHOUT(kSmolLm2);
  for (const char* set : {"mt_bench", "gsm8k_80"})
    SKIP_WITHOUT(shared("prompts/" + std::string(set) + ".jsonl"));
  check_smollm2("mt_bench.jsonl", 6, 48);
  check_smollm2("gsm8k_80.jsonl", 1, 48);
}
class WholeTextsFull : public testing::TestWithParam<std::string> {};
TEST_P(WholeTextsFull, OfSmolLm2) {
  SKIP_WITHOUT(kSmolLm2);
  SKIP_WITHOUT(shared("prompts/" + GetParam() + ".jsonl"));
  check_smollm2(GetParam() + ".jsonl", 80, 128);
}
INSTANTIATE_TEST_SUITE_P(Prompts, WholeTextsFull,
                         testing::Values("mt_bench", "gsm8k_80", "vicuna_bench"),
                         [](const auto& test) { return test.param; });

}  // namespace
}  // namespace chimera::test
