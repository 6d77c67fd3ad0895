#include "engine/chimera/chimera_drafter.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstring>
#include <utility>

#include "engine/candidate_tree.h"
#include "engine/clock.h"
#include "engine/ngram_index.h"
#include "engine/sampler.h"
#include "engine/trust.h"
#include "engine/worth.h"

namespace chimera {
namespace {

constexpr int kMostDepths = DraftState::kMostDepths;
constexpr int kBranch = DraftState::kBranch;  // candidates taken from one expanded node
constexpr int kTargetsBest =
    DraftState::kBranch;  // tokens that the target found likely join the dynamic vocabulary

// Of what was expanded at a depth, how much was chosen below it. (Starts as if half of it were.)
struct Yield {
  double expanded = 5, chosen = 2.5;  // sums of path probabilities
  double share() const { return chosen / expanded; }
};

class GrowingDrafter final : public ChimeraDrafter {
 public:
  GrowingDrafter(const Llama& target, const DraftTensors& tensors, const ChimeraOptions& options,
                 int n_sequences, int context)
      : options_(options),
        hidden_(tensors.config.hidden_size),
        model_(target, tensors, n_sequences, context) {
    sequences_.resize(static_cast<size_t>(n_sequences));
    const auto waiting = static_cast<size_t>(kMostWaiting * hidden_);
    waiting_ = target.backend().allocate(sequences_.size() * waiting * 4);
    for (int s = 0; s < n_sequences; ++s) {
      Sequence& seq = sequences_[static_cast<size_t>(s)];
      seq.root = model_.root(s);
      seq.waiting = static_cast<float*>(waiting_.get()) + static_cast<size_t>(s) * waiting;
    }
    if (options.ngrams)
      indexes_.assign(static_cast<size_t>(n_sequences),
                      NgramIndex(kHybridMinMatch, kHybridMaxMatch, context));
    known_.assign(static_cast<size_t>(target.config().vocab_size), 0);
    const auto known = model_.vocabulary();
    for (const int32_t id : known) known_[static_cast<size_t>(id)] = 1;
    n_static_ = known.size();
    vocabulary_.reserve(n_static_ + DraftModel::kMaxDynamic);
    vocabulary_.assign(known.begin(), known.end());
    for (auto* v : {&noise_, &noisy_}) v->resize(n_static_ + DraftModel::kMaxDynamic);
    order_.reserve(1024);
  }
  std::string name() const override {
    return !options_.tree.empty() ? "static" : options_.ngrams ? "hybrid" : "chimera";
  }

  void observe(const KeptRows& k) override {
    const Clock::time_point start = Clock::now();
    Sequence& seq = sequences_[static_cast<size_t>(k.sequence)];
    const int first = k.committed - k.n_kept;  // position of the first kept row
    if (k.text != seq.text) start_text(seq, k.text);
    seq.cut(first);
    if (first < model_.committed(k.sequence)) model_.set_committed(k.sequence, first);
    const bool rests = seq.worth.rests();
    if (rests && seq.n_waiting + k.n_kept <= kMostWaiting) {
      seq.wait(k, first, hidden_);
    } else {
      catch_up(k.sequence, k.tokens);
      absorb(k.sequence, k.tokens, k.states, first, k.n_kept);
    }
    learn_vocabulary(k, first, !rests);
    const Step::Sequence& rows = k.step->sequences[k.sequence];
    if (rows.root != rows.first_row) return;  // a prompt
    seq.trust.observe(k.n_kept - 1);
    if (rests || seq.price > 0) seq.worth.observe(k.n_kept - 1, seq.price, seq.promised);
    seq.price = 0;
    spent_.seconds += seconds_since(start);
    if (!rests) average(seconds_since(start), &observe_seconds_);
  }

  CandidateTree& candidates(const DraftContext& c) override {
    const Clock::time_point start = Clock::now();
    CandidateTree& tree = grow_candidates(c);
    spent_.seconds += seconds_since(start);
    return tree;
  }

  double depth_seconds() const override { return depth_seconds_; }
  double observe_seconds() const override { return observe_seconds_; }
  const Spent& spent() const override { return spent_; }

