#include "engine/train/cpu_ops.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <new>

#include "engine/cpu/kernels.h"
#include "engine/error.h"

namespace chimera::training {
namespace {

constexpr int64_t kLogitRows = 256;  // of a chunk: 8 MB of logits over 8,192 tokens stay in cache

void exp_row(const float* x, int64_t n, float shift, float* y) {
  static const cpu::Kernels& kernels = cpu::select_kernels();
  kernels.sampling.exp_scaled(x, n, shift, 1.0f, y);
}
void exp_row(const double* x, int64_t n, double shift, double* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = std::exp(x[i] - shift);
}

// y = 1 / (1 + exp(-x)), in pieces that stay in cache
template <typename T>
void sigmoid(const T* x, int64_t n, T* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = -x[i];
  exp_row(y, n, T{0}, y);
  for (int64_t i = 0; i < n; ++i) y[i] = T{1} / (T{1} + y[i]);
}
constexpr int64_t kPiece = 512;

template <typename T>
T dot(const T* a, const T* b, int64_t n) {
  T s[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int j = 0; j < 8; ++j) s[j] += a[i + j] * b[i + j];
  }
  for (; i < n; ++i) s[0] += a[i] * b[i];
  return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}
int64_t row_of(const int32_t* index, int64_t r) {
  return index == nullptr ? r : index[r];
}
template <typename T>
void add_scaled(const T* x, T a, int64_t n, T* y) {
  for (int64_t i = 0; i < n; ++i) y[i] += a * x[i];
}

}  // namespace

template <typename T>
CpuOps<T>::CpuOps(int threads, Precision precision)
    : pool_(threads), tile_(select_tile(precision)), scratch_(static_cast<size_t>(pool_.size())) {}

template <typename T>
std::shared_ptr<void> CpuOps<T>::allocate(size_t bytes) {
  constexpr std::align_val_t kAlign{64};
  void* const memory = ::operator new(std::max<size_t>(bytes, 1), kAlign, std::nothrow);
  if (memory == nullptr) throw MemoryError(bytes, "use a smaller batch");
  return {memory, [](void* p) { ::operator delete(p, kAlign); }};
}
template <typename T>
void CpuOps<T>::upload(void* to, const void* host, size_t bytes) {
  if (bytes > 0) std::memcpy(to, host, bytes);
}
template <typename T>
void CpuOps<T>::download(void* host, const void* from, size_t bytes) {
  if (bytes > 0) std::memcpy(host, from, bytes);
}

// ---- Products ----------------------------------------------------------------------------------

// Each thread takes a band of the longer side of C.
template <typename T>
void CpuOps<T>::gemm_shared(int64_t m, int64_t n, int64_t k, Operand<T> a, Operand<T> b, T* c,
                            int64_t ldc, bool accumulate) {
  pool_.run([&](int thread) {
    const int64_t unit = n >= m ? tile_.cols : tile_.rows;
    const int64_t units = (std::max(m, n) + unit - 1) / unit;
    const int64_t begin = units * thread / pool_.size() * unit;
    const int64_t end = std::min(units * (thread + 1) / pool_.size() * unit, std::max(m, n));
    if (begin >= end) return;
    GemmScratch* scratch = &scratch_[static_cast<size_t>(thread)];
    if (n >= m) {
      gemm(tile_, scratch, m, end - begin, k, a, b.offset(0, begin), c + begin, ldc, accumulate);
    } else {
      gemm(tile_, scratch, end - begin, n, k, a.offset(begin, 0), b, c + begin * ldc, ldc,
           accumulate);
    }
  });
}

template <typename T>
void CpuOps<T>::product(int64_t rows, int64_t out, int64_t in, const T* x, const T* w, T* y,
                        bool accumulate) {
  gemm_shared(rows, out, in, by_rows(x, in), transposed(w, in), y, out, accumulate);
}
template <typename T>
void CpuOps<T>::grad_input(int64_t rows, int64_t out, int64_t in, const T* dy, const T* w, T* dx) {
  gemm_shared(rows, in, out, by_rows(dy, out), by_rows(w, in), dx, in, false);
}
template <typename T>
void CpuOps<T>::grad_weight(int64_t rows, int64_t out, int64_t in, const T* dy, const T* x, T* dw) {
  gemm_shared(out, in, rows, transposed(dy, out), by_rows(x, in), dw, in, true);
}

// ---- Moving rows -------------------------------------------------------------------------------

