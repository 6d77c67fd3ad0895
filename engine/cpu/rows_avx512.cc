// The row kernels for AVX-512. A machine with AMX uses them too, with its own products.
#include "engine/cpu/lanes_avx512.h"
// The lanes come first.
#include "engine/cpu/lanes_kernels.h"

namespace chimera::cpu {

constinit const Kernels kAvx512Kernels = table(Isa::kAvx512, "avx512", kProductsAvx512);
constinit const Kernels kAmxKernels = table(Isa::kAmx, "amx", kProductsAmx);

}  // namespace chimera::cpu