  void follow(const DraftContext& c, std::span<const int32_t> next,
              FunctionRef<bool(int, std::span<const float>, int)> visit) override {
    const Sequence& seq = sequences_[static_cast<size_t>(c.sequence)];
    if (!ready(c, seq)) return;
    const float* logits = expand_root(c, seq);
    for (int depth = 1; depth <= c.max_depth; ++depth) {
      if (static_cast<size_t>(depth) > next.size()) return;
      const int32_t token = next[static_cast<size_t>(depth - 1)];
      if (!visit(depth, {with_noise(c, logits), vocabulary_.size()}, index_of(token)) ||
          static_cast<size_t>(depth) == next.size() || depth == DraftModel::kMaxRows)
        return;
      const Clock::time_point start = Clock::now();
      model_.step().first_new = model_.step().n_rows;
      add_row(c, depth - 1, token);
      logits = expand_rows(c, depth, seq);
      average(seconds_since(start), &depth_seconds_);
    }
  }

 private:
  // Rows of a rest: what waits costs nothing yet, and nothing at all if the text ends.
  static constexpr int kMostWaiting = 256;

  struct Sequence {
    int64_t text = -1;
    DraftModel::Root root{};
    int expanded = 0;  // committed length that the model has seen; 0: nothing to draft from
    Trust trust{};
    Worth worth{};
    double price = 0;          // of the last tree, in plain steps; 0 where costs are not known, ...
    double promised = 0;       // ... and tokens that it promised
    float* waiting = nullptr;  // states of the rows that wait, kMostWaiting, which an op will read
    int first_waiting = 0, n_waiting = 0;

    void wait(const KeptRows& k, int first, int64_t width) {
      if (n_waiting == 0) first_waiting = first;
      std::copy_n(k.states, k.n_kept * width, waiting + n_waiting * width);
      n_waiting += k.n_kept;
    }
    // The text goes on from position `first`, behind all that waits if it was not cut.
    void cut(int first) { n_waiting = std::clamp(first - first_waiting, 0, n_waiting); }
  };

  // What the target has computed while drafting rested.
  void catch_up(int sequence, std::span<const int32_t> tokens) {
    Sequence& seq = sequences_[static_cast<size_t>(sequence)];
    absorb(sequence, tokens, seq.waiting, seq.first_waiting, std::exchange(seq.n_waiting, 0));
  }

  // Kept rows, n from position `first` on, bring a slot each; the last one also belongs to the next
  // root, whose f is what the first depth is drafted from. Rows go through in the order of the
  // text.
  void absorb(int sequence, std::span<const int32_t> tokens, const float* states, int first,
              int n_kept) {
    Sequence& seq = sequences_[static_cast<size_t>(sequence)];
    for (int done = 0; done < n_kept;) {
      const int n = std::min(n_kept - done, DraftModel::kMaxRows - 1);
      const int p = first + done;  // position of the state of the first row of this pass
      int32_t trigrams[3 * DraftModel::kMaxRows];
      for (int i = 0; i <= n; ++i) trigram(tokens, p + i, trigrams + 3 * i);
      // Features of positions p .. p + n; row i stands for the token at p + i, i > 0.
      model_.fill_features(0, n + 1, trigrams);
      Step& step = model_.step();
      step.clear();
      step.n_rows = step.first_new = 1;
      step.begin_sequence(sequence);
      for (int i = 1; i <= n; ++i) {
        step.add_row(tokens[static_cast<size_t>(p + i)], i == 1 ? -1 : i - 1, false);
        model_.link(i, i - 1, i - 1);
      }
      model_.append(model_.pass(), states + int64_t{done} * hidden_);
      done += n;
      if (done == n_kept) {
        step.first_new = n;  // nobody asks for the f of the others
        model_.encode(model_.pass());
        std::memcpy(seq.root.h, states + int64_t{done - 1} * hidden_, row_bytes());
        std::memcpy(seq.root.f, model_.f(n), row_bytes());
        std::memcpy(seq.root.feature, model_.feature(n), feature_bytes());
        seq.expanded = first + n_kept;
      }
      model_.set_committed(sequence, p + n);
    }
  }

