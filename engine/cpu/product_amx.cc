// Products over panels with AMX: matrix multiplication of tiles, registers of 16 rows of 64 bytes.
//
//   C (tokens x 16 rows) += A (tokens x k) * B (k x 16 rows)
//
// A is read straight from the activations, one token a row. A row of B is [16 rows][4 k] bytes, or
// [16 rows][2 k] bf16: a vector of a panel. The tokens of a tile do not meet in the arithmetic, so
// what a token gets does not depend on how many share the tile.
//
// BF16: TDPBF16PS *is* the contract's step of 32 columns, and C stays in its tile to the end.
// Quantised: TDPBSSD gives the exact integer dots of one block (of half of it for Q6_K). They leave
// the tile at once, because the contract goes on in floats, with AVX-512.
//
// As in product_avx512.cc, nothing here may have linkage but the table.
#include "engine/cpu/kernels.h"
#include "engine/cpu/panels.h"
#include "engine/cpu/product_avx512.h"

namespace chimera::cpu {
namespace {

constexpr int kTile = 16;  // tokens

// With fewer tokens than this the AVX-512 product, which gives the same bits, has less to do.
// Not tuned.
constexpr int kMinTokens = 4;

// g++'s tile intrinsics do not say that they read memory: without this, what they are to read may
// not have been written yet.
void finish_stores(const void* p) { asm volatile("" ::"r"(p) : "memory"); }

// The shapes of the tile registers, by number (intrinsics want literals). The last tokens, fewer
// than 16, have registers of their own, so that one configuration serves the whole product.
//   0 C, 1 A   of 16 tokens      2 C, 3 A   of the last m % 16      4 B
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void shape(int tile, int rows_, int bytes) {
    rows[tile] = static_cast<uint8_t>(rows_);
    row_bytes[tile] = static_cast<uint16_t>(bytes);
  }
};
static_assert(sizeof(TileConfig) == 64);

// k_bytes: of one step of a token.
void configure(int m, int k_bytes) {
  TileConfig config;
  config.shape(0, kTile, 64);
  config.shape(1, kTile, k_bytes);
  if (m % kTile != 0) {
    config.shape(2, m % kTile, 64);
    config.shape(3, m % kTile, k_bytes);
  }
  config.shape(4, k_bytes / 4, 64);
  finish_stores(&config);
  _tile_loadconfig(&config);
}

// y of up to 16 tokens: lanes `rows` of acc[t].
void store(const float (*acc)[16], int tokens, __mmask16 rows, float* y, const Product& p) {
  for (int t = 0; t < tokens; ++t, y += p.y_stride) {
    __m512 v = _mm512_load_ps(acc[t]);
    if (p.accumulate) v = _mm512_add_ps(_mm512_maskz_loadu_ps(rows, y), v);
    _mm512_mask_storeu_ps(y, rows, v);
  }
}

template <typename Reader>
void quantised_tile(const Product& p, const std::byte* panel, int token, int tokens, __mmask16 rows,
                    float* y) {
  const int64_t blocks = p.cols / 32;
  constexpr int kGroups = 8 / Reader::kScales;  // that share a scale: the rows of B
  alignas(64) int8_t b_tile[kGroups][64];
  alignas(64) int32_t dot[kTile][16];
  alignas(64) float acc[kTile][16] = {}, u[kTile][16];
  for (int64_t b = 0; b < blocks; ++b) {
    const Reader w(panel, b);
    const int8_t* a = p.x.q8 + token * p.cols + b * 32;
    const __m512 min = w.min();
    for (int h = 0; h < Reader::kScales; ++h, a += 16) {
      const __m512i offset = _mm512_set1_epi8(static_cast<char>(Reader::kOffset));
#pragma GCC unroll 8
      for (int g = 0; g < kGroups; ++g)
        _mm512_store_si512(b_tile[g], _mm512_sub_epi8(w.group(h * kGroups + g), offset));
      finish_stores(b_tile);
      _tile_loadd(4, b_tile, 64);
      if (tokens == kTile) {
        _tile_zero(0);
        _tile_loadd(1, a, p.cols);
        _tile_dpbssd(0, 1, 4);
        _tile_stored(0, dot, 64);
      } else {
        _tile_zero(2);
        _tile_loadd(3, a, p.cols);
        _tile_dpbssd(2, 3, 4);
        _tile_stored(2, dot, 64);
      }
      const __m512 scale = w.scale(h);
      for (int t = 0; t < tokens; ++t) {
        __m512 v = _mm512_setzero_ps();
        if (Reader::kHasMin) {
          const __m512i sum = _mm512_set1_epi32(p.x.sum[(token + t) * blocks + b]);
          v = _mm512_mul_ps(min, _mm512_cvtepi32_ps(sum));
        }
        if (h > 0) v = _mm512_load_ps(u[t]);
        v = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(_mm512_load_si512(dot[t])), v);
        _mm512_store_ps(u[t], v);
      }
    }
    for (int t = 0; t < tokens; ++t) {
      const __m512 scale = _mm512_set1_ps(p.x.scale[(token + t) * blocks + b]);
      const __m512 v = _mm512_fmadd_ps(scale, _mm512_load_ps(u[t]), _mm512_load_ps(acc[t]));
      _mm512_store_ps(acc[t], v);
    }
  }
  store(acc, tokens, rows, y, p);
}

