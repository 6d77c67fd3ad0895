// The CUDA backend on the CPU, its kernels run by the emulator: what the tests prove it with on
// machines without a GPU. Some ten thousand times slower than the GPU.
#pragma once

#include <memory>

#include "engine/backend.h"

namespace chimera {

std::unique_ptr<Backend> make_emulated_cuda_backend(const BackendOptions& options);

}  // namespace chimera