  CandidateTree& grow_candidates(const DraftContext& c) {
    Sequence& seq = sequences_[static_cast<size_t>(c.sequence)];
    tree_.clear();
    const int budget = std::min(c.max_nodes, options_.nodes);
    if (budget <= 0 || c.max_depth <= 0) return tree_;
    if (!options_.tree.empty()) {
      if (ready(c, seq)) grow_static(c, seq);
      tree_.choose(budget, c.max_depth, nullptr, 0, 1);  // all of it: its shape was the choice
      return tree_;
    }
    const bool rests = seq.worth.rests();
    if (!rests && seq.text == c.text) catch_up(c.sequence, c.tokens);
    // As if observe() had been part of it: the step pays for both.
    const Clock::time_point start =
        Clock::now() - std::chrono::duration_cast<Clock::duration>(
                           std::chrono::duration<double>(rests ? 0 : observe_seconds_));
    if (options_.ngrams)
      propose_ngrams(indexes_[static_cast<size_t>(c.sequence)], c.text, c.tokens, kHybridMinMatch,
                     kHybridMaxMatch, c.sampling.temperature, &tree_);
    if (!rests && ready(c, seq)) grow(c, seq, budget, start);
    tree_.choose(budget, c.max_depth, c.cost, seconds_since(start), seq.trust.share());
    seq.trust.promised += tree_.promised();
    learn_yields();
    if (c.cost != nullptr && !rests) {
      const double plain = c.cost->seconds(1),
                   pass = c.cost->seconds(1 + static_cast<int>(tree_.chosen().size()));
      seq.price = (seconds_since(start) + pass - plain) / plain;
      seq.promised = tree_.expected_tokens() - 1;
    }
    return tree_;
  }

  // A new text: what an earlier one taught is forgotten, so that a run can be repeated step by
  // step.
  void start_text(Sequence& seq, int64_t text) {
    seq.text = text;
    seq.expanded = seq.n_waiting = 0;
    seq.trust = {};
    seq.worth = {};
    seq.price = 0;
    if (sequences_.size() > 1) return;  // the vocabulary is everybody's
    for (size_t i = n_static_; i < vocabulary_.size(); ++i)
      known_[static_cast<size_t>(vocabulary_[i])] = 0;
    vocabulary_.resize(n_static_);
    learnt_ = written_ = 0;
  }

  size_t row_bytes() const { return static_cast<size_t>(hidden_) * 4; }
  size_t feature_bytes() const { return static_cast<size_t>(model_.feature_size()) * 4; }

  static void trigram(std::span<const int32_t> tokens, int position, int32_t* out) {
    for (int i = 0; i < 3; ++i) out[i] = tokens[static_cast<size_t>(std::max(0, position - 2 + i))];
  }

  // Tokens of the text, and those that the target found likely, can be proposed from now on. In the
  // order of the text, however many rows a step kept: so the oldest are the same.
  void learn_vocabulary(const KeptRows& k, int first, bool likely) {
    if (first == 0) learn(k.tokens[0]);
    const Step::Sequence& seq = k.step->sequences[k.sequence];
    for (int r = seq.first_row; r < seq.first_row + seq.n_rows; ++r) {
      if (k.step->kept_at[r] < 0) continue;
      learn(k.tokens[static_cast<size_t>(k.step->kept_at[r] + 1)]);
      if (!likely || k.step->logits_index[r] < 0) continue;
      const float* logits = k.logits + int64_t{k.step->logits_index[r]} * k.vocab;
      int32_t best[kTargetsBest] = {};
      const int n = ops_.top_k(logits, k.vocab, kTargetsBest, best);
      for (int i = 0; i < n; ++i) learn(best[i]);
    }
  }
  void learn(int32_t token) {
    if (known_[static_cast<size_t>(token)]) return;
    known_[static_cast<size_t>(token)] = 1;
    const size_t at = n_static_ + learnt_++ % DraftModel::kMaxDynamic;
    if (at == vocabulary_.size()) {
      vocabulary_.push_back(token);
    } else {
      known_[static_cast<size_t>(vocabulary_[at])] = 0;
      vocabulary_[at] = token;
    }
  }
  // The head learns them when it is next needed: neighbours together, and in a rest none.
  void write_vocabulary() {
    size_t n = std::min<size_t>(learnt_ - written_, DraftModel::kMaxDynamic);
    for (written_ = learnt_; n > 0;) {
      const size_t row = (learnt_ - n) % DraftModel::kMaxDynamic,
                   run = std::min(n, DraftModel::kMaxDynamic - row);
      model_.set_dynamic(static_cast<int>(row),
                         std::span(vocabulary_).subspan(n_static_ + row, run));
      n -= run;
    }
  }

