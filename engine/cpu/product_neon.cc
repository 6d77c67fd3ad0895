// Products over panels with NEON and its dot product (ARMv8.2).
//
// A tile is one panel (16 rows: four vectors of 4 lanes) times up to kTile tokens. It goes over the
// columns once; every vector of weights that it loads meets all its tokens. SDOT takes the four
// bytes that it multiplies with from one lane of a register: the 32 activations that a token has in
// a block are loaded once, into two registers, and never broadcast. Both its operands are signed.
// Quants of up to 7 bits are that as they stand, those of Q8_0 when their sign bit is flipped back.
//
// Nothing in this file may have linkage but the table at its end (see product_avx512.cc).
#include "engine/cpu/flushed.h"
#include "engine/cpu/kernels.h"
#include "engine/cpu/lanes_neon.h"
#include "engine/cpu/panels.h"

namespace chimera::cpu {
namespace {

constexpr int kTile = 4;  // tokens: 16 integer sums and 8 vectors of activations of 32 registers

// ---- Weights: how each type's panel gives up its scales and quants -----------------------------
//
// A reader stands on one block of 32 columns. group(g, part) is the vector [4 rows][4 k] of column
// group g = 0..7, rows 4 part and up. scale(s), s < kScales, are the rows' scales (of half s of the
// block's columns where there are two); min() their minima if kHasMin. An offset that is still in
// the quants (kOffset) is taken out of the dot with the activations' sum.

IntLanes load_bytes(const uint8_t* p) {
  const uint8x16_t bytes = vld1q_u8(p);
  const uint16x8_t lo = vmovl_u8(vget_low_u8(bytes)), hi = vmovl_high_u8(bytes);
  return {{vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(lo))),
           vreinterpretq_s32_u32(vmovl_high_u16(lo)),
           vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(hi))),
           vreinterpretq_s32_u32(vmovl_high_u16(hi))}};
}

IntLanes load_bytes(const int8_t* p) {
  const int8x16_t bytes = vld1q_s8(p);
  const int16x8_t lo = vmovl_s8(vget_low_s8(bytes)), hi = vmovl_high_s8(bytes);
  return {{vmovl_s16(vget_low_s16(lo)), vmovl_high_s16(lo), vmovl_s16(vget_low_s16(hi)),
           vmovl_high_s16(hi)}};
}

uint8x16_t shifted(const uint8_t* p, int left) {
  return vshlq_u8(vld1q_u8(p), vdupq_n_s8(static_cast<int8_t>(left)));
}

uint8x16_t nibbles(const uint8_t (*quants)[64], int group, int part) {
  const uint8x16_t v = vld1q_u8(quants[group % 4] + 16 * part);
  return group < 4 ? vandq_u8(v, vdupq_n_u8(15)) : vshrq_n_u8(v, 4);
}

// Adds bit `group` of every byte of `high` as the fifth bit.
uint8x16_t with_fifth_bit(uint8x16_t low, const uint8_t* high, int group, int part) {
  return vorrq_u8(low, vandq_u8(shifted(high + 16 * part, 4 - group), vdupq_n_u8(16)));
}

struct ReadQ8_0 {
  static constexpr int kBytes = sizeof(PanelQ8_0), kOffset = 0, kScales = 1;
  static constexpr bool kHasMin = false;
  const PanelQ8_0* p;
  ReadQ8_0(const std::byte* panel, int64_t block)
      : p(reinterpret_cast<const PanelQ8_0*>(panel) + block) {}
  Lanes scale(int) const { return load_f16(p->scale); }
  Lanes min() const { return broadcast(0.0f); }
  uint8x16_t group(int g, int part) const {
    return veorq_u8(vld1q_u8(p->quants[g] + 16 * part), vdupq_n_u8(128));
  }
};

template <typename Panel, int kOffsetOfType, bool kMin, bool kFiveBits>
struct ReadBlock {
  static constexpr int kBytes = sizeof(Panel), kOffset = kOffsetOfType, kScales = 1;
  static constexpr bool kHasMin = kMin;
  const Panel* p;
  ReadBlock(const std::byte* panel, int64_t block)
      : p(reinterpret_cast<const Panel*>(panel) + block) {}
  Lanes scale(int) const { return load_f16(p->scale); }
  Lanes min() const {
    if constexpr (kHasMin)
      return load_f16(p->min);
    else
      return broadcast(0.0f);
  }
  uint8x16_t group(int g, int part) const {
    const uint8x16_t low = nibbles(p->quants, g, part);
    if constexpr (kFiveBits)
      return with_fifth_bit(low, p->high, g, part);
    else
      return low;
  }
};
using ReadQ4_0 = ReadBlock<PanelQ4_0, 8, false, false>;
using ReadQ4_1 = ReadBlock<PanelQ4_1, 0, true, false>;
using ReadQ5_0 = ReadBlock<PanelQ5_0, 16, false, true>;
using ReadQ5_1 = ReadBlock<PanelQ5_1, 0, true, true>;

