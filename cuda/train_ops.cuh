// The training ops of engine/train/ops.h on the GPU: launches of the kernels beside this file, and
// of cuBLAS for the large products where it is installed. Written over runtime.cuh, so that all of
// it also runs under the emulator.
//
// # What binds (counted, not measured)
// SmolLM2-135M: d = 576, q 576, kv 192, ffn 512, rank 64, four steps, some 4,000 tokens to choose
// from, two positions for a start, texts of some 300 positions. A start's multiply-adds, forward:
//   2 positions x 5 d^2 + d q + 4 d kv         4.9 M   encoder, query, slot
//   4 steps x 4 d kv + d q + 3 d ffn + 3 d rank  7.0 M
//   4 steps x 4,000 d                          9.2 M   logits
//   9 heads x 300 slots x 64 x (1 + 4)         0.9 M   attention
// and twice as many backward, but once for the logits, whose head is frozen: 57 M, 0.11 GFLOP. At
// 150,000 starts a second that is 17 TFLOP/s of an H100's 990 (dense bf16).
//
// Its bytes: forward writes and reads some 18,000 floats a step and 25,000 a position, backward the
// same twice, logits 4 x 6 x 4,000 floats, attention 20 x 9 x 300: 1.9 MB a start, 0.28 TB/s of
// 3.35. Over PCIe come 2 x 2.3 KB of states and 256 bytes of targets: 0.7 GB/s, so f32 will do.
//
// So neither binds; what does is each step's fixed cost. A step is some 320 launches, and the
// optimiser, for 17 matrices, some 800, at 3 to 4 us of the host each: about 4 ms, whatever the
// batch. Muon's products are 52 GFLOP more, a millisecond or two of kernels too small to fill the
// GPU. 384 starts, the CPU's batch, would take 2.6 ms at the aim: there the host binds. With 4,096
// (27 ms) a sixth of the time is fixed. The next is the host's reading of texts, 150,000 x 2 x 576
// halves a second to make floats of; fit reads a batch ahead on a thread of its own.
//
// # Memory
// Everything stays on the device: a start takes some 0.5 MB while its batch is worked on. What the
// host sends goes through pinned memory, so that it need not wait.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "cuda/cublas.cuh"
#include "cuda/train_attention.cuh"
#include "cuda/train_loss.cuh"
#include "cuda/train_product.cuh"
#include "cuda/train_rows.cuh"
#include "engine/train/ops.h"

