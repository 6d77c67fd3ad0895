// The tables of other machines' instruction sets are here in name only: no file of theirs is
// compiled, and machine_has() says no to every one of them.
#include "engine/cpu/kernels.h"

namespace chimera::cpu {
namespace {

[[maybe_unused]] constexpr Kernels absent(Isa isa, const char* name) {
  Kernels kernels{};
  kernels.isa = isa;
  kernels.name = name;
  return kernels;
}

}  // namespace

#if !defined(__x86_64__)
constinit const Kernels kAvx2Kernels = absent(Isa::kAvx2, "avx2");
constinit const Kernels kAvxVnniKernels = absent(Isa::kAvxVnni, "avxvnni");
constinit const Kernels kAvx512Kernels = absent(Isa::kAvx512, "avx512");
constinit const Kernels kAmxKernels = absent(Isa::kAmx, "amx");
#endif

#if !defined(__aarch64__)
constinit const Kernels kNeonKernels = absent(Isa::kNeon, "neon");
#endif

}  // namespace chimera::cpu
