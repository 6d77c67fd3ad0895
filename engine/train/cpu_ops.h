// The training ops on the CPU, over a pool of threads. The bits do not depend on its size.
#pragma once

#include <vector>

#include "engine/train/gemm.h"
#include "engine/train/ops.h"

namespace chimera::training {

template <typename T>
class CpuOps : public Ops<T> {
 public:
  explicit CpuOps(int threads, Precision precision = Precision::kF32);

  using typename Ops<T>::Adam;
  using typename Ops<T>::Attention;
  std::shared_ptr<void> allocate(size_t bytes) override;
  void upload(void* to, const void* host, size_t bytes) override;
  void download(void* host, const void* from, size_t bytes) override;
  void product(int64_t rows, int64_t out, int64_t in, const T* x, const T* w, T* y,
               bool accumulate) override;
  void grad_input(int64_t rows, int64_t out, int64_t in, const T* dy, const T* w, T* dx) override;
  void grad_weight(int64_t rows, int64_t out, int64_t in, const T* dy, const T* x, T* dw) override;
  void zero(int64_t n, T* x) override;
  void gather_rows(int64_t rows, int64_t n, const T* x, const int32_t* index, T* y) override;
  void embed(int64_t rows, int64_t n, T eps, const T* table, const int32_t* token, T* y) override;
  void concat(int64_t rows, int64_t n, const T* a, const int32_t* a_index, const T* b,
              const int32_t* b_index, T* y) override;
  void add_rows(int64_t rows, int64_t n, const T* x, int64_t x_stride, const int32_t* index,
                T* y) override;
  void rms(int64_t rows, int64_t n, T eps, const T* x, T* y, T* inverse) override;
  void rms_grad(int64_t rows, int64_t n, const T* y, const T* inverse, const T* dy, T* dx,
                bool accumulate) override;
  void scale(int64_t rows, int64_t n, const T* x, const T* weight, T* y) override;
  void scale_grad(int64_t rows, int64_t n, const T* x, const T* weight, const T* dy, T* dx,
                  T* dweight) override;
  void residual(int64_t rows, int64_t n, const T* cat, const T* scale, T* u) override;
  void residual_grad(int64_t rows, int64_t n, const T* cat, const T* du, T* dscale, T* df) override;
  void silu(int64_t n, const T* x, T* y) override;
  void silu_grad(int64_t n, const T* x, const T* dy, T* dx) override;
  void swiglu(int64_t rows, int64_t n, const T* gate_up, T* y) override;
  void swiglu_grad(int64_t rows, int64_t n, const T* gate_up, const T* dy, T* dgate_up) override;
  void rotate(int64_t rows, int64_t stride, int heads, int head_dim, const int32_t* position,
              double base, int direction, T factor, T* x) override;
  void attention_begin(const Attention& a) override;
  void attention_step(const Attention& a, int k, T* out) override;
  void attention_step_grad(const Attention& a, int k, const T* out, const T* dout) override;
  void attention_end_grad(const Attention& a) override;
  void cross_entropy(int64_t rows, int64_t n, int64_t vocab, const T* u, const T* head,
                     const SoftTarget* target, const int32_t* target_of, const T* weight,
                     bool want_grad, T* du, T* loss, int32_t* correct) override;
  void axpby(int64_t n, T a, const T* x, T b, T* y) override;
  void momentum(int64_t n, T momentum, const T* g, T* m, T* update) override;
  void adam(int64_t n, const Adam& adam, const T* g, T* m, T* v, T* w) override;
  void normalize(int64_t n, T* x) override;
  double sum_of_squares(std::span<const int64_t> ends, const T* x) override;

 private:
  // f(begin, end, thread) over contiguous shares of [0, n).
  template <typename F>
  void shares(int64_t n, const F& f) {
    pool_.run([&](int thread) {
      const int64_t begin = n * thread / pool_.size(), end = n * (thread + 1) / pool_.size();
      if (begin < end) f(begin, end, thread);
    });
  }
  void gemm_shared(int64_t m, int64_t n, int64_t k, Operand<T> a, Operand<T> b, T* c, int64_t ldc,
                   bool accumulate);
  struct Unit;  // a (text, KV head) of the attention
  template <typename F>
  void attention_units(const Attention& a, const F& f);

  cpu::ThreadPool pool_;
  const TileKernel& tile_;
  std::vector<GemmScratch> scratch_;  // by thread
  std::vector<T> logits_;
  // Attention, for each (text, head): scores (n_queries, n_slots), their gradient, and for each
  // step probabilities (n_rows, n_slots + kMaxSteps).
  std::vector<T> scores_, dscores_, work_;
  std::vector<T> probabilities_[kMaxSteps];
};

}  // namespace chimera::training