namespace chimera::cuda {
inline namespace CHIMERA_CUDA_BODY {

// Pinned memory for what is on its way to the device, given out piece by piece.
class Staging {
 public:
  ~Staging() {
    for (const Chunk& c : chunks_) free_pinned(c.memory);
  }
  std::byte* take(size_t bytes) {
    bytes = round_up<size_t>(bytes, 256);
    while (at_ < chunks_.size() && chunks_[at_].bytes - used_ < bytes) ++at_, used_ = 0;
    if (at_ == chunks_.size()) {
      const size_t size = std::max<size_t>(bytes, 8 << 20);
      chunks_.push_back({static_cast<std::byte*>(allocate_pinned(size)), size});
    }
    used_ += bytes;
    return chunks_[at_].memory + used_ - bytes;
  }
  void clear() { at_ = used_ = 0; }  // all of it has arrived

 private:
  struct Chunk {
    std::byte* memory;
    size_t bytes;
  };
  std::vector<Chunk> chunks_;
  size_t at_ = 0, used_ = 0;
};

class CudaTrainingOps final : public training::Ops<float> {
 public:
  explicit CudaTrainingOps(training::Precision precision, bool use_cublas = true)
      : parts_(precision == training::Precision::kF32 ? 3 : 1),
        stream_(make_stream()),
        cublas_(use_cublas ? std::make_unique<Cublas>() : nullptr) {
    if (cublas_ && !cublas_->available()) cublas_.reset();
    need(&sums_, kMostSums);
  }
  ~CudaTrainingOps() override { free_stream(stream_); }
  CudaTrainingOps(const CudaTrainingOps&) = delete;
  CudaTrainingOps& operator=(const CudaTrainingOps&) = delete;
  bool has_cublas() const { return cublas_ != nullptr; }

  // ---- Memory ----

  std::shared_ptr<void> allocate(size_t bytes) override {
    return {allocate_device(std::max<size_t>(bytes, 256)), [](void* p) { free_device(p); }};
  }
  void upload(void* to, const void* host, size_t bytes) override {
    if (bytes == 0) return;
    std::byte* staged = staging_.take(bytes);
    std::memcpy(staged, host, bytes);
    copy(stream_, to, staged, bytes);
  }
  void download(void* host, const void* from, size_t bytes) override {
    if (bytes > 0) copy(stream_, host, from, bytes);
    synchronize(stream_);
    staging_.clear();
  }

  // ---- Products ----

  void product(int64_t rows, int64_t out, int64_t in, const float* x, const float* w, float* y,
               bool accumulate) override {
    multiply(x, true, w, true, y, {0, 0, 0, in, in, out, rows, out, in}, accumulate);
  }
  void grad_input(int64_t rows, int64_t out, int64_t in, const float* dy, const float* w,
                  float* dx) override {
    multiply(dy, true, w, false, dx, {0, 0, 0, out, in, in, rows, in, out}, false);
  }
  void grad_weight(int64_t rows, int64_t out, int64_t in, const float* dy, const float* x,
                   float* dw) override {
    multiply(dy, false, x, false, dw, {0, 0, 0, out, in, in, out, in, rows}, true);
  }

  // ---- Moving rows ----

  void zero(int64_t n, float* x) override { each("zero", stream_, n, Zero{x}); }
  void gather_rows(int64_t rows, int64_t n, const float* x, const int32_t* index,
                   float* y) override {
    each_row("gather", stream_, rows, n, GatherRows{n, x, index, y});
  }
  void embed(int64_t rows, int64_t n, float eps, const float* table, const int32_t* token,
             float* y) override {
    train_rms(stream_, rows, {n, eps, table, token, y, nullptr});
  }
  void concat(int64_t rows, int64_t n, const float* a, const int32_t* a_index, const float* b,
              const int32_t* b_index, float* y) override {
    each_row("concat", stream_, rows, n, Concat{n, a, a_index, b, b_index, y});
  }
  void add_rows(int64_t rows, int64_t n, const float* x, int64_t x_stride, const int32_t* index,
                float* y) override {
    each_row("add rows", stream_, rows, n, AddRows{rows, n, x, x_stride, index, y});
  }

  // ---- Rows ----

  void rms(int64_t rows, int64_t n, float eps, const float* x, float* y, float* inverse) override {
    train_rms(stream_, rows, {n, eps, x, nullptr, y, inverse});
  }
  void rms_grad(int64_t rows, int64_t n, const float* y, const float* inverse, const float* dy,
                float* dx, bool accumulate) override {
    train_rms_grad(stream_, rows, {n, y, inverse, dy, dx, accumulate});
  }
  void scale(int64_t rows, int64_t n, const float* x, const float* weight, float* y) override {
    each_row("scale", stream_, rows, n, Scale{n, x, weight, y});
  }
  void scale_grad(int64_t rows, int64_t n, const float* x, const float* weight, const float* dy,
                  float* dx, float* dweight) override {
    need(&runs_, kMostRuns * n);
    cuda::scale_grad(stream_, {rows, n, 0, x, weight, dy, dx, dweight, runs_.data()});
  }
  void residual(int64_t rows, int64_t n, const float* cat, const float* scale, float* u) override {
    each_row("residual", stream_, rows, n, Residual{n, cat, scale, u});
  }
  void residual_grad(int64_t rows, int64_t n, const float* cat, const float* du, float* dscale,
                     float* df) override {
    const int sums = sum_rows("residual's gradient", stream_, rows, n, ResidualGrad{n, cat, du, df},
                              sums_.data());
    add_sum(stream_, {sums_.data(), sums, 1, dscale});
  }
  void silu(int64_t n, const float* x, float* y) override { each("silu", stream_, n, Silu{x, y}); }
  void silu_grad(int64_t n, const float* x, const float* dy, float* dx) override {
    each("silu's gradient", stream_, n, SiluGrad{x, dy, dx});
  }
  void swiglu(int64_t rows, int64_t n, const float* gate_up, float* y) override {
    each_row("swiglu", stream_, rows, n, Swiglu{n, gate_up, y});
  }
  void swiglu_grad(int64_t rows, int64_t n, const float* gate_up, const float* dy,
                   float* dgate_up) override {
    each_row("swiglu's gradient", stream_, rows, n, SwigluGrad{n, gate_up, dy, dgate_up});
  }
  void rotate(int64_t rows, int64_t stride, int heads, int head_dim, const int32_t* position,
              double base, int direction, float factor, float* x) override {
    Rotate r{{}, stride, heads, head_dim / 2, direction, factor, position, x};
    if (r.half > kMostHalf)
      throw Error("device cuda: head_dim", std::to_string(2 * kMostHalf) + " at most",
                  std::to_string(head_dim), "use --device cpu");
    for (int i = 0; i < r.half; ++i) r.frequency[i] = std::pow(base, -2.0 * i / head_dim);
    each_row("rotate", stream_, rows, stride / 2, r);
  }

  // ---- The rollout's attention ----

  void attention_begin(const Attention& a) override {
    plan_ = RolloutPlan(a.texts, a.shape);
    put(plan_.texts, &texts_);
    put(plan_.text_of, &text_of_);
    for (int kind = 0; kind < RolloutPlan::kKinds; ++kind) put(plan_.tasks[kind], &tasks_[kind]);
    need(&scores_, plan_.n_scores);
    need(&dscores_, plan_.n_scores);
    need(&dweights_, plan_.n_weights);
    zero(plan_.n_scores, dscores_.data());
    rollout_product(RolloutPlan::kScores, a.q, true, a.k, true, scores_.data(), false);
  }
  void attention_step(const Attention& a, int k, float* out) override {
    need(&weights_[k], plan_.n_weights);
    rollout_step(stream_, rollout(a, k, out, nullptr), a.n_rows);
    rollout_product(RolloutPlan::kOut, weights_[k].data(), true, a.v, false, out, true);
  }
  void attention_step_grad(const Attention& a, int k, const float* out,
                           const float* dout) override {
    rollout_product(RolloutPlan::kDWeights, dout, true, a.v, true, dweights_.data(), false);
    rollout_product(RolloutPlan::kDV, weights_[k].data(), false, dout, false, a.dv, true);
    rollout_step_grad(stream_, rollout(a, k, const_cast<float*>(out), dout), a.n_rows);
  }
  void attention_end_grad(const Attention& a) override {
    rollout_product(RolloutPlan::kDQ, dscores_.data(), true, a.k, false, a.dq, true);
    rollout_product(RolloutPlan::kDK, dscores_.data(), false, a.q, false, a.dk, true);
  }

  // ---- Loss ----

  void cross_entropy(int64_t rows, int64_t n, int64_t vocab, const float* u, const float* head,
                     const training::SoftTarget* target, const int32_t* target_of,
                     const float* weight, bool want_grad, float* du, float* loss,
                     int32_t* correct) override {
    constexpr int64_t kLogits = int64_t{1} << 27;  // of a chunk: half a GB
    const int64_t most_rows = std::clamp<int64_t>(kLogits / std::max<int64_t>(vocab, 1), 1, rows);
    need(&logits_, most_rows * vocab);
    for (int64_t first = 0; first < rows; first += most_rows) {
      const int64_t chunk = std::min(most_rows, rows - first);
      product(chunk, vocab, n, u + first * n, head, logits_.data(), false);
      cuda::cross_entropy(stream_,
                          {vocab, logits_.data(), target, target_of + first, weight + first,
                           want_grad, loss + first, correct + first},
                          chunk);
      if (want_grad) grad_input(chunk, vocab, n, logits_.data(), head, du + first * n);
    }
  }

  // ---- The optimiser ----

  void axpby(int64_t n, float a, const float* x, float b, float* y) override {
    each("axpby", stream_, n, Axpby{a, x, b, y});
  }
  void momentum(int64_t n, float momentum, const float* g, float* m, float* update) override {
    each("momentum", stream_, n, Momentum{momentum, g, m, update});
  }
  void adam(int64_t n, const Adam& a, const float* g, float* m, float* v, float* w) override {
    each("adam", stream_, n, AdamStep{a.beta1, a.beta2, a.rate, a.scale, a.epsilon, g, m, v, w});
  }
  void normalize(int64_t n, float* x) override {
    cuda::normalize(stream_, {sums_.data(), sum_squares(n, x), n, x});
  }
  double sum_of_squares(std::span<const int64_t> ends, const float* x) override {
    std::vector<double> sums(static_cast<size_t>(ends.empty() ? 0 : sum_squares(ends.back(), x)));
    download(sums.data(), sums_.data(), sums.size() * sizeof(double));
    double sum = 0;
    for (const double s : sums) sum += s;
    return sum;
  }

 private:
  int sum_squares(int64_t n, const float* x) {
    return sum_rows("squares", stream_, ceil_div(n, kSquareRow), kSquareRow, SquareOf{n, x},
                    sums_.data());
  }

  void multiply(const float* a, bool a_by_k, const float* b, bool b_by_k, float* c,
                const ProductTask& t, bool accumulate) {
#if defined(__CUDACC__)
    // Its matrices are column-major: C^T = B^T A^T.
    if (cublas_ && t.m > 0 && t.n > 0 && t.k > 0 &&
        cublas_->gemm(stream_, b_by_k, !a_by_k, t.n, t.m, t.k, b, t.ldb, a, t.lda, CUDA_R_32F,
                      accumulate ? 1.0f : 0.0f, c, t.ldc,
                      parts_ == 1 ? CUBLAS_COMPUTE_32F_FAST_16BF : CUBLAS_COMPUTE_32F))
      return;
#endif
    need(&partials_, product_partials(t));
    ProductParams p{};
    p.a = a, p.b = b, p.c = c;
    p.a_by_k = a_by_k, p.b_by_k = b_by_k;
    p.accumulate = accumulate;
    p.task = t;
    cuda::product(stream_, parts_, p, partials_.data());
  }

  // All of a kind; those that add to a place that others of their group add to, one after the
  // other.
  void rollout_product(RolloutPlan::Kind kind, const float* a, bool a_by_k, const float* b,
                       bool b_by_k, float* c, bool accumulate) {
    const bool shared = kind == RolloutPlan::kDV || kind == RolloutPlan::kDK;
    const auto all = static_cast<int>(plan_.tasks[kind].size());
    const int launches = shared ? plan_.group : 1;
    for (int i = 0; i < launches; ++i) {
      ProductParams p{};
      p.a = a, p.b = b, p.c = c;
      p.a_by_k = a_by_k, p.b_by_k = b_by_k;
      p.accumulate = accumulate;
      p.task = plan_.largest[kind];
      p.n_tasks = all / launches;
      p.tasks = tasks_[kind].data() + i * p.n_tasks;
      cuda::product(stream_, parts_, p, nullptr);
    }
  }

  RolloutParams rollout(const Attention& a, int k, float* out, const float* dout) const {
    RolloutParams p{};
    p.shape = a.shape;
    p.texts = texts_.data();
    p.text_of = text_of_.data();
    p.query = a.query + k * a.n_rows;
    p.seen = a.seen;
    p.step = k;
    p.q = a.q, p.k = a.k, p.v = a.v;
    p.scores = scores_.data();
    p.weights = weights_[k].data();
    p.out = out;
    p.dout = dout;
    p.dweights = dweights_.data();
    p.dscores = dscores_.data();
    p.dq = a.dq;
    for (int j = 1; j <= k; ++j) {
      p.own_k[j] = a.own_k[j], p.own_v[j] = a.own_v[j];
      p.own_dk[j] = a.own_dk[j], p.own_dv[j] = a.own_dv[j];
    }
    return p;
  }

  int parts_;
  Stream stream_;
  std::unique_ptr<Cublas> cublas_;
  Staging staging_;
  training::Buffer<double> sums_;
  training::Buffer<float> runs_, partials_, logits_;
  // The attention's.
  RolloutPlan plan_;
  training::Buffer<RolloutText> texts_;
  training::Buffer<int32_t> text_of_;
  training::Buffer<ProductTask> tasks_[RolloutPlan::kKinds];
  training::Buffer<float> scores_, dscores_, dweights_, weights_[training::kMaxSteps];
};

}  // namespace CHIMERA_CUDA_BODY
}  // namespace chimera::cuda
