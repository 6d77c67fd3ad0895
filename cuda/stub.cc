// Stands in for the CUDA backend in builds without one.
#include "engine/backend.h"
#include "engine/error.h"

namespace chimera {

bool cuda_available() { return false; }

std::unique_ptr<Backend> make_cuda_backend(const BackendOptions& /*options*/) {
  throw Error("device cuda", "a build with the CUDA backend", "one without", "use --device cpu");
}

double cuda_read_bandwidth(size_t /*bytes*/) { return 0; }

}  // namespace chimera
