// Products over panels with AVX-512 and VNNI.
//
// A tile is one panel (16 rows, a lane each) times up to kTile tokens. It goes over the columns
// once; every vector of weights that it loads meets all its tokens. The tiles of a panel follow
// each other, so that the panel comes from memory once, during the first tile, and from the cache
// after that.
//
// Nothing in this file may have linkage but the table at its end: an inline function of this file,
// compiled for AVX-512, could otherwise be the copy that the linker keeps for the whole program.
#include "engine/cpu/product_avx512.h"

#include "engine/cpu/kernels.h"
#include "engine/cpu/panels.h"

namespace chimera::cpu {
namespace {

constexpr int kTile = 8;  // tokens: 8 f32 sums and 8 integer dots are 16 of the 32 registers

// The hardware's prefetchers stop at the end of a page; the first tile of a panel asks for the
// bytes that are this far ahead, which are those of the next panels. Where that tile is the only
// one they are not wanted again before the next step, and should not drive keys and values out of
// the caches; else they go to L2: L1 can wait for fewer lines at a time, and its own prefetcher
// fetches them from there.
constexpr int kPrefetchBytes = 8192;
// One or two tokens ask for the next line before a fetch ahead has paid: memory is all that they
// wait for, the hardware has seen their stream, and requests beside its own only stand in the same
// queue. (Zen 4, a pass of Q4_1 without them and with: one token 0.84 to 0.97, two 0.88 to 0.98 of
// the time, three 0.99, four 0.95 to 1.03, eight 1.01 to 1.06, nine 1.3.)
constexpr int kFewTokens = 2;
enum class Ahead { kNothing, kOnce, kAgain };

// Inlined by force: g++ drops calls of a function that does nothing but prefetch.
template <int kBytes>
[[gnu::always_inline]] inline void prefetch(Ahead ahead, const std::byte* p) {
  const auto* at = reinterpret_cast<const char*>(p + kPrefetchBytes);
  if (ahead == Ahead::kOnce) {
#pragma GCC unroll 9
    for (int i = 0; i < kBytes; i += 64) _mm_prefetch(at + i, _MM_HINT_NTA);
  } else if (ahead == Ahead::kAgain) {
#pragma GCC unroll 9
    for (int i = 0; i < kBytes; i += 64) _mm_prefetch(at + i, _MM_HINT_T1);
  }
}

// ---- Tiles ------------------------------------------------------------------------------------

// One panel times T tokens.
struct Tile {
  const Product& p;
  const std::byte* panel;
  int token;  // the first
  Ahead ahead;
  __mmask16 rows;  // that exist
  float* y;        // of the first row and token
};

// y of the tile's rows and tokens. Inlined, because an array that is handed to a function has to
// stand in memory, and the compiler would then write the sums back there after every step.
template <int T>
[[gnu::always_inline]] inline void store(const Tile& tile, const __m512 (&acc)[T]) {
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    float* y = tile.y + t * tile.p.y_stride;
    __m512 v = acc[t];
    if (tile.p.accumulate) v = _mm512_add_ps(_mm512_maskz_loadu_ps(tile.rows, y), v);
    _mm512_mask_storeu_ps(y, tile.rows, v);
  }
}

// A token's four bytes of one group, in every lane.
__m512i broadcast(const int8_t* q) {
  return _mm512_set1_epi32(*reinterpret_cast<const int __attribute__((may_alias, aligned(1)))*>(q));
}

// dot[t] = sum over the columns of scale s of q * a, in integers. q8 and sum: the first token's
// activations of this block and their sum, the next token's q8_stride and sum_stride on.
//
// VPDPBUSD multiplies unsigned by signed bytes and adds four neighbours to a 32-bit lane. The
// weights are the unsigned ones, and starting from -kOffset * sum of the activations takes the
// offset out.
template <typename Reader, int T>
[[gnu::always_inline]] inline void integer_dots(const Reader& w, int, const int8_t* q8,
                                                int64_t q8_stride, const int32_t* sum,
                                                int64_t sum_stride, __m512i (&dot)[T]) {
  constexpr int kOffsetLog2 = Reader::kOffset == 0 ? 0 : __builtin_ctz(Reader::kOffset);
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    const __m512i offset = _mm512_slli_epi32(_mm512_set1_epi32(sum[t * sum_stride]), kOffsetLog2);
    dot[t] = _mm512_setzero_si512();
    if (Reader::kOffset != 0) dot[t] = _mm512_sub_epi32(dot[t], offset);
  }
#pragma GCC unroll 8
  for (int g = 0; g < 8; ++g) {
    const __m512i quants = w.group(g);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
      dot[t] = _mm512_dpbusd_epi32(dot[t], quants, broadcast(q8 + t * q8_stride + g * 4));
  }
}