  // Where a token stands in the logits, -1: it cannot be proposed.
  int index_of(int32_t token) const {
    const auto it = std::find(vocabulary_.begin(), vocabulary_.end(), token);
    return it == vocabulary_.end() ? -1 : static_cast<int>(it - vocabulary_.begin());
  }

  // The noise that the target will add where it chooses the tokens `depth` + 1 below the root.
  void draw_noise(const DraftContext& c, int depth) {
    if (c.sampling.temperature >= kLeastTemperature)
      ops_.gumbel(vocabulary_.data(), 0, static_cast<int64_t>(vocabulary_.size()), c.sampling.seed,
                  static_cast<int64_t>(c.tokens.size()) + depth, noise_.data());
  }
  // A row of logits with that noise. Cuts of the distribution are the target's business: a token
  // that it cuts has little probability here as well.
  const float* with_noise(const DraftContext& c, const float* logits) {
    const float temperature = c.sampling.temperature;
    if (temperature < kLeastTemperature) return logits;
    for (size_t i = 0; i < vocabulary_.size(); ++i) noisy_[i] = logits[i] + temperature * noise_[i];
    return noisy_.data();
  }

  // Follows a duration: quickly down and slowly up, since whatever else the machine does only adds.
  static void average(double seconds, double* mean) {
    const double change = std::min(seconds, 2 * *mean) - *mean;
    *mean = *mean > 0 ? *mean + change / (change > 0 ? 16 : 4) : seconds;
  }

  // Adds candidates below a node `depth` below the root that was expanded, from its row of the
  // logits: the n likeliest, or those of the ranks that wanted(rank) says. added(rank, candidate).
  template <typename Wanted, typename Added>
  void propose(int parent, int depth, const DraftContext& c, const float* plain_logits, int n,
               const Wanted& wanted, const Added& added) {
    const float* logits = with_noise(c, plain_logits);
    const auto width = static_cast<int64_t>(vocabulary_.size());
    int32_t best[StaticTree::kMostRanks] = {};
    n = ops_.top_k(logits, width, n, best);
    const DraftCalibration::Reading read =
        model_.config().calibration(depth, c.sampling.temperature);
    const float scale = 1 / read.temperature;
    const float largest = logits[best[0]];
    const float sum = ops_.sum_of_exp(logits, width, largest, scale);
    const float above = tree_.probability_of(parent), others = tree_.discount_matches(parent);
    for (int i = 0; i < n; ++i) {
      if (!wanted(i)) continue;
      const float p =
          above * others * read.coverage * std::exp((logits[best[i]] - largest) * scale) / sum;
      // A damaged target's states may be no numbers; trees are sorted by probability.
      added(i, tree_.add_drafted(parent, vocabulary_[static_cast<size_t>(best[i])],
                                 std::isnan(p) ? 0.0f : p));
    }
  }
  void propose(int parent, int depth, const DraftContext& c, const float* logits) {
    propose(
        parent, depth, c, logits, kBranch, [](int) { return true; }, [](int, int) {});
  }

  // Whether observe() has seen the text as far as its root.
  static bool ready(const DraftContext& c, const Sequence& seq) {
    return seq.text == c.text && seq.expanded == static_cast<int>(c.tokens.size()) - 1;
  }