// Scale and minimum of Q4_K and Q5_K: 6-bit numbers times d and -dmin, one rounding each.
template <typename Panel, bool kFiveBits>
struct ReadK {
  static constexpr int kBytes = sizeof(Panel) / 8, kOffset = 0, kScales = 1;
  static constexpr bool kHasMin = true;
  const Panel* p;
  int block;
  ReadK(const std::byte* panel, int64_t b)
      : p(reinterpret_cast<const Panel*>(panel) + b / 8), block(static_cast<int>(b % 8)) {}
  Lanes scale(int) const {
    const IntLanes number = load_bytes(p->six_bits[block / 2][block % 2 * 2]) & broadcast(63);
    return load_f16(p->d) * to_float(number);
  }
  Lanes min() const {
    const auto& bytes = p->six_bits[block / 2];
    IntLanes number;
    if (block % 2 == 0) {
      number = load_bytes(bytes[1]) & broadcast(63);
    } else {  // the upper two bits of three bytes
      const IntLanes b0 = shift_right<6>(load_bytes(bytes[0]));
      const IntLanes b1 = shift_right<6>(load_bytes(bytes[1]));
      const IntLanes b2 = shift_right<6>(load_bytes(bytes[2]));
      number = b0 | (shift_left<2>(b1) | shift_left<4>(b2));
    }
    return load_f16(p->minus_dmin) * to_float(number);
  }
  uint8x16_t group(int g, int part) const {
    const uint8x16_t low = nibbles(p->quants[block], g, part);
    if constexpr (kFiveBits)
      return with_fifth_bit(low, p->high[block], g, part);
    else
      return low;
  }
};
using ReadQ4_K = ReadK<PanelQ4_K, false>;
using ReadQ5_K = ReadK<PanelQ5_K, true>;

struct ReadQ6_K {
  static constexpr int kBytes = sizeof(PanelQ6_K) / 8, kOffset = 0, kScales = 2;
  static constexpr bool kHasMin = false;
  const PanelQ6_K* p;
  int block;
  ReadQ6_K(const std::byte* panel, int64_t b)
      : p(reinterpret_cast<const PanelQ6_K*>(panel) + b / 8), block(static_cast<int>(b % 8)) {}
  Lanes scale(int s) const { return load_f16(p->d) * to_float(load_bytes(p->scale[block][s])); }
  Lanes min() const { return broadcast(0.0f); }
  uint8x16_t group(int g, int part) const {  // bits 2 (g % 4) and up of `high` become bits 4 and 5
    const uint8x16_t bits = shifted(p->high[block][g / 4] + 16 * part, 4 - 2 * (g % 4));
    const uint8x16_t q =
        vorrq_u8(nibbles(p->quants[block], g, part), vandq_u8(bits, vdupq_n_u8(0x30)));
    return vsubq_u8(q, vdupq_n_u8(32));
  }
};

// ---- Tiles ------------------------------------------------------------------------------------

// One panel times T tokens.
struct Tile {
  const Product& p;
  const std::byte* panel;
  int token;  // the first
  int rows;   // that exist: 1..16
  float* y;   // of the first row and token
};

template <int T>
[[gnu::always_inline]] inline void store(const Tile& tile, const Lanes (&acc)[T]) {
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) {
    float* y = tile.y + t * tile.p.y_stride;
    if (tile.rows == kPanelRows)
      store(y, tile.p.accumulate ? load(y) + acc[t] : acc[t]);
    else
      store_first(y, tile.p.accumulate ? load_first(y, tile.rows) + acc[t] : acc[t], tile.rows);
  }
}

// sum + the products of four signed bytes in each lane of w with those in lane g of x. The
// instruction has its lane in it; where this is inlined g is known.
[[gnu::always_inline]] inline int32x4_t dot_bytes(int32x4_t sum, int8x16_t w, int8x16_t x, int g) {
  switch (g) {
    case 0: return vdotq_laneq_s32(sum, w, x, 0);
    case 1: return vdotq_laneq_s32(sum, w, x, 1);
    case 2: return vdotq_laneq_s32(sum, w, x, 2);
    default: return vdotq_laneq_s32(sum, w, x, 3);
  }
}

