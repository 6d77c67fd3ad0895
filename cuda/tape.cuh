// How weights stand in device memory: as a tape that the tensor cores read from beginning to end.
//
// mma.m16n8k16 wants a 16 x 16 tile of A spread over a warp's registers: lane 4 g + t holds the
// pairs (k, k + 1) of row g and g + 8 at k = 2t and 2t + 8. So we store it that way:
//
//   element (row, k) of a tile:  lane      row % 8 * 4 + k % 8 / 2
//                                register  row / 8 + 2 * (k / 8), its half k % 2
//
// A matrix is cut into row tiles of 16 rows, each stored whole; a row tile into slabs, k ascending;
// a slab holds 16 rows x 32 k (x 256 k for K-quants: their block), everything that it takes to
// multiply with it, in 16-byte units, so that cp.async moves it as it is:
//
//   F16, BF16    2 tiles (k 0..15, 16..31) of 32 lanes x 16 bytes
//   Q8_0         32 lanes x 16 bytes: two tiles of 8 bytes; then 16 scales
//   Q4_0, Q4_1   32 lanes x two tiles of 8 nibbles (one word a tile); 16 scales (, 16 minima)
//   Q5_0, Q5_1   the same, then 32 lanes x 16 fifth bits; 16 scales (, 16 minima)
//   Q4_K         8 times (32 k) the nibbles; then 16 times the block's 16 bytes d, dmin, scales
//   Q5_K         8 times nibbles and fifth bits; then as Q4_K
//   Q6_K         8 times nibbles and 32 lanes x two high bits; then 16 x (16 scales), 16 x d
//
// That is the file's own number of bits: nothing is expanded. Rows are padded to 16 and columns to
// a slab with zero bytes, which every type reads as finite weights, met by zero activations.
//
// F32 weights never meet a tensor core: panels of 32 rows, (cols, 32), so that lanes are rows.
#pragma once

#include <cstring>

#include "cuda/device.cuh"
#include "engine/tensor.h"

