#include "engine/dtype.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

namespace chimera {
namespace {

constexpr DTypeInfo kInfo[kDTypeCount] = {
    {"F32", 1, 4},      {"F16", 1, 2},      {"BF16", 1, 2},     {"Q8_0", 32, 34},
    {"Q4_0", 32, 18},   {"Q4_1", 32, 20},   {"Q5_0", 32, 22},   {"Q5_1", 32, 24},
    {"Q4_K", 256, 144}, {"Q5_K", 256, 176}, {"Q6_K", 256, 210},
};

template <typename T>
T load(const std::byte* p) {
  T value;
  std::memcpy(&value, p, sizeof value);  // files give no alignment
  return value;
}

const uint8_t* bytes(const std::byte* p) {
  return reinterpret_cast<const uint8_t*>(p);
}

// The 6-bit scale and minimum of sub-block j (0..7) of a Q4_K or Q5_K block; s: its 12 scale bytes.
void unpack_scale_min(const uint8_t* s, int j, int* scale, int* min) {
  if (j < 4) {
    *scale = s[j] & 63;
    *min = s[j + 4] & 63;
  } else {
    *scale = (s[j + 4] & 15) | ((s[j - 4] >> 6) << 4);
    *min = (s[j + 4] >> 4) | ((s[j] >> 6) << 4);
  }
}

}  // namespace

const DTypeInfo& dtype_info(DType type) {
  return kInfo[static_cast<int>(type)];
}

size_t row_bytes(DType type, int64_t cols) {
  const DTypeInfo& info = dtype_info(type);
  return static_cast<size_t>(cols / info.block_weights) * static_cast<size_t>(info.block_bytes);
}

Activation activation_for(DType type) {
  switch (type) {
    case DType::kF32:
    case DType::kF16: return Activation::kF32;
    case DType::kBF16: return Activation::kBF16;
    default: return Activation::kQ8;
  }
}

float bf16_to_f32(uint16_t h) {
  return std::bit_cast<float>(static_cast<uint32_t>(h) << 16);
}

uint16_t f32_to_bf16(float f) {
  const uint32_t u = std::bit_cast<uint32_t>(f);
  if ((u & 0x7fffffffu) > 0x7f800000u)
    return static_cast<uint16_t>((u >> 16) | 0x40u);  // quiet NaN
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

float f16_to_f32(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t exponent = (h >> 10) & 31u, mantissa = h & 1023u;
  if (exponent == 31)
    return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13) |
                                (mantissa ? 0x400000u : 0u));
  if (exponent != 0)
    return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;  // zero and denormals: exact
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
}

uint16_t f32_to_f16(float f) {
  const uint32_t u = std::bit_cast<uint32_t>(f), magnitude = u & 0x7fffffffu;
  const auto sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  if (magnitude > 0x7f800000u)
    return static_cast<uint16_t>(sign | 0x7e00u |
                                 ((magnitude >> 13) & 0x3ffu));  // quiet NaN, payload kept
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to infinity
  if (magnitude >= 0x38800000u) {                                              // normal
    const uint32_t rounded = magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u);
    return static_cast<uint16_t>(sign | (rounded >> 13));
  }
  // Denormal: adding 0.5 leaves value * 2^24, rounded to nearest even, in the low mantissa bits.
  const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
  return static_cast<uint16_t>(sign |
                               (std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(0.5f)));
}