template <typename T>
void CpuOps<T>::zero(int64_t n, T* x) {
  shares(n, [&](int64_t begin, int64_t end, int) { std::fill(x + begin, x + end, T{0}); });
}

template <typename T>
void CpuOps<T>::gather_rows(int64_t rows, int64_t n, const T* x, const int32_t* index, T* y) {
  shares(rows, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) std::copy_n(x + row_of(index, r) * n, n, y + r * n);
  });
}

template <typename T>
void CpuOps<T>::embed(int64_t rows, int64_t n, T eps, const T* table, const int32_t* token, T* y) {
  shares(rows, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const T* row = table + token[r] * n;
      T squares = 0;
      for (int64_t j = 0; j < n; ++j) squares += row[j] * row[j];
      const T inverse = T{1} / std::sqrt(squares / static_cast<T>(n) + eps);
      for (int64_t j = 0; j < n; ++j) y[r * n + j] = row[j] * inverse;
    }
  });
}

template <typename T>
void CpuOps<T>::concat(int64_t rows, int64_t n, const T* a, const int32_t* a_index, const T* b,
                       const int32_t* b_index, T* y) {
  shares(rows, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      std::copy_n(a + row_of(a_index, r) * n, n, y + r * 2 * n);
      std::copy_n(b + row_of(b_index, r) * n, n, y + (r * 2 + 1) * n);
    }
  });
}

// Rows may be added to the same one: by columns, so that threads do not meet.
template <typename T>
void CpuOps<T>::add_rows(int64_t rows, int64_t n, const T* x, int64_t x_stride,
                         const int32_t* index, T* y) {
  shares(n, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = x + r * x_stride;
      T* to = y + row_of(index, r) * n;
      for (int64_t i = begin; i < end; ++i) to[i] += from[i];
    }
  });
}

// ---- Rows --------------------------------------------------------------------------------------

template <typename T>
void CpuOps<T>::rms(int64_t rows, int64_t n, T eps, const T* x, T* y, T* inverse) {
  shares(rows, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const T* from = x + r * n;
      inverse[r] = T{1} / std::sqrt(dot(from, from, n) / static_cast<T>(n) + eps);
      for (int64_t i = 0; i < n; ++i) y[r * n + i] = from[i] * inverse[r];
    }
  });
}

// y = x s with s = (mean(x^2) + eps)^-1/2: dx = s (dy - y mean(dy y)).
template <typename T>
void CpuOps<T>::rms_grad(int64_t rows, int64_t n, const T* y, const T* inverse, const T* dy, T* dx,
                         bool accumulate) {
  shares(rows, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const T *yr = y + r * n, *dyr = dy + r * n;
      const T mean = dot(yr, dyr, n) / static_cast<T>(n);
      T* to = dx + r * n;
      for (int64_t i = 0; i < n; ++i) {
        const T g = inverse[r] * (dyr[i] - yr[i] * mean);
        to[i] = accumulate ? to[i] + g : g;
      }
    }
  });
}

template <typename T>
void CpuOps<T>::scale(int64_t rows, int64_t n, const T* x, const T* weight, T* y) {
  shares(rows, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t i = 0; i < n; ++i) y[r * n + i] = x[r * n + i] * weight[i];
    }
  });
}

template <typename T>
void CpuOps<T>::scale_grad(int64_t rows, int64_t n, const T* x, const T* weight, const T* dy, T* dx,
                           T* dweight) {
  shares(n, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = begin; i < end; ++i) {
        dweight[i] += dy[r * n + i] * x[r * n + i];
        dx[r * n + i] = dy[r * n + i] * weight[i];
      }
    }
  });
}

template <typename T>
void CpuOps<T>::residual(int64_t rows, int64_t n, const T* cat, const T* scale, T* u) {
  shares(rows, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const T *h = cat + r * 2 * n, *f = h + n;
      for (int64_t i = 0; i < n; ++i) u[r * n + i] = *scale * h[i] + f[i];
    }
  });
}

template <typename T>
void CpuOps<T>::residual_grad(int64_t rows, int64_t n, const T* cat, const T* du, T* dscale,
                              T* df) {
  double sum = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const T* h = cat + r * 2 * n;
    for (int64_t i = 0; i < n; ++i) {
      sum += static_cast<double>(du[r * n + i]) * static_cast<double>(h[i]);
      df[r * n + i] += du[r * n + i];
    }
  }
  *dscale += static_cast<T>(sum);
}

