#include "engine/train/adamw.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace chimera::training {

AdamWState start_adamw(std::vector<float> values) {
  AdamWState s;
  s.first.assign(values.size(), 0);
  s.second.assign(values.size(), 0);
  s.averaged = values;
  s.values = std::move(values);
  return s;
}

double learning_rate(const AdamWOptions& o, double progress) {
  if (progress < o.warm_up) return o.rate * std::max(progress, 1e-3) / o.warm_up;
  const double done = std::min(1.0, (progress - o.warm_up) / (1 - o.warm_up));
  const double cosine = 0.5 * (1 + std::cos(std::numbers::pi * done));
  return o.rate * (o.last_rate + (1 - o.last_rate) * cosine);
}

double adamw_step(const AdamWOptions& o, const ParameterLayout& layout, double rate,
                  std::vector<float>* gradient, AdamWState* state, Ops<float>* ops) {
  // Summed by tensor, so that the result does not depend on the number of threads.
  std::vector<double> squares(layout.all.size());
  ops->shares(static_cast<int64_t>(squares.size()), [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      const Parameter& p = layout.all[static_cast<size_t>(t)];
      double sum[4] = {};
      for (size_t i = 0; i < p.size(); ++i) {
        const double g = (*gradient)[p.offset + i];
        sum[i % 4] += g * g;
      }
      squares[static_cast<size_t>(t)] = sum[0] + sum[1] + sum[2] + sum[3];
    }
  });
  double norm = 0;
  for (const double s : squares) norm += s;
  norm = std::sqrt(norm);
  if (!std::isfinite(norm)) return norm;
  const auto factor = static_cast<float>(norm > o.clip ? o.clip / norm : 1.0);

  ++state->step;
  const auto t = static_cast<double>(state->step);
  const auto beta1 = static_cast<float>(o.beta1), beta2 = static_cast<float>(o.beta2);
  // The bias corrections: m / (1 - beta1^t) over sqrt(v / (1 - beta2^t)).
  const auto rate1 = static_cast<float>(rate / (1 - std::pow(o.beta1, t)));
  const auto scale2 = static_cast<float>(1 / (1 - std::pow(o.beta2, t)));
  const auto epsilon = static_cast<float>(o.epsilon);
  // An average over few steps has to forget its start faster.
  const auto keep = static_cast<float>(std::min(o.average, (1 + t) / (10 + t)));
  for (const Parameter& p : layout.all) {
    const float shrink = p.decay ? static_cast<float>(1 - rate * o.decay) : 1.0f;
    ops->shares(static_cast<int64_t>(p.size()), [&](int64_t begin, int64_t end, int) {
      float* w = state->values.data() + p.offset;
      float* m = state->first.data() + p.offset;
      float* v = state->second.data() + p.offset;
      float* average = state->averaged.data() + p.offset;
      const float* g = gradient->data() + p.offset;
      for (int64_t i = begin; i < end; ++i) {
        const float x = g[i] * factor;
        m[i] = beta1 * m[i] + (1 - beta1) * x;
        v[i] = beta2 * v[i] + (1 - beta2) * x * x;
        w[i] = w[i] * shrink - rate1 * m[i] / (std::sqrt(v[i] * scale2) + epsilon);
        average[i] = keep * average[i] + (1 - keep) * w[i];
      }
    });
  }
  return norm;
}

}  // namespace chimera::training
