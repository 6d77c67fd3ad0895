// The tile on VDPBF16PS, which multiplies twice as many elements as an FMA: elements of A and B are
// rounded to bf16, sums stay in f32. A word of a panel is a pair of neighbours in k.
#include <immintrin.h>

#include "engine/train/gemm.h"

namespace chimera::training {
namespace {

constexpr int kTileRows = 14, kTileVectors = 2;

__mmask16 first(int64_t n) {
  return static_cast<__mmask16>(n >= 16 ? 0xffffu : n <= 0 ? 0u : (1u << n) - 1u);
}

// Rows and columns of a 16 x 16 matrix of words change places.
[[gnu::always_inline]] inline void transpose(__m512i (&v)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {  // pairs of rows
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // fours of rows: v[i + j] has columns j, j + 4, j + 8, j + 12
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm512_shuffle_i32x4(v[j], v[4 + j], 0x88);  // rows 0-7 of columns j, j + 8
    t[4 + j] = _mm512_shuffle_i32x4(v[j], v[4 + j], 0xdd);
    t[8 + j] = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0xdd);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    v[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
    v[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
    v[4 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0x88);
    v[12 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0xdd);
  }
}

// Lines that lie in k order: pairs are neighbours already, lines have to become lanes.
void pack_along_k(const float* data, int64_t line_stride, int64_t lines, int64_t k, int height,
                  float* out) {
  const int64_t words = (k + 1) / 2;
  for (int at = 0; at < height; at += 16) {
    const __mmask16 lanes = first(height - at);
    for (int64_t p = 0; p < words; p += 16) {
      const int64_t rest = k - 2 * p;
      __m512i v[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        v[i] = _mm512_setzero_si512();
        if (at + i < lines) {
          const float* from = data + (at + i) * line_stride + 2 * p;
          v[i] = reinterpret_cast<__m512i>(
              _mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(first(rest - 16), from + 16),
                                  _mm512_maskz_loadu_ps(first(rest), from)));
        }
      }
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        if (p + i < words) _mm512_mask_storeu_epi32(out + (p + i) * height + at, lanes, v[i]);
    }
  }
}

// Lines are lanes already; two steps of k are put together.
void pack_across_k(const float* data, int64_t k_stride, int64_t lines, int64_t k, int height,
                   float* out) {
  const auto bf16 = [](__m512 x) {
    return _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
  };
  for (int64_t p = 0; p < k; p += 2, out += height)
    for (int at = 0; at < height; at += 16) {
      const __mmask16 some = first(lines - at), both = p + 1 < k ? some : __mmask16{0};
      const float* from = data + p * k_stride + at;
      const __m512i even = bf16(_mm512_maskz_loadu_ps(some, from));
      const __m512i odd = bf16(_mm512_maskz_loadu_ps(both, from + k_stride));
      _mm512_mask_storeu_epi32(out + at, first(height - at),
                               _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
}

void pack(const float* data, int64_t line_stride, int64_t k_stride, int64_t count, int64_t k,
          int height, float* out) {
  for (int64_t at = 0; at < count; at += height, out += (k + 1) / 2 * height) {
    const int64_t lines = count - at < height ? count - at : height;
    const float* source = data + at * line_stride;
    if (k_stride == 1)
      pack_along_k(source, line_stride, lines, k, height, out);
    else
      pack_across_k(source, k_stride, lines, k, height, out);
  }
}

void tile(int64_t words, const float* a, const float* b, float* c, int64_t ldc, bool accumulate) {
  __m512 sum[kTileRows][kTileVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
  for (int64_t p = 0; p < words; ++p, a += kTileRows, b += 16 * kTileVectors) {
    const auto b0 = reinterpret_cast<__m512bh>(_mm512_loadu_ps(b));
    const auto b1 = reinterpret_cast<__m512bh>(_mm512_loadu_ps(b + 16));
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
      const auto row = reinterpret_cast<__m512bh>(_mm512_set1_ps(a[i]));
      sum[i][0] = _mm512_dpbf16_ps(sum[i][0], row, b0);
      sum[i][1] = _mm512_dpbf16_ps(sum[i][1], row, b1);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kTileVectors; ++j) {
      float* to = c + i * ldc + 16 * j;
      _mm512_storeu_ps(to, accumulate ? _mm512_add_ps(_mm512_loadu_ps(to), sum[i][j]) : sum[i][j]);
    }
  }
}

}  // namespace

const TileKernel kTileAvx512Bf16 = {kTileRows, 16 * kTileVectors, 2, pack, tile};

}  // namespace chimera::training
