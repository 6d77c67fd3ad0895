// The operations that training is made of, forward and backward. T is float, or double for checking
// gradients on the CPU. Two bodies: CpuOps (cpu_ops.h), which says what each of them means, and the
// CUDA backend's (cuda/train_ops.cuh). All else of the trainer is written once, over these.
//
// Pointers are the ops' memory (Buffer), unless they say host. Matrices are row-major; `w` has
// shape (out, in) as everywhere. Gradients of weights are added to what is there, other results
// replace it unless `accumulate` says otherwise. An index of rows is (rows) int32; nullptr: row r
// itself. A run can be repeated bit for bit: sums have one order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "engine/train/training_text.h"

namespace chimera::training {

inline constexpr int kMaxSteps = 8;  // of a rollout

// What products round their elements to; sums are f32.
enum class Precision : uint8_t { kF32, kBF16 };

// One text's part of the rollout's attention: rows [first_slot, ... + n_slots) of k and v are its
// slots, rows [first_query, ... + n_queries) of q ask for it, in the rollouts that are rows
// [first_row, ... + n_rows) of every step.
struct AttentionText {
  int64_t first_slot, n_slots;
  int64_t first_query, n_queries;
  int64_t first_row, n_rows;
};

struct AttentionShape {
  int n_heads, n_kv_heads, head_dim;
};

// n values in the memory of some ops; on the CPU that is plain memory.
template <typename U>
class Buffer {
 public:
  U* data() const { return static_cast<U*>(memory_.get()); }
  int64_t size() const { return size_; }

 private:
  friend class Memory;
  std::shared_ptr<void> memory_;
  int64_t size_ = 0, capacity_ = 0;
};

class Memory {
 public:
  virtual ~Memory() = default;
  // Aligned to 64 bytes at least. Throws Error if there is not so much.
  virtual std::shared_ptr<void> allocate(size_t bytes) = 0;
  // The host's array may change afterwards.
  virtual void upload(void* to, const void* host, size_t bytes) = 0;
  // Waits for all that was asked for before.
  virtual void download(void* host, const void* from, size_t bytes) = 0;

  // Makes room for n values. true: it is new memory, what was in it is lost.
  template <typename U>
  bool need(Buffer<U>* buffer, int64_t n) {
    buffer->size_ = n;
    if (n <= buffer->capacity_ && buffer->memory_ != nullptr) return false;
    buffer->memory_.reset();        // before there is another
    buffer->capacity_ = n + n / 4;  // batches differ in size, and new memory costs a device dearly
    buffer->memory_ = allocate(static_cast<size_t>(buffer->capacity_) * sizeof(U));
    return true;
  }
  template <typename U>
  void put(std::span<const U> host, Buffer<U>* buffer) {
    need(buffer, static_cast<int64_t>(host.size()));
    upload(buffer->data(), host.data(), host.size_bytes());
  }
  template <typename U>
  void put(const std::vector<U>& host, Buffer<U>* buffer) {
    put(std::span<const U>(host), buffer);
  }
  template <typename U>
  std::vector<U> get(const Buffer<U>& buffer) {
    std::vector<U> host(static_cast<size_t>(buffer.size()));
    download(host.data(), buffer.data(), host.size() * sizeof(U));
    return host;
  }
};

template <typename T>
class Ops : public Memory {
 public:
  // ---- Products ----

  // y (rows, out) = x (rows, in) w^T
  virtual void product(int64_t rows, int64_t out, int64_t in, const T* x, const T* w, T* y,
                       bool accumulate = false) = 0;
  // dx (rows, in) = dy (rows, out) w
  virtual void grad_input(int64_t rows, int64_t out, int64_t in, const T* dy, const T* w,
                          T* dx) = 0;
  // dw (out, in) += dy^T x
  virtual void grad_weight(int64_t rows, int64_t out, int64_t in, const T* dy, const T* x,
                           T* dw) = 0;

  // ---- Moving rows ----

  virtual void zero(int64_t n, T* x) = 0;
  // y (rows, n): row r is row index[r] of x
  virtual void gather_rows(int64_t rows, int64_t n, const T* x, const int32_t* index, T* y) = 0;
  // The same, each row divided by sqrt(mean of squares + eps).
  virtual void embed(int64_t rows, int64_t n, T eps, const T* table, const int32_t* token,
                     T* y) = 0;
  // y (rows, 2 n): row r is row a_index[r] of a, then row b_index[r] of b
  virtual void concat(int64_t rows, int64_t n, const T* a, const int32_t* a_index, const T* b,
                      const int32_t* b_index, T* y) = 0;
  // Row index[r] of y (.., n) += row r of x, whose rows are x_stride apart. Equal ones of the index
  // are neighbours.
  virtual void add_rows(int64_t rows, int64_t n, const T* x, int64_t x_stride, const int32_t* index,
                        T* y) = 0;

  // ---- Rows ----