// Q6_K has two scales a block, and the activations' sum over half a block is not at hand. So the
// other way round: weights signed, activations unsigned as a + 128, and the start is -128 * sum of
// the weights, which serves all tokens.
template <int T>
[[gnu::always_inline]] inline void integer_dots(const ReadQ6_K& w, int s, const int8_t* q8,
                                                int64_t q8_stride, const int32_t*, int64_t,
                                                __m512i (&dot)[T]) {
  const __m512i all_128 = _mm512_set1_epi8(-128);  // as unsigned bytes
  __m512i quants[4], sum_128 = _mm512_setzero_si512();
#pragma GCC unroll 4
  for (int g = 0; g < 4; ++g) {
    quants[g] = _mm512_sub_epi8(w.group(4 * s + g), _mm512_set1_epi8(ReadQ6_K::kOffset));
    sum_128 = _mm512_dpbusd_epi32(sum_128, all_128, quants[g]);
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    dot[t] = _mm512_sub_epi32(_mm512_setzero_si512(), sum_128);
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
      const __m512i x = broadcast(q8 + t * q8_stride + 16 * s + 4 * g);
      dot[t] = _mm512_dpbusd_epi32(dot[t], _mm512_xor_si512(x, all_128), quants[g]);
    }
  }
}

template <typename Reader, int T>
void quantised_tile(const Tile& tile) {
  const Product& p = tile.p;
  const int64_t blocks = p.cols / 32;
  const int8_t* q8 = p.x.q8 + tile.token * p.cols;
  const float* scale_x = p.x.scale + tile.token * blocks;
  const int32_t* sum_x = p.x.sum + tile.token * blocks;
  __m512 acc[T];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) acc[t] = _mm512_setzero_ps();

  for (int64_t b = 0; b < blocks; ++b, q8 += 32, ++scale_x, ++sum_x) {
    prefetch<Reader::kBytes>(tile.ahead, tile.panel + b * Reader::kBytes);
    const Reader w(tile.panel, b);
    __m512 u[T];
#pragma GCC unroll 2
    for (int s = 0; s < Reader::kScales; ++s) {
      __m512i dot[T];
      integer_dots(w, s, q8, p.cols, sum_x, blocks, dot);
      const __m512 scale = w.scale(s), min = w.min();
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        if (s == 0) {
          const __m512 sum = _mm512_cvtepi32_ps(_mm512_set1_epi32(sum_x[t * blocks]));
          u[t] = Reader::kHasMin ? _mm512_mul_ps(min, sum) : _mm512_setzero_ps();
        }
        u[t] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(dot[t]), u[t]);
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
      acc[t] = _mm512_fmadd_ps(_mm512_set1_ps(scale_x[t * blocks]), u[t], acc[t]);
  }
  store(tile, acc);
}

__m512 load_column(const float* p) {
  return _mm512_loadu_ps(p);
}
__m512 load_column(const uint16_t* p) {
  return load_halves(p);
}