template <typename T>
void CpuOps<T>::silu(int64_t n, const T* x, T* y) {
  shares((n + kPiece - 1) / kPiece, [&](int64_t begin, int64_t end, int) {
    T s[kPiece];
    for (int64_t p = begin * kPiece; p < std::min(end * kPiece, n); p += kPiece) {
      const int64_t m = std::min(kPiece, n - p);
      sigmoid(x + p, m, s);
      for (int64_t i = 0; i < m; ++i) y[p + i] = x[p + i] * s[i];
    }
  });
}

template <typename T>
void CpuOps<T>::silu_grad(int64_t n, const T* x, const T* dy, T* dx) {
  shares((n + kPiece - 1) / kPiece, [&](int64_t begin, int64_t end, int) {
    T s[kPiece];
    for (int64_t p = begin * kPiece; p < std::min(end * kPiece, n); p += kPiece) {
      const int64_t m = std::min(kPiece, n - p);
      sigmoid(x + p, m, s);
      for (int64_t i = 0; i < m; ++i) {
        dx[p + i] = dy[p + i] * s[i] * (T{1} + x[p + i] * (T{1} - s[i]));
      }
    }
  });
}

template <typename T>
void CpuOps<T>::swiglu(int64_t rows, int64_t n, const T* gate_up, T* y) {
  shares(rows, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const T *gate = gate_up + r * 2 * n, *up = gate + n;
      T* to = y + r * n;
      sigmoid(gate, n, to);
      for (int64_t i = 0; i < n; ++i) to[i] *= gate[i] * up[i];
    }
  });
}

template <typename T>
void CpuOps<T>::swiglu_grad(int64_t rows, int64_t n, const T* gate_up, const T* dy, T* dgate_up) {
  shares(rows, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const T *gate = gate_up + r * 2 * n, *up = gate + n, *d = dy + r * n;
      T *dgate = dgate_up + r * 2 * n, *dup = dgate + n;
      sigmoid(gate, n, dup);
      for (int64_t i = 0; i < n; ++i) {
        const T s = dup[i];
        dgate[i] = d[i] * up[i] * s * (T{1} + gate[i] * (T{1} - s));
        dup[i] = d[i] * gate[i] * s;
      }
    }
  });
}

template <typename T>
void CpuOps<T>::rotate(int64_t rows, int64_t stride, int heads, int head_dim,
                       const int32_t* position, double base, int direction, T factor, T* x) {
  const int half = head_dim / 2;
  std::vector<double> frequency(static_cast<size_t>(half));
  for (int i = 0; i < half; ++i) {
    frequency[static_cast<size_t>(i)] = std::pow(base, -2.0 * i / head_dim);
  }
  shares(rows, [&](int64_t begin, int64_t end, int) {
    std::vector<T> cosine(frequency.size()), sine(frequency.size());
    for (int64_t r = begin; r < end; ++r) {
      T* row = x + r * stride;
      for (size_t i = 0; i < frequency.size(); ++i) {
        const double angle = direction * position[r] * frequency[i];
        cosine[i] = static_cast<T>(std::cos(angle));
        sine[i] = static_cast<T>(std::sin(angle));
      }
      for (int h = 0; h < heads; ++h) {
        T* lo = row + h * head_dim;
        for (size_t i = 0; i < frequency.size(); ++i) {
          T &a = lo[i], &b = lo[i + frequency.size()];
          const T turned = a * cosine[i] - b * sine[i];
          b = b * cosine[i] + a * sine[i];
          a = turned;
        }
      }
      if (factor != T{1}) {
        for (int64_t i = 0; i < stride; ++i) row[i] *= factor;
      }
    }
  });
}

// ---- Attention ---------------------------------------------------------------------------------

template <typename T>
struct CpuOps<T>::Unit {
  const AttentionText* text;
  int kv_head;
  int64_t scores_at;   // of the first query head: (n_queries, n_slots) each
  int64_t weights_at;  // of the first query head: (n_rows, n_slots + kMaxSteps) each
};

namespace {
int64_t weights_width(const AttentionText& t) {
  return t.n_slots + kMaxSteps;
}
}  // namespace

