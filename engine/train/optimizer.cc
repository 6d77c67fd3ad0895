#include "engine/train/optimizer.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace chimera::training {

OptimizerState start_optimizer(std::vector<float> values) {
  OptimizerState s;
  s.first.assign(values.size(), 0);
  s.second.assign(values.size(), 0);
  s.averaged = values;
  s.values = std::move(values);
  return s;
}

double learning_rate(const OptimizerOptions& o, double progress) {
  if (progress < o.warm_up) return o.rate * std::max(progress, 1e-3) / o.warm_up;
  const double done = std::min(1.0, (progress - o.warm_up) / (1 - o.warm_up));
  const double cosine = 0.5 * (1 + std::cos(std::numbers::pi * done));
  return o.rate * (o.last_rate + (1 - o.last_rate) * cosine);
}

// f(i) for each element, threads side by side.
template <typename F>
void Optimizer::each(size_t n, const F& f) {
  ops_.shares(static_cast<int64_t>(n), [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// Returns the norm; summed by tensor, so that it does not depend on the number of threads.
double Optimizer::clip(std::vector<float>* gradient) {
  std::vector<double> squares(layout_.all.size());
  each(squares.size(), [&](int64_t t) {
    const Parameter& p = layout_.all[static_cast<size_t>(t)];
    double sum[4] = {};
    for (size_t i = 0; i < p.size(); ++i) {
      const double g = (*gradient)[p.offset + i];
      sum[i % 4] += g * g;
    }
    squares[static_cast<size_t>(t)] = sum[0] + sum[1] + sum[2] + sum[3];
  });
  double norm = 0;
  for (const double s : squares) norm += s;
  norm = std::sqrt(norm);
  if (std::isfinite(norm) && norm > options_.clip) {
    const auto factor = static_cast<float>(options_.clip / norm);
    each(gradient->size(), [&](int64_t i) { (*gradient)[static_cast<size_t>(i)] *= factor; });
  }
  return norm;
}

void Optimizer::orthogonalize(int64_t rows, int64_t cols, float* x) {
  constexpr int kSteps = 5;
  constexpr float kA = 3.4445f, kB = -4.7750f, kC = 2.0315f;  // steep at 0, flat about 1
  const auto n = static_cast<size_t>(rows * cols);
  const int64_t side = std::min(rows, cols);
  const bool wide = rows <= cols;
  double sum[4] = {};
  for (size_t i = 0; i < n; ++i) sum[i % 4] += static_cast<double>(x[i]) * x[i];
  const auto inverse =
      static_cast<float>(1 / std::sqrt(std::max(sum[0] + sum[1] + sum[2] + sum[3], 1e-30)));
  each(n, [&](int64_t i) { x[i] *= inverse; });
  for (auto* v : {&gram_, &square_}) v->resize(static_cast<size_t>(side * side));
  next_.resize(n);
  float *gram = gram_.data(), *square = square_.data(), *next = next_.data();
  // x <- a x + (b G + c G G) x with G = x x^T, or from the other side where x is tall.
  for (int step = 0; step < kSteps; ++step) {
    if (wide) {
      ops_.product(side, side, cols, x, x, gram);
    } else {
      std::fill(gram_.begin(), gram_.end(), 0.0f);
      ops_.grad_weight(rows, side, side, x, x, gram);
    }
    ops_.product(side, side, side, gram, gram, square);  // G is its own transpose
    each(gram_.size(), [&](int64_t i) { gram[i] = kB * gram[i] + kC * square[i]; });
    if (wide)
      ops_.grad_input(side, side, cols, gram, x, next);
    else
      ops_.product(rows, side, side, x, gram, next);
    each(n, [&](int64_t i) { x[i] = kA * x[i] + next[i]; });
  }
}

double Optimizer::step(double rate, std::vector<float>* gradient, OptimizerState* state) {
  const OptimizerOptions& o = options_;
  const double norm = clip(gradient);
  if (!std::isfinite(norm)) return norm;

  ++state->step;
  const auto t = static_cast<double>(state->step);
  const auto momentum = static_cast<float>(o.momentum);
  const auto beta1 = static_cast<float>(o.beta1), beta2 = static_cast<float>(o.beta2);
  // AdamW's bias corrections: m / (1 - beta1^t) over sqrt(v / (1 - beta2^t)).
  const auto rate1 = static_cast<float>(rate / (1 - std::pow(o.beta1, t)));
  const auto scale2 = static_cast<float>(1 / (1 - std::pow(o.beta2, t)));
  const auto epsilon = static_cast<float>(o.epsilon);
  // An average over few steps has to forget its start faster.
  const auto keep = static_cast<float>(std::min(o.average, (1 + t) / (10 + t)));
  for (const Parameter& p : layout_.all) {
    if (p.size() == 0) continue;
    float* w = state->values.data() + p.offset;
    float* m = state->first.data() + p.offset;
    float* v = state->second.data() + p.offset;
    float* average = state->averaged.data() + p.offset;
    const float* g = gradient->data() + p.offset;
    if (p.is_matrix) {
      update_.resize(p.size());
      float* update = update_.data();
      each(p.size(), [&](int64_t i) {
        m[i] = momentum * m[i] + (1 - momentum) * g[i];
        update[i] = momentum * m[i] + (1 - momentum) * g[i];  // Nesterov's look ahead
      });
      orthogonalize(p.rows, p.cols, update);
      const auto shrink = static_cast<float>(1 - rate * o.decay);
      const auto scale =
          static_cast<float>(rate * 0.2 * std::sqrt(static_cast<double>(std::max(p.rows, p.cols))));
      each(p.size(), [&](int64_t i) { w[i] = w[i] * shrink - scale * update[i]; });
    } else {
      each(p.size(), [&](int64_t i) {
        m[i] = beta1 * m[i] + (1 - beta1) * g[i];
        v[i] = beta2 * v[i] + (1 - beta2) * g[i] * g[i];
        w[i] -= rate1 * m[i] / (std::sqrt(v[i] * scale2) + epsilon);
      });
    }
    each(p.size(), [&](int64_t i) { average[i] = keep * average[i] + (1 - keep) * w[i]; });
  }
  return norm;
}

}  // namespace chimera::training
