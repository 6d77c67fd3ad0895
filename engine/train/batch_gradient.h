// The loss of one training step, and its gradient: the step's texts are dealt to micro-batches,
// which threads work on side by side. Their gradients are summed in the order of the micro-batches,
// so the result has the same bits for any number of threads.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "engine/train/draft_gradient.h"

namespace chimera::training {

using MicroBatch = std::vector<const TrainingText*>;

class BatchGradient {
 public:
  // The arguments are those of DraftGradient. n_parallel: micro-batches to work on at once, if
  // there are threads for it; threads beyond that share the work inside one.
  BatchGradient(const DraftConfig& config, const float* embedding, const float* head, int64_t vocab,
                std::span<const int32_t> vocabulary, int dynamic_best, int n_parallel, int threads,
                Precision precision = Precision::kF32);

  // The loss is the mean over all starts. gradient: written, or nullptr for none.
  Score run(const float* parameters, std::span<const MicroBatch> batches, int n_steps,
            double step_weight, float* gradient);

  Ops<float>& ops() { return ops_; }  // on all threads

 private:
  Ops<float> ops_;
  cpu::ThreadPool pool_;
  std::vector<std::unique_ptr<DraftGradient<float>>> models_;  // by thread of the pool
  std::vector<std::vector<float>> gradients_;                  // by micro-batch
  size_t n_parameters_;
};

}  // namespace chimera::training
