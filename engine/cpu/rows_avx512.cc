// The row kernels for AVX-512. A machine with AMX uses them too, with its own products.
#include "engine/cpu/lanes_avx512.h"
// The lanes come first.
#include "engine/cpu/lanes_kernels.h"

namespace chimera::cpu {

const Kernels kAvx512Kernels = {Isa::kAvx512,
                                "avx512",
                                kProductsAvx512,
                                rms_norm,
                                swiglu,
                                silu,
                                quantize_q8,
                                round_bf16,
                                round_f16,
                                rotate,
                                attention,
                                combine,
                                {argmax, exp_scaled, gumbel, top_k, sum_of_exp}};
const Kernels kAmxKernels = {Isa::kAmx,
                             "amx",
                             kProductsAmx,
                             rms_norm,
                             swiglu,
                             silu,
                             quantize_q8,
                             round_bf16,
                             round_f16,
                             rotate,
                             attention,
                             combine,
                             {argmax, exp_scaled, gumbel, top_k, sum_of_exp}};

}  // namespace chimera::cpu
