#include <cstdlib>
#include <string>

#include "engine/cpu/kernels.h"
#include "engine/cpu/product_amx.h"
#include "engine/error.h"

#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace chimera::cpu {
namespace {

// Best first.
constexpr const Kernels* kTables[] = {&kAmxKernels,  &kAvx512Kernels, &kAvxVnniKernels,
                                      &kAvx2Kernels, &kNeonKernels,   &kScalarKernels};

}  // namespace

bool machine_has(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  switch (isa) {
    case Isa::kScalar: return true;
    case Isa::kAvx2: return avx2;
    case Isa::kAvxVnni: return avx2 && __builtin_cpu_supports("avxvnni");
    case Isa::kAvx512: return avx512;
    case Isa::kAmx: return avx512 && amx_available();
    case Isa::kNeon: return false;
  }
  return false;
#elif defined(__aarch64__)
  const bool dot_products = (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
  return isa == Isa::kScalar || (isa == Isa::kNeon && dot_products);
#else
  return isa == Isa::kScalar;
#endif
}

const Kernels& select_kernels() {
  const char* wanted = std::getenv("CHIMERA_ISA");
  for (const Kernels* table : kTables) {
    const bool has = machine_has(table->isa);
    if (wanted == nullptr || *wanted == '\0') {
      if (has) return *table;
    } else if (table->name == std::string(wanted)) {
      if (has) return *table;
      std::string names;
      for (const Kernels* t : kTables)
        if (machine_has(t->isa)) names += (names.empty() ? "" : " or ") + std::string(t->name);
      throw Error("CHIMERA_ISA", names + " on this machine", wanted,
                  "unset it to use the best one");
    }
  }
  throw Error("CHIMERA_ISA", "scalar, avx2, avxvnni, avx512, amx or neon", in_quotes(wanted));
}

}  // namespace chimera::cpu

const chimera::SamplingOps& chimera::sampling_ops() {
  return cpu::select_kernels().sampling;
}
