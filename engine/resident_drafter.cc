#include "engine/resident_drafter.h"

#include <algorithm>
#include <vector>

#include "engine/candidate_tree.h"
#include "engine/chimera/draft_model.h"
#include "engine/clock.h"
#include "engine/error.h"

namespace chimera {
namespace {

static_assert(DraftState::kMostCandidates == CandidateTree::kMostNodes);

class Resident final : public ResidentDrafter {
 public:
  Resident(const Llama& target, const DraftTensors* tensors, const ResidentOptions& options,
           int context)
      : target_(target), backend_(target.backend()), ops_(*backend_.tree_ops()), options_(options) {
    const auto vocab = static_cast<size_t>(target.config().vocab_size);
    if (tensors != nullptr) {
      model_ =
          std::make_unique<DraftModel>(target, *tensors, 1, context, DType::kQ4_1, Memory::kDevice);
      config_ = tensors->config;
      // A pass has as many rows as there may be: of a prompt, of a path that was accepted, of a
      // depth. What is not there costs nothing but its share of the grid.
      const int longest = std::min(options.nodes, std::max(options.depth, kMatchDepth));
      prompt_ = model_->make_device_pass(DraftModel::kMaxRows);
      kept_ = model_->make_device_pass(std::min(longest + 2, +DraftModel::kMaxRows));
      grown_ = model_->make_device_pass(options.width);
      vocabulary_.assign(model_->vocabulary().begin(), model_->vocabulary().end());
      known_.resize(vocab);
      for (const int32_t id : vocabulary_) known_[static_cast<size_t>(id)] = 1;
    }
    state_memory_ = backend_.allocate(sizeof(DraftState), Memory::kDevice);
    state_ = static_cast<DraftState*>(state_memory_.get());
    text_memory_ =
        backend_.allocate((static_cast<size_t>(context) + 1) * sizeof(int32_t), Memory::kDevice);
    vocabulary_memory_ = backend_.allocate(
        (vocabulary_.size() + DraftState::kMostDynamic) * sizeof(int32_t), Memory::kDevice);
    known_memory_ = backend_.allocate(known_.size(), Memory::kDevice);
    results_memory_ = backend_.allocate(2 * sizeof(PassResult), Memory::kHost);

    initial_.text = static_cast<int32_t*>(text_memory_.get());
    initial_.context = context;
    initial_.results = static_cast<PassResult*>(results_memory_.get());
    initial_.depth = model_ ? std::min(options.depth, +DraftState::kMostDepths) : 0;
    initial_.width = options.width;
    initial_.min_match = options.min_match;
    initial_.max_match = options.max_match;
    initial_.vocabulary = static_cast<int32_t*>(vocabulary_memory_.get());
    initial_.known = static_cast<uint8_t*>(known_memory_.get());
    initial_.n_static = static_cast<int32_t>(vocabulary_.size());
    set_shape(options.tree);
    for (uint64_t* key : {&prompt_key_, &last_key_, &pass_key_}) *key = backend_.new_key();
  }
  ~Resident() override {
    try {
      backend_.wait(ticket_);
    } catch (const Error&) {  // the device has failed: whoever waited for it has been told
    }
  }
  Resident(const Resident&) = delete;
  Resident& operator=(const Resident&) = delete;

  std::string name() const override {
    if (!options_.tree.empty()) return "static";
    return !model_ ? (options_.nodes == 0 ? "none" : "ngram")
                   : (options_.max_match > 0 ? "hybrid" : "chimera");
  }

  void start(const Target& target, int64_t text, std::span<const int32_t> tokens,
             const Sampling& sampling, const CostCurve* cost) override {
    if (!options_.tree.empty()) cost = nullptr;  // all of it: its shape was the choice
    bind(target);
    initial_.length = static_cast<int32_t>(tokens.size());
    initial_.sampling = sampling;
    initial_.nodes = std::min(options_.nodes, target.max_nodes);
    initial_.has_costs = cost != nullptr;
    for (int rows = 1; cost != nullptr && rows <= Step::kMaxRows; ++rows)
      initial_.seconds[rows] = static_cast<float>(cost->seconds(rows));
    for (int depth = 0; depth < DraftState::kMostDepths; ++depth) {
      const DraftCalibration::Reading read = config_.calibration(depth, sampling.temperature);
      initial_.temperature[depth] = read.temperature;
      initial_.coverage[depth] = read.coverage;
    }
    upload(initial_.text, tokens.data(), tokens.size());
    upload(initial_.vocabulary, vocabulary_.data(), vocabulary_.size());
    upload(initial_.known, known_.data(), known_.size());
    if (cost != nullptr && initial_.nodes > 0 && initial_.drafting_seconds == 0)
      initial_.drafting_seconds = static_cast<float>(time_drafting());
    upload(state_, &initial_, 1);
    text_ = text;
    length_ = tokens.size();
    launched_ = read_ = 0;
  }

  bool follows(int64_t text, size_t length) const override {
    return text == text_ && length == length_;
  }
  int most_rows() const override { return model_ ? DraftModel::kMaxRows - 1 : +Step::kMaxRows; }
  bool ahead() const override { return launched_ > read_; }
  OnDevice on_device() const override { return {step_.get(), state_}; }

  void run(const Target& target, Step* step) override {
    const bool last = step->sequences[0].root >= 0;
    backend_.submit(last ? last_key_ : prompt_key_, [&] {
      target.pass(step);
      observe(target, step, prompt_);
      if (last) draft();
    });
    if (!last) return;
    ++length_;
    launched_ = read_ = 1;  // passes that sampled
    launch(target);
  }

