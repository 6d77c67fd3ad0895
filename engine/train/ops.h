// The operations that training is made of, forward and backward, on the CPU. T is float, or double
// for checking gradients. A CUDA body takes the place of this class and of nothing else.
//
// Matrices are row-major; `w` has shape (out, in) as everywhere. Gradients of weights are added to
// what is there, other results replace it unless `accumulate` says otherwise.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "engine/train/gemm.h"

namespace chimera::training {

inline constexpr int kMaxSteps = 8;  // of a rollout

// What the target answered at a position: its most probable tokens, most probable first.
struct SoftTarget {
  static constexpr int kMost = 32;
  int32_t token[kMost];  // -1: fewer than kMost
  float probability[kMost];
};

struct StepScore {
  double loss = 0;  // summed cross entropy, unweighted
  int64_t rows = 0, correct = 0;
  StepScore& operator+=(const StepScore& o) {
    loss += o.loss, rows += o.rows, correct += o.correct;
    return *this;
  }
};

// One text's part of the rollout's attention: positions [first_position, ... + n_slots) of the
// batch are its slots; its starts n = first_start + i, i < n_starts, are rows first_row + i of
// every step. Step k of a start asks with position min(n + 1 + k, n_positions - 1) and sees slots
// 0..n and its own k slots.
struct AttentionText {
  int64_t first_position, n_positions;
  int64_t first_start, n_starts;
  int64_t first_row;
  int64_t n_slots() const { return first_start + n_starts; }  // that any start of it sees
};

struct AttentionShape {
  int n_heads, n_kv_heads, head_dim;
};

template <typename T>
class Ops {
 public:
  explicit Ops(int threads, Precision precision = Precision::kF32);
  int threads() const { return pool_.size(); }

  // f(begin, end, thread) over contiguous shares of [0, n).
  template <typename F>
  void shares(int64_t n, const F& f) {
    pool_.run([&](int thread) {
      const int64_t begin = n * thread / pool_.size(), end = n * (thread + 1) / pool_.size();
      if (begin < end) f(begin, end, thread);
    });
  }

  // y (rows, out) = x (rows, in) w^T
  void product(int64_t rows, int64_t out, int64_t in, const T* x, const T* w, T* y,
               bool accumulate = false);
  // dx (rows, in) = dy (rows, out) w
  void grad_input(int64_t rows, int64_t out, int64_t in, const T* dy, const T* w, T* dx,
                  bool accumulate = false);
  // dw (out, in) += dy^T x
  void grad_weight(int64_t rows, int64_t out, int64_t in, const T* dy, const T* x, T* dw);

  // y = x / sqrt(mean(x^2) + eps); inverse (rows): what x was multiplied with.
  void rms(int64_t rows, int64_t n, T eps, const T* x, T* y, T* inverse);
  // dx (+)= the gradient, from y and inverse.
  void rms_grad(int64_t rows, int64_t n, const T* y, const T* inverse, const T* dy, T* dx,
                bool accumulate);
  // y = x * weight, each row
  void scale(int64_t rows, int64_t n, const T* x, const T* weight, T* y);
  // dx = dy * weight; dweight += sum over rows of dy * x. dx may be dy.
  void scale_grad(int64_t rows, int64_t n, const T* x, const T* weight, const T* dy, T* dx,
                  T* dweight);
  void silu(int64_t n, const T* x, T* y);
  void silu_grad(int64_t n, const T* x, const T* dy, T* dx);  // dx may be dy
  // y (rows, n) = silu(gate) * up; gate_up (rows, 2 n)
  void swiglu(int64_t rows, int64_t n, const T* gate_up, T* y);
  void swiglu_grad(int64_t rows, int64_t n, const T* gate_up, const T* dy, T* dgate_up);
  // Rotates pairs (i, i + dim / 2) of the first `heads` heads of each row (width `stride`) by
  // `direction` times the angles of its position, then multiplies the whole row by `factor`.
  void rotate(int64_t rows, int64_t stride, int heads, int head_dim, const int32_t* position,
              double base, int direction, T factor, T* x);

  // The rollout's attention. begin(): scores of every (position, slot) of q (P, heads * dim), which
  // is scaled already, against k (P, kv_heads * dim), once for all steps. step(): out (N, heads *
  // dim) of step n_own, whose own slots are own_k[1..n_own], own_v[1..n_own], each (N, kv).
  struct Attention {
    AttentionShape shape;
    std::span<const AttentionText> texts;
    const T *q, *k, *v;
    const T *own_k[kMaxSteps], *own_v[kMaxSteps];
    // Written by the gradient (added to): dq, dk, dv like q, k, v.
    T *dq, *dk, *dv;
    T *own_dk[kMaxSteps], *own_dv[kMaxSteps];
  };
  void attention_begin(const Attention& a);
  void attention_step(const Attention& a, int k, T* out);
  // Steps in descending order, then the end.
  void attention_step_grad(const Attention& a, int k, const T* out, const T* dout);
  void attention_end_grad(const Attention& a);

  // Cross entropy of softmax(u head^T) with the target's answer, each row times `weight`:
  //   -sum p log softmax, over the target's probabilities inside the vocabulary; those outside are
  //   dropped.
  // head (vocab, n): the rows of a part of the target's vocabulary, where token t is row
  // index_of[t], -1: outside. du (rows, n) = the gradient; score: unweighted, of rows whose weight
  // is not 0. target[r]: of row r; nullptr means that the row does not count.
  void cross_entropy(int64_t rows, int64_t n, int64_t vocab, const T* u, const T* head,
                     const int32_t* index_of, const SoftTarget* const* target, const T* weight,
                     bool want_grad, T* du, StepScore* score_of_row);

 private:
  void gemm_shared(int64_t m, int64_t n, int64_t k, Operand<T> a, Operand<T> b, T* c, int64_t ldc,
                   bool accumulate);
  struct Unit;  // a (text, KV head) of the attention
  template <typename F>
  void attention_units(const Attention& a, const F& f);

  cpu::ThreadPool pool_;
  const TileKernel& tile_;
  std::vector<GemmScratch> scratch_;     // by thread
  std::vector<std::vector<T>> columns_;  // by thread: sums over rows
  std::vector<T> logits_;
  // Attention, for each (text, head): scores (n_queries, n_slots), their gradient, and for each
  // step probabilities (n_starts, n_slots + k).
  std::vector<T> scores_, dscores_, work_;
  std::vector<T> probabilities_[kMaxSteps];
};

}  // namespace chimera::training
