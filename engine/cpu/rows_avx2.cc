// The row kernels for AVX2 + FMA + F16C. A machine with AVX-VNNI uses them too, with its own
// products.
#include "engine/cpu/lanes_avx2.h"
// The lanes come first.
#include "engine/cpu/lanes_kernels.h"

namespace chimera::cpu {

constinit const Kernels kAvx2Kernels = table(Isa::kAvx2, "avx2", kProductsAvx2);
constinit const Kernels kAvxVnniKernels = table(Isa::kAvxVnni, "avxvnni", kProductsAvxVnni);

}  // namespace chimera::cpu