  const PassResult& advance(const Target& target) override {
    const uint64_t before = ticket_;
    launch(target);
    backend_.wait(before);
    const PassResult& result = initial_.results[read_ % 2];
    if (result.number != read_)
      throw Error("pass on the device", "number " + std::to_string(read_),
                  std::to_string(result.number));
    ++read_;
    length_ += static_cast<size_t>(result.emitted);
    return result;
  }

 private:
  void set_shape(const StaticTree& tree) {
    initial_.n_shape = tree.size();
    for (auto& children : initial_.shape) std::fill(std::begin(children), std::end(children), -1);
    for (int i = 0; i < tree.size(); ++i) {
      const StaticTree::Node& node = tree.nodes[static_cast<size_t>(i)];
      initial_.shape[node.parent + 1][node.rank] = static_cast<int16_t>(i);
    }
  }

  // Lists are about the buffers of a session; another one needs others.
  void bind(const Target& target) {
    const int rows = 1 + std::min(options_.nodes, target.max_nodes);
    if (target.states == states_ && rows == rows_) return;
    backend_.wait(ticket_);
    states_ = target.states;
    rows_ = rows;
    step_ = backend_.make_device_step(1, rows);
    for (uint64_t* key : {&prompt_key_, &last_key_, &pass_key_}) *key = backend_.new_key();
  }

  template <typename T>
  void upload(T* to, const T* from, size_t n) {
    if (n > 0) backend_.upload(to, from, n * sizeof(T));
  }

  // Of a step without the target's pass, the best of a few: drafting from nothing takes as long as
  // from anything. What follows a pass is like one depth more.
  double time_drafting() {
    const uint64_t key = backend_.new_key();
    double best = 1;
    for (int repeat = 0; repeat < 5; ++repeat) {
      upload(state_, &initial_, 1);
      const auto begin = Clock::now();
      backend_.submit(key, [&] { draft(); });
      best = std::min(best, seconds_since(begin));
    }
    return model_ ? best * (initial_.depth + 1) / initial_.depth : best;
  }

  void launch(const Target& target) {
    ticket_ = backend_.launch(pass_key_, [&] {
      target.pass(step_.get());
      observe(target, step_.get(), kept_);
      draft();
    });
    ++launched_;
  }

  // ---- Ops: what follows from a pass over `step`, and the next tree ----

  void observe(const Target& target, const Step* step, const DraftPass& pass) {
    ops_.advance(step, state_, pass);
    if (options_.max_match > 0) ops_.learn_matches(step, state_);
    if (!model_) return;
    model_->compute_features(pass, model_->features());
    model_->forward(pass, target.states);
    model_->keep_root(pass, target.states);
    ops_.learn_vocabulary(step, target.logits, target_.config().vocab_size, state_, target_.head(),
                          model_->head());
  }

  void draft() {
    if (options_.nodes > 0) ops_.propose(state_, grown_);
    for (int depth = 0; depth < initial_.depth; ++depth) {
      if (depth > 0) {
        model_->compute_features(grown_, model_->features());
        model_->forward(grown_, model_->f());
      }
      model_->run_head(grown_, depth, model_->root(0).h);
      ops_.top_k(grown_, model_->logits(), model_->logits_stride(), depth, state_);
      ops_.grow(depth, state_, grown_);
    }
    ops_.choose(state_, step_.get());
  }

  const Llama& target_;
  Backend& backend_;
  TreeOps& ops_;
  ResidentOptions options_;
  std::unique_ptr<DraftModel> model_;
  DraftConfig config_;  // of the draft
  DraftPass prompt_, kept_, grown_;
  std::vector<int32_t> vocabulary_;  // the static part
  std::vector<uint8_t> known_;       // by token
  std::shared_ptr<void> state_memory_, text_memory_, vocabulary_memory_, known_memory_,
      results_memory_;
  DraftState* state_;     // on the device
  DraftState initial_{};  // of a text
  std::shared_ptr<Step> step_;

  // The session that it is bound to, and its lists of ops.
  const float* states_ = nullptr;
  int rows_ = 0;
  uint64_t prompt_key_ = 0, last_key_ = 0, pass_key_ = 0;

  int64_t text_ = -1;
  size_t length_ = 0;                // of the text, as far as the host has read it
  int64_t launched_ = 0, read_ = 0;  // passes of this text that sampled
  uint64_t ticket_ = 0;              // of the last launch
};

}  // namespace

void ResidentDrafter::draft(const DraftContext& /*context*/, Step* /*step*/) {
  throw Error("drafter " + name(), "a session that leaves drafting to the device", "another use");
}

std::unique_ptr<ResidentDrafter> make_resident_drafter(const Llama& target,
                                                       const DraftTensors* tensors,
                                                       const ResidentOptions& options,
                                                       int context) {
  if (target.backend().tree_ops() == nullptr) return nullptr;
  const StaticTree& tree = options.tree;
  if (tree.ranks() > DraftState::kBranch || tree.depth() > DraftState::kMostDepths) return nullptr;
  ResidentOptions all = options;
  if (!tree.empty())
    all = {.nodes = tree.size(), .depth = tree.depth(), .width = tree.width(), .tree = tree};
  return std::make_unique<Resident>(target, tensors, all, context);
}

}  // namespace chimera
