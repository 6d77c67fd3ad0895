// The optimiser: Muon for matrices, AdamW for the few numbers that are not in one, both with
// gradient clipping, a cosine schedule and an average of the weights (EMA).
//
// Muon (Jordan et al. 2024) makes the momentum of a matrix orthogonal before it takes it as a step,
// so that every direction of the matrix is moved by the same amount, rare ones too. Its step is
// scaled to the size of AdamW's (arXiv 2502.16982), so that one learning rate serves both. What it
// is worth on equal data stands in tools/train/README.md. AdamW: arXiv 1711.05101; the cosine:
// 1608.03983.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/train/ops.h"
#include "engine/train/parameters.h"

namespace chimera::training {

struct OptimizerOptions {
  double rate = 2e-3;                                // at the end of the warm-up
  double warm_up = 0.04;                             // of all steps
  double last_rate = 0.02;                           // at the end, of `rate`
  double momentum = 0.95;                            // Muon's
  double beta1 = 0.9, beta2 = 0.95, epsilon = 1e-8;  // AdamW's
  double decay = 0.01;                               // of matrices
  double clip = 1;                                   // norm of the whole gradient
  double average = 0.999;                            // EMA of the weights
};

// Everything that a checkpoint has to hold.
struct OptimizerState {
  Buffer<float> values, first, second, averaged;  // weights, moments, EMA
  int64_t step = 0;                               // taken so far
};

// Starts at the given weights. The state is in the memory of the ops.
OptimizerState start_optimizer(Ops<float>* ops, const std::vector<float>& values);

// progress: of the run, 0 to 1.
double learning_rate(const OptimizerOptions& options, double progress);

class Optimizer {
 public:
  // The products of Muon are those of `ops`. layout and ops are not copied.
  Optimizer(const OptimizerOptions& options, const ParameterLayout& layout, Ops<float>* ops)
      : options_(options), layout_(layout), ops_(*ops) {}

  // One step. gradient, in the memory of the ops as the state is, is scaled in place if it
  // is clipped. Returns its norm before clipping; where that is not finite nothing has been
  // changed. The bits do not depend on the number of threads.
  double step(double rate, float* gradient, OptimizerState* state);

  // Makes the singular values of x (rows, cols) nearly 1 (0.7 to 1.2), five Newton-Schulz steps of
  // an odd polynomial.
  void orthogonalize(int64_t rows, int64_t cols, float* x);

 private:
  double clip(float* gradient);

  OptimizerOptions options_;
  const ParameterLayout& layout_;
  Ops<float>& ops_;
  Buffer<float> update_, gram_, square_, next_;
};

}  // namespace chimera::training