namespace chimera::cuda {
inline namespace CHIMERA_CUDA_BODY {

inline constexpr int kTileRows = 16;
inline constexpr int kF32PanelRows = 32;

// Where the parts of a slab are, in bytes.
struct SlabLayout {
  int k;           // weights of a row in it: 32 or 256
  int low_bytes;   // quants of 32 k: 16 rows x 32 x (16, 8 or 4 bits)
  int high_bytes;  // their further bits: 0, 64 (one bit) or 128 (two bits)
  int scales;      // offset of scales or block headers
  int bytes;       // of the slab
};

BOTH constexpr SlabLayout slab_layout(DType type) {
  switch (type) {
    case DType::kF16:
    case DType::kBF16: return {32, 1024, 0, 1024, 1024};
    case DType::kQ8_0: return {32, 512, 0, 512, 512 + 32};
    case DType::kQ4_0: return {32, 256, 0, 256, 256 + 32};
    case DType::kQ4_1: return {32, 256, 0, 256, 256 + 64};
    case DType::kQ5_0: return {32, 256, 64, 320, 320 + 32};
    case DType::kQ5_1: return {32, 256, 64, 320, 320 + 64};
    case DType::kQ4_K: return {256, 256, 0, 8 * 256, 8 * 256 + 16 * 16};
    case DType::kQ5_K: return {256, 256, 64, 8 * 320, 8 * 320 + 16 * 16};
    case DType::kQ6_K: return {256, 256, 128, 8 * 384, 8 * 384 + 16 * 16 + 16 * 2};
    default: return {1, 0, 0, 0, 0};
  }
}
BOTH constexpr bool has_minimum(DType type) {
  return type == DType::kQ4_1 || type == DType::kQ5_1 || type == DType::kQ4_K ||
         type == DType::kQ5_K;
}
// What is taken from the stored number: weight = scale * (q - offset) + minimum.
BOTH constexpr int quant_offset(DType type) {
  return type == DType::kQ8_0   ? 128
         : type == DType::kQ4_0 ? 8
         : type == DType::kQ5_0 ? 16
         : type == DType::kQ6_K ? 32
                                : 0;
}

BOTH constexpr int64_t tape_slabs(DType type, int64_t cols) {
  return ceil_div<int64_t>(cols, slab_layout(type).k);
}
// Bytes of a matrix on the tape.
BOTH constexpr int64_t tape_bytes(DType type, int64_t rows, int64_t cols) {
  if (type == DType::kF32) return round_up<int64_t>(rows, kF32PanelRows) * cols * 4;
  return ceil_div<int64_t>(rows, kTileRows) * tape_slabs(type, cols) * slab_layout(type).bytes;
}

// Where (row, k) of a 16 x 16 tile stands: lane, register, half.
struct Place16 {
  int lane, reg, half;
};
BOTH constexpr Place16 place_a(int row, int k) {
  return {row % 8 * 4 + k % 8 / 2, row / 8 + 2 * (k / 8), k % 2};
}
// And (k, column) of a 16 x 8 tile of B.
BOTH constexpr Place16 place_b(int k, int column) { return {column * 4 + k % 8 / 2, k / 8, k % 2}; }

// ---- One number at a time: for embeddings, and what the tests hold the fast way against ---------

BOTH uint16_t load_u16(const std::byte* p) { return *reinterpret_cast<const uint16_t*>(p); }

// The stored quant of (row, k), offset not taken off; k within the slab.
BOTH int tape_quant(DType type, const std::byte* slab, int row, int k) {
  const SlabLayout l = slab_layout(type);
  const std::byte* part = slab + k / 32 * (l.low_bytes + l.high_bytes);
  const int tile = k % 32 / 16;
  const Place16 at = place_a(row, k % 16);
  const auto byte_at = [&](int i) { return static_cast<int>(part[i]); };
  if (type == DType::kQ8_0) return byte_at(at.lane * 16 + tile * 8 + at.reg * 2 + at.half);
  // A word of 8 nibbles: register r's halves at bits 4 r and 4 r + 16, so that a shift and a mask
  // leave both in their places.
  const int bit = 4 * at.reg + 16 * at.half;
  int q = byte_at(at.lane * 8 + tile * 4 + bit / 8) >> (bit % 8) & 15;
  if (l.high_bytes == 64) {  // halfword of a lane: tile t's register r: bits 4 t + r, and + 8
    const int b = 4 * tile + at.reg + 8 * at.half;
    q |= (byte_at(256 + at.lane * 2 + b / 8) >> (b % 8) & 1) << 4;
  }
  if (l.high_bytes == 128) {  // word of a lane: 2 (4 t + r), and + 16
    const int b = 2 * (4 * tile + at.reg) + 16 * at.half;
    q |= (byte_at(256 + at.lane * 4 + b / 8) >> (b % 8) & 3) << 4;
  }
  return q;
}

// The 6-bit scale and minimum of sub-block j of a Q4_K or Q5_K block; s: its 12 bytes.
BOTH void unpack_k_scale(const std::byte* s, int j, int* scale, int* minimum) {
  const auto at = [&](int i) { return static_cast<int>(s[i]); };
  if (j < 4) {
    *scale = at(j) & 63;
    *minimum = at(j + 4) & 63;
  } else {
    *scale = (at(j + 4) & 15) | (at(j - 4) >> 6) << 4;
    *minimum = at(j + 4) >> 4 | (at(j) >> 6) << 4;
  }
}

// Scale and minimum of (row, k) in f32: products rounded once, as engine/dtype.h states.
struct ScaleMin {
  float scale, minimum;
};
BOTH ScaleMin tape_scale(DType type, const std::byte* slab, int row, int k) {
  const std::byte* s = slab + slab_layout(type).scales;
  switch (type) {
    case DType::kQ4_K:
    case DType::kQ5_K: {
      const std::byte* block = s + row * 16;
      int scale, minimum;
      unpack_k_scale(block + 4, k / 32, &scale, &minimum);
      return {f16_to_float(load_u16(block)) * static_cast<float>(scale),
              -(f16_to_float(load_u16(block + 2)) * static_cast<float>(minimum))};
    }
    case DType::kQ6_K:
      return {f16_to_float(load_u16(s + 256 + row * 2)) *
                  static_cast<float>(static_cast<int8_t>(s[row * 16 + k / 16])),
              0.0f};
    default:
      return {f16_to_float(load_u16(s + row * 2)),
              has_minimum(type) ? f16_to_float(load_u16(s + 32 + row * 2)) : 0.0f};
  }
}

// Weight (row, k) of a matrix of `cols` columns, as dequantize_row() gives it.
BOTH float tape_weight(DType type, const std::byte* tape, int64_t cols, int64_t row, int64_t k) {
  if (type == DType::kF32)
    return reinterpret_cast<const float*>(
        tape)[(row / kF32PanelRows * cols + k) * kF32PanelRows + row % kF32PanelRows];
  const SlabLayout l = slab_layout(type);
  const std::byte* slab = tape + (row / kTileRows * tape_slabs(type, cols) + k / l.k) * l.bytes;
  const int r = static_cast<int>(row % kTileRows), i = static_cast<int>(k % l.k);
  if (type == DType::kF16 || type == DType::kBF16) {
    const Place16 at = place_a(r, i % 16);
    const uint16_t bits = load_u16(slab + i / 16 * 512 + at.lane * 16 + at.reg * 4 + at.half * 2);
    return type == DType::kF16 ? f16_to_float(bits) : bf16_to_float(bits);
  }
  const ScaleMin s = tape_scale(type, slab, r, i);
  const float product =
      s.scale * static_cast<float>(tape_quant(type, slab, r, i) - quant_offset(type));
  return has_minimum(type) ? product + s.minimum : product;
}

// Packs rows [first, end) of a matrix into `tape` (zeroed, of the whole matrix), on the host.
// Ranges that begin at multiples of kF32PanelRows share no byte.
inline void pack_tape(const TensorView& view, std::byte* tape, int64_t first, int64_t end) {
  const DType type = view.type;
  const SlabLayout l = slab_layout(type);
  for (int64_t row = first; row < end; ++row) {
    const std::byte* from = view.row(row);
    const int r = static_cast<int>(row % kTileRows);
    if (type == DType::kF32) {
      for (int64_t k = 0; k < view.cols; ++k)
        std::memcpy(
            tape +
                ((row / kF32PanelRows * view.cols + k) * kF32PanelRows + row % kF32PanelRows) * 4,
            from + 4 * k, 4);
      continue;
    }
    std::byte* slabs = tape + row / kTileRows * tape_slabs(type, view.cols) * l.bytes;
    if (type == DType::kF16 || type == DType::kBF16) {
      for (int64_t k = 0; k < view.cols; ++k) {
        const Place16 at = place_a(r, static_cast<int>(k % 16));
        std::memcpy(slabs + k / 16 * 512 + at.lane * 16 + at.reg * 4 + at.half * 2, from + 2 * k,
                    2);
      }
      continue;
    }
    const int block_bytes = dtype_info(type).block_bytes;
    CanonicalBlock block;
    for (int64_t b = 0; b < view.cols / 32; ++b) {
      std::byte* slab = slabs + b * 32 / l.k * l.bytes;
      std::byte* part = slab + b * 32 % l.k / 32 * (l.low_bytes + l.high_bytes);
      read_block(type, from, b, &block);
      for (int k = 0; k < 32; ++k) {
        const auto q = static_cast<unsigned>(block.q[k] + quant_offset(type));
        const int tile = k / 16;
        const Place16 at = place_a(r, k % 16);
        const auto put = [part](int byte, unsigned bits) {
          part[byte] |= static_cast<std::byte>(bits);
        };
        if (type == DType::kQ8_0) {
          put(at.lane * 16 + tile * 8 + at.reg * 2 + at.half, q);
          continue;
        }
        const int bit = 4 * at.reg + 16 * at.half;
        put(at.lane * 8 + tile * 4 + bit / 8, (q & 15u) << (bit % 8));
        if (l.high_bytes == 64) {
          const int i = 4 * tile + at.reg + 8 * at.half;
          put(256 + at.lane * 2 + i / 8, q >> 4 << (i % 8));
        }
        if (l.high_bytes == 128) {
          const int i = 2 * (4 * tile + at.reg) + 16 * at.half;
          put(256 + at.lane * 4 + i / 8, q >> 4 << (i % 8));
        }
      }
      std::byte* scales = slab + l.scales;
      const std::byte* file = from + b * 32 / dtype_info(type).block_weights * block_bytes;
      switch (type) {
        case DType::kQ4_K:
        case DType::kQ5_K: std::memcpy(scales + r * 16, file, 16); break;
        case DType::kQ6_K:
          std::memcpy(scales + r * 16, file + 192, 16);
          std::memcpy(scales + 256 + r * 2, file + 208, 2);
          break;
        default:
          std::memcpy(scales + r * 2, file, 2);
          if (has_minimum(type)) std::memcpy(scales + 32 + r * 2, file + 2, 2);
      }
    }
  }
}

inline void pack_tape(const TensorView& view, std::byte* tape) {
  pack_tape(view, tape, 0, view.rows);
}

// ---- A warp's fragment: what the products read -------------------------------------------------

// f16 of weights (in pairs): 0x6400 | q is the f16 number 1024 + q, for q < 1024; taking 1024 +
// offset off is exact, and one f16x2 multiply-add makes the weight: f16(scale * (q - offset) +
// minimum), rounded once, with f16 scale and minimum. K-quants: scale = f16(d * scale_j), minimum =
// -f16(dmin * min_j).
struct LaneScales {
  uint32_t scale[2], minimum[2];  // of rows g and g + 8, twice in a register
};

template <DType kType>
DEVICE LaneScales lane_scales(SharedAddress slab, int k32, int k16) {
  LaneScales s;
  UNROLLED_FOR (int i = 0; i < 2; ++i) {
    const int row = lane_index() / 4 + 8 * i;
    uint16_t scale, minimum = 0;
    if constexpr (kType == DType::kQ4_K || kType == DType::kQ5_K || kType == DType::kQ6_K) {
      const ScaleMin f = tape_scale(kType, pointer_of(slab), row, k32 * 32 + k16 * 16);
      scale = float_to_f16(f.scale);
      minimum = float_to_f16(f.minimum);
    } else {
      const SharedAddress p = slab + slab_layout(kType).scales + row * 2;
      scale = load_shared_u16(p);
      if constexpr (has_minimum(kType)) minimum = load_shared_u16(p + 32);
    }
    s.scale[i] = pack(scale, scale);
    s.minimum[i] = pack(minimum, minimum);
  }
  return s;
}

// The A fragments of the two 16 x 16 tiles at 32 k number `k32` of a slab in shared memory.
template <DType kType>
DEVICE void load_fragments(SharedAddress slab, int k32, uint32_t (&a)[2][4]) {
  const int lane = lane_index();
  if constexpr (kType == DType::kF16 || kType == DType::kBF16) {
    UNROLLED_FOR (int tile = 0; tile < 2; ++tile) {
      const Words4 w = load_shared_16(slab + tile * 512 + lane * 16);
      UNROLLED_FOR (int r = 0; r < 4; ++r) a[tile][r] = w.word[r];
    }
  } else {
    constexpr SlabLayout l = slab_layout(kType);
    constexpr uint32_t kOffset = static_cast<uint32_t>(quant_offset(kType)) * 0x00010001u;
    constexpr uint32_t kBase = 0x64006400u + kOffset;  // 1024 + offset
    const SharedAddress part = slab + k32 * (l.low_bytes + l.high_bytes);
    LaneScales s = lane_scales<kType>(slab, k32, 0);
    if constexpr (kType == DType::kQ8_0) {
      const Words4 w = load_shared_16(part + lane * 16);
      UNROLLED_FOR (int tile = 0; tile < 2; ++tile)
        UNROLLED_FOR (int r = 0; r < 4; ++r) {
          const uint32_t q =
              pick_bytes(w.word[2 * tile + r / 2], 0x64u, r % 2 == 0 ? 0x4140u : 0x4342u);
          a[tile][r] =
              multiply_add_f16x2(subtract_f16x2(q, kBase), s.scale[r % 2], s.minimum[r % 2]);
        }
    } else {
      const Words2 w = load_shared_8(part + lane * 8);
      uint32_t high = 0;
      if constexpr (l.high_bytes == 64) high = load_shared_u16(part + 256 + lane * 2);
      if constexpr (l.high_bytes == 128) high = load_shared_u32(part + 256 + lane * 4);
      UNROLLED_FOR (int tile = 0; tile < 2; ++tile) {
        if constexpr (kType == DType::kQ6_K)
          s = lane_scales<kType>(slab, k32, tile);  // 16 k a scale
        UNROLLED_FOR (int r = 0; r < 4; ++r) {
          uint32_t less_offset;
          if constexpr (l.high_bytes == 0) {
            // Every other nibble stays where it is: 1024 + 16 q, of which a sixteenth is 64 + q,
            // all of it exact.
            constexpr uint32_t kSixteenth = 0x2c002c00u,
                               kMinusBase = 0xd400d400u + 16 * kOffset;  // -(64 + offset)
            const uint32_t nibbles = w.word[tile] >> (r < 2 ? 0 : 8);
            less_offset = r % 2 == 0
                              ? subtract_f16x2(and_or(nibbles, 0x000f000fu, 0x64006400u), kBase)
                              : multiply_add_f16x2(and_or(nibbles, 0x00f000f0u, 0x64006400u),
                                                   kSixteenth, kMinusBase);
          } else {
            uint32_t q = and_or(w.word[tile] >> (4 * r), 0x000f000fu, 0x64006400u);
            const int i = 4 * tile + r;
            if constexpr (l.high_bytes == 64)
              q |= (high >> i & 1u) << 4 | (high >> (8 + i) & 1u) << 20;
            else
              q |= (high >> (2 * i) & 0x00030003u) << 4;
            less_offset = subtract_f16x2(q, kBase);
          }
          a[tile][r] = multiply_add_f16x2(less_offset, s.scale[r % 2], s.minimum[r % 2]);
        }
      }
    }
  }
}

}  // namespace CHIMERA_CUDA_BODY
}  // namespace chimera::cuda
