// Weights as the fast products read them: panels of kPanelRows = 16 rows, all columns, one panel
// after the other. Lanes are rows: a vector holds the same column(s) of 16 rows, a token's
// activation is broadcast against it, and no sum ever runs across lanes. One layout serves every
// instruction set.
//
// F32, F16  [k][16 rows]
// BF16      [k / 2][16 rows][2 k]; columns are padded with zeros to a multiple of 32
// others    one of the structs below for each 32 columns (K-quants: 256), as large as the blocks of
//           16 rows in the file. It is made of f16 scales (and minima) of the 16 rows, and vectors
//           of 64 bytes [16 rows][4 k], which is what VPDPBUSD multiplies and what a row of an AMX
//           tile is. The 32 columns of a block are eight groups of four, k = 4 group + i:
//
//   Q8_0                      row 0        row 1             row 15
//            quants[0]   | k0 k1 k2 k3 | k0 k1 k2 k3 | .. | k0 k1 k2 k3 |      group 0
//            quants[1]   | k4 k5 k6 k7 | k4 k5 k6 k7 | .. | k4 k5 k6 k7 |      group 1
//            ...
//            quants[7]   | k28 ..  k31 | k28 ..  k31 | .. | k28 ..  k31 |      group 7
//
//   Q4_*     quants[0]   low nibbles: group 0, high nibbles: group 4 (k16 k17 k18 k19)
//            quants[1]   low nibbles: group 1, high nibbles: group 5
//            quants[2]   low nibbles: group 2, high nibbles: group 6
//            quants[3]   low nibbles: group 3, high nibbles: group 7
//
//   Q5_*     the same, and the fifth bits: bit g of byte (row, i) of `high` belongs to group g
//   Q6_K     the same, and bits 5 and 6:  bits 2 (g % 4) and up of byte (row, i) of high[g / 4]
//
// All quants are stored unsigned, with the offset that the file's type has (Q4_0: 8, Q5_0: 16,
// Q6_K: 32) or, for Q8_0, an offset of 128 added here (the sign bit flipped). Products take the
// offset out with the activations' sum: sum (q + c) a = sum q a + c sum a, in integers, exactly.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine/cpu/kernels.h"
#include "engine/dtype.h"
#include "engine/tensor.h"

namespace chimera::cpu {

struct PanelQ8_0 {
  uint16_t scale[16];
  uint8_t quants[8][64];
};
struct PanelQ4_0 {
  uint16_t scale[16];
  uint8_t quants[4][64];
};
struct PanelQ4_1 {
  uint16_t scale[16], min[16];
  uint8_t quants[4][64];
};
struct PanelQ5_0 {
  uint16_t scale[16];
  uint8_t high[64];
  uint8_t quants[4][64];
};
struct PanelQ5_1 {
  uint16_t scale[16], min[16];
  uint8_t high[64];
  uint8_t quants[4][64];
};

// K-quants. The 6-bit scales and minima of blocks 2p and 2p + 1, four numbers a row, lie in the
// three bytes six_bits[p][0..2] of that row. The last of the four is in pieces, in their upper two
// bits:
//
//   byte 0    scale[2p]        bits 0-1 of minimum[2p + 1]
//   byte 1    minimum[2p]      bits 2-3 of minimum[2p + 1]
//   byte 2    scale[2p + 1]    bits 4-5 of minimum[2p + 1]
struct PanelQ4_K {
  uint16_t d[16], minus_dmin[16];  // the minimum is subtracted: its sign is flipped here, once
  uint8_t six_bits[4][3][16];
  uint8_t quants[8][4][64];
};
struct PanelQ5_K {
  uint16_t d[16], minus_dmin[16];
  uint8_t six_bits[4][3][16];
  uint8_t high[8][64];
  uint8_t quants[8][4][64];
};
struct PanelQ6_K {
  uint16_t d[16];
  int8_t scale[8][2][16];  // of columns 0-15 and of columns 16-31 of a block
  uint8_t high[8][2][64];
  uint8_t quants[8][4][64];
};

static_assert(sizeof(PanelQ8_0) == 16 * 34 && sizeof(PanelQ4_0) == 16 * 18);
static_assert(sizeof(PanelQ4_1) == 16 * 20 && sizeof(PanelQ5_0) == 16 * 22);
static_assert(sizeof(PanelQ5_1) == 16 * 24 && sizeof(PanelQ4_K) == 16 * 144);
static_assert(sizeof(PanelQ5_K) == 16 * 176 && sizeof(PanelQ6_K) == 16 * 210);

// Bytes of one panel. `cols` is a multiple of the type's block_weights. Any alignment will do for
// the panels; 64 is fastest.
size_t panel_bytes(DType type, int64_t cols);

// Packs rows [16 panel, 16 panel + 16) of w, in the engine's row order; rows past w.rows are zero.
void pack_panel(const TensorView& w, int64_t panel, std::byte* out);

// out[k], k < cols = weights of one row, the same bits as dequantize_row gives. `panels` starts at
// panel 0.
void dequantize_panel_row(DType type, const std::byte* panels, int64_t cols, int64_t row,
                          float* out);

}  // namespace chimera::cpu