void read_block(DType type, const std::byte* row, int64_t index, CanonicalBlock* out) {
  out->min = 0.0f;
  out->has_min = false;
  const auto set_scale = [&](float d) { out->scale[0] = out->scale[1] = d; };
  const auto half = [](const std::byte* p) { return f16_to_f32(load<uint16_t>(p)); };
  switch (type) {
    case DType::kQ8_0: {
      const std::byte* b = row + index * 34;
      set_scale(half(b));
      std::memcpy(out->q, b + 2, 32);
      return;
    }
    case DType::kQ4_0: {
      const std::byte* b = row + index * 18;
      set_scale(half(b));
      const uint8_t* qs = bytes(b + 2);
      for (int j = 0; j < 16; ++j) {
        out->q[j] = static_cast<int8_t>((qs[j] & 15) - 8);
        out->q[j + 16] = static_cast<int8_t>((qs[j] >> 4) - 8);
      }
      return;
    }
    case DType::kQ4_1: {
      const std::byte* b = row + index * 20;
      set_scale(half(b));
      out->min = half(b + 2);
      out->has_min = true;
      const uint8_t* qs = bytes(b + 4);
      for (int j = 0; j < 16; ++j) {
        out->q[j] = static_cast<int8_t>(qs[j] & 15);
        out->q[j + 16] = static_cast<int8_t>(qs[j] >> 4);
      }
      return;
    }
    case DType::kQ5_0:
    case DType::kQ5_1: {
      const bool has_min = type == DType::kQ5_1;
      const std::byte* b = row + index * (has_min ? 24 : 22);
      set_scale(half(b));
      if (has_min) out->min = half(b + 2);
      out->has_min = has_min;
      const std::byte* rest = b + (has_min ? 4 : 2);
      const auto qh = load<uint32_t>(rest);
      const uint8_t* qs = bytes(rest + 4);
      const int offset = has_min ? 0 : 16;
      for (int j = 0; j < 16; ++j) {
        const int high0 = static_cast<int>((qh >> j) & 1u) << 4;
        const int high1 = static_cast<int>((qh >> (j + 16)) & 1u) << 4;
        out->q[j] = static_cast<int8_t>(((qs[j] & 15) | high0) - offset);
        out->q[j + 16] = static_cast<int8_t>(((qs[j] >> 4) | high1) - offset);
      }
      return;
    }
    case DType::kQ4_K:
    case DType::kQ5_K: {
      const bool five = type == DType::kQ5_K;
      const std::byte* b = row + (index / 8) * (five ? 176 : 144);
      const int j = static_cast<int>(index % 8);
      int scale, min;
      unpack_scale_min(bytes(b + 4), j, &scale, &min);
      set_scale(half(b) * static_cast<float>(scale));
      out->min = -(half(b + 2) * static_cast<float>(min));
      out->has_min = true;
      const uint8_t* qh = bytes(b + 16);
      const uint8_t* qs = bytes(b + (five ? 48 : 16)) + (j / 2) * 32;
      for (int i = 0; i < 32; ++i) {
        int q = j % 2 ? qs[i] >> 4 : qs[i] & 15;
        if (five) q |= ((qh[i] >> j) & 1) << 4;
        out->q[i] = static_cast<int8_t>(q);
      }
      return;
    }
    case DType::kQ6_K: {
      const std::byte* b = row + (index / 8) * 210;
      const int sub = static_cast<int>(index % 8),
                part = sub % 4;  // half block of 128, quarter of it
      const uint8_t* ql = bytes(b) + (sub / 4) * 64 + (part % 2) * 32;
      const uint8_t* qh = bytes(b + 128) + (sub / 4) * 32;
      const std::byte* scales = b + 192 + (sub / 4) * 8 + part * 2;
      const float d = half(b + 208);
      for (int s = 0; s < 2; ++s)
        out->scale[s] = d * static_cast<float>(static_cast<int8_t>(scales[s]));
      for (int i = 0; i < 32; ++i) {
        const int low = part < 2 ? ql[i] & 15 : ql[i] >> 4;
        const int high = (qh[i] >> (2 * part)) & 3;
        out->q[i] = static_cast<int8_t>((low | (high << 4)) - 32);
      }
      return;
    }
    default: return;
  }
}

void dequantize_row(DType type, const std::byte* row, int64_t cols, float* out) {
  switch (type) {
    case DType::kF32: std::memcpy(out, row, static_cast<size_t>(cols) * 4); return;
    case DType::kF16:
      for (int64_t i = 0; i < cols; ++i) out[i] = f16_to_f32(load<uint16_t>(row + 2 * i));
      return;
    case DType::kBF16:
      for (int64_t i = 0; i < cols; ++i) out[i] = bf16_to_f32(load<uint16_t>(row + 2 * i));
      return;
    default: break;
  }
  CanonicalBlock block;
  for (int64_t b = 0; b < cols / 32; ++b) {
    read_block(type, row, b, &block);
    for (int i = 0; i < 32; ++i) {
      const float product = block.scale[i / 16] * static_cast<float>(block.q[i]);
      out[b * 32 + i] = block.has_min ? product + block.min : product;
    }
  }
}

void quantize_row_q8_0(const float* row, int64_t cols, std::byte* out) {
  for (int64_t b = 0; b < cols / 32; ++b, row += 32, out += 34) {
    float largest = 0;
    for (int i = 0; i < 32; ++i) largest = std::max(largest, std::fabs(row[i]));
    const uint16_t scale = f32_to_f16(largest / 127.0f);
    const float d = f16_to_f32(scale);
    std::memcpy(out, &scale, 2);
    for (int i = 0; i < 32; ++i) {
      const float q = d > 0 ? std::nearbyint(row[i] / d) : 0.0f;
      const float in_range = q >= -127.0f ? std::min(q, 127.0f) : -127.0f;  // NaN too
      out[2 + i] = static_cast<std::byte>(static_cast<int8_t>(in_range));
    }
  }
}

// The rounding that minimises the error lies between the block's extremes and a range a little
// narrower; three ranges are tried.
void quantize_row_q4_1(const float* row, int64_t cols, std::byte* out) {
  for (int64_t b = 0; b < cols / 32; ++b, row += 32, out += 20) {
    const auto [low, high] = std::minmax_element(row, row + 32);
    float least = INFINITY;
    for (const float shrink : {0.0f, 0.04f, 0.08f}) {
      const float margin = shrink * (*high - *low);
      const uint16_t scale = f32_to_f16((*high - *low - 2 * margin) / 15.0f);
      const uint16_t min = f32_to_f16(*low + margin);
      const float d = f16_to_f32(scale), m = f16_to_f32(min), inverse = d > 0 ? 1 / d : 0.0f;
      uint8_t q[32];
      float error = 0;
      for (int i = 0; i < 32; ++i) {
        const float exact = (row[i] - m) * inverse;
        const float steps = exact >= 0 ? std::min(exact, 15.0f) : 0.0f;  // NaN too
        q[i] = static_cast<uint8_t>(steps + 0.5f);
        const float off = static_cast<float>(q[i]) * d + m - row[i];
        error += off * off;
      }
      if (!(error < least)) continue;
      least = error;
      std::memcpy(out, &scale, 2);
      std::memcpy(out + 2, &min, 2);
      for (int i = 0; i < 16; ++i) out[4 + i] = static_cast<std::byte>(q[i] | q[i + 16] << 4);
    }
  }
}

}  // namespace chimera
