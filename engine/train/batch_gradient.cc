#include "engine/train/batch_gradient.h"

#include <algorithm>
#include <exception>

#include "engine/train/cpu_ops.h"

namespace chimera::training {

TrainingDevice cpu_training_device(int n_parallel, int threads, Precision precision) {
  TrainingDevice device{std::make_unique<CpuOps<float>>(threads, precision), {}};
  const int parts = std::clamp(threads, 1, n_parallel);
  for (int i = 0; i < parts; ++i)
    device.side_by_side.push_back(
        std::make_unique<CpuOps<float>>(std::max(1, threads / parts), precision));
  return device;
}

BatchGradient::BatchGradient(TrainingDevice* device, const DraftConfig& config,
                             const float* embedding, const float* head, int64_t vocab,
                             std::span<const int32_t> vocabulary, int dynamic_best)
    : ops_(*device->all),
      pool_(std::max(1, static_cast<int>(device->side_by_side.size()))),
      n_parameters_(static_cast<int64_t>(ParameterLayout(config).total)) {
  const auto add = [&](Ops<float>* ops) {
    models_.push_back(std::make_unique<DraftGradient<float>>(ops, config, embedding, head, vocab,
                                                             vocabulary, dynamic_best));
  };
  for (const auto& ops : device->side_by_side) add(ops.get());
  if (models_.empty()) add(device->all.get());
}

Score BatchGradient::run(const float* parameters, std::span<const MicroBatch> batches, int n_steps,
                         double step_weight, float* gradient) {
  std::vector<Score> scores(batches.size());
  if (gradient != nullptr) gradients_.resize(std::max(gradients_.size(), batches.size()));
  std::vector<std::exception_ptr> errors(models_.size());  // a job must not throw
  pool_.run([&](int thread) {
    const auto t = static_cast<size_t>(thread);
    try {
      for (size_t i = t; i < batches.size(); i += models_.size()) {
        if (gradient != nullptr) ops_.need(&gradients_[i], n_parameters_);
        scores[i] = models_[t]->run(parameters, batches[i], n_steps, step_weight,
                                    gradient != nullptr ? gradients_[i].data() : nullptr);
      }
    } catch (...) {
      errors[t] = std::current_exception();
    }
  });
  for (const std::exception_ptr& error : errors)
    if (error) std::rethrow_exception(error);
  Score total;
  for (const Score& s : scores) total += s;
  if (gradient == nullptr || total.starts == 0) return total;
  for (size_t b = 0; b < batches.size(); ++b) {
    const float weight = static_cast<float>(scores[b].starts) / static_cast<float>(total.starts);
    ops_.axpby(n_parameters_, weight, gradients_[b].data(), b == 0 ? 0.0f : 1.0f, gradient);
  }
  return total;
}

}  // namespace chimera::training
