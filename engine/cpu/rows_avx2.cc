// The row kernels for AVX2 + FMA + F16C. A machine with AVX-VNNI uses them too, with its own
// products.
#include "engine/cpu/lanes_avx2.h"
// The lanes come first.
#include "engine/cpu/lanes_kernels.h"

namespace chimera::cpu {

const Kernels kAvx2Kernels = {Isa::kAvx2,
                              "avx2",
                              kProductsAvx2,
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
const Kernels kAvxVnniKernels = {Isa::kAvxVnni,
                                 "avxvnni",
                                 kProductsAvxVnni,
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
