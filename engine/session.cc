#include "engine/session.h"

#include <algorithm>
#include <utility>

#include "engine/clock.h"
#include "engine/error.h"
#include "engine/resident_drafter.h"
#include "engine/rope.h"

namespace chimera {
namespace {

// Offsets of a session's buffers.
struct Layout {
  MemoryPlan plan;
  // The host may read `states` and what follows; the rest is the device's.
  size_t kv, rope_cos, rope_sin, hidden, qkv, attended, gate_up, states, logits;
  int max_rows, max_logits;
  KvShape kv_shape;
};

Layout lay_out(const LlamaConfig& c, const Backend& backend, const SessionOptions& o) {
  const auto require = [](bool ok, const char* name, const std::string& expected, int64_t found) {
    if (!ok) throw Error(name, expected, std::to_string(found));
  };
  require(o.context >= 1 && o.context <= (1 << 20), "context", "1 to 1048576 tokens", o.context);
  require(o.n_sequences >= 1 && o.n_sequences <= Step::kMaxSequences, "sequences",
          "1 to " + std::to_string(Step::kMaxSequences), o.n_sequences);
  require(o.max_nodes >= 0 && o.max_nodes < Step::kMaxRows / o.n_sequences, "nodes",
          "0 to " + std::to_string(Step::kMaxRows / o.n_sequences - 1), o.max_nodes);
  require(o.prefill_rows >= 1 && o.prefill_rows <= Step::kMaxRows, "prefill rows",
          "1 to " + std::to_string(Step::kMaxRows), o.prefill_rows);
  if (o.kv_type != DType::kF16 && o.kv_type != DType::kF32)
    throw Error("KV type", "F16 or F32", dtype_info(o.kv_type).name);
  require(c.head_dim <= kMaxHeadDim, "head_dim", "at most " + std::to_string(kMaxHeadDim),
          c.head_dim);

  Layout l;
  l.max_logits = o.n_sequences * (o.max_nodes + 1);
  l.max_rows = std::max(o.prefill_rows, l.max_logits);
  const int64_t rows = l.max_rows, positions = o.context, half = c.head_dim / 2;
  l.kv_shape = {o.kv_type,  c.n_layers,    c.n_kv_heads,
                c.head_dim, o.n_sequences, o.context + l.max_rows};
  l.kv =
      l.plan.add("kv cache",
                 "(" + std::to_string(c.n_layers) + " layers, " + std::to_string(o.n_sequences) +
                     " sequences, " + std::to_string(c.n_kv_heads) + " heads, " +
                     std::to_string(l.kv_shape.capacity) + " slots, 2 x " +
                     std::to_string(c.head_dim) + ") " + (o.kv_type == DType::kF16 ? "f16" : "f32"),
                 backend.kv_bytes(l.kv_shape));
  l.rope_cos = l.plan.add_f32("rope cos", positions, half);
  l.rope_sin = l.plan.add_f32("rope sin", positions, half);
  l.hidden = l.plan.add_f32("hidden", rows, c.hidden_size);
  l.qkv = l.plan.add_f32("q, k, v", rows, c.q_size() + 2 * c.kv_size());
  l.attended = l.plan.add_f32("attended", rows, c.q_size());
  l.gate_up = l.plan.add_f32("gate, up", rows, 2 * int64_t{c.ffn_size});
  l.states = l.plan.add_f32("states", rows, c.hidden_size);
  l.logits = l.plan.add_f32("logits", l.max_logits, c.vocab_size);
  return l;
}

}  // namespace

MemoryPlan Session::plan(const LlamaConfig& config, const Backend& backend,
                         const SessionOptions& options) {
  return lay_out(config, backend, options).plan;
}

void Session::reserve(const LlamaConfig& c, Backend& backend, const SessionOptions& options) {
  const Layout l = lay_out(c, backend, options);
  backend.reserve(l.max_rows, l.kv_shape.capacity,
                  std::max({c.hidden_size, c.ffn_size, c.q_size()}),
                  {c.n_heads, c.n_kv_heads, c.head_dim}, c.vocab_size);
}

Session::Session(const Llama& model, const SessionOptions& options)
    : model_(model), options_(options) {
  const LlamaConfig& c = model.config();
  Backend& backend = model.backend();
  const Layout l = lay_out(c, backend, options);
  max_rows_ = l.max_rows;
  device_memory_ = backend.allocate(l.states, Memory::kDevice);
  shared_memory_ = backend.allocate(l.plan.total() - l.states);
  auto *base = static_cast<std::byte*>(device_memory_.get()),
       *shared = static_cast<std::byte*>(shared_memory_.get());
  const auto floats = [&](size_t offset) {
    return reinterpret_cast<float*>(offset < l.states ? base + offset
                                                      : shared + (offset - l.states));
  };
  step_memory_ = backend.make_step(options.n_sequences);
  step_ = step_memory_.get();
  kv_ = backend.bind_kv(l.kv_shape, base + l.kv);
  activations_ = {floats(l.hidden),
                  floats(l.qkv),
                  floats(l.attended),
                  floats(l.gate_up),
                  floats(l.states),
                  floats(l.logits),
                  {floats(l.rope_cos), floats(l.rope_sin)}};

  const auto table = static_cast<size_t>(options.context) * static_cast<size_t>(c.head_dim / 2);
  std::vector<float> cos(table), sin(table);
  fill_rope_table(c, options.context, cos.data(), sin.data());
  backend.upload(floats(l.rope_cos), cos.data(), table * 4);
  backend.upload(floats(l.rope_sin), sin.data(), table * 4);
  reserve(c, backend, options);

  texts_.resize(static_cast<size_t>(options.n_sequences));
  for (Text& text : texts_) text.tokens.reserve(static_cast<size_t>(options.context) + 1);
}

void Session::start(int sequence, std::span<const int32_t> prompt, const Sampling& sampling) {
  check(sampling);
  if (prompt.empty()) throw Error("prompt", "at least one token", "none");
  if (static_cast<int64_t>(prompt.size()) > options_.context)
    throw Error("prompt", "at most " + std::to_string(options_.context) + " tokens (the context)",
                std::to_string(prompt.size()), "shorten it, or ask for more context");
  for (const int32_t id : prompt)
    if (id < 0 || id >= model_.config().vocab_size)
      throw Error("prompt", "token ids below " + std::to_string(model_.config().vocab_size),
                  std::to_string(id));
  Text& text = texts_[static_cast<size_t>(sequence)];
  text.tokens.assign(prompt.begin(), prompt.end());
  // Not counted here: a drafter may go from one Session to another.
  text.number = static_cast<int64_t>(model_.backend().new_key());
  text.active = true;
  text.emitted = text.drafted = 0;
  step_->sequences[sequence].committed = 0;
  step_->sequences[sequence].sampling = sampling;
}

void Session::truncate(int sequence, int n) {
  Text& text = texts_[static_cast<size_t>(sequence)];
  text.tokens.resize(std::min(text.tokens.size(), static_cast<size_t>(n)));
  int32_t& committed = step_->sequences[sequence].committed;
  committed = std::min(committed, static_cast<int32_t>(text.tokens.size()) - 1);
}

int Session::pending(int sequence) const {
  const Text& text = texts_[static_cast<size_t>(sequence)];
  if (!text.active || full(sequence)) return 0;
  return static_cast<int>(text.tokens.size()) - step_->sequences[sequence].committed;
}

void Session::fill_step(Drafter* drafter, int most_rows) {
  step_->clear();
  // Rows for prompts: what the sequences that decode leave over. There is always some, since
  // every sequence brings room for a root and its candidates.
  int room = most_rows;
  for (int s = 0; s < options_.n_sequences; ++s)
    if (pending(s) == 1) room -= options_.max_nodes + 1;
  for (int s = 0; s < options_.n_sequences; ++s) {
    Text& text = texts_[static_cast<size_t>(s)];
    text.emitted = text.drafted = 0;
    const int waiting = pending(s);
    const int take = waiting > 1 ? std::min(waiting, room) : waiting;
    if (take == 0) continue;
    if (waiting > 1) room -= take;
    step_->begin_sequence(s);
    int row = -1;
    for (int i = 0; i < take; ++i) {
      const bool last = i + 1 == waiting;
      row = step_->add_row(text.tokens[static_cast<size_t>(step_->sequences[s].committed + i)], row,
                           last);
      if (last) step_->set_root(row);
    }
    cost_.at_context(step_->sequences[s].committed);
    if (drafter != nullptr && waiting == 1) {
      const int max_depth = options_.context - static_cast<int>(text.tokens.size());
      drafter->draft({model_.backend(), s, text.number, text.tokens, row, options_.max_nodes,
                      max_depth, cost_.known() ? &cost_ : nullptr, step_->sequences[s].sampling},
                     step_);
      text.drafted = step_->n_rows - row - 1;
    }
  }
}

void Session::pass() {
  model_.backend().submit(reinterpret_cast<uintptr_t>(step_), [this] {
    forward();
    accept_and_keep();
  });
}

bool Session::step(Drafter* drafter) {
  if (drafter != nullptr && drafter->resident() != nullptr)
    return step_resident(*drafter->resident());
  // Trees are sized by what they cost beside a plain step, and so one is taken now and then.
  const bool plain = drafter != nullptr && cost_.known() && until_plain_ <= 0;
  fill_step(plain ? nullptr : drafter, max_rows_);
  if (step_->n_rows == 0) return false;
  const Clock::time_point start = Clock::now();
  pass();
  if (step_->n_logits == step_->n_rows) {  // no prompt among them
    cost_.learn(step_->n_rows, seconds_since(start));
    --until_plain_;
    if (plain || step_->n_rows == 1) until_plain_ = kPlainEvery;  // 1: nothing was proposed
  }
  for (int s = 0; s < options_.n_sequences; ++s) {
    read_back(s);
    const Step::Sequence& seq = step_->sequences[s];
    if (drafter != nullptr && seq.n_rows > 0 && seq.n_kept > 0)
      drafter->observe({s, texts_[static_cast<size_t>(s)].number,
                        texts_[static_cast<size_t>(s)].tokens, seq.n_kept, seq.committed,
                        activations_.states + int64_t{seq.first_row} * model_.config().hidden_size,
                        step_, activations_.logits, model_.config().vocab_size});
  }
  return true;
}

bool Session::step_resident(ResidentDrafter& drafter) {
  if (options_.n_sequences != 1)
    throw Error("drafter " + drafter.name() + " on the device", "one sequence",
                std::to_string(options_.n_sequences));
  Text& text = texts_[0];
  text.emitted = text.drafted = 0;
  if (pending(0) == 0) return false;
  const auto ops = [this](Step* step) {
    model_.forward(step, kv_, activations_);
    accept_and_keep(step);
  };
  const ResidentDrafter::Target target{activations_.states, activations_.logits, options_.max_nodes,
                                       ops};
  Step::Sequence& s = step_->sequences[0];
  if (!drafter.follows(text.number, text.tokens.size())) {
    cost_.at_context(static_cast<int>(text.tokens.size()));
    drafter.start(target, text.number, text.tokens, s.sampling, cost_.known() ? &cost_ : nullptr);
  }
  if (drafter.ahead()) {
    const PassResult& pass = drafter.advance(target);
    text.tokens.insert(text.tokens.end(), pass.token, pass.token + pass.emitted);
    text.emitted = pass.emitted;
    text.drafted = pass.drafted;
    s.committed = static_cast<int32_t>(text.tokens.size()) - 1;
  } else {
    fill_step(nullptr, std::min(max_rows_, drafter.most_rows()));
    drafter.run(target, step_);
    read_back(0);
  }
  return true;
}

double Session::time_pass(int rows, int context) {
  constexpr double kEnough = 0.1;  // seconds
  constexpr int kMost = 5;
  int32_t& committed = step_->sequences[0].committed;
  const int32_t before = std::exchange(committed, context);
  Step* step = step_;
  uint64_t key = reinterpret_cast<uintptr_t>(step_) + 1;
  // A list over a Step of the device is launched alike for every tree, for the largest: so each
  // tree is timed in it.
  Backend& backend = model_.backend();
  if (backend.tree_ops() != nullptr && options_.n_sequences == 1) {
    if (timed_step_ == nullptr) {
      timed_step_ = backend.make_device_step(1, options_.max_nodes + 1);
      timed_key_ = backend.new_key();
    }
    step = timed_step_.get();
    key = timed_key_;
  }
  double least = 0, spent = 0;
  for (int i = 0; i < kMost && (i < 2 || spent < kEnough); ++i) {
    step_->clear();
    step_->begin_sequence(0);
    // A tree: the rows of a chain stand where their positions are, which spares attention a search.
    for (int r = 0; r < rows; ++r) step_->add_row(0, r > 0 ? (r - 1) / 2 : -1, true);
    if (step != step_) backend.upload(step, step_, sizeof(Step));
    const Clock::time_point start = Clock::now();
    backend.submit(key, [this, step] { model_.forward(step, kv_, activations_); });
    const double seconds = seconds_since(start);
    spent += seconds;
    least = i == 0 ? seconds : std::min(least, seconds);
  }
  step_->clear();
  committed = before;
  return least;
}

double Session::plain_seconds() {
  constexpr double kEnough = 0.1;
  constexpr size_t kMost = 64;
  Text& text = texts_[0];
  const bool active = std::exchange(text.active, true);
  const CostCurve learnt = cost_;
  std::vector<double> seconds;
  for (double spent = 0; spent < kEnough && seconds.size() < kMost; spent += seconds.back()) {
    truncate(0, static_cast<int>(text.tokens.size()) - 1);
    const Clock::time_point start = Clock::now();
    step(nullptr);
    seconds.push_back(seconds_since(start));
  }
  cost_ = learnt;
  text.active = active;
  std::sort(seconds.begin(), seconds.end());
  return seconds[seconds.size() / 2];
}

void Session::measure_cost() {
  measure_attention();
  const Clock::time_point start = Clock::now();
  // All of the range first, then what lies between: a slow model's passes are too long for more.
  // And once more as far as time allows, so that a disturbed while is not all that is known of a
  // size.
  for (int round = 0; round < 2; ++round) {
    for (const int rows : {1, 2, 4, 8, 16, 32, 64, 3, 5, 6, 9, 12, 24, 48}) {
      if (rows > std::min(options_.max_nodes + 1, options_.context)) continue;
      if (cost_.known() && seconds_since(start) > std::max(0.4, 10 * cost_.measured(1))) return;
      const double before = cost_.measured(rows), seconds = time_pass(rows);
      cost_.set(rows, before > 0 ? std::min(before, seconds) : seconds);
    }
  }
}

// Where passes are long, weights are many beside a text of this length.
void Session::measure_attention() {
  constexpr double kLong = 0.05;  // seconds
  const int rows = std::min(options_.max_nodes + 1, 8),
            far = std::min(options_.context, kMeasuredContext) - rows;
  if (rows < 2 || far < 64 || time_pass(1) > kLong) return;
  const auto further = [&](int context) {
    return time_pass(rows, context) - time_pass(1, context);
  };
  cost_.set_attention((further(far) - further(0)) / ((rows - 1) * far));
}

void Session::accept_and_keep(Step* step) {
  Backend& backend = model_.backend();
  const LlamaConfig& c = model_.config();
  backend.accept(step, activations_.logits, c.vocab_size);
  backend.keep(step, kv_);
  backend.keep_rows(step, c.hidden_size, activations_.states);
}

// Appends what the step accepted and sampled to the text.
void Session::read_back(int sequence) {
  const Step::Sequence& s = step_->sequences[sequence];
  Text& text = texts_[static_cast<size_t>(sequence)];
  if (s.n_rows == 0 || s.root < 0) return;
  for (int r = s.root + 1; r < s.first_row + s.n_rows; ++r) {
    if (step_->kept_at[r] < 0) continue;
    text.tokens.push_back(step_->token[r]);
    ++text.emitted;
  }
  text.tokens.push_back(s.next);
  ++text.emitted;
}

}  // namespace chimera