void bf16_tile(const Product& p, const std::byte* panel, int token, int tokens, __mmask16 rows,
               float* y) {
  const int64_t cols = (p.cols + 31) / 32 * 32;
  const uint16_t* a = p.x.bf16 + token * cols;
  alignas(64) float acc[kTile][16];
  if (tokens == kTile) {
    _tile_zero(0);
    for (int64_t k = 0; k < cols; k += 32) {
      _tile_loadd(1, a + k, cols * 2);
      _tile_loadd(4, panel + k * 32, 64);
      _tile_dpbf16ps(0, 1, 4);
    }
    _tile_stored(0, acc, 64);
  } else {
    _tile_zero(2);
    for (int64_t k = 0; k < cols; k += 32) {
      _tile_loadd(3, a + k, cols * 2);
      _tile_loadd(4, panel + k * 32, 64);
      _tile_dpbf16ps(2, 3, 4);
    }
    _tile_stored(2, acc, 64);
  }
  store(acc, tokens, rows, y, p);
}

using TileFunction = void (*)(const Product&, const std::byte* panel, int token, int tokens,
                              __mmask16 rows, float* y);

// The two template arguments and k_bytes tell the types apart. noinline: see bf16.
template <TileFunction kTileFunction>
[[gnu::noinline]] void over_panels(const Product& p, size_t panel_size, int k_bytes) {
  configure(p.m, k_bytes);
  for (int64_t panel = p.panel_begin; panel < p.panel_end; ++panel) {
    const int64_t row = panel * kPanelRows, rows = p.rows - row;
    const auto mask = static_cast<__mmask16>(rows < kPanelRows ? (1u << rows) - 1 : 0xffffu);
    for (int t = 0; t < p.m; t += kTile) {
      const int tokens = p.m - t < kTile ? p.m - t : kTile;
      kTileFunction(p, p.panels + static_cast<size_t>(panel) * panel_size, t, tokens, mask,
                    p.y + t * p.y_stride + row);
    }
  }
  _tile_release();  // a thread that sleeps with tiles in use costs 8 KB at every switch
}

template <typename Reader, DType kType>
void quantised(const Product& p) {
  if (p.m < kMinTokens) return kProductsAvx512[static_cast<int>(kType)](p);
  over_panels<quantised_tile<Reader>>(p, static_cast<size_t>(p.cols / 32) * Reader::kBytes,
                                      32 / Reader::kScales);
}

void bf16(const Product& p) {
  if (p.m < kMinTokens) return kProductsAvx512[static_cast<int>(DType::kBF16)](p);
  // The tiles flush denormals by themselves; the add to y must be told.
  const unsigned mode = _mm_getcsr();
  _mm_setcsr(mode | 0x8040u);
  over_panels<bf16_tile>(p, static_cast<size_t>((p.cols + 31) / 32) * 1024, 64);
  _mm_setcsr(mode);
}

// AMX has nothing for these.
void f32(const Product& p) { kProductsAvx512[static_cast<int>(DType::kF32)](p); }
void f16(const Product& p) { kProductsAvx512[static_cast<int>(DType::kF16)](p); }

}  // namespace

// In the order of DType.
const ProductFunction kProductsAmx[kDTypeCount] = {
    f32,
    f16,
    bf16,
    quantised<ReadQ8_0, DType::kQ8_0>,
    quantised<ReadQ4_0, DType::kQ4_0>,
    quantised<ReadQ4_1, DType::kQ4_1>,
    quantised<ReadQ5_0, DType::kQ5_0>,
    quantised<ReadQ5_1, DType::kQ5_1>,
    quantised<ReadQ4_K, DType::kQ4_K>,
    quantised<ReadQ5_K, DType::kQ5_K>,
    quantised<ReadQ6_K, DType::kQ6_K>,
};

}  // namespace chimera::cpu