  // Starts the draft's step. Row 0 stands for the root, which observe() has run: it is no row of
  // the sequence, so that the tree's rows are contiguous, and its slot is committed. Returns its
  // logits.
  const float* expand_root(const DraftContext& c, const Sequence& seq) {
    ++spent_.steps;
    ++spent_.depths;
    write_vocabulary();
    Step& step = model_.step();
    std::memcpy(model_.f(0), seq.root.f, row_bytes());
    std::memcpy(model_.feature(0), seq.root.feature, feature_bytes());
    step.clear();
    step.n_rows = 1;
    step.token[0] = c.tokens.back();
    step.begin_sequence(c.sequence);
    draw_noise(c, 0);
    model_.run_head(model_.pass(), 0, seq.root.h);
    return model_.logits(0);
  }

  // Adds a row for `token` after the token of row `parent`.
  int add_row(const DraftContext& c, int parent, int32_t token) {
    Step& step = model_.step();
    const int row = step.add_row(token, parent == 0 ? -1 : parent, false);
    int32_t* t = trigrams_ + 3 * (row - step.first_new);
    t[2] = token;
    t[1] = step.token[parent];
    t[0] = parent == 0 ? c.tokens[c.tokens.size() - std::min<size_t>(2, c.tokens.size())]
                       : step.token[std::max(0, step.parent[parent])];
    model_.link(row, parent, parent);
    return row;
  }

  // Runs the rows added since step.first_new, which stand `depth` below the root; their logits.
  // Draws the noise of what comes below them.
  const float* expand_rows(const DraftContext& c, int depth, const Sequence& seq) {
    ++spent_.depths;
    const int first = model_.step().first_new;
    model_.fill_features(first, model_.step().n_rows - first, trigrams_);
    model_.forward(model_.pass(), model_.f());
    draw_noise(c, depth);
    model_.run_head(model_.pass(), depth, seq.root.h);
    return model_.logits(first);
  }

  // Grows the tree depth by depth with the draft model.
  void grow(const DraftContext& c, const Sequence& seq, int budget, Clock::time_point start) {
    Step& step = model_.step();
    propose(CandidateTree::kRoot, 0, c, expand_root(c, seq));
    const int depths = std::min({options_.depth, c.max_depth, kMostDepths});
    for (int depth = 1; depth < depths; ++depth) {
      const auto order = tree_.worth_expanding(
          depth, budget,
          static_cast<size_t>(std::min(options_.width, DraftModel::kMaxRows - step.n_rows)));
      if (order.empty()) return;
      if (c.cost != nullptr && !pays(c, seq, depth, order, budget, seconds_since(start))) return;
      const Clock::time_point depth_start = Clock::now();
      step.first_new = step.n_rows;
      for (const int i : order) {
        const int parent = tree_[i].parent;
        tree_[i].row =
            add_row(c, parent == CandidateTree::kRoot ? 0 : tree_[parent].row, tree_[i].token);
      }
      const float* logits = expand_rows(c, depth, seq);
      for (size_t i = 0; i < order.size(); ++i)
        propose(order[i], depth, c, logits + static_cast<int64_t>(i) * model_.logits_stride());
      average(seconds_since(depth_start), &depth_seconds_);
    }
  }

  // Whether drafting below the nodes in order, `depth` below the root, is expected to give more
  // tokens for its time than the step gives without it.
  bool pays(const DraftContext& c, const Sequence& seq, int depth, std::span<const int> order,
            int budget, double drafting) {
    const float trust = seq.trust.share();
    tree_.choose(budget, c.max_depth, c.cost, drafting, trust);
    double mass = 0;
    for (const int i : order) mass += static_cast<double>(tree_[i].probability);
    const double seconds = drafting + c.cost->seconds(1 + static_cast<int>(tree_.chosen().size()));
    if (mass * static_cast<double>(trust) * yields_[static_cast<size_t>(depth)].share() * seconds >=
        depth_seconds_ * tree_.expected_tokens())
      return true;
    // Now and then it is tried all the same: what is not done is not measured, and one slow pass
    // must not end drafting for good.
    constexpr int kTryEvery = 8;
    return ++declined_ % kTryEvery == 0;
  }

