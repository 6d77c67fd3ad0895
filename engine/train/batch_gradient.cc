#include "engine/train/batch_gradient.h"

#include <algorithm>

namespace chimera::training {

BatchGradient::BatchGradient(const DraftConfig& config, const float* embedding, const float* head,
                             int64_t vocab, std::span<const int32_t> vocabulary, int dynamic_best,
                             int n_parallel, int threads, Precision precision)
    : ops_(threads, precision),
      pool_(std::clamp(threads, 1, n_parallel)),
      n_parameters_(ParameterLayout(config).total) {
  for (int i = 0; i < pool_.size(); ++i)
    models_.push_back(std::make_unique<DraftGradient<float>>(
        config, embedding, head, vocab, vocabulary, dynamic_best,
        std::max(1, threads / pool_.size()), precision));
}

Score BatchGradient::run(const float* parameters, std::span<const MicroBatch> batches, int n_steps,
                         double step_weight, float* gradient) {
  std::vector<Score> scores(batches.size());
  if (gradient != nullptr) gradients_.resize(std::max(gradients_.size(), batches.size()));
  pool_.run([&](int thread) {
    for (size_t i = static_cast<size_t>(thread); i < batches.size(); i += models_.size()) {
      if (gradient != nullptr) gradients_[i].resize(n_parameters_);
      scores[i] = models_[static_cast<size_t>(thread)]->run(
          parameters, batches[i], n_steps, step_weight,
          gradient != nullptr ? gradients_[i].data() : nullptr);
    }
  });
  Score total;
  for (const Score& s : scores) total += s;
  if (gradient == nullptr || total.starts == 0) return total;
  ops_.shares(static_cast<int64_t>(n_parameters_), [&](int64_t begin, int64_t end, int) {
    for (size_t b = 0; b < batches.size(); ++b) {
      const float weight = static_cast<float>(scores[b].starts) / static_cast<float>(total.starts);
      const float* g = gradients_[b].data();
      for (int64_t i = begin; i < end; ++i)
        gradient[i] = (b == 0 ? 0.0f : gradient[i]) + weight * g[i];
    }
  });
  return total;
}

}  // namespace chimera::training