// f(unit, thread), each (text, KV head) once, whichever thread is free: they write to disjoint
// places.
template <typename T>
template <typename F>
void CpuOps<T>::attention_units(const Attention& a, const F& f) {
  std::vector<Unit> units;
  const int group = a.shape.n_heads / a.shape.n_kv_heads;
  int64_t scores_at = 0, weights_at = 0;
  for (const AttentionText& t : a.texts) {
    for (int h = 0; h < a.shape.n_kv_heads; ++h) {
      units.push_back({&t, h, scores_at, weights_at});
      scores_at += group * t.n_queries * t.n_slots;
      weights_at += group * t.n_rows * weights_width(t);
    }
  }
  std::atomic<size_t> next = 0;
  pool_.run([&](int thread) {
    for (size_t u; (u = next++) < units.size();) f(units[u], thread);
  });
}

template <typename T>
void CpuOps<T>::attention_begin(const Attention& a) {
  int64_t n_scores = 0, n_weights = 0;
  for (const AttentionText& t : a.texts) {
    n_scores += a.shape.n_heads * t.n_queries * t.n_slots;
    n_weights += a.shape.n_heads * t.n_rows * weights_width(t);
  }
  scores_.resize(static_cast<size_t>(n_scores));
  dscores_.assign(static_cast<size_t>(n_scores), T{0});
  for (auto& p : probabilities_) p.resize(static_cast<size_t>(n_weights));
  work_.resize(static_cast<size_t>(n_weights));
  const int dim = a.shape.head_dim, group = a.shape.n_heads / a.shape.n_kv_heads;
  const int64_t q_size = int64_t{a.shape.n_heads} * dim, kv = int64_t{a.shape.n_kv_heads} * dim;
  attention_units(a, [&](const Unit& u, int thread) {
    const AttentionText& t = *u.text;
    const T* k = a.k + t.first_slot * kv + u.kv_head * dim;
    for (int g = 0; g < group; ++g) {
      const T* q = a.q + t.first_query * q_size + (u.kv_head * group + g) * dim;
      gemm(tile_, &scratch_[static_cast<size_t>(thread)], t.n_queries, t.n_slots, dim,
           by_rows(q, q_size), transposed(k, kv),
           scores_.data() + u.scores_at + g * t.n_queries * t.n_slots, t.n_slots, false);
    }
  });
}

template <typename T>
void CpuOps<T>::attention_step(const Attention& a, int k, T* out) {
  const int dim = a.shape.head_dim, group = a.shape.n_heads / a.shape.n_kv_heads;
  const int64_t q_size = int64_t{a.shape.n_heads} * dim, kv = int64_t{a.shape.n_kv_heads} * dim;
  attention_units(a, [&](const Unit& u, int thread) {
    const AttentionText& t = *u.text;
    const int64_t slots = t.n_slots, width = weights_width(t);
    for (int g = 0; g < group; ++g) {
      const int head = u.kv_head * group + g;
      const T* scores = scores_.data() + u.scores_at + g * t.n_queries * slots;
      T* weights = probabilities_[k].data() + u.weights_at + g * t.n_rows * width;
      for (int64_t s = 0; s < t.n_rows; ++s) {
        const int64_t query = a.query[k * a.n_rows + t.first_row + s],
                      seen = a.seen[t.first_row + s];
        const T* q = a.q + query * q_size + head * dim;
        const T* of_query = scores + (query - t.first_query) * slots;
        T* w = weights + s * width;
        std::copy(of_query, of_query + seen, w);
        for (int j = 1; j <= k; ++j) {
          w[seen + j - 1] = dot(q, a.own_k[j] + (t.first_row + s) * kv + u.kv_head * dim, dim);
        }
        const int64_t n = seen + k;
        exp_row(w, n, *std::max_element(w, w + n), w);
        T sum = 0;
        for (int64_t i = 0; i < n; ++i) sum += w[i];
        for (int64_t i = 0; i < n; ++i) w[i] /= sum;
        // Own slots move behind the last slot of the text: what lies between is 0 for the product.
        T own[kMaxSteps];
        std::copy(w + seen, w + n, own);
        std::fill(w + seen, w + slots, T{0});
        std::copy(own, own + k, w + slots);
      }
      T* o = out + t.first_row * q_size + head * dim;
      gemm(tile_, &scratch_[static_cast<size_t>(thread)], t.n_rows, dim, slots,
           by_rows<T>(weights, width), by_rows(a.v + t.first_slot * kv + u.kv_head * dim, kv), o,
           q_size, false);
      for (int64_t s = 0; s < t.n_rows; ++s) {
        for (int j = 1; j <= k; ++j) {
          add_scaled(a.own_v[j] + (t.first_row + s) * kv + u.kv_head * dim,
                     weights[s * width + slots + j - 1], dim, o + s * q_size);
        }
      }
    }
  });
}

