// Weight types and the byte layout of their blocks, as GGUF stores them (little-endian, unpadded).
//
// | type  | weights a block | bytes | weight                                            |
// |-------|-----------------|-------|---------------------------------------------------|
// | F32   | 1               | 4     | as stored                                         |
// | F16   | 1               | 2     | as stored                                         |
// | BF16  | 1               | 2     | as stored                                         |
// | Q8_0  | 32              | 34    | d * q                                             |
// | Q4_0  | 32              | 18    | d * (q - 8)                                       |
// | Q4_1  | 32              | 20    | d * q + m                                         |
// | Q5_0  | 32              | 22    | d * (q - 16)                                      |
// | Q5_1  | 32              | 24    | d * q + m                                         |
// | Q4_K  | 256             | 144   | (d * scale[j]) * q - (dmin * min[j]), j = i / 32  |
// | Q5_K  | 256             | 176   | (d * scale[j]) * q - (dmin * min[j]), j = i / 32  |
// | Q6_K  | 256             | 210   | (d * scale[j]) * (q - 32), j = i / 16             |
#pragma once

#include <cstddef>
#include <cstdint>

namespace chimera {

enum class DType : uint8_t {
  kF32,
  kF16,
  kBF16,
  kQ8_0,
  kQ4_0,
  kQ4_1,
  kQ5_0,
  kQ5_1,
  kQ4_K,
  kQ5_K,
  kQ6_K
};
inline constexpr int kDTypeCount = 11;

struct DTypeInfo {
  const char* name;   // as people write it: "Q4_1"
  int block_weights;  // weights a block
  int block_bytes;    // bytes a block
};

const DTypeInfo& dtype_info(DType type);

// Bytes of one row of `cols` weights. `cols` must be a multiple of block_weights.
size_t row_bytes(DType type, int64_t cols);

// How activations are rounded before they meet weights of this type: the first half of the
// arithmetic contract (cpu/kernels.h has the rest).
enum class Activation : uint8_t {
  kF32,   // as they are                                  (F32 and F16 weights)
  kBF16,  // rounded to bf16                              (BF16 weights)
  kQ8,    // int8 in blocks of 32 with an f32 scale and the block's sum  (quantised weights)
};
Activation activation_for(DType type);

// out[i] = weight i of a row that starts at `row`, each rounded to f32 once per operation of the
// table above. The plain definition of every type; embeddings are read with it.
void dequantize_row(DType type, const std::byte* row, int64_t cols, float* out);

// Rounds a row to Q8_0: d = max |w| / 127 as f16, q to nearest. cols: a multiple of 32.
void quantize_row_q8_0(const float* row, int64_t cols, std::byte* out);
// Rounds a row to Q4_1, for the draft model. cols: a multiple of 32.
void quantize_row_q4_1(const float* row, int64_t cols, std::byte* out);

// IEEE half and bfloat16 to f32 are exact; from f32 they round to nearest, ties to even.
float f16_to_f32(uint16_t h);
uint16_t f32_to_f16(float f);
float bf16_to_f32(uint16_t h);
uint16_t f32_to_bf16(float f);

// One 32-wide sub-block of any quantised type in canonical form, the form in which the arithmetic
// contract is stated: w[i] = scale[i / 16] * q[i] + min, where the two scales differ for Q6_K only.
// `q` already has the type's offset removed (-8, -16, -32).
struct CanonicalBlock {
  int8_t q[32];
  float scale[2];
  float min;  // added; 0 for types without one. K-quants: -(dmin * mn), the product rounded once
  bool has_min;
};
// Reads sub-block `index` (32 weights each) of a row. Requires activation_for(type) == kQ8.
void read_block(DType type, const std::byte* row, int64_t index, CanonicalBlock* out);

}  // namespace chimera
