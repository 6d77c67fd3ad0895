// The CUDA backend: the ops of backend.h as launches of the kernels beside this file. It is written
// over runtime.cuh, so that the whole of it also runs under the emulator, and is compiled twice:
// cuda_backend.cu for the device, emulated_backend.cc for the tests.
//
// # The Step
// The engine's Step is memory that the host writes. The kernels read a copy in device memory: the
// first op of a submit() that names a Step sends it over, and what accept() changed comes back at
// the end. Ops outside a submit() do both for themselves and wait (debugging, tests). A Step of
// make_device_step() is never copied: ops read it where the ops before them wrote it, and its grids
// are sized once and for all.
//
// # Graphs
// Key 0 runs the ops as they come, with grids as large as the step. For other keys there is a graph
// for each bucket of rows (up to 8, 32, 64, kMaxRows) that steps have had: the first step of a
// bucket runs the ops as they come (which loads every kernel), the second captures them, and all
// further ones replay the graph without running `ops` at all: what varies must be in the Step.
// Grids fit the largest step of the bucket, and the longest context; blocks without work return.
//
// A list over device Steps alone has one graph. Two of its launches may be under way: launch()
// marks the stream with an event that wait() waits for, so the host is told of a step while the
// next one runs, and the device never waits for the host.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cuda/accept.cuh"
#include "cuda/attention.cuh"
#include "cuda/likely.cuh"
#include "cuda/rows.cuh"
#include "cuda/tree.cuh"
#include "engine/backend.h"
#include "engine/error.h"
#include "engine/tree_ops.h"