// With w = softmax(score), o = sum w v: dw = do . v, dscore = w (dw - do . o).
template <typename T>
void CpuOps<T>::attention_step_grad(const Attention& a, int k, const T* out, const T* dout) {
  const int dim = a.shape.head_dim, group = a.shape.n_heads / a.shape.n_kv_heads;
  const int64_t q_size = int64_t{a.shape.n_heads} * dim, kv = int64_t{a.shape.n_kv_heads} * dim;
  attention_units(a, [&](const Unit& u, int thread) {
    const AttentionText& t = *u.text;
    GemmScratch* scratch = &scratch_[static_cast<size_t>(thread)];
    const int64_t slots = t.n_slots, width = weights_width(t);
    const int64_t at = t.first_slot * kv + u.kv_head * dim;
    for (int g = 0; g < group; ++g) {
      const int head = u.kv_head * group + g;
      const T* weights = probabilities_[k].data() + u.weights_at + g * t.n_rows * width;
      T* dweights = work_.data() + u.weights_at + g * t.n_rows * width;
      T* dscores = dscores_.data() + u.scores_at + g * t.n_queries * slots;
      const T* o = out + t.first_row * q_size + head * dim;
      const T* d = dout + t.first_row * q_size + head * dim;
      gemm(tile_, scratch, t.n_rows, slots, dim, by_rows(d, q_size), transposed(a.v + at, kv),
           dweights, width, false);
      gemm(tile_, scratch, slots, dim, t.n_rows, transposed(weights, width), by_rows(d, q_size),
           a.dv + at, kv, true);
      for (int64_t s = 0; s < t.n_rows; ++s) {
        const int64_t query = a.query[k * a.n_rows + t.first_row + s],
                      seen = a.seen[t.first_row + s], q_at = query * q_size + head * dim;
        const T *w = weights + s * width, *dw = dweights + s * width, *ds = d + s * q_size;
        const T mean = dot(ds, o + s * q_size, dim);
        T* to = dscores + (query - t.first_query) * slots;
        for (int64_t i = 0; i < seen; ++i) to[i] += w[i] * (dw[i] - mean);
        for (int j = 1; j <= k; ++j) {
          const int64_t own = (t.first_row + s) * kv + u.kv_head * dim;
          const T p = w[slots + j - 1];
          const T dscore = p * (dot(ds, a.own_v[j] + own, dim) - mean);
          add_scaled(ds, p, dim, a.own_dv[j] + own);
          add_scaled(a.q + q_at, dscore, dim, a.own_dk[j] + own);
          add_scaled(a.own_k[j] + own, dscore, dim, a.dq + q_at);
        }
      }
    }
  });
}

template <typename T>
void CpuOps<T>::attention_end_grad(const Attention& a) {
  const int dim = a.shape.head_dim, group = a.shape.n_heads / a.shape.n_kv_heads;
  const int64_t q_size = int64_t{a.shape.n_heads} * dim, kv = int64_t{a.shape.n_kv_heads} * dim;
  attention_units(a, [&](const Unit& u, int thread) {
    const AttentionText& t = *u.text;
    GemmScratch* scratch = &scratch_[static_cast<size_t>(thread)];
    const int64_t slots = t.n_slots, at = t.first_slot * kv + u.kv_head * dim;
    for (int g = 0; g < group; ++g) {
      const T* dscores = dscores_.data() + u.scores_at + g * t.n_queries * slots;
      const int64_t q_at = t.first_query * q_size + (u.kv_head * group + g) * dim;
      gemm(tile_, scratch, t.n_queries, dim, slots, by_rows<T>(dscores, slots),
           by_rows(a.k + at, kv), a.dq + q_at, q_size, true);
      gemm(tile_, scratch, slots, dim, t.n_queries, transposed<T>(dscores, slots),
           by_rows(a.q + q_at, q_size), a.dk + at, kv, true);
    }
  });
}

// ---- Loss --------------------------------------------------------------------------------------

