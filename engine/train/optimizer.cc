#include "engine/train/optimizer.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace chimera::training {

OptimizerState start_optimizer(Ops<float>* ops, const std::vector<float>& values) {
  OptimizerState s;
  ops->put(values, &s.values);
  ops->put(values, &s.averaged);
  for (Buffer<float>* moment : {&s.first, &s.second}) {
    ops->need(moment, s.values.size());
    ops->zero(moment->size(), moment->data());
  }
  return s;
}

double learning_rate(const OptimizerOptions& o, double progress) {
  if (progress < o.warm_up) return o.rate * std::max(progress, 1e-3) / o.warm_up;
  const double done = std::min(1.0, (progress - o.warm_up) / (1 - o.warm_up));
  const double cosine = 0.5 * (1 + std::cos(std::numbers::pi * done));
  return o.rate * (o.last_rate + (1 - o.last_rate) * cosine);
}

// Returns the norm.
double Optimizer::clip(float* gradient) {
  std::vector<int64_t> ends;
  for (const Parameter& p : layout_.all) ends.push_back(static_cast<int64_t>(p.offset + p.size()));
  const double norm = std::sqrt(ops_.sum_of_squares(ends, gradient));
  if (std::isfinite(norm) && norm > options_.clip) {
    const auto factor = static_cast<float>(options_.clip / norm);
    ops_.axpby(ends.back(), factor, gradient, 0.0f, gradient);
  }
  return norm;
}

void Optimizer::orthogonalize(int64_t rows, int64_t cols, float* x) {
  constexpr int kSteps = 5;
  constexpr float kA = 3.4445f, kB = -4.7750f, kC = 2.0315f;  // steep at 0, flat about 1
  const int64_t n = rows * cols, side = std::min(rows, cols);
  const bool wide = rows <= cols;
  ops_.normalize(n, x);
  for (auto* v : {&gram_, &square_}) ops_.need(v, side * side);
  ops_.need(&next_, n);
  float *gram = gram_.data(), *square = square_.data(), *next = next_.data();
  // x <- a x + (b G + c G G) x with G = x x^T, or from the other side where x is tall.
  for (int step = 0; step < kSteps; ++step) {
    if (wide) {
      ops_.product(side, side, cols, x, x, gram);
    } else {
      ops_.zero(side * side, gram);
      ops_.grad_weight(rows, side, side, x, x, gram);
    }
    ops_.product(side, side, side, gram, gram, square);  // G is its own transpose
    ops_.axpby(side * side, kC, square, kB, gram);
    if (wide)
      ops_.grad_input(side, side, cols, gram, x, next);
    else
      ops_.product(rows, side, side, x, gram, next);
    ops_.axpby(n, 1.0f, next, kA, x);
  }
}

double Optimizer::step(double rate, float* gradient, OptimizerState* state) {
  const OptimizerOptions& o = options_;
  const double norm = clip(gradient);
  if (!std::isfinite(norm)) return norm;

  ++state->step;
  const auto t = static_cast<double>(state->step);
  // AdamW's bias corrections: m / (1 - beta1^t) over sqrt(v / (1 - beta2^t)).
  const Ops<float>::Adam adam{static_cast<float>(o.beta1), static_cast<float>(o.beta2),
                              static_cast<float>(rate / (1 - std::pow(o.beta1, t))),
                              static_cast<float>(1 / (1 - std::pow(o.beta2, t))),
                              static_cast<float>(o.epsilon)};
  // An average over few steps has to forget its start faster.
  const auto keep = static_cast<float>(std::min(o.average, (1 + t) / (10 + t)));
  for (const Parameter& p : layout_.all) {
    if (p.size() == 0) continue;
    float* w = state->values.data() + p.offset;
    float* m = state->first.data() + p.offset;
    float* v = state->second.data() + p.offset;
    float* average = state->averaged.data() + p.offset;
    const float* g = gradient + p.offset;
    const auto n = static_cast<int64_t>(p.size());
    if (p.is_matrix) {
      ops_.need(&update_, n);
      float* update = update_.data();
      ops_.momentum(n, static_cast<float>(o.momentum), g, m, update);
      orthogonalize(p.rows, p.cols, update);
      const auto shrink = static_cast<float>(1 - rate * o.decay);
      const auto scale =
          static_cast<float>(rate * 0.2 * std::sqrt(static_cast<double>(std::max(p.rows, p.cols))));
      ops_.axpby(n, -scale, update, shrink, w);
    } else {
      ops_.adam(n, adam, g, m, v, w);
    }
    ops_.axpby(n, 1 - keep, w, keep, average);
  }
  return norm;
}

}  // namespace chimera::training
