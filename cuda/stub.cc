// Stands in for the CUDA backend in builds without one.
#include "engine/backend.h"
#include "engine/error.h"
#include "engine/train/ops.h"

namespace chimera {
namespace {

[[noreturn]] void refuse() {
  throw Error("device cuda", "a build with the CUDA backend", "one without", "use --device cpu");
}

}  // namespace

bool cuda_available() { return false; }

std::unique_ptr<Backend> make_cuda_backend(const BackendOptions& /*options*/) { refuse(); }

std::unique_ptr<training::Ops<float>> training::make_cuda_training_ops(Precision /*precision*/) {
  refuse();
}

double cuda_read_bandwidth(size_t /*bytes*/) { return 0; }

}  // namespace chimera