template <typename T>
void CpuOps<T>::cross_entropy(int64_t rows, int64_t n, int64_t vocab, const T* u, const T* head,
                              const SoftTarget* target, const int32_t* target_of, const T* weight,
                              bool want_grad, T* du, T* loss, int32_t* correct) {
  logits_.resize(static_cast<size_t>(std::min(rows, kLogitRows) * vocab));
  for (int64_t first = 0; first < rows; first += kLogitRows) {
    const int64_t chunk = std::min(kLogitRows, rows - first);
    product(chunk, vocab, n, u + first * n, head, logits_.data(), false);
    shares(chunk, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t r = first + i;
        T* x = logits_.data() + i * vocab;
        if (target_of[r] < 0) {
          loss[r] = 0;
          correct[r] = -1;
          std::fill(x, x + vocab, T{0});
          continue;
        }
        const SoftTarget& t = target[target_of[r]];
        const T largest = *std::max_element(x, x + vocab);
        T mass = 0, expected = 0;  // sum of p, and of p times its logit
        for (int j = 0; j < SoftTarget::kMost; ++j) {
          if (t.token[j] < 0) continue;
          mass += static_cast<T>(t.probability[j]);
          expected += static_cast<T>(t.probability[j]) * x[t.token[j]];
        }
        correct[r] = t.token[0] >= 0 && x[t.token[0]] == largest;
        exp_row(x, vocab, largest, x);
        T part[8] = {};
        for (int64_t c = 0; c + 8 <= vocab; c += 8) {
          for (int j = 0; j < 8; ++j) part[j] += x[c + j];
        }
        T sum = 0;
        for (int64_t c = vocab / 8 * 8; c < vocab; ++c) sum += x[c];
        for (const T p : part) sum += p;
        loss[r] = mass * (largest + std::log(sum)) - expected;
        if (!want_grad) continue;
        const T factor = weight[r] * mass / sum;
        for (int64_t c = 0; c < vocab; ++c) x[c] *= factor;
        for (int j = 0; j < SoftTarget::kMost; ++j) {
          if (t.token[j] >= 0) x[t.token[j]] -= weight[r] * static_cast<T>(t.probability[j]);
        }
      }
    });
    if (want_grad) grad_input(chunk, vocab, n, logits_.data(), head, du + first * n);
  }
}

// ---- The optimiser -----------------------------------------------------------------------------

template <typename T>
void CpuOps<T>::axpby(int64_t n, T a, const T* x, T b, T* y) {
  shares(n, [&](int64_t begin, int64_t end, int) {
    if (b == T{0}) {
      for (int64_t i = begin; i < end; ++i) y[i] = a * x[i];
    } else {
      for (int64_t i = begin; i < end; ++i) y[i] = b * y[i] + a * x[i];
    }
  });
}

template <typename T>
void CpuOps<T>::momentum(int64_t n, T momentum, const T* g, T* m, T* update) {
  shares(n, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      m[i] = momentum * m[i] + (1 - momentum) * g[i];
      update[i] = momentum * m[i] + (1 - momentum) * g[i];
    }
  });
}

template <typename T>
void CpuOps<T>::adam(int64_t n, const Adam& a, const T* g, T* m, T* v, T* w) {
  shares(n, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      m[i] = a.beta1 * m[i] + (1 - a.beta1) * g[i];
      v[i] = a.beta2 * v[i] + (1 - a.beta2) * g[i] * g[i];
      w[i] -= a.rate * m[i] / (std::sqrt(v[i] * a.scale) + a.epsilon);
    }
  });
}

namespace {
template <typename T>
double squares(const T* x, int64_t n) {
  double sum[4] = {};
  for (int64_t i = 0; i < n; ++i)
    sum[i % 4] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return sum[0] + sum[1] + sum[2] + sum[3];
}
}  // namespace

template <typename T>
void CpuOps<T>::normalize(int64_t n, T* x) {
  const auto inverse = static_cast<T>(1 / std::sqrt(std::max(squares(x, n), 1e-30)));
  shares(n, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) x[i] *= inverse;
  });
}

template <typename T>
double CpuOps<T>::sum_of_squares(std::span<const int64_t> ends, const T* x) {
  std::vector<double> sums(ends.size());
  shares(static_cast<int64_t>(ends.size()), [&](int64_t begin, int64_t end, int) {
    for (auto i = static_cast<size_t>(begin); i < static_cast<size_t>(end); ++i) {
      const int64_t first = i == 0 ? 0 : ends[i - 1];
      sums[i] = squares(x + first, ends[i] - first);
    }
  });
  double sum = 0;
  for (const double s : sums) sum += s;
  return sum;
}

template class CpuOps<float>;
template class CpuOps<double>;

}  // namespace chimera::training