// F32 and F16: a multiply-add for every column.
template <typename Weight, int T>
void float_tile(const Tile& tile) {
  const Product& p = tile.p;
  const auto* w = reinterpret_cast<const Weight*>(tile.panel);
  const int64_t cols = p.cols;
  const float* x = p.x.f32 + tile.token * cols;
  __m512 acc[T];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) acc[t] = _mm512_setzero_ps();
  for (int64_t k = 0; k < cols; ++k, w += 16, ++x) {
    prefetch<16 * sizeof(Weight)>(tile.ahead, reinterpret_cast<const std::byte*>(w));
    const __m512 column = load_column(w);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
      acc[t] = _mm512_fmadd_ps(column, _mm512_set1_ps(x[t * cols]), acc[t]);
  }
  store(tile, acc);
}

// A bf16 is the upper half of a float: of a pair, the odd one needs its neighbour masked away, the
// even one a shift.
__m512 even_of(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
}
__m512 odd_of(__m512i pairs) {
  return _mm512_castsi512_ps(
      _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}

template <int T>
void bf16_tile(const Tile& tile) {
  const Product& p = tile.p;
  const int64_t cols = (p.cols + 31) / 32 * 32;
  const uint16_t* x = p.x.bf16 + tile.token * cols;
  const std::byte* w = tile.panel;
  __m512 acc[T];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) acc[t] = _mm512_setzero_ps();
  for (int64_t step = 0; step < cols; step += 32) {
    // The step's activations as floats, evens and odds apart: from here they are broadcast.
    alignas(64) float x_even[T][16], x_odd[T][16];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const __m512i pairs = _mm512_loadu_si512(x + t * cols + step);
      _mm512_store_ps(x_even[t], even_of(pairs));
      _mm512_store_ps(x_odd[t], odd_of(pairs));
    }
    __m512 even[T], odd[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) even[t] = odd[t] = _mm512_setzero_ps();
    for (int i = 0; i < 16; ++i, w += 64) {
      prefetch<64>(tile.ahead, w);
      const __m512i pairs = _mm512_loadu_si512(w);
      const __m512 w_even = even_of(pairs), w_odd = odd_of(pairs);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        even[t] = _mm512_fmadd_ps(w_even, _mm512_set1_ps(x_even[t][i]), even[t]);
        odd[t] = _mm512_fmadd_ps(w_odd, _mm512_set1_ps(x_odd[t][i]), odd[t]);
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) acc[t] = _mm512_add_ps(acc[t], _mm512_add_ps(even[t], odd[t]));
  }
  store(tile, acc);
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
    const auto mask = static_cast<__mmask16>(rows < kPanelRows ? (1u << rows) - 1 : 0xffffu);
    for (int t = 0; t < p.m; t += kTile) {
      const Tile tile{.p = p,
                      .panel = p.panels + static_cast<size_t>(panel) * panel_size,
                      .token = t,
                      .ahead = t > 0 || p.m <= kFewTokens ? Ahead::kNothing
                               : p.m <= kTile             ? Ahead::kOnce
                                                          : Ahead::kAgain,
                      .rows = mask,
                      .y = p.y + t * p.y_stride + row};
      switch (p.m - t) {
        case 1: Kernel::template run<1>(tile); break;
        case 2: Kernel::template run<2>(tile); break;
        case 3: Kernel::template run<3>(tile); break;
        case 4: Kernel::template run<4>(tile); break;
        case 5: Kernel::template run<5>(tile); break;
        case 6: Kernel::template run<6>(tile); break;
        case 7: Kernel::template run<7>(tile); break;
        default: Kernel::template run<8>(tile); break;
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

// The compiler does not know that the mode of the next function matters to the arithmetic in this
// one; a call that it cannot look into keeps the two apart.
[[gnu::noinline]] void bf16_flushed(const Product& p) {
  over_panels<BFloat>(p, static_cast<size_t>((p.cols + 31) / 32) * 1024);
}

void bf16(const Product& p) {
  const unsigned mode = _mm_getcsr();
  _mm_setcsr(mode | 0x8040u);  // FTZ | DAZ, as the contract wants it for BF16
  bf16_flushed(p);
  _mm_setcsr(mode);
}

}  // namespace

// In the order of DType.
const ProductFunction kProductsAvx512[kDTypeCount] = {
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