namespace chimera::cuda {
inline namespace CHIMERA_CUDA_BODY {

struct DeviceDelete {
  void operator()(void* p) const { free_device(p); }
};
using DeviceMemory = std::unique_ptr<void, DeviceDelete>;

class CudaMatrix final : public Matrix {
 public:
  struct Segment {
    DType type;
    int64_t rows, first_row;
    DeviceMemory tape;
  };
  std::vector<Segment> segments;
  bool needs_f32 = false, needs_f16 = false, needs_bf16 = false;
  int64_t partials_a_token = 0, counters = 0;  // scratch of a product: floats, words
};

class CudaBackend final : public Backend, public TreeOps {
 public:
  CudaBackend(std::string isa, std::string description, bool eager)
      : isa_(std::move(isa)),
        description_(std::move(description)),
        eager_(eager),
        stream_(make_stream(/*watched=*/eager)),
        sampled_(allocate_device(Step::kMaxRows * kSampleParts * sizeof(uint64_t))) {
    steps_.reserve(16);
    for (Event& event : events_) event = make_event();
  }
  ~CudaBackend() override {
    try {
      synchronize(stream_);
    } catch (const Error&) {  // the device has failed: whoever waited for it has been told
    }
    clear_graphs();
    for (const Event& event : events_) free_event(event);
    free_stream(stream_);
  }
  CudaBackend(const CudaBackend&) = delete;
  CudaBackend& operator=(const CudaBackend&) = delete;

  std::string name() const override { return "cuda"; }
  std::string isa() const override { return isa_; }
  std::string description() const override { return description_; }
  int contract_version() const override { return kContractVersion; }

  // ---- memory ----

  std::shared_ptr<void> allocate(size_t bytes, Memory memory) override {
    bytes = std::max<size_t>(bytes, 64);
    if (memory == Memory::kHost) return {allocate_pinned(bytes), [](void* p) { free_pinned(p); }};
    return {memory == Memory::kDevice ? allocate_device(bytes) : allocate_managed(bytes),
            [](void* p) { free_device(p); }};
  }
  std::shared_ptr<Step> make_step(int n_sequences) override {
    auto* step = static_cast<Step*>(allocate_pinned(sizeof(Step)));
    step->n_sequences = n_sequences;
    return {step, [](Step* p) { free_pinned(p); }};
  }
  std::shared_ptr<Step> make_device_step(int n_sequences, int max_rows) override {
    auto* step = static_cast<Step*>(allocate_device(sizeof(Step)));
    upload(&step->n_sequences, &n_sequences, sizeof n_sequences);
    (*device_steps_)[step] = {step, step, max_rows, max_rows, n_sequences, false, true};
    return {step, [known = device_steps_](Step* p) {
              known->erase(p);
              free_device(p);
            }};
  }
  void upload(void* device, const void* host, size_t bytes) override {
    copy(stream_, device, host, bytes);
    synchronize(stream_);
  }

  std::unique_ptr<Matrix> prepare(std::span<const TensorView> stacked,
                                  const Consumed& consumed) override {
    auto matrix = std::make_unique<CudaMatrix>();
    matrix->cols = stacked.front().cols;
    for (const TensorView& w : stacked) matrix->rows += w.rows;
    int64_t first_row = 0;
    for (const TensorView& w : stacked) {
      if (w.cols != matrix->cols)
        throw Error("tensor " + in_quotes(w.name), std::to_string(matrix->cols) + " columns",
                    std::to_string(w.cols));
      const auto bytes = static_cast<size_t>(tape_bytes(w.type, w.rows, w.cols));
      std::vector<std::byte> tape(bytes);
      pack_in_parallel(w, tape.data());
      CudaMatrix::Segment s{w.type, w.rows, first_row, DeviceMemory(allocate_device(bytes))};
      if (consumed) consumed({w.data, w.bytes()});
      upload(s.tape.get(), tape.data(), bytes);
      matrix->bytes += bytes;
      first_row += w.rows;
      bool& needs = w.type == DType::kF32    ? matrix->needs_f32
                    : w.type == DType::kBF16 ? matrix->needs_bf16
                                             : matrix->needs_f16;
      needs = true;
      matrix->partials_a_token += partial_floats(w.type, w.rows, matrix->rows, w.cols, 8) / 8;
      matrix->counters += counter_words(w.rows, Step::kMaxRows);
      matrix->segments.push_back(std::move(s));
    }
    most_partials_ = std::max(most_partials_, matrix->partials_a_token);
    most_counters_ = std::max(most_counters_, matrix->counters);
    return matrix;
  }

  // Packs the rows' own tiles (or F32 panels) anew: what they hold besides is in the tensor too.
  void replace_rows(Matrix& matrix, const TensorView& tensor, int64_t first, int64_t n) override {
    const int64_t height = tensor.type == DType::kF32 ? kF32PanelRows : kTileRows,
                  end = std::min(tensor.rows, ceil_div(first + n, height) * height);
    first = first / height * height;
    TensorView rows = tensor;
    rows.rows = end - first;
    std::vector<std::byte> file;
    for (int64_t r = first; r < end; ++r)
      file.insert(file.end(), tensor.row(r), tensor.row(r) + row_bytes(tensor.type, tensor.cols));
    rows.data = file.data();
    rows.interleaved_head_dim = 0;
    std::vector<std::byte> packed(
        static_cast<size_t>(tape_bytes(tensor.type, rows.rows, tensor.cols)));
    pack_tape(rows, packed.data());
    auto* to =
        static_cast<std::byte*>(static_cast<CudaMatrix&>(matrix).segments.front().tape.get());
    upload(to + tape_bytes(tensor.type, first, tensor.cols), packed.data(), packed.size());
  }

  size_t kv_bytes(const KvShape& s) const override { return 2 * half_kv_bytes(s); }
  KvCache bind_kv(const KvShape& s, void* memory) const override {
    return {s, memory, static_cast<std::byte*>(memory) + half_kv_bytes(s)};
  }

  void reserve(int max_rows, int capacity, int64_t max_cols, const Heads& heads,
               int64_t /*vocab*/) override {
    const int most_rows = std::max(scratch_rows_, max_rows),
              chunks = std::max(max_chunks_, capacity / kChunk + 1);
    const int64_t cols = std::max(scratch_cols_, max_cols),
                  partials = std::max<int64_t>(
                      partial_heads_, heads.n_heads * (2 + round_up(heads.head_dim, kKvTile)));
    const auto rows = static_cast<size_t>(most_rows);
    const std::array<size_t, 6> sizes = {
        static_cast<size_t>(fragment_bytes(most_rows, cols)),                 // f16
        static_cast<size_t>(fragment_bytes(most_rows, cols)),                 // bf16
        rows * static_cast<size_t>(cols) * 4,                                 // f32
        round_up<size_t>(rows, 8) * static_cast<size_t>(most_partials_) * 4,  // products
        rows * static_cast<size_t>(partials * chunks) * 4,                    // attention
        static_cast<size_t>(most_counters_) * 4};
    std::array<size_t, 6> at;
    size_t bytes = 0;
    for (size_t i = 0; i < sizes.size(); ++i) {
      at[i] = bytes;
      bytes += round_up<size_t>(sizes[i], 256);
    }
    synchronize(stream_);
    clear_graphs();
    // There may not be room for both: what was reserved before is gone, even if this one fails.
    scratch_rows_ = 0;
    reserved_ = 0;
    scratch_.reset();
    scratch_.reset(allocate_device(bytes));
    reserved_ = bytes;
    scratch_rows_ = most_rows;
    scratch_cols_ = cols;
    max_chunks_ = chunks;
    partial_heads_ = partials;
    scratch_partials_ = most_partials_;
    scratch_counters_ = most_counters_;
    auto* p = static_cast<std::byte*>(scratch_.get());
    f16_ = p + at[0];
    bf16_ = p + at[1];
    f32_ = reinterpret_cast<float*>(p + at[2]);
    product_partials_ = reinterpret_cast<float*>(p + at[3]);
    attention_partials_ = reinterpret_cast<float*>(p + at[4]);
    product_counters_ = reinterpret_cast<uint32_t*>(p + at[5]);
  }
  size_t reserved_bytes() const override { return reserved_; }

  // ---- running ----

  void submit(uint64_t key, FunctionRef<void()> ops) override {
    start(key, ops);
    synchronize(stream_);
  }
  uint64_t launch(uint64_t key, FunctionRef<void()> ops) override {
    start(key, ops);
    record(events_[++launched_ % kMostTickets], stream_);
    return launched_;
  }
  void wait(uint64_t ticket) override {
    if (ticket > 0) cuda::wait(events_[ticket % kMostTickets]);
  }

  void on_host(FunctionRef<void()> op) override {
    if (capturing_)
      throw Error("an op on the host", "submit() with key 0", "a list that is captured as a graph");
    if (submitted_) finish();
    // What it does with ops of its own runs as outside: each by itself.
    const bool submitted = std::exchange(submitted_, false),
               bucketed = std::exchange(bucketed_, false);
    op();
    submitted_ = submitted;
    bucketed_ = bucketed;
  }

  TreeOps* tree_ops() override { return this; }

  // ---- ops ----

  void embed(const Step* step, const Matrix& table, float* out) override {
    op(step, [&](const Sight& s) {
      const CudaMatrix::Segment& w = cast(table).segments.front();
      cuda::embed(stream_, {s.device, w.type, tape(w), table.cols, out}, s.max_rows);
    });
  }

  void rms_norm(const Step* step, const float* x, const float* weight, float eps, int64_t n,
                float* y) override {
    op(step, [&](const Sight& s) {
      cuda::rms_norm(stream_, {s.device, x, weight, eps, n, y}, s.max_rows);
    });
  }

  void linear(const Step* step, const Linear& l) override {
    op(step, [&](const Sight& s) {
      look_ahead();
      const CudaMatrix& w = cast(*l.weights);
      const int tokens = l.rows == Rows::kAll ? s.max_rows : s.max_logits;
      if (tokens == 0) return;
      if (tokens > scratch_rows_ || w.cols > scratch_cols_)
        throw Error("product of " + std::to_string(tokens) + " x " + std::to_string(w.cols),
                    "at most " + std::to_string(scratch_rows_) + " x " +
                        std::to_string(scratch_cols_) + ", as reserved",
                    "more");
      if (w.partials_a_token > scratch_partials_ || w.counters > scratch_counters_)
        throw Error("product of " + std::to_string(w.rows) + " rows",
                    "reserve() after the last prepare()", "one before it");
      prepare_input(stream_,
                    {s.device, l.rows, l.input, l.x, l.norm_weight, l.eps, w.cols,
                     w.needs_f32 ? f32_ : nullptr, w.needs_f16 ? f16_ : nullptr,
                     w.needs_bf16 ? bf16_ : nullptr, l.x_stride},
                    tokens);
      for (size_t i = 0; i < w.segments.size();) {
        const DType type = w.segments[i].type;
        const std::byte* x = type == DType::kF32    ? reinterpret_cast<std::byte*>(f32_)
                             : type == DType::kBF16 ? bf16_
                                                    : f16_;
        LinearParams p{s.device,
                       l.rows,
                       x,
                       w.rows,
                       w.cols,
                       l.y_stride > 0 ? l.y_stride : w.rows,
                       l.accumulate,
                       product_partials_,
                       scratch_rows_,
                       product_counters_,
                       {},
                       0};
        for (; i < w.segments.size() && w.segments[i].type == type && p.n_segments < kMaxSegments;
             ++i)
          p.segments[p.n_segments++] = {tape(w.segments[i]), w.segments[i].rows,
                                        l.y + w.segments[i].first_row};
        cuda::linear(stream_, type, p, tokens);
      }
    });
  }

  void rope_append(const Step* step, float* qkv, const Heads& h, const RopeTable& rope,
                   const KvCache& kv, int layer) override {
    op(step, [&](const Sight& s) {
      look_ahead();
      const float scale = 1.0f / std::sqrt(static_cast<float>(h.head_dim));
      cuda::rope_append(stream_, {s.device, qkv, h, rope, scale, kv_layer(kv, layer)}, s.max_rows);
    });
  }

  void attention(const Step* step, const float* qkv, const Heads& h, const KvCache& kv, int layer,
                 float* out) override {
    op(step, [&](const Sight& s) {
      look_ahead();
      if (s.max_rows > scratch_rows_)
        throw Error("attention of " + std::to_string(s.max_rows) + " rows",
                    "at most " + std::to_string(scratch_rows_) + ", as reserved", "more");
      int chunks = max_chunks_;
      if (!bucketed_ && !s.on_device) {
        chunks = 1;  // no row sees further than all its sequence's rows in a chain
        for (int i = 0; i < step->n_sequences; ++i)
          if (const Step::Sequence& q = step->sequences[i]; q.n_rows > 0)
            chunks = std::max(chunks, (q.committed + q.n_rows - 1) / kChunk + 1);
      }
      cuda::attention(
          stream_, {s.device, qkv, h, kv_layer(kv, layer), max_chunks_, attention_partials_, out},
          s.max_rows, chunks, s.n_sequences);
    });
  }

  void copy_rows(const Step* step, const RowCopy& copy) override {
    op(step, [&](const Sight& s) { cuda::copy_rows(stream_, {s.device, copy}, s.max_rows); });
  }
  void join_rows(const Step* step, const float* h, float scale, const float* f, int64_t width,
                 float* joined, float* sum) override {
    op(step, [&](const Sight& s) {
      cuda::join_rows(stream_, {s.device, h, scale, f, width, joined, sum}, s.max_rows);
    });
  }

  void likely_tokens(const Step* step, const float* logits, int64_t vocab,
                     LikelyTokens* out) override {
    op(step, [&](const Sight& s) {
      if (s.max_logits > 0)
        cuda::likely_tokens(stream_, {s.device, logits, vocab, out}, s.max_logits);
    });
  }

  void accept(Step* step, const float* logits, int32_t vocab) override {
    op(step, [&](Sight& s) {
      s.written = !s.on_device;
      cuda::accept(stream_, {s.device, logits, vocab, static_cast<uint64_t*>(sampled_.get())},
                   s.max_logits, s.n_sequences);
      early_written_ = true;
    });
  }
  void keep(const Step* step, const KvCache& kv) override {
    op(step, [&](const Sight& s) {
      const KvLayer first = kv_layer(kv, 0);
      cuda::keep(stream_, {s.device, first, first.head_offset(kv.shape.n_sequences, 0)},
                 kv.shape.n_layers);
    });
  }
  void keep_rows(const Step* step, int64_t width, float* x) override {
    op(step, [&](const Sight& s) {
      cuda::keep_rows(stream_, {s.device, width, x}, s.n_sequences);
    });
  }

  // ---- tree_ops.h ----

  void advance(const Step* step, DraftState* state, const DraftPass& draft) override {
    op(step, [&](const Sight& s) {
      cuda::advance(stream_, {s.device, state, draft});
      early_written_ = true;
    });
  }
  void learn_matches(const Step* step, DraftState* state) override {
    op(step, [&](const Sight& s) { cuda::learn_matches(stream_, {s.device, state}, s.max_rows); });
  }
  void learn_vocabulary(const Step* step, const float* logits, int32_t vocab, DraftState* state,
                        const Matrix& target_head, Matrix* head) override {
    const CudaMatrix::Segment &from = cast(target_head).segments.front(),
                              &to = cast(*head).segments.front();
    if (to.type != DType::kF32 && to.type != DType::kQ8_0)
      throw Error("a draft's head", "F32 or Q8_0", dtype_info(to.type).name);
    op(step, [&](const Sight& s) {
      cuda::learn_vocabulary(stream_,
                             {s.device, logits, vocab, state, from.type, to.type, tape(from),
                              static_cast<std::byte*>(to.tape.get()), head->cols},
                             s.max_rows);
      early_written_ = true;  // rows of the head
    });
  }
  void propose(DraftState* state, const DraftPass& draft) override {
    free_op([&] {
      cuda::propose(stream_, {state, draft});
      early_written_ = true;
    });
  }
  void top_k(const DraftPass& draft, const float* logits, int64_t stride, int depth,
             DraftState* state) override {
    op(draft.rows, [&](const Sight& s) {
      cuda::top_k(stream_, {s.device, logits, stride, depth, state}, s.max_rows);
    });
  }
  void grow(int depth, DraftState* state, const DraftPass& draft) override {
    free_op([&] {
      cuda::grow(stream_, {depth, state, draft});
      early_written_ = true;
    });
  }
  void choose(DraftState* state, Step* step) override {
    free_op([&] {
      cuda::choose(stream_, {state, step});
      early_written_ = true;
    });
  }

 private:
  // A Step that ops of the current submit() have named: its copy, and what the grids are sized for.
  struct Sight {
    const Step* host;
    Step* device;
    int max_rows, max_logits, n_sequences;
    bool written = false;    // by the device
    bool on_device = false;  // one of make_device_step(): `host` is no memory of the host
  };
  // A list of ops for one bucket.
  struct Recorded {
    std::vector<Sight> steps;
    bool captured = false;
    Graph graph{};
  };

  static const CudaMatrix& cast(const Matrix& m) { return static_cast<const CudaMatrix&>(m); }
  static const std::byte* tape(const CudaMatrix::Segment& s) {
    return static_cast<const std::byte*>(s.tape.get());
  }
  // By all of the host's threads: packing is what loading a model takes.
  static void pack_in_parallel(const TensorView& w, std::byte* tape) {
    constexpr int64_t kLeast = 1 << 20;  // weights that are worth a thread
    const int64_t threads = std::clamp<int64_t>(w.rows * w.cols / kLeast, 1,
                                                std::max(1u, std::thread::hardware_concurrency())),
                  share = round_up<int64_t>(ceil_div(w.rows, threads), kF32PanelRows);
    std::vector<std::jthread> others;
    for (int64_t first = share; first < w.rows; first += share)
      others.emplace_back([&w, tape, first, end = std::min(w.rows, first + share)] {
        pack_tape(w, tape, first, end);
      });
    pack_tape(w, tape, 0, std::min(w.rows, share));
  }
  static size_t half_kv_bytes(const KvShape& s) {
    const KvLayer l = kv_layer({s, nullptr, nullptr}, 0);
    return static_cast<size_t>(l.head_offset(s.n_sequences, 0)) * static_cast<size_t>(s.n_layers) *
           (s.type == DType::kF16 ? 2 : 4);
  }
  // Rows that the grids of a graph are sized for.
  int bucket(int rows) const {
    if (rows == 0) return 0;
    for (const int size : {8, 32, 64})
      if (rows <= size) return std::max(rows, std::min(size, scratch_rows_));
    return std::max(rows, std::min(+Step::kMaxRows, scratch_rows_));
  }
  bool fits(const std::vector<Sight>& steps) const {
    return std::all_of(steps.begin(), steps.end(), [this](const Sight& s) {
      return s.on_device || (bucket(s.host->n_rows - s.host->first_new) == s.max_rows &&
                             s.host->n_sequences <= s.n_sequences);
    });
  }

  // submit(), but a graph may still be running afterwards.
  void start(uint64_t key, FunctionRef<void()> ops) {
    if (key == 0 || eager_) return run(ops);
    std::vector<Recorded>& known = recorded_[key];
    bucketed_ = true;
    try {
      const auto r = std::find_if(known.begin(), known.end(),
                                  [this](const Recorded& r) { return fits(r.steps); });
      if (r == known.end()) {
        run(ops);
        known.push_back({last_steps_});
      } else {
        if (!r->captured) {
          begin_capture(stream_);
          capturing_ = true;
          run(ops);
          capturing_ = false;
          r->graph = end_capture(stream_);
          r->captured = true;
        }
        replay(stream_, r->graph);
      }
    } catch (...) {
      if (capturing_) abandon_capture(stream_);
      capturing_ = bucketed_ = submitted_ = false;
      steps_.clear();
      throw;
    }
    bucketed_ = false;
  }

  void run(FunctionRef<void()> ops) {
    submitted_ = true;
    try {
      ops();
    } catch (...) {
      submitted_ = early_written_ = false;
      steps_.clear();
      throw;
    }
    finish();
    submitted_ = false;
  }
  // Brings back what the device wrote into the steps, and forgets them.
  void finish() {
    for (const Sight& s : steps_)
      if (s.written) copy(stream_, const_cast<Step*>(s.host), s.device, sizeof(Step));
    if (!capturing_) synchronize(stream_);
    last_steps_.assign(steps_.begin(), steps_.end());
    steps_.clear();
    early_written_ = false;
  }

  // For an op whose kernels read the Step, or weights, before the one ahead of them is done.
  void look_ahead() const {
    if (behind_writer_)
      throw Error("an op that reads the Step and weights early",
                  "another one ahead of it than one that writes them", "such a one");
  }

  template <typename F>
  void op(const Step* step, const F& f) {
    Sight& s = sight(step);
    if (s.max_rows > 0) {
      behind_writer_ = std::exchange(early_written_, false);
      f(s);
    }
    if (!submitted_) finish();
  }

  // Ops whose Steps are all the device's, and whose grids are the same for any.
  template <typename F>
  void free_op(const F& f) {
    f();
    if (!submitted_) finish();
  }

  Sight& sight(const Step* step) {
    for (Sight& s : steps_)
      if (s.host == step) return s;
    if (const auto it = device_steps_->find(step); it != device_steps_->end()) {
      steps_.push_back(it->second);
      return steps_.back();
    }
    DeviceMemory& memory = mirrors_[step];
    if (!memory) memory.reset(allocate_device(sizeof(Step)));
    auto* device = static_cast<Step*>(memory.get());
    copy(stream_, device, step, sizeof(Step));
    // A graph's logits: as many as its rows, so that a later step may want more of them.
    const int live = step->n_rows - step->first_new, rows = bucketed_ ? bucket(live) : live;
    steps_.push_back({step, device, rows, bucketed_ ? rows : step->n_logits, step->n_sequences});
    return steps_.back();
  }

  void clear_graphs() {
    for (auto& [key, all] : recorded_)
      for (const Recorded& r : all)
        if (r.captured) free_graph(r.graph);
    recorded_.clear();
  }

  std::string isa_, description_;
  bool eager_;
  Stream stream_;
  DeviceMemory sampled_;  // AcceptParams::best

  int scratch_rows_ = 0, max_chunks_ = 0;
  int64_t scratch_cols_ = 0, scratch_partials_ = 0, scratch_counters_ = 0, partial_heads_ = 0;
  int64_t most_partials_ = 0, most_counters_ = 0;  // of the matrices so far, for the next reserve()
  DeviceMemory scratch_;
  size_t reserved_ = 0;
  std::byte *f16_ = nullptr, *bf16_ = nullptr;
  float *f32_ = nullptr, *product_partials_ = nullptr, *attention_partials_ = nullptr;
  uint32_t* product_counters_ = nullptr;

  std::map<const Step*, DeviceMemory> mirrors_;
  // Those of make_device_step(); a Step may be freed after the backend.
  std::shared_ptr<std::map<const Step*, Sight>> device_steps_ =
      std::make_shared<std::map<const Step*, Sight>>();
  std::array<Event, kMostTickets> events_;
  uint64_t launched_ = 0;
  std::vector<Sight> steps_, last_steps_;  // of the submit() that runs, and of the last one
  std::map<uint64_t, std::vector<Recorded>> recorded_;
  bool submitted_ = false, capturing_ = false, bucketed_ = false;
  // Did the last op of the list write what ops read early: the Step, weights? As an op begins, of
  // the one ahead of it.
  bool early_written_ = false, behind_writer_ = false;
};

}  // namespace CHIMERA_CUDA_BODY
}  // namespace chimera::cuda
