// Drafting on the device: each op against the host's definition of it, trees against the host's
// drafter, and whole texts against plain decoding.
#include <cmath>
#include <cstring>
#include <deque>
#include <optional>

#include "engine/candidate_tree.h"
#include "engine/chimera/chimera_drafter.h"
#include "engine/error.h"
#include "engine/ngram_index.h"
#include "engine/resident_drafter.h"
#include "tests/cuda_devices.h"
#include "tests/cuda_support.h"

namespace chimera::test {
namespace {

// The order in which the emulator runs threads: what a race would show in.
class Descending {
 public:
  explicit Descending(bool on) { cuda::test::set_descending(on); }
  ~Descending() { cuda::test::set_descending(false); }
  Descending(const Descending&) = delete;
  Descending& operator=(const Descending&) = delete;
};

// A DraftState whose buffers the host can read, and what the ops ask for beside it.
class Bench {
 public:
  Bench(const std::string& device, int context, int n_static = 0, int vocab = 0)
      : backend(backend_on(device)), ops(*backend->tree_ops()) {
    state = take<DraftState>(1);
    state->text = take<int32_t>(static_cast<size_t>(context) + 1);
    state->context = context;
    state->results = take<PassResult>(2);
    state->vocabulary = take<int32_t>(static_cast<size_t>(n_static) + DraftState::kMostDynamic);
    state->known = take<uint8_t>(static_cast<size_t>(vocab));
    state->n_static = n_static;
    for (float& t : state->temperature) t = 1;
    for (float& c : state->coverage) c = 1;
    for (Step** step : {&step_, &draft.rows, &draft.features, &draft.trigrams, &draft.root}) {
      *step = take<Step>(1);
      (*step)->n_sequences = 1;
    }
    draft.links = take<DraftLinks>(1);
  }
  template <typename T>
  T* take(size_t n) {
    memory_.push_back(backend->allocate(n * sizeof(T)));
    return static_cast<T*>(memory_.back().get());
  }
  Step& step() { return *step_; }

  // A pass of the target kept a path of `tokens` among other rows, and sampled `next` after it: the
  // text grows by it. piece: a prompt's, of which only the last has a root.
  void pass(std::span<const int32_t> tokens, int32_t next, std::mt19937& random) {
    Step& s = step();
    s.clear();
    s.begin_sequence(0);
    const int first = s.sequences[0].committed;
    int row = -1;
    for (size_t i = 0; i < tokens.size(); ++i) {
      const int parent = row;
      if (i > 0 && random() % 2) s.add_row(1000000, parent, true);  // a sibling that was not kept
      row = s.add_row(tokens[i], parent, true);
      if (i == 0) s.set_root(row);
      s.kept_at[row] = first + static_cast<int>(i);
    }
    s.sequences[0].n_kept = static_cast<int32_t>(tokens.size());
    s.sequences[0].next = next;
    s.sequences[0].committed += s.sequences[0].n_kept;
  }

  std::unique_ptr<Backend> backend;
  TreeOps& ops;
  DraftState* state;
  DraftPass draft;

