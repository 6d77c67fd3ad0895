// The row kernels for NEON.
#include "engine/cpu/lanes_neon.h"
// The lanes come first.
#include "engine/cpu/lanes_kernels.h"

namespace chimera::cpu {

constinit const Kernels kNeonKernels = table(Isa::kNeon, "neon", kProductsNeon);

}  // namespace chimera::cpu
