// The loss of one training step, and its gradient: the step's texts are dealt to micro-batches,
// which a CPU's threads work on side by side. (A GPU is busy with one, of all texts.) Their
// gradients are summed in the order of the micro-batches, so the result has the same bits for any
// number of threads.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "engine/cpu/thread_pool.h"
#include "engine/train/draft_gradient.h"

namespace chimera::training {

using MicroBatch = std::vector<const TrainingText*>;

// A device's ops, and those of each micro-batch that is worked on at the same time; none: one
// after the other, with `all`.
struct TrainingDevice {
  std::unique_ptr<Ops<float>> all;
  std::vector<std::unique_ptr<Ops<float>>> side_by_side;
};
// n_parallel: micro-batches to work on at once, if there are threads for it; threads beyond that
// share the work inside one.
TrainingDevice cpu_training_device(int n_parallel, int threads,
                                   Precision precision = Precision::kF32);

class BatchGradient {
 public:
  // The arguments are those of DraftGradient.
  BatchGradient(TrainingDevice* device, const DraftConfig& config, const float* embedding,
                const float* head, int64_t vocab, std::span<const int32_t> vocabulary,
                int dynamic_best);

  // The loss is the mean over all starts. gradient: written, or nullptr for none. Both arrays
  // are in the memory of the ops.
  Score run(const float* parameters, std::span<const MicroBatch> batches, int n_steps,
            double step_weight, float* gradient);

 private:
  Ops<float>& ops_;
  cpu::ThreadPool pool_;
  std::vector<std::unique_ptr<DraftGradient<float>>> models_;  // by thread of the pool
  std::vector<Buffer<float>> gradients_;                       // by micro-batch
  int64_t n_parameters_;
};

}  // namespace chimera::training
