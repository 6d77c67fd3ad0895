#include <cstdlib>
#include <string>

#include "engine/cpu/kernels.h"
#include "engine/cpu/product_amx.h"
#include "engine/error.h"

namespace chimera::cpu {
namespace {

struct Entry {
  const char* name;
  const Kernels* kernels;
};
// Best first.
constexpr Entry kEntries[] = {{"amx", &kAmxKernels},
                              {"avx512", &kAvx512Kernels},
                              {"avxvnni", &kAvxVnniKernels},
                              {"avx2", &kAvx2Kernels},
                              {"scalar", &kScalarKernels}};

}  // namespace

bool machine_has(Isa isa) {
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
  }
  return false;
}

const Kernels& select_kernels() {
  const char* wanted = std::getenv("CHIMERA_ISA");
  for (const Entry& entry : kEntries) {
    const bool has = machine_has(entry.kernels->isa);
    if (wanted == nullptr || *wanted == '\0') {
      if (has) return *entry.kernels;
    } else if (entry.name == std::string(wanted)) {
      if (has) return *entry.kernels;
      std::string names;
      for (const Entry& e : kEntries)
        if (machine_has(e.kernels->isa))
          names += (names.empty() ? "" : " or ") + std::string(e.name);
      throw Error("CHIMERA_ISA", names + " on this machine", wanted,
                  "unset it to use the best one");
    }
  }
  throw Error("CHIMERA_ISA", "scalar, avx2, avxvnni, avx512 or amx", in_quotes(wanted));
}

}  // namespace chimera::cpu

const chimera::SamplingOps& chimera::sampling_ops() {
  return cpu::select_kernels().sampling;
}
