#include "cuda/emulated_backend.h"

#include "cuda/cuda_backend.cuh"

namespace chimera {

std::unique_ptr<Backend> make_emulated_cuda_backend(const BackendOptions& options) {
  return std::make_unique<cuda::CudaBackend>("emulated", "cuda kernels, emulated on the CPU",
                                             options.eager);
}

}  // namespace chimera
