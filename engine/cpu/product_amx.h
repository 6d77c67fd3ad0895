// Whether kProductsAmx may be called.
#pragma once

namespace chimera::cpu {

// True where the processor has AMX with int8 and bf16 and the kernel lets this process use it, for
// which the first call asks. Check AVX-512 with VNNI apart.
bool amx_available();

}  // namespace chimera::cpu