template <typename Reader, int T>
void quantised_tile(const Tile& tile) {
  const Product& p = tile.p;
  const int64_t blocks = p.cols / 32;
  const int8_t* q8 = p.x.q8 + tile.token * p.cols;
  const float* scale_x = p.x.scale + tile.token * blocks;
  const int32_t* sum_x = p.x.sum + tile.token * blocks;
  constexpr int kGroups = 8 / Reader::kScales;
  Lanes acc[T];
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) acc[t] = broadcast(0.0f);

  for (int64_t b = 0; b < blocks; ++b, q8 += 32, ++scale_x, ++sum_x) {
    const Reader w(tile.panel, b);
    int8x16_t x[T][2];
    Lanes u[T];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      x[t][0] = vld1q_s8(q8 + t * p.cols);
      x[t][1] = vld1q_s8(q8 + t * p.cols + 16);
    }
#pragma GCC unroll 2
    for (int s = 0; s < Reader::kScales; ++s) {
      IntLanes dot[T];
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) dot[t] = broadcast(int32_t{0});
#pragma GCC unroll 8
      for (int g = s * kGroups; g < (s + 1) * kGroups; ++g) {
#pragma GCC unroll 4
        for (int part = 0; part < 4; ++part) {
          const int8x16_t quants = vreinterpretq_s8_u8(w.group(g, part));
#pragma GCC unroll 4
          for (int t = 0; t < T; ++t)
            dot[t].v[part] = dot_bytes(dot[t].v[part], quants, x[t][g / 4], g % 4);
        }
      }
      const Lanes scale = w.scale(s), min = w.min();
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const int32_t sum = sum_x[t * blocks];
        if (Reader::kOffset != 0) dot[t] = dot[t] - broadcast(Reader::kOffset * sum);
        if (s == 0)
          u[t] = Reader::kHasMin ? min * broadcast(static_cast<float>(sum)) : broadcast(0.0f);
        u[t] = fma(scale, to_float(dot[t]), u[t]);
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) acc[t] = fma(broadcast(scale_x[t * blocks]), u[t], acc[t]);
  }
  store(tile, acc);
}

Lanes load_column(const float* p) {
  return load(p);
}
Lanes load_column(const uint16_t* p) {
  return load_f16(p);
}

// F32 and F16: a multiply-add for every column.
template <typename Weight, int T>
void float_tile(const Tile& tile) {
  const Product& p = tile.p;
  const auto* w = reinterpret_cast<const Weight*>(tile.panel);
  const float* x = p.x.f32 + tile.token * p.cols;
  Lanes acc[T];
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) acc[t] = broadcast(0.0f);
  for (int64_t k = 0; k < p.cols; ++k, w += 16, ++x) {
    const Lanes column = load_column(w);
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) acc[t] = fma(column, broadcast(x[t * p.cols]), acc[t]);
  }
  store(tile, acc);
}

// ---- BF16 -------------------------------------------------------------------------------------
//
// The mode FZ flushes denormals as the contract wants it but for one case: a sum just below FLT_MIN
// that rounds up to it is flushed here and is not on x86, which looks after rounding. Such a sum is
// rare, and never goes unnoticed: every result that is flushed raises the flag UFC. So a tile runs
// in this mode, and if the flag was raised runs again in plain arithmetic.

constexpr uint64_t kFlushMode = 1u << 24, kUnderflow = 1u << 3;  // FPCR.FZ, FPSR.UFC

uint64_t mode() {
  uint64_t fpcr;
  asm volatile("mrs %0, fpcr" : "=r"(fpcr)::"memory");
  return fpcr;
}
void set_mode(uint64_t fpcr) {
  asm volatile("msr fpcr, %0" ::"r"(fpcr) : "memory");
}
uint64_t flags() {
  uint64_t fpsr;
  asm volatile("mrs %0, fpsr" : "=r"(fpsr)::"memory");
  return fpsr;
}
void set_flags(uint64_t fpsr) {
  asm volatile("msr fpsr, %0" ::"r"(fpsr) : "memory");
}

// A bf16 is the upper half of a float.
float32x4_t part_of(uint32x4_t pairs, int odd) {
  return vreinterpretq_f32_u32(odd ? vandq_u32(pairs, vdupq_n_u32(0xffff0000u))
                                   : vshlq_n_u32(pairs, 16));
}

// y (T, 16): the sums of a tile. Not inlined, as the mode matters to the arithmetic in it, of which
// the compiler does not know.
template <int T>
[[gnu::noinline]] void bf16_sums(const Tile& tile, float (*y)[kPanelRows]) {
  const int64_t cols = (tile.p.cols + 31) / 32 * 32;
  const uint16_t* x = tile.p.x.bf16 + tile.token * cols;
  Lanes acc[T];
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) acc[t] = broadcast(0.0f);
  for (int64_t step = 0; step < cols; step += 32) {
    const auto* pairs = reinterpret_cast<const uint32_t*>(tile.panel) + step / 2 * kPanelRows;
    // The two chains one after the other: both at once would not fit in the registers.
    Lanes chain[2][T];
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) chain[odd][t] = broadcast(0.0f);
      for (int i = 0; i < 16; ++i) {
        const Lanes w =
            parts([&](int part) { return part_of(vld1q_u32(pairs + i * 16 + 4 * part), odd); });
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
          const float xk = bf16_to_f32(x[t * cols + step + 2 * i + odd]);
          chain[odd][t] = fma(w, broadcast(xk), chain[odd][t]);
        }
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) acc[t] = acc[t] + (chain[0][t] + chain[1][t]);
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) store(y[t], acc[t]);
}

