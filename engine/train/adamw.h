// AdamW with gradient clipping, a cosine schedule and an average of the weights (EMA).
// (arXiv 1711.05101; 1608.03983 for the cosine.)
#pragma once

#include <cstdint>
#include <vector>

#include "engine/train/ops.h"
#include "engine/train/parameters.h"

namespace chimera::training {

struct AdamWOptions {
  double rate = 2e-3;       // at the end of the warm-up
  double warm_up = 0.04;    // of all steps
  double last_rate = 0.02;  // at the end, of `rate`
  double beta1 = 0.9, beta2 = 0.95, epsilon = 1e-8;
  double decay = 0.01;    // of matrices
  double clip = 1;        // norm of the whole gradient
  double average = 0.99;  // EMA of the weights
};

// Everything that a checkpoint has to hold of the optimiser.
struct AdamWState {
  std::vector<float> values, first, second, averaged;  // weights, moments, EMA
  int64_t step = 0;                                    // taken so far
};

// Starts at the given weights.
AdamWState start_adamw(std::vector<float> values);

// progress: of the run, 0 to 1.
double learning_rate(const AdamWOptions& options, double progress);

// One step. gradient is scaled in place if it is clipped. Returns its norm before clipping; where
// that is not finite nothing has been changed.
double adamw_step(const AdamWOptions& options, const ParameterLayout& layout, double rate,
                  std::vector<float>* gradient, AdamWState* state, Ops<float>* ops);

}  // namespace chimera::training