  // y = x / sqrt(mean(x^2) + eps); inverse (rows): what x was multiplied with.
  virtual void rms(int64_t rows, int64_t n, T eps, const T* x, T* y, T* inverse) = 0;
  // dx (+)= the gradient, from y and inverse.
  virtual void rms_grad(int64_t rows, int64_t n, const T* y, const T* inverse, const T* dy, T* dx,
                        bool accumulate) = 0;
  // y = x * weight, each row
  virtual void scale(int64_t rows, int64_t n, const T* x, const T* weight, T* y) = 0;
  // dx = dy * weight; dweight += sum over rows of dy * x. dx may be dy.
  virtual void scale_grad(int64_t rows, int64_t n, const T* x, const T* weight, const T* dy, T* dx,
                          T* dweight) = 0;
  // u (rows, n) = scale * h + f, where cat (rows, 2 n) holds h, then f. scale: (1)
  virtual void residual(int64_t rows, int64_t n, const T* cat, const T* scale, T* u) = 0;
  // dscale += sum of du * h, df += du
  virtual void residual_grad(int64_t rows, int64_t n, const T* cat, const T* du, T* dscale,
                             T* df) = 0;
  virtual void silu(int64_t n, const T* x, T* y) = 0;
  virtual void silu_grad(int64_t n, const T* x, const T* dy, T* dx) = 0;  // dx may be dy
  // y (rows, n) = silu(gate) * up; gate_up (rows, 2 n)
  virtual void swiglu(int64_t rows, int64_t n, const T* gate_up, T* y) = 0;
  virtual void swiglu_grad(int64_t rows, int64_t n, const T* gate_up, const T* dy, T* dgate_up) = 0;
  // Rotates pairs (i, i + dim / 2) of the first `heads` heads of each row (width `stride`) by
  // `direction` times the angles of its position, then multiplies the whole row by `factor`.
  virtual void rotate(int64_t rows, int64_t stride, int heads, int head_dim,
                      const int32_t* position, double base, int direction, T factor, T* x) = 0;

  // ---- The rollout's attention ----

  // begin(): scores of every (query, slot) of q (.., heads * dim), which is scaled already, against
  // k (.., kv_heads * dim), once for all steps. step(): out (N, heads * dim) of step k, in which
  // row r asks with row query[k N + r] of q and sees the first seen[r] slots of its text and k own
  // ones, row r of own_k[1..k], own_v[1..k], each (N, kv). Rows that ask with the same are
  // neighbours.
  struct Attention {
    AttentionShape shape;
    std::span<const AttentionText> texts;  // host
    const int32_t *query, *seen;           // (K, N), (N)
    int64_t n_rows;                        // N
    const T *q, *k, *v;
    const T *own_k[kMaxSteps], *own_v[kMaxSteps];
    // Written by the gradient (added to): dq, dk, dv like q, k, v.
    T *dq, *dk, *dv;
    T *own_dk[kMaxSteps], *own_dv[kMaxSteps];
  };
  virtual void attention_begin(const Attention& a) = 0;
  virtual void attention_step(const Attention& a, int k, T* out) = 0;
  // Steps in descending order, then the end.
  virtual void attention_step_grad(const Attention& a, int k, const T* out, const T* dout) = 0;
  virtual void attention_end_grad(const Attention& a) = 0;

  // ---- Loss ----

  // Cross entropy of softmax(u head^T) with the target's answer, each row times `weight`:
  //   -sum p log softmax, over the target's probabilities inside the vocabulary; those outside are
  //   dropped.
  // head (vocab, n): the rows of a part of the target's vocabulary; the tokens of `target` are
  // numbers of its rows, -1: outside. target_of[r]: the target of row r; -1: the row does not
  // count. du (rows, n) = the gradient. loss (rows): unweighted; correct (rows): 1 where head's
  // largest is the target's first, -1 in rows that do not count, whose loss is 0.
  virtual void cross_entropy(int64_t rows, int64_t n, int64_t vocab, const T* u, const T* head,
                             const SoftTarget* target, const int32_t* target_of, const T* weight,
                             bool want_grad, T* du, T* loss, int32_t* correct) = 0;

  // ---- The optimiser ----

  // y = a x + b y; where b is 0, y is not read.
  virtual void axpby(int64_t n, T a, const T* x, T b, T* y) = 0;
  // m = momentum m + (1 - momentum) g; update = momentum m + (1 - momentum) g: Nesterov's look
  // ahead
  virtual void momentum(int64_t n, T momentum, const T* g, T* m, T* update) = 0;
  // AdamW without decay: m, v the moments' running means, w -= rate m / (sqrt(v scale) + epsilon)
  struct Adam {
    T beta1, beta2, rate, scale, epsilon;
  };
  virtual void adam(int64_t n, const Adam& adam, const T* g, T* m, T* v, T* w) = 0;
  // x /= its norm (1e-15 at least)
  virtual void normalize(int64_t n, T* x) = 0;
  // Of x; ends: of its tensors, one behind the other (the CPU has a sum for each). Waits.
  virtual double sum_of_squares(std::span<const int64_t> ends, const T* x) = 0;
};

// Ops of the GPU: from cuda/, or its stub. Throws Error where there is none.
std::unique_ptr<Ops<float>> make_cuda_training_ops(Precision precision);

}  // namespace chimera::training
