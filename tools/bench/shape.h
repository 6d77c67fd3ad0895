// chimera bench --shape: the steps of a model of a known shape, its weights random numbers.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "engine/backend.h"

namespace chimera {

struct ShapeBenchOptions {
  std::string shape;  // one of shape_names()
  std::string type;   // of the weights, one of shape_types()
  int context;        // tokens before the step
  int rounds;
  int threads;
  bool json;
};
std::vector<std::string> shape_names();
std::vector<std::string> shape_types();

// Times steps of a root alone and with trees of 25 and 64 nodes, whole and by parts, beside the
// speed of reading memory; and steps of decoding, plain and with a draft model. Speed does not
// depend on what the weights say, so no file is needed. Throws Error if there is not enough memory.
int bench_shape(std::unique_ptr<Backend> backend, const ShapeBenchOptions& options);

}  // namespace chimera