 private:
  std::vector<std::shared_ptr<void>> memory_;
  Step* step_;
};

// The candidates of a state and those of the host's tree.
void expect_same(const DraftState& s, const CandidateTree& tree, float tolerance) {
  ASSERT_EQ(s.n_candidates, tree.size());
  for (int i = 0; i < tree.size(); ++i) {
    ASSERT_EQ(s.token[i], tree[i].token) << i << " of " << tree.size();
    ASSERT_EQ(s.parent[i], tree[i].parent) << i;
    ASSERT_EQ(s.depth_of[i], tree[i].depth) << i;
    ASSERT_NEAR(s.probability[i], tree[i].probability, tolerance) << i;
  }
}

// A text that grows pass by pass: what the host is told, the rows for the draft, and the n-grams.
TEST(CudaDraft, TextAndMatches) {
  std::mt19937 random(1);
  for (const std::string& device : devices())
    for (const int alphabet : {1, 2, 5, 40}) {
      const int min_match = alphabet == 5 ? 2 : 1, max_match = alphabet == 2 ? 3 : 6;
      const float temperature = alphabet == 5 ? 0.7f : 0.0f;
      const Descending order(alphabet > 2);
      Bench b(device, 400);
      b.state->sampling.temperature = temperature;
      b.state->min_match = min_match;
      b.state->max_match = max_match;
      b.state->nodes = 8;
      NgramIndex index(min_match, max_match, 400);
      std::vector<int32_t> text = {0};
      b.state->text[0] = 0;
      b.state->length = 1;
      for (int n = 0; text.size() < 370; ++n) {
        const size_t before = text.size();
        for (size_t i = random() % 12 + 1; i > 0; --i)
          text.push_back(static_cast<int32_t>(random() % static_cast<unsigned>(alphabet)));
        const std::span<const int32_t> all = text;
        b.pass(all.subspan(before - 1, text.size() - before), text.back(), random);
        b.ops.advance(&b.step(), b.state, b.draft);
        ASSERT_EQ(b.state->length, static_cast<int>(text.size()));
        ASSERT_TRUE(std::equal(text.begin(), text.end(), b.state->text));
        const PassResult& result = b.state->results[n % 2];
        ASSERT_EQ(result.number, n);
        ASSERT_EQ(result.emitted, static_cast<int>(text.size() - before));
        ASSERT_EQ(result.drafted, b.step().n_rows - 1);
        ASSERT_TRUE(std::equal(text.begin() + static_cast<std::ptrdiff_t>(before), text.end(),
                               result.token));
        // The rows stand for the tokens after the kept positions.
        const int kept = static_cast<int>(text.size() - before),
                  first = static_cast<int>(before) - 1;
        ASSERT_EQ(b.draft.rows->n_rows, kept + 1);
        ASSERT_EQ(b.draft.rows->first_new, 1);
        ASSERT_EQ(b.draft.rows->sequences[0].committed, first);
        ASSERT_EQ(b.draft.rows->sequences[0].n_rows, kept);
        ASSERT_EQ(b.draft.features->n_rows, kept + 1);
        ASSERT_EQ(b.draft.trigrams->n_rows, 3 * (kept + 1));
        ASSERT_EQ(b.draft.links->root, kept);
        ASSERT_EQ(b.draft.links->root_state, kept - 1);
        for (int i = 0; i <= kept; ++i) {
          for (int j = 0; j < 3; ++j)
            ASSERT_EQ(b.draft.trigrams->token[3 * i + j],
                      text[static_cast<size_t>(std::max(0, first + i - 2 + j))]);
          if (i == 0) continue;
          ASSERT_EQ(b.draft.rows->token[i], text[static_cast<size_t>(first + i)]);
          ASSERT_EQ(b.draft.rows->parent[i], i == 1 ? -1 : i - 1);
          ASSERT_EQ(b.draft.rows->position[i], first + i - 1);
          ASSERT_EQ(b.draft.rows->slot[i], first + i - 1);
          ASSERT_EQ(b.draft.links->feature[i], i - 1);
          ASSERT_EQ(b.draft.links->state[i], i - 1);
        }
        b.ops.learn_matches(&b.step(), b.state);
        b.ops.propose(b.state, b.draft);
        CandidateTree tree;
        propose_ngrams(index, 1, text, min_match, max_match, temperature, &tree);
        SCOPED_TRACE(device + ", " + std::to_string(alphabet) + " tokens, length " +
                     std::to_string(text.size()));
        expect_same(*b.state, tree, 1e-6f);
        if (::testing::Test::HasFatalFailure()) return;
        ASSERT_EQ(b.state->n_matches, tree.size());
        ASSERT_EQ(b.draft.rows->n_rows, 1);
        ASSERT_EQ(b.draft.rows->token[0], text.back());
        ASSERT_EQ(b.draft.rows->sequences[0].committed, static_cast<int>(text.size()) - 1);
      }
    }
}

TEST(CudaDraft, TopKOfARow) {
  std::mt19937 random(3);
  for (const std::string& device : devices())
    for (const int n : {1, 7, 8, 9, 255, 257, 2061})
      for (const float temperature : {0.0f, 0.9f}) {
        const Descending order(n % 2 == 0 || temperature > 0);
        const int n_static = std::max(1, n - 5), vocab = n + 100;
        Bench b(device, 64, n_static, vocab);
        constexpr int kRows = 3, kDepth = 2;
        const int64_t stride = n + 3;
        auto* logits = b.take<float>(static_cast<size_t>(kRows * stride));
        for (int64_t i = 0; i < kRows * stride; ++i)  // halves: many are equal
          logits[i] = 0.5f * static_cast<float>(random() % (temperature > 0 ? 4000 : 7)) *
                      (temperature > 0 ? 0.001f : 1.0f);
        logits[1] = -0.0f;
        for (int i = 0; i < 8 && 5 + 256 * i < n; ++i)  // all of the best in one thread's share
          logits[2 * stride + 5 + 256 * i] = static_cast<float>(100 - i);
        for (int i = 0; i < n; ++i) b.state->vocabulary[i] = (i * 7 + 3) % vocab;
        b.state->n_dynamic = n - n_static;
        b.state->length = 11;
        b.state->sampling = {.temperature = temperature, .seed = 9};
        b.state->temperature[kDepth] = 0.8f;
        b.state->coverage[kDepth] = 0.9f;
        b.draft.rows->n_rows = kRows;
        b.draft.rows->first_new = 1;
        b.ops.top_k(b.draft, logits, stride, kDepth, b.state);
        std::vector<float> noise(static_cast<size_t>(n)), noisy(noise);
        sampling_ops().gumbel(b.state->vocabulary, 0, n, 9, 11 + kDepth, noise.data());
        for (int row = 1; row < kRows; ++row) {
          for (int i = 0; i < n; ++i)
            noisy[static_cast<size_t>(i)] =
                logits[row * stride + i] +
                (temperature > 0 ? temperature * noise[static_cast<size_t>(i)] : 0.0f);
          int32_t best[8];
          const int found = sampling_ops().top_k(noisy.data(), n, 8, best);
          ASSERT_EQ(b.state->n_best, found);
          const float largest = noisy[static_cast<size_t>(best[0])];
          const float sum = sampling_ops().sum_of_exp(noisy.data(), n, largest, 1 / 0.8f);
          for (int r = 0; r < found; ++r) {
            ASSERT_EQ(b.state->best[row][r], best[r]) << device << " " << n << " rank " << r;
            ASSERT_NEAR(
                b.state->share[row][r],
                0.9f * std::exp((noisy[static_cast<size_t>(best[r])] - largest) / 0.8f) / sum,
                2e-5f);
          }
        }
        EXPECT_EQ(b.state->share[0][0], 0.0f) << "row 0 is not new";
      }
}

// Depth by depth, with few tokens, so that the draft often says what a match has said, and shares
// that are often equal; rows, features, trigrams and where they come from.
TEST(CudaDraft, Growth) {
  std::mt19937 random(6);
  int merged = 0;
  for (const std::string& device : devices())
    for (int repeat = 0; repeat < 60; ++repeat) {
      const Descending order(repeat % 2);
      constexpr int kTokens = 12;
      Bench b(device, 60, kTokens, kTokens);
      DraftState& s = *b.state;
      const int length = 1 + static_cast<int>(random() % 55), depths = 4;
      s.nodes = 1 + static_cast<int>(random() % 12);
      s.width = repeat % 5 == 0 ? 25 : 1 + static_cast<int>(random() % 5);
      s.depth = depths;
      s.min_match = 1;
      s.max_match = repeat % 4 == 3 ? 0 : 6;
      s.length = length;
      std::vector<int32_t> text;
      for (int i = 0; i < length; ++i) text.push_back(static_cast<int32_t>(random() % 3));
      std::copy(text.begin(), text.end(), s.text);
      for (int i = 0; i < kTokens; ++i) s.vocabulary[i] = (i + 2) % kTokens;
      b.ops.propose(b.state, b.draft);
      CandidateTree tree;
      for (int i = 0; i < s.n_candidates; ++i) tree.add(s.parent[i], s.token[i], s.probability[i]);

      Step& step = b.step();
      step.sequences[0].committed = length - 1;
      step.clear();
      step.n_rows = 1;
      step.token[0] = text.back();
      step.begin_sequence(0);
      std::vector<int> nodes = {CandidateTree::kRoot};
      int first = 0;
      for (int depth = 0; depth < depths; ++depth) {
        s.n_best = repeat % 7 == 0 ? 5 : 8;
        for (size_t i = 0; i < nodes.size(); ++i) {
          const int row = first + static_cast<int>(i);
          std::vector<int32_t> best(kTokens);
          for (int k = 0; k < kTokens; ++k) best[static_cast<size_t>(k)] = k;
          std::shuffle(best.begin(), best.end(), random);
          const float others = tree.discount_matches(nodes[i]),
                      share = tree.probability_of(nodes[i]) * others;
          for (int r = 0; r < s.n_best; ++r) {
            s.best[row][r] = best[static_cast<size_t>(r)];
            s.share[row][r] = static_cast<float>(8 - r) / 64 * static_cast<float>(1 + random() % 2);
            const int size = tree.size();
            tree.add_drafted(nodes[i], s.vocabulary[best[static_cast<size_t>(r)]],
                             share * s.share[row][r]);
            merged += tree.size() == size && size < DraftState::kMostCandidates;
          }
        }
        b.ops.grow(depth, b.state, b.draft);
        SCOPED_TRACE(device + " " + std::to_string(repeat) + " depth " + std::to_string(depth));
        expect_same(s, tree, 0);
        if (HasFatalFailure()) return;

        first = step.n_rows;
        const auto next =
            depth + 1 < std::min(depths, s.context - length)
                ? tree.worth_expanding(
                      depth + 1, s.nodes,
                      static_cast<size_t>(std::min(s.width, DraftState::kMaxRows - first)))
                : std::span<const int>();
        nodes.assign(next.begin(), next.end());
        for (const int node : nodes) {
          const int above = tree[node].parent < 0 ? 0 : tree[tree[node].parent].row;
          const int row = step.add_row(tree[node].token, above == 0 ? -1 : above, false);
          tree[node].row = row;
          ASSERT_EQ(s.row[node], row);
          ASSERT_EQ(s.candidate_of_row[row], node);
          ASSERT_EQ(b.draft.links->feature[row], above);
          ASSERT_EQ(b.draft.links->state[row], above);
          std::vector<int32_t> path;
          for (int n = node; n >= 0; n = tree[n].parent) path.push_back(tree[n].token);
          path.insert(path.end(), text.rbegin(), text.rend());
          path.insert(path.end(), 2, text[0]);  // what is not there repeats the first
          for (size_t j = 0; j < 3; ++j)
            ASSERT_EQ(b.draft.trigrams->token[3 * row + static_cast<int>(j)], path[2 - j]);
        }
        const Step& rows = *b.draft.rows;
        ASSERT_EQ(rows.first_new, first);
        ASSERT_EQ(rows.n_rows, step.n_rows);
        ASSERT_EQ(rows.sequences[0].n_rows, step.n_rows - 1);
        ASSERT_EQ(b.draft.features->first_new, first);
        ASSERT_EQ(b.draft.features->n_rows, step.n_rows);
        ASSERT_EQ(b.draft.trigrams->first_new, 3 * first);
        ASSERT_EQ(b.draft.trigrams->n_rows, 3 * step.n_rows);
        for (int r = first; r < step.n_rows; ++r)
          for (const auto part :
               {&Step::token, &Step::parent, &Step::sequence, &Step::position, &Step::slot})
            ASSERT_EQ((rows.*part)[r], (step.*part)[r]) << r;
      }
    }
  EXPECT_GT(merged, 50) << "matches that the draft had a word about";
}

// Random trees with many equal probabilities, with costs and without, near the context's end.
TEST(CudaDraft, Choice) {
  std::mt19937 random(4);
  for (const std::string& device : devices()) {
    Bench b(device, 100);
    for (int repeat = 0; repeat < 40; ++repeat) {
      const Descending order(repeat % 3 == 0);
      CandidateTree tree;
      const int n = static_cast<int>(random() % (repeat % 4 == 0 ? 1024 : 40));
      for (int i = 0; i < n; ++i) {
        const int parent = static_cast<int>(random() % static_cast<unsigned>(i + 1)) - 1;
        tree.add(parent, i, tree.probability_of(parent) * static_cast<float>(random() % 5) / 4);
      }
      DraftState& s = *b.state;
      s.n_candidates = tree.size();
      for (int i = 0; i < tree.size(); ++i) {
        s.token[i] = tree[i].token;
        s.parent[i] = tree[i].parent;
        s.depth_of[i] = tree[i].depth;
        s.probability[i] = tree[i].probability;
      }
      s.length = repeat == 5 ? 100 : 40 + static_cast<int>(random() % 60);
      s.nodes = static_cast<int>(random() % 64);
      s.sampling.seed = static_cast<uint64_t>(repeat);
      for (int i = 0; i < s.length; ++i) s.text[i] = i;
      CostCurve cost;
      s.has_costs = repeat % 2;
      s.drafting_seconds = 0.25f;
      s.trust = {static_cast<float>(random() % 20), 10.0f};
      const Trust trust = s.trust;
      for (int m = 1; m <= 64; ++m) {
        if (s.has_costs) cost.set(m, 1 + 0.02 * m * m);
        s.seconds[m] = static_cast<float>(1 + 0.02 * m * m);
      }
      Step& got = *b.draft.rows;
      got.sequences[0].n_kept = 7;
      b.ops.choose(b.state, &got);
      ASSERT_EQ(got.sequences[0].n_kept, 0);
      if (s.length == s.context) {
        ASSERT_EQ(got.n_rows, 0);
        ASSERT_EQ(got.sequences[0].n_rows, 0);
        continue;
      }
      Step& expected = b.step();
      expected.sequences[0].committed = s.length - 1;
      expected.clear();
      expected.begin_sequence(0);
      expected.set_root(expected.add_row(s.text[s.length - 1], -1, true));
      tree.choose(s.nodes, s.context - s.length, &cost, 0.25, trust.share());
      ASSERT_EQ(s.trust.promised, trust.promised + tree.promised());
      tree.write(&expected, 0);
      ASSERT_EQ(got.n_rows, expected.n_rows);
      ASSERT_EQ(got.n_logits, expected.n_logits);
      ASSERT_EQ(got.sequences[0].committed, s.length - 1);
      ASSERT_EQ(got.sequences[0].n_rows, expected.n_rows);
      ASSERT_EQ(got.sequences[0].first_row, 0);
      ASSERT_EQ(got.sequences[0].root, 0);
      ASSERT_EQ(got.sequences[0].sampling.seed, s.sampling.seed);
      for (int r = 0; r < got.n_rows; ++r)
        for (const auto rows :
             {&Step::token, &Step::parent, &Step::sequence, &Step::position, &Step::slot,
              &Step::logits_index, &Step::logits_row, &Step::kept_at})
          ASSERT_EQ((got.*rows)[r], (expected.*rows)[r]) << device << " " << repeat << " row " << r;
    }
  }
}

// The order in which tokens are learnt and put out, and the rows of the head.
TEST(CudaDraft, Vocabulary) {
  constexpr int kVocab = 1500, kStatic = 37, kCols = 96;
  for (const std::string& device : devices())
    for (const DType type : {DType::kF32, DType::kQ8_0}) {
      const Descending order(type == DType::kF32);
      std::mt19937 random(5);
      Bench b(device, 600, kStatic, kVocab);
      const auto target = cuda::test::random_matrix(
          random, type == DType::kF32 ? DType::kBF16 : DType::kQ4_0, kVocab, kCols, false);
      std::vector<std::byte> zeros((kStatic + DraftState::kMostDynamic) * row_bytes(type, kCols));
      const TensorView view{"head", type, kStatic + DraftState::kMostDynamic, kCols, zeros.data()};
      const auto target_head = b.backend->prepare({&target.view, 1}, nullptr),
                 head = b.backend->prepare({&view, 1}, nullptr);
      std::deque<int32_t> dynamic;  // by row
      std::vector<bool> known(kVocab);
      int oldest = 0;
      for (int i = 0; i < kStatic; ++i) {
        b.state->vocabulary[i] = 2 * i;
        b.state->known[2 * i] = 1;
        known[static_cast<size_t>(2 * i)] = true;
      }
      const auto learn = [&](int32_t token) {
        if (known[static_cast<size_t>(token)]) return;
        known[static_cast<size_t>(token)] = true;
        if (dynamic.size() < DraftState::kMostDynamic) return dynamic.push_back(token);
        known[static_cast<size_t>(dynamic[static_cast<size_t>(oldest)])] = false;
        dynamic[static_cast<size_t>(oldest)] = token;
        oldest = (oldest + 1) % DraftState::kMostDynamic;
      };
      auto* logits = b.take<float>(size_t{64} * kVocab);
      std::vector<int32_t> text = {1499};
      b.state->text[0] = 1499;
      for (int n = 0; text.size() < 220; ++n) {
        const size_t before = text.size();
        // (The first tokens are few, so that they come twice within a pass.)
        for (size_t i = random() % 20 + 1; i > 0; --i)
          text.push_back(static_cast<int32_t>(random() % (n < 5 ? 100 : kVocab)));
        const std::span<const int32_t> all = text;
        b.pass(all.subspan(before - 1, text.size() - before), text.back(), random);
        Step& step = b.step();
        for (int i = 0; i < 64 * kVocab; ++i) logits[i] = static_cast<float>(random() % 5000);
        int32_t best[8];
        if (before == 1) learn(text[0]);
        for (int r = 0; r < step.n_rows; ++r) {
          if (random() % 4 == 0) step.logits_index[r] = -1;
          if (step.kept_at[r] < 0) continue;
          learn(text[static_cast<size_t>(step.kept_at[r]) + 1]);
          if (step.logits_index[r] < 0) continue;
          sampling_ops().top_k(logits + step.logits_index[r] * kVocab, kVocab, 8, best);
          for (const int32_t token : best) learn(token);
        }
        b.ops.advance(&step, b.state, b.draft);
        b.ops.learn_vocabulary(&step, logits, kVocab, b.state, *target_head, head.get());
        ASSERT_EQ(b.state->n_dynamic, static_cast<int>(dynamic.size()));
        ASSERT_EQ(b.state->oldest, oldest);
        ASSERT_TRUE(std::equal(dynamic.begin(), dynamic.end(), b.state->vocabulary + kStatic));
        for (int i = 0; i < kVocab; ++i)
          ASSERT_EQ(b.state->known[i] != 0, known[static_cast<size_t>(i)]) << i << " pass " << n;
      }
      ASSERT_GT(oldest, 0) << "some must have been put out";
      // Each row is what the host would have prepared.
      std::vector<float> row(kCols);
      std::vector<std::byte> rounded(row_bytes(type, kCols));
      Step& step = b.step();
      auto* out = b.take<float>(size_t{Step::kMaxRows} * kCols);
      for (int first = 0; first < b.state->n_dynamic; first += Step::kMaxRows) {
        step.clear();
        step.n_rows = std::min(+Step::kMaxRows, b.state->n_dynamic - first);
        for (int r = 0; r < step.n_rows; ++r) step.token[r] = kStatic + first + r;
        b.backend->embed(&step, *head, out);
        for (int r = 0; r < step.n_rows; ++r) {
          const int32_t token = dynamic[static_cast<size_t>(first + r)];
          dequantize_row(target.view.type, target.view.row(token), kCols, row.data());
          if (type == DType::kQ8_0) {
            quantize_row_q8_0(row.data(), kCols, rounded.data());
            dequantize_row(type, rounded.data(), kCols, row.data());
          }
          ASSERT_TRUE(cuda::test::same_bits(out + r * kCols, row.data(), kCols))
              << device << " dynamic row " << first + r;
        }
      }
    }
}

// ---- Whole drafters ----------------------------------------------------------------------------

// A draft of random weights for stories260K. What it says is nonsense, but sharp. In our form, or
// with the last token alone and slots of states alone.
DraftTensors random_draft(unsigned seed, bool least = false) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  DraftTensors t;
  DraftConfig& c = t.config;
  c.hidden_size = 64;
  c.n_heads = 4, c.n_kv_heads = 2, c.head_dim = 16;
  c.ffn_size = 64;
  c.n_steps = 3;
  c.head_rank = 32;
  c.trigram = c.slot_features = !least;
  c.greedy = {{0.9f, 1.1f, 1.2f}, {0.95f, 0.9f, 0.9f}};
  c.sampled = {{1.0f, 1.3f}, {0.8f, 0.7f}};
  const auto fill = [&](std::vector<float>* v, int rows, int cols, float size) {
    for (int i = 0; i < rows * cols; ++i)
      v->push_back(normal(random) * size / std::sqrt(static_cast<float>(cols)));
  };
  const int d = 64;
  if (c.trigram) fill(&t.w1, d, 3 * d, 1), fill(&t.w2, d, d, 1);
  fill(&t.w3, d, d, 1);
  fill(&t.wq, c.q_size(), d, 1), fill(&t.wk, c.kv_size(), c.slot_size(), 1);
  fill(&t.wv, c.kv_size(), c.slot_size(), 1), fill(&t.wo, d, c.q_size(), 1);
  fill(&t.gate_up, 2 * c.ffn_size, d, 1), fill(&t.down, d, c.ffn_size, 1);
  for (auto* norm : {&t.attn_norm, &t.ffn_norm, &t.out_norm}) norm->assign(d, 1.0f);
  for (float& w : t.out_norm) w = 0.5f;
  for (auto* norm : {&t.key_norm, &t.value_norm})
    norm->assign(static_cast<size_t>(c.slot_size()), 1.0f);
  t.head_scale = {1.0f, 0.7f, 0.5f};  // the target's own last word, mostly
  for (int k = 0; k < c.n_steps; ++k) {
    fill(&t.head_down.emplace_back(), c.head_rank, 2 * d, 1);
    fill(&t.head_up.emplace_back(), d, c.head_rank, 0.5f);
  }
  for (int32_t id = 0; id < 70; ++id) t.vocabulary.push_back(id * 5 + 3);
  return t;
}

const std::string kStories = shared("models/stories260K/stories260K.bin");
const std::vector<int32_t> kPrompt = {1, 403, 407, 261, 378, 403, 407, 261};

// 1; 2 - 2 1 - 2 1 2; 2 3: the likeliest guess has no children.
StaticTree small_shape() {
  StaticTree tree;
  tree.add(-1, 0);
  const int second = tree.add(-1, 1), deep = tree.add(second, 0);
  tree.add(second, 2);
  tree.add(deep, 1);
  return tree;
}

struct Way {
  const char* name;
  ResidentOptions options;
  bool has_draft;
  bool least = false;  // random_draft()
};
const Way kWays[] = {
    {"none", {.nodes = 0}, false},
    {"ngram", {.nodes = 4, .min_match = 1, .max_match = 6}, false},
    {"chimera", {.nodes = 4, .depth = 2, .width = 2}, true},
    {"hybrid", {.nodes = 5, .depth = 3, .width = 2, .min_match = 1, .max_match = 6}, true},
    {"static", {.tree = small_shape()}, true},
    {"hybrid", {.nodes = 5, .depth = 3, .width = 2, .min_match = 1, .max_match = 6}, true, true}};

DraftTensors draft_of(const Way& way) {
  return random_draft(way.least ? 2 : 1, way.least);  // (of that form the first guesses nothing)
}
std::unique_ptr<ResidentDrafter> drafter_of(const Way& way, const Llama& target, int context) {
  const DraftTensors draft = draft_of(way);
  auto drafter =
      make_resident_drafter(target, way.has_draft ? &draft : nullptr, way.options, context);
  EXPECT_EQ(drafter->name(), way.name);
  return drafter;
}

struct Tree {
  std::vector<int32_t> token, parent;
  bool operator==(const Tree&) const = default;
};
Tree tree_of(const Step& step) {
  return {{step.token + 1, step.token + std::max(1, step.n_rows)},
          {step.parent + 1, step.parent + std::max(1, step.n_rows)}};
}
std::string text_of(const Tree& tree) {
  std::string text;
  for (size_t i = 0; i < tree.token.size(); ++i)
    text += std::to_string(tree.token[i]) + "<" + std::to_string(tree.parent[i]) + " ";
  return text;
}

// The host's drafter, and what it drafted.
class Recorder final : public Drafter {
 public:
  explicit Recorder(std::unique_ptr<TreeDrafter> drafter) : drafter_(std::move(drafter)) {}
  std::string name() const override { return drafter_->name(); }
  void draft(const DraftContext& c, Step* step) override {
    CandidateTree& tree = drafter_->candidates(c);
    candidates.emplace_back();
    for (int i = 0; i < tree.size(); ++i) candidates.back().push_back(tree[i]);
    tree.write(step, c.root);
    trees.push_back(tree_of(*step));
  }
  void observe(const KeptRows& kept) override { drafter_->observe(kept); }
  std::vector<Tree> trees;
  std::vector<std::vector<CandidateTree::Node>> candidates;