  // Keeps account of what became of expanded nodes: pays() counts on it to go on so.
  void learn_yields() {
    for (int i = 0; i < tree_.size(); ++i)
      if (tree_[i].row >= 0)
        yields_[static_cast<size_t>(tree_[i].depth)].expanded +=
            static_cast<double>(tree_[i].probability);
    for (const int i : tree_.chosen()) {
      const int parent = tree_[i].parent;
      if (parent != CandidateTree::kRoot && tree_[parent].row >= 0)
        yields_[static_cast<size_t>(tree_[parent].depth)].chosen +=
            static_cast<double>(tree_[i].probability);
    }
  }

  // Fills the given shape with the draft's guesses.
  void grow_static(const DraftContext& c, const Sequence& seq) {
    const StaticTree& shape = options_.tree;
    Step& step = model_.step();
    static_at_.assign(shape.nodes.size(), CandidateTree::kNone);
    const auto fill = [&](int parent, const float* logits) {  // parent: of the shape, -1: the root
      const bool root = parent < 0;
      const int depth = root ? 0 : shape.nodes[static_cast<size_t>(parent)].depth;
      propose(
          root ? CandidateTree::kRoot : static_at_[static_cast<size_t>(parent)], depth, c, logits,
          StaticTree::kMostRanks, [&](int rank) { return shape.find(parent, rank) >= 0; },
          [&](int rank, int candidate) {
            static_at_[static_cast<size_t>(shape.find(parent, rank))] = candidate;
          });
    };
    fill(-1, expand_root(c, seq));
    const int depths = std::min(shape.depth(), c.max_depth);
    for (int depth = 1; depth < depths; ++depth) {
      order_.clear();  // nodes of the shape that have children
      for (int i = 0; i < shape.size(); ++i) {
        const int parent = shape.nodes[static_cast<size_t>(i)].parent;
        if (parent >= 0 && shape.nodes[static_cast<size_t>(parent)].depth == depth &&
            static_at_[static_cast<size_t>(parent)] != CandidateTree::kNone &&
            std::find(order_.begin(), order_.end(), parent) == order_.end())
          order_.push_back(parent);
      }
      if (order_.empty()) return;
      step.first_new = step.n_rows;
      for (const int i : order_) {
        CandidateTree::Node& node = tree_[static_at_[static_cast<size_t>(i)]];
        const int parent = node.parent;
        node.row = add_row(c, parent == CandidateTree::kRoot ? 0 : tree_[parent].row, node.token);
      }
      const float* logits = expand_rows(c, depth, seq);
      for (size_t i = 0; i < order_.size(); ++i)
        fill(order_[i], logits + static_cast<int64_t>(i) * model_.logits_stride());
    }
  }

  ChimeraOptions options_;
  const SamplingOps& ops_ = sampling_ops();
  int hidden_;
  DraftModel model_;
  std::shared_ptr<void> waiting_;
  std::vector<Sequence> sequences_;
  std::vector<NgramIndex> indexes_;
  std::vector<int32_t> vocabulary_;  // what can be proposed: n_static_ tokens, then dynamic ones
  size_t n_static_ = 0;
  size_t learnt_ = 0;           // dynamic ones of this text; the last kMaxDynamic are there, ...
  size_t written_ = 0;          // ... and those up to this one in the model's head
  std::vector<uint8_t> known_;  // by token: in the vocabulary
  std::vector<float> noise_, noisy_;  // (vocabulary)
  CandidateTree tree_;
  std::vector<int> order_;
  int32_t trigrams_[3 * DraftModel::kMaxRows];      // of the rows being added
  std::vector<int> static_at_;                      // candidates of the given shape's nodes
  int declined_ = 0;                                // times that pays() said no
  double depth_seconds_ = 0, observe_seconds_ = 0;  // averaged over the last ones
  Spent spent_;

  std::array<Yield, kMostDepths + 1> yields_;  // by the depth of what was expanded
};

}  // namespace

std::unique_ptr<ChimeraDrafter> make_chimera_drafter(const Llama& target,
                                                     const DraftTensors& tensors,
                                                     const ChimeraOptions& options, int n_sequences,
                                                     int context) {
  return std::make_unique<GrowingDrafter>(target, tensors, options, n_sequences, context);
}

}  // namespace chimera