// The same in plain arithmetic.
void bf16_sums_exact(const Tile& tile, int tokens, float (*y)[kPanelRows]) {
  const int64_t cols = (tile.p.cols + 31) / 32 * 32;
  const auto* w = reinterpret_cast<const uint16_t*>(tile.panel);
  for (int t = 0; t < tokens; ++t) {
    const uint16_t* x = tile.p.x.bf16 + (tile.token + t) * cols;
    for (int r = 0; r < kPanelRows; ++r) {
      float acc = 0.0f;
      for (int64_t step = 0; step < cols; step += 32) {
        float chain[2] = {};
        for (int64_t k = step; k < step + 32; ++k)
          chain[k % 2] = flushed_fma(flushed(bf16_to_f32(w[k / 2 * 32 + 2 * r + k % 2])),
                                     flushed(bf16_to_f32(x[k])), chain[k % 2]);
        acc = flushed(acc + flushed(chain[0] + chain[1]));
      }
      y[t][r] = acc;
    }
  }
}

template <int T>
void bf16_tile(const Tile& tile) {
  float sums[T][kPanelRows];
  const uint64_t mode_before = mode(), flags_before = flags();
  set_mode(mode_before | kFlushMode);
  set_flags(flags_before & ~kUnderflow);
  bf16_sums<T>(tile, sums);
  const bool underflow = (flags() & kUnderflow) != 0;
  set_flags(flags_before);
  set_mode(mode_before);
  if (underflow) bf16_sums_exact(tile, T, sums);
  for (int t = 0; t < T; ++t) {
    float* y = tile.y + t * tile.p.y_stride;
    for (int r = 0; r < tile.rows; ++r)
      y[r] = tile.p.accumulate ? flushed(flushed(y[r]) + sums[t][r]) : sums[t][r];
  }
}

// ---- Products ---------------------------------------------------------------------------------

// Kernels of one type: run<T>(tile) for every tile width.
template <typename Reader>
struct Quantised {
  template <int T>
  static void run(const Tile& tile) {
    quantised_tile<Reader, T>(tile);
  }
};
template <typename Weight>
struct Float {
  template <int T>
  static void run(const Tile& tile) {
    float_tile<Weight, T>(tile);
  }
};
struct BFloat {
  template <int T>
  static void run(const Tile& tile) {
    bf16_tile<T>(tile);
  }
};

template <typename Kernel>
void over_panels(const Product& p, size_t panel_size) {
  for (int64_t panel = p.panel_begin; panel < p.panel_end; ++panel) {
    const int64_t row = panel * kPanelRows, rows = p.rows - row;
    for (int t = 0; t < p.m; t += kTile) {
      const Tile tile{.p = p,
                      .panel = p.panels + static_cast<size_t>(panel) * panel_size,
                      .token = t,
                      .rows = static_cast<int>(rows < kPanelRows ? rows : kPanelRows),
                      .y = p.y + t * p.y_stride + row};
      switch (p.m - t) {
        case 1: Kernel::template run<1>(tile); break;
        case 2: Kernel::template run<2>(tile); break;
        case 3: Kernel::template run<3>(tile); break;
        default: Kernel::template run<4>(tile); break;
      }
    }
  }
}

template <typename Reader>
void quantised(const Product& p) {
  over_panels<Quantised<Reader>>(p, static_cast<size_t>(p.cols / 32) * Reader::kBytes);
}
void f32(const Product& p) {
  over_panels<Float<float>>(p, static_cast<size_t>(p.cols) * 64);
}
void f16(const Product& p) {
  over_panels<Float<uint16_t>>(p, static_cast<size_t>(p.cols) * 32);
}
void bf16(const Product& p) {
  over_panels<BFloat>(p, static_cast<size_t>((p.cols + 31) / 32) * 1024);
}

}  // namespace

// In the order of DType.
const ProductFunction kProductsNeon[kDTypeCount] = {
    f32,
    f16,
    bf16,
    quantised<ReadQ8_0>,
    quantised<ReadQ4_0>,
    quantised<ReadQ4_1>,
    quantised<ReadQ5_0>,
    quantised<ReadQ5_1>,
    quantised<ReadQ4_K>,
    quantised<ReadQ5_K>,
    quantised<ReadQ6_K>,
};

}  // namespace chimera::cpu