 private:
  std::unique_ptr<TreeDrafter> drafter_;
};

// Step by step the device grows the tree that the host grows: candidate by candidate.
TEST(CudaDraft, TreesAreTheHosts) {
  SKIP_WITHOUT(kStories);
  constexpr int kContext = 23;
  for (const std::string& device : devices()) {
    const Loaded l = load_on(device, kStories);
    for (const Way& way : kWays)
      for (const float temperature : {0.0f, 1.0f}) {
        if (way.options.nodes == 0 || (temperature > 0 && way.name == std::string("chimera")))
          continue;
        const Descending order(temperature > 0);
        SCOPED_TRACE(device + " " + way.name + " T " + std::to_string(temperature));
        const Sampling sampling{.temperature = temperature, .seed = 4};
        const ResidentOptions& o = way.options;
        std::unique_ptr<TreeDrafter> host;
        if (way.has_draft)
          host = make_chimera_drafter(*l.model, draft_of(way),
                                      {.nodes = o.tree.empty() ? o.nodes : o.tree.size(),
                                       .depth = o.depth,
                                       .width = o.width,
                                       .ngrams = o.max_match > 0,
                                       .tree = o.tree},
                                      1, kContext);
        else
          host = make_ngram_drafter(
              {.nodes = o.nodes, .min_match = o.min_match, .max_match = o.max_match}, 1, kContext);
        Recorder recorder(std::move(host));
        Session session(*l.model, {.context = kContext, .max_nodes = 5, .prefill_rows = 6});
        session.start(0, kPrompt, sampling);
        while (!session.full(0)) session.step(&recorder);
        const std::vector<int32_t> text(session.tokens(0).begin(), session.tokens(0).end());

        const auto drafter = drafter_of(way, *l.model, kContext);
        session.start(0, kPrompt, sampling);
        size_t compared = 0, nodes = 0;
        session.step(drafter.get());  // a piece of the prompt
        for (size_t n = 1; !session.full(0) && n < recorder.trees.size(); ++n) {
          session.step(drafter.get());  // the tree for the pass after the next is there now
          const auto step = std::make_unique<Step>();
          const auto state = std::make_unique<DraftState>();
          l.backend->upload(step.get(), drafter->on_device().step, sizeof(Step));
          l.backend->upload(state.get(), drafter->on_device().state, sizeof(DraftState));
          const std::vector<CandidateTree::Node>& expected = recorder.candidates[n];
          ASSERT_EQ(state->n_candidates, static_cast<int>(expected.size())) << "tree " << n;
          for (size_t i = 0; i < expected.size() && o.tree.empty(); ++i) {  // (a shape's order is
                                                                            // the host's own)
            ASSERT_EQ(state->token[i], expected[i].token) << "tree " << n << " candidate " << i;
            ASSERT_EQ(state->parent[i], expected[i].parent) << "tree " << n << " candidate " << i;
            ASSERT_NEAR(state->probability[i], expected[i].probability, 1e-4f)
                << "tree " << n << " candidate " << i;
          }
          ASSERT_EQ(tree_of(*step), recorder.trees[n]) << "tree " << n << "\n"
                                                       << text_of(tree_of(*step)) << "\n"
                                                       << text_of(recorder.trees[n]);
          ++compared;
          nodes += recorder.trees[n].token.size();
        }
        EXPECT_GT(compared, 3u);
        EXPECT_GT(nodes, 3u);
        session.stop(0);
      }
  }
}

// Whole texts to the end of the context, in a graph and op by op, one after the other in a session.
TEST(CudaDraft, TextsAreTheSame) {
  SKIP_WITHOUT(kStories);
  constexpr int kContext = 24;
  for (const std::string& device : devices()) {
    const Loaded l = load_on(device, kStories), by_op = load_on(device, kStories, true);
    Session plain(*by_op.model, {.context = kContext}),
        eager(*by_op.model, {.context = kContext, .max_nodes = 6, .prefill_rows = 5}),
        graph(*l.model, {.context = kContext, .max_nodes = 6, .prefill_rows = 8});
    std::vector<std::unique_ptr<ResidentDrafter>> drafters;
    for (const Way& way : kWays) drafters.push_back(drafter_of(way, *l.model, kContext));
    const auto eager_hybrid = drafter_of(kWays[3], *by_op.model, kContext);
    double tokens_per_step[std::size(kWays)] = {};
    for (const float temperature : {0.0f, 0.7f, 1.0f}) {
      const GenerateOptions options{
          -1, {}, {.temperature = temperature, .top_p = temperature == 1.0f ? 0.9f : 1, .seed = 6}};
      const Generation expected = generate(plain, nullptr, kPrompt, options);
      ASSERT_EQ(expected.ids.size(), kContext - kPrompt.size());
      for (size_t i = 0; i < drafters.size(); ++i) {
        if (i == 2 && temperature == 0.7f) continue;  // the hybrid is enough
        const Generation g = generate(graph, drafters[i].get(), kPrompt, options);
        EXPECT_EQ(g.ids, expected.ids) << device << " " << kWays[i].name << " T " << temperature;
        EXPECT_EQ(g.stop, Stop::kLength);
        tokens_per_step[i] = std::max(tokens_per_step[i], g.tokens_per_step());
      }
      if (temperature != 0.7f) continue;
      const Generation g = generate(eager, eager_hybrid.get(), kPrompt, options);
      EXPECT_EQ(g.ids, expected.ids) << device << " op by op";
    }
    EXPECT_EQ(tokens_per_step[0], 1);
    for (size_t i = 1; i < drafters.size(); ++i)
      EXPECT_GT(tokens_per_step[i], 1.05) << kWays[i].name << " must get something accepted";
  }
}

// A drafter knows its text from one of another session that is as long.
TEST(CudaDraft, SessionsHaveTextsOfTheirOwn) {
  SKIP_WITHOUT(kStories);
  const Loaded l = load_on(devices().front(), kStories);
  const auto drafter = drafter_of(kWays[3], *l.model, 24);
  const SessionOptions options{.context = 24, .max_nodes = 6};
  Session plain(*l.model, {.context = 24});
  for (const int n : {2, 3, 4}) {
    std::vector<int32_t> text = kPrompt;
    {
      Session first(*l.model, options);
      generate(first, drafter.get(), kPrompt, {n, {}, {}});
      const auto whole = first.tokens(0);
      text.assign(whole.begin(), whole.end());
    }
    text[1] = 5;  // as long, but another
    Session second(*l.model, options);
    EXPECT_EQ(generate(second, drafter.get(), text, {}).ids, generate(plain, nullptr, text, {}).ids)
        << n;
  }
}

// A kernel that fails, with a pass under way: the next wait throws, op by op the kernel's name
// comes with it, and everything can be let go.
TEST(CudaDraft, AFaultIsAnError) {
  SKIP_WITHOUT(kStories);
  for (const bool eager : {false, true}) {
    std::optional<cuda::emulator::Fault> fault;  // outlives the rest
    const Loaded l = load_on("emulated", kStories, eager);
    Session session(*l.model, {.context = 24, .max_nodes = 4, .prefill_rows = 8});
    const auto drafter = drafter_of(kWays[3], *l.model, 24);
    session.start(0, kPrompt, {});
    for (int i = 0; i < 4; ++i) session.step(drafter.get());
    fault.emplace("combine");
    std::string message;
    try {
      session.step(drafter.get());
    } catch (const Error& e) {
      message = e.what();
    }
    EXPECT_NE(message.find(eager ? "cuda: combine" : "cuda: a step"), std::string::npos) << message;
    EXPECT_THROW(session.step(nullptr), Error);
  }
}

// What a Session keeps on the device the host never touches, and what it may read it can.
TEST(CudaDraft, TheHostKeepsOut) {
  SKIP_WITHOUT(kStories);
  const cuda::emulator::GuardedMemory guarded(size_t{64} << 20);
  const Loaded l = load_on("emulated", kStories);
  Session session(*l.model, {.context = 24, .max_nodes = 4, .prefill_rows = 8});
  EXPECT_GT(session.time_pass(3), 0);
  EXPECT_GT(session.time_pass(3, 20), 0);
  const auto drafter = drafter_of(kWays[3], *l.model, 24);
  const GenerateOptions options{8, {}, {}};
  const Generation drafted = generate(session, drafter.get(), kPrompt, options),
                   plain = generate(session, nullptr, kPrompt, options);
  EXPECT_EQ(drafted.ids, plain.ids);
  EXPECT_TRUE(std::isfinite(session.states()[0] + session.logits()[0]));
}

// Texts that end, or go on, where a pass is already under way.
TEST(CudaDraft, EndsInTime) {
  SKIP_WITHOUT(kStories);
  constexpr int kContext = 40;
  const Way& hybrid = kWays[3];
  for (const std::string& device : devices()) {
    const Loaded l = load_on(device, kStories);
    Session session(*l.model, {.context = kContext, .max_nodes = 6, .prefill_rows = 8});
    const auto drafter = drafter_of(hybrid, *l.model, kContext);
    const auto other = drafter_of(kWays[1], *l.model, kContext);
    GenerateOptions options{22, {}, {}};
    const Generation plain = generate(session, nullptr, kPrompt, options);

    // The end of the text in the middle of an accepted path: tokens of one step, its first one the
    // text's first of its kind.
    session.start(0, kPrompt, {});
    int32_t eos = -1;
    while (eos < 0 && session.tokens(0).size() < kPrompt.size() + 22) {
      session.step(drafter.get());
      const auto text = session.tokens(0).subspan(kPrompt.size());
      for (size_t i = text.size() - static_cast<size_t>(session.emitted(0)); i + 1 < text.size();
           ++i)
        if (std::find(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(i), text[i]) ==
            text.begin() + static_cast<std::ptrdiff_t>(i))
          eos = text[i];
    }
    ASSERT_GE(eos, 0) << "no path was accepted";
    options.eos = {eos};
    const Generation expected = generate(session, nullptr, kPrompt, options),
                     stopped = generate(session, drafter.get(), kPrompt, options);
    EXPECT_EQ(stopped.stop, Stop::kEos);
    EXPECT_EQ(stopped.ids, expected.ids);

    // Cancelled, then another text in the same session, then the first again.
    options.eos = {};
    int asked = 0;
    options.cancelled = [&] { return ++asked == 4; };
    const Generation cancelled = generate(session, drafter.get(), kPrompt, options);
    EXPECT_EQ(cancelled.stop, Stop::kCancelled);
    EXPECT_GE(cancelled.ids.size(), 3u);
    EXPECT_TRUE(std::equal(cancelled.ids.begin(), cancelled.ids.end(), plain.ids.begin()));
    options.cancelled = nullptr;
    std::mt19937 random(7);  // in pieces, the last of them a whole one
    const std::vector<int32_t> second = random_tokens(random, 16, 512);
    options.max_tokens = 6;
    const Generation second_plain = generate(session, nullptr, second, options);
    EXPECT_EQ(generate(session, drafter.get(), second, options).ids, second_plain.ids);

    // By turns, and cut: where one drafter leaves the text, another one finds it.
    session.start(0, kPrompt, {});
    const auto check = [&] {
      const auto text = session.tokens(0).subspan(kPrompt.size());
      return std::equal(text.begin(), text.end(), plain.ids.begin());
    };
    for (Drafter* d : {static_cast<Drafter*>(drafter.get()), static_cast<Drafter*>(drafter.get()),
                       static_cast<Drafter*>(other.get()), static_cast<Drafter*>(other.get()),
                       static_cast<Drafter*>(nullptr), static_cast<Drafter*>(drafter.get()),
                       static_cast<Drafter*>(drafter.get())}) {
      session.step(d);
      ASSERT_TRUE(check()) << device;
      if (d == nullptr) {
        EXPECT_EQ(session.last_step().n_rows, 1) << "nothing is run again";
      }
    }
    session.truncate(0, static_cast<int>(kPrompt.size()) + 3);
    for (int i = 0; i < 3; ++i) {
      session.step(drafter.get());
      ASSERT_TRUE(check()) << device;
    }
    EXPECT_GE(session.tokens(0).size(), kPrompt.size() + 5);
  }
}

// Where each row costs as much as the first, none is worth it; where they cost nothing, all are.
TEST(CudaDraft, TreesFollowTheCosts) {
  SKIP_WITHOUT(kStories);
  for (const std::string& device : devices()) {
    const Loaded l = load_on(device, kStories);
    for (const Way* way : {&kWays[2], &kWays[4]}) {
      Session session(*l.model, {.context = 20, .max_nodes = 5, .prefill_rows = 8});
      const GenerateOptions options{5, {}, {}};
      const auto drafter = drafter_of(*way, *l.model, 20);
      const Generation all = generate(session, drafter.get(), kPrompt, options);
      for (const bool dear : {true, false}) {
        CostCurve cost;  // in seconds beside which the emulator's drafting is nothing
        for (int m = 1; m <= 6; ++m) cost.set(m, dear ? 1e6 * m : 1e6);
        session.set_cost(cost);
        const auto sized = drafter_of(*way, *l.model, 20);
        const Generation g = generate(session, sized.get(), kPrompt, options);
        EXPECT_EQ(g.ids, all.ids);
        EXPECT_EQ(g.drafted, dear && way->options.tree.empty() ? 0 : all.drafted) << way->name;
      }
    }
  }
}

// The host's drafter takes them.
TEST(CudaDraft, ShapesThatTheDeviceDoesNotTake) {
  SKIP_WITHOUT(kStories);
  const Loaded l = load_on(devices().front(), kStories);
  const DraftTensors draft = random_draft(1);
  const auto takes = [&](const StaticTree& tree) {
    return make_resident_drafter(*l.model, &draft, {.tree = tree}, 16) != nullptr;
  };
  StaticTree wide, deep;
  wide.add(-1, DraftState::kBranch - 1);
  EXPECT_TRUE(takes(wide));
  wide.add(-1, DraftState::kBranch);
  EXPECT_FALSE(takes(wide));
  for (int i = 0; i < DraftState::kMostDepths; ++i) deep.add(i - 1, 0);
  EXPECT_TRUE(takes(deep));
  deep.add(deep.size() - 1, 0);
  EXPECT_FALSE(takes(deep));
}

TEST(CudaDraft, IsNotForBatches) {
  SKIP_WITHOUT(kStories);
  for (const std::string& device : devices()) {
    const Loaded l = load_on(device, kStories);
    Session session(*l.model, {.context = 16, .n_sequences = 2});
    const auto drafter = drafter_of(kWays[0], *l.model, 16);
    session.start(0, kPrompt, {});
    EXPECT_THROW(session.step(drafter.get()), Error);
    EXPECT_THROW(drafter->draft({*l.backend, 0, 1, kPrompt, 0, 1, 1, nullptr, {}}, nullptr), Error);
  }
  EXPECT_EQ(make_resident_drafter(*load(kStories, "scalar", 1).model, nullptr, {}, 16), nullptr);
}

}  // namespace
}  // namespace chimera::test
