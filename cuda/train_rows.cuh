// The trainer's ops that work element by element and row by row (engine/train/ops.h). What an op
// does with one element is a plain struct; two kernels apply it to a flat array and to the rows of
// a matrix, a block each. All of them wait for memory, so none is more clever than that.
//
// Sums go over a block's threads in a tree, and over blocks in the order of their numbers: the same
// bits each time.
#pragma once

#include "cuda/numeric.cuh"
#include "cuda/reduce.cuh"
#include "cuda/runtime.cuh"

namespace chimera::cuda {
inline namespace CHIMERA_CUDA_BODY {

// ---- Element by element ------------------------------------------------------------------------

inline constexpr int kEachThreads = 128, kEachElements = 4;

template <typename F>
struct EachParams {
  F f;
  int64_t n;
};
// f(i), i < n
template <typename F>
KERNEL(kEachThreads, 1)
void each_kernel(EachParams<F> p) {
  wait_for_previous();
  const int64_t first = static_cast<int64_t>(block_x()) * kEachThreads * kEachElements;
  UNROLLED_FOR (int j = 0; j < kEachElements; ++j) {
    const int64_t i = first + j * kEachThreads + thread_index();
    if (i < p.n) p.f(i);
  }
}
template <typename F>
void each(const char* name, Stream stream, int64_t n, const F& f) {
  if (n == 0) return;
  const Grid grid{ceil_div<int64_t>(n, kEachThreads * kEachElements)};
  launch(name, each_kernel<F>, stream, grid, kEachThreads, 0, EachParams<F>{f, n});
}

// f(row, i), i < width. (No division of an index by a width that is not a constant.)
template <typename F>
KERNEL(kEachThreads, 1)
void rows_kernel(EachParams<F> p) {
  wait_for_previous();
  for (int64_t i = thread_index(); i < p.n; i += block_threads()) p.f(block_x(), i);
}
template <typename F>
void each_row(const char* name, Stream stream, int64_t rows, int64_t width, const F& f) {
  if (rows == 0) return;
  launch(name, rows_kernel<F>, stream, {rows}, kEachThreads, 0, EachParams<F>{f, width});
}

struct Zero {
  float* x;
  DEVICE void operator()(int64_t i) const { x[i] = 0.0f; }
};
struct Axpby {
  float a;
  const float* x;
  float b;
  float* y;
  DEVICE void operator()(int64_t i) const { y[i] = b == 0.0f ? a * x[i] : b * y[i] + a * x[i]; }
};
struct Momentum {
  float momentum;
  const float* g;
  float *m, *update;
  DEVICE void operator()(int64_t i) const {
    const float next = momentum * m[i] + (1 - momentum) * g[i];
    m[i] = next;
    update[i] = momentum * next + (1 - momentum) * g[i];
  }
};
struct AdamStep {
  float beta1, beta2, rate, scale, epsilon;
  const float* g;
  float *m, *v, *w;
  DEVICE void operator()(int64_t i) const {
    m[i] = beta1 * m[i] + (1 - beta1) * g[i];
    v[i] = beta2 * v[i] + (1 - beta2) * g[i] * g[i];
    w[i] -= divide(rate * m[i], square_root(v[i] * scale) + epsilon);
  }
};

BOTH float sigmoid(float x) { return divide(1.0f, 1.0f + exp_contract(-x)); }
struct Silu {
  const float* x;
  float* y;
  DEVICE void operator()(int64_t i) const { y[i] = silu(x[i]); }
};
struct SiluGrad {
  const float *x, *dy;
  float* dx;
  DEVICE void operator()(int64_t i) const {
    const float s = sigmoid(x[i]);
    dx[i] = dy[i] * s * (1.0f + x[i] * (1.0f - s));
  }
};
struct Swiglu {
  int64_t n;
  const float* gate_up;  // (rows, 2 n)
  float* y;              // (rows, n)
  DEVICE void operator()(int64_t r, int64_t i) const {
    const float *gate = gate_up + r * 2 * n, *up = gate + n;
    y[r * n + i] = silu(gate[i]) * up[i];
  }
};
struct SwigluGrad {
  int64_t n;
  const float *gate_up, *dy;
  float* dgate_up;
  DEVICE void operator()(int64_t r, int64_t i) const {
    const float gate = gate_up[r * 2 * n + i], up = gate_up[(r * 2 + 1) * n + i], d = dy[r * n + i];
    const float s = sigmoid(gate);
    dgate_up[r * 2 * n + i] = d * up * s * (1.0f + gate * (1.0f - s));
    dgate_up[(r * 2 + 1) * n + i] = d * gate * s;
  }
};

DEVICE int64_t row_of(const int32_t* index, int64_t r) { return index == nullptr ? r : index[r]; }
struct GatherRows {
  int64_t n;
  const float* x;
  const int32_t* index;
  float* y;
  DEVICE void operator()(int64_t r, int64_t i) const { y[r * n + i] = x[row_of(index, r) * n + i]; }
};
struct Concat {
  int64_t n;
  const float* a;
  const int32_t* a_index;
  const float* b;
  const int32_t* b_index;
  float* y;
  DEVICE void operator()(int64_t r, int64_t i) const {
    y[r * 2 * n + i] = a[row_of(a_index, r) * n + i];
    y[(r * 2 + 1) * n + i] = b[row_of(b_index, r) * n + i];
  }
};
// Rows that go to the same one are neighbours: the block of the first adds them all, in order.
struct AddRows {
  int64_t rows, n;
  const float* x;
  int64_t x_stride;
  const int32_t* index;
  float* y;
  DEVICE void operator()(int64_t r, int64_t i) const {
    const int64_t to = row_of(index, r);
    if (r > 0 && row_of(index, r - 1) == to) return;
    float sum = y[to * n + i];
    for (int64_t q = r; q < rows && row_of(index, q) == to; ++q) sum = sum + x[q * x_stride + i];
    y[to * n + i] = sum;
  }
};
struct Scale {
  int64_t n;
  const float *x, *weight;
  float* y;
  DEVICE void operator()(int64_t r, int64_t i) const { y[r * n + i] = x[r * n + i] * weight[i]; }
};
struct Residual {
  int64_t n;
  const float *cat, *scale;
  float* u;
  DEVICE void operator()(int64_t r, int64_t i) const {
    u[r * n + i] = *scale * cat[r * 2 * n + i] + cat[(r * 2 + 1) * n + i];
  }
};

inline constexpr int kMostHalf = 128;  // of a head's dimension
// Element i of a row: pair i, numbered head by head.
struct Rotate {
  double frequency[kMostHalf];  // of pair i of a head
  int64_t stride;
  int heads, half, direction;
  float factor;
  const int32_t* position;
  float* x;
  DEVICE void operator()(int64_t r, int64_t i) const {
    const int head = static_cast<int>(i) / half, pair = static_cast<int>(i) % half;
    float* lo = x + r * stride + head * 2 * half + pair;
    float a = lo[0], b = lo[half];
    if (head < heads) {
      const double angle = direction * position[r] * frequency[pair];
      const float cosine = static_cast<float>(::cos(angle)),
                  sine = static_cast<float>(::sin(angle));
      const float turned = a * cosine - b * sine;
      b = b * cosine + a * sine;
      a = turned;
    }
    lo[0] = a * factor;
    lo[half] = b * factor;
  }
};

// ---- Sums over a row ---------------------------------------------------------------------------

inline constexpr int kReduceThreads = 128;

struct RmsParams {
  int64_t n;
  float eps;
  const float* x;        // (rows of index, n)
  const int32_t* index;  // or null
  float* y;              // (rows, n)
  float* inverse;        // (rows) or null
};
KERNEL(kReduceThreads, 1) void rms_kernel(RmsParams p) {
  wait_for_previous();
  auto* shared = reinterpret_cast<float*>(shared_memory());
  const float* x = p.x + row_of(p.index, block_x()) * p.n;
  float squares = 0;
  for (int64_t i = thread_index(); i < p.n; i += block_threads())
    squares = fma(x[i], x[i], squares);
  squares = block_sum<kReduceThreads>(shared, squares);
  const float inverse = divide(1.0f, square_root(divide(squares, static_cast<float>(p.n)) + p.eps));
  for (int64_t i = thread_index(); i < p.n; i += block_threads())
    p.y[block_x() * p.n + i] = x[i] * inverse;
  if (p.inverse != nullptr && thread_index() == 0) p.inverse[block_x()] = inverse;
}
inline void train_rms(Stream stream, int64_t rows, const RmsParams& p) {
  if (rows == 0) return;
  launch("rms", rms_kernel, stream, {rows}, kReduceThreads, 16, p);
}

struct RmsGradParams {
  int64_t n;
  const float *y, *inverse, *dy;
  float* dx;
  bool accumulate;
};
KERNEL(kReduceThreads, 1) void rms_grad_kernel(RmsGradParams p) {
  wait_for_previous();
  auto* shared = reinterpret_cast<float*>(shared_memory());
  const int64_t row = block_x() * p.n;
  float mean = 0;
  for (int64_t i = thread_index(); i < p.n; i += block_threads())
    mean = fma(p.y[row + i], p.dy[row + i], mean);
  mean = divide(block_sum<kReduceThreads>(shared, mean), static_cast<float>(p.n));
  const float inverse = p.inverse[block_x()];
  for (int64_t i = thread_index(); i < p.n; i += block_threads()) {
    const float g = inverse * (p.dy[row + i] - p.y[row + i] * mean);
    p.dx[row + i] = p.accumulate ? p.dx[row + i] + g : g;
  }
}
inline void train_rms_grad(Stream stream, int64_t rows, const RmsGradParams& p) {
  if (rows == 0) return;
  launch("rms gradient", rms_grad_kernel, stream, {rows}, kReduceThreads, 16, p);
}

// ---- Sums over rows ----------------------------------------------------------------------------

// A thread has a column and a run of rows; the runs' sums are added in order.
struct ScaleGradParams {
  int64_t rows, n, run;
  const float *x, *weight, *dy;
  float *dx, *dweight;
  float* partials;  // (runs, n)
};
inline constexpr int64_t kMostRuns = 64;
KERNEL(kEachThreads, 1) void scale_grad_kernel(ScaleGradParams p) {
  wait_for_previous();
  const int64_t i = static_cast<int64_t>(block_x()) * kEachThreads + thread_index();
  if (i >= p.n) return;
  const int64_t begin = block_y() * p.run, end = least(p.rows, begin + p.run);
  const float weight = p.weight[i];
  float sum = 0;
  for (int64_t r = begin; r < end; ++r) {
    const float dy = p.dy[r * p.n + i];  // dx may be dy
    sum = fma(dy, p.x[r * p.n + i], sum);
    p.dx[r * p.n + i] = dy * weight;
  }
  p.partials[block_y() * p.n + i] = sum;
}
KERNEL(kEachThreads, 1) void scale_grad_end_kernel(ScaleGradParams p) {
  wait_for_previous();
  const int64_t i = static_cast<int64_t>(block_x()) * kEachThreads + thread_index();
  if (i >= p.n) return;
  float sum = 0;
  for (int64_t run = 0; run * p.run < p.rows; ++run) sum = sum + p.partials[run * p.n + i];
  p.dweight[i] += sum;
}
// partials: (kMostRuns, n)
inline void scale_grad(Stream stream, ScaleGradParams p) {
  if (p.rows == 0) return;
  p.run = most<int64_t>(16, ceil_div(p.rows, kMostRuns));
  const int64_t columns = ceil_div<int64_t>(p.n, kEachThreads);
  launch("scale gradient", scale_grad_kernel, stream, {columns, ceil_div(p.rows, p.run)},
         kEachThreads, 0, p);
  launch("scale gradient's end", scale_grad_end_kernel, stream, {columns}, kEachThreads, 0, p);
}

// ---- Sums over everything, in double -----------------------------------------------------------

inline constexpr int64_t kMostSums = 256;  // blocks
inline constexpr int64_t kSquareRow = 1024;

// shared: (kEachThreads); every thread gets the sum.
DEVICE double block_sum_f64(double* shared, double x) {
  const int t = thread_index();
  shared[t] = x;
  for (int width = kEachThreads / 2; width > 0; width /= 2) {
    sync_threads();
    if (t < width) shared[t] = shared[t] + shared[t + width];
  }
  sync_threads();
  return shared[0];
}

template <typename F>
struct SumParams {
  F f;
  int64_t rows, n;
  double* partials;  // (blocks): sums of f(r, i)
};
template <typename F>
KERNEL(kEachThreads, 1)
void sum_kernel(SumParams<F> p) {
  wait_for_previous();
  double sum = 0;
  for (int64_t r = block_x(); r < p.rows; r += grid_x())
    for (int64_t i = thread_index(); i < p.n; i += block_threads()) sum = sum + p.f(r, i);
  sum = block_sum_f64(reinterpret_cast<double*>(shared_memory()), sum);
  if (thread_index() == 0) p.partials[block_x()] = sum;
}
// Returns the number of partial sums, kMostSums at most.
template <typename F>
int sum_rows(const char* name, Stream stream, int64_t rows, int64_t n, const F& f,
             double* partials) {
  const int64_t blocks = least(rows, kMostSums);
  if (rows > 0)
    launch(name, sum_kernel<F>, stream, {blocks}, kEachThreads, kEachThreads * 8,
           SumParams<F>{f, rows, n, partials});
  return static_cast<int>(blocks);
}

struct SquareOf {  // of a flat array, in rows of kSquareRow
  int64_t n;
  const float* x;
  DEVICE double operator()(int64_t r, int64_t i) const {
    const int64_t at = r * kSquareRow + i;
    return at < n ? static_cast<double>(x[at]) * static_cast<double>(x[at]) : 0.0;
  }
};
struct ResidualGrad {
  int64_t n;
  const float *cat, *du;
  float* df;
  DEVICE double operator()(int64_t r, int64_t i) const {
    const float d = du[r * n + i];
    df[r * n + i] += d;
    return static_cast<double>(d) * static_cast<double>(cat[r * 2 * n + i]);
  }
};

struct EndSumParams {
  const double* partials;
  int n_partials;
  int64_t n;
  float* x;
};
DEVICE double end_sum(const EndSumParams& p) {
  double sum = 0;
  for (int i = thread_index(); i < p.n_partials; i += block_threads()) sum = sum + p.partials[i];
  return block_sum_f64(reinterpret_cast<double*>(shared_memory()), sum);
}
// x (1) += the sum
KERNEL(kEachThreads, 1) void add_sum_kernel(EndSumParams p) {
  wait_for_previous();
  const double sum = end_sum(p);
  if (thread_index() == 0) *p.x += static_cast<float>(sum);
}
inline void add_sum(Stream stream, const EndSumParams& p) {
  launch("add sum", add_sum_kernel, stream, {1}, kEachThreads, kEachThreads * 8, p);
}
// x (n) /= root of the sum
KERNEL(kEachThreads, 1) void normalize_kernel(EndSumParams p) {
  wait_for_previous();
  const auto inverse = static_cast<float>(1 / ::sqrt(most(end_sum(p), 1e-30)));
  const int64_t first = block_x() * kSquareRow, end = least(p.n, first + kSquareRow);
  for (int64_t i = first + thread_index(); i < end; i += block_threads()) p.x[i] *= inverse;
}
inline void normalize(Stream stream, const EndSumParams& p) {
  if (p.n == 0) return;
  launch("normalize", normalize_kernel, stream, {ceil_div(p.n, kSquareRow)}, kEachThreads,
         kEachThreads * 8, p);
}

}  // namespace CHIMERA_CUDA_BODY
}  // namespace chimera::cuda
