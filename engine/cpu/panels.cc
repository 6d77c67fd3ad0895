#include "engine/cpu/panels.h"

#include <cstring>

namespace chimera::cpu {
namespace {

// Packing works on words of four bytes: four columns of one row, one lane of a vector.
uint32_t load_word(const std::byte* p) {
  uint32_t word;
  std::memcpy(&word, p, 4);
  return word;
}

uint16_t load_half(const std::byte* p) {
  uint16_t half;
  std::memcpy(&half, p, 2);
  return half;
}

void store_word(uint8_t* vector, int row, uint32_t word) {
  std::memcpy(vector + 4 * row, &word, 4);
}

constexpr uint32_t kNibbles = 0x0f0f0f0f;

// ---- One block of one row, file to panel ------------------------------------------------------

// 4-bit types: a file's byte j holds columns j and j + 16, as a panel's does.
void pack_nibbles(const std::byte* quants, int row, uint8_t (*out)[64]) {
  for (int v = 0; v < 4; ++v) store_word(out[v], row, load_word(quants + 4 * v));
}

// The fifth bits of 32 columns, bit k of the file's word: bit `group` of byte i, k = 4 group + i.
void pack_fifth_bits(uint32_t bits, int row, uint8_t* out) {
  for (int i = 0; i < 4; ++i) {
    uint32_t byte = 0;
    for (int group = 0; group < 8; ++group) byte |= ((bits >> (4 * group + i)) & 1u) << group;
    out[4 * row + i] = static_cast<uint8_t>(byte);
  }
}

void pack_block(const std::byte* b, int row, PanelQ8_0* out) {
  out->scale[row] = load_half(b);
  for (int v = 0; v < 8; ++v)
    store_word(out->quants[v], row, load_word(b + 2 + 4 * v) ^ 0x80808080u);
}

void pack_block(const std::byte* b, int row, PanelQ4_0* out) {
  out->scale[row] = load_half(b);
  pack_nibbles(b + 2, row, out->quants);
}

void pack_block(const std::byte* b, int row, PanelQ4_1* out) {
  out->scale[row] = load_half(b);
  out->min[row] = load_half(b + 2);
  pack_nibbles(b + 4, row, out->quants);
}

void pack_block(const std::byte* b, int row, PanelQ5_0* out) {
  out->scale[row] = load_half(b);
  pack_fifth_bits(load_word(b + 2), row, out->high);
  pack_nibbles(b + 6, row, out->quants);
}

void pack_block(const std::byte* b, int row, PanelQ5_1* out) {
  out->scale[row] = load_half(b);
  out->min[row] = load_half(b + 2);
  pack_fifth_bits(load_word(b + 4), row, out->high);
  pack_nibbles(b + 8, row, out->quants);
}

// The head that Q4_K and Q5_K share: d, dmin, and 6-bit scales and minima in the file's 12 bytes s:
//   s[0..3]   scale[j]     | upper two bits of scale[j + 4]      (j = 0..3)
//   s[4..7]   minimum[j]   | upper two bits of minimum[j + 4]
//   s[8..11]  lower four bits of scale[j + 4] and of minimum[j + 4]
template <typename Panel>
void pack_k_head(const std::byte* b, int row, Panel* out) {
  out->d[row] = load_half(b);
  out->minus_dmin[row] = load_half(b + 2) ^ 0x8000u;
  const uint32_t s0 = load_word(b + 4), s1 = load_word(b + 8), s2 = load_word(b + 12);
  uint32_t scale[2] = {s0 & 0x3f3f3f3fu, (s2 & kNibbles) | ((s0 >> 2) & 0x30303030u)};
  uint32_t min[2] = {s1 & 0x3f3f3f3fu, ((s2 >> 4) & kNibbles) | ((s1 >> 2) & 0x30303030u)};
  for (int pair = 0; pair < 4; ++pair) {
    const int shift = pair % 2 * 16;
    const uint32_t scales = scale[pair / 2] >> shift, mins = min[pair / 2] >> shift;
    const uint32_t split = mins >> 8 & 63u;  // the number that is cut in three
    out->six_bits[pair][0][row] = static_cast<uint8_t>((scales & 63u) | split << 6);
    out->six_bits[pair][1][row] = static_cast<uint8_t>((mins & 63u) | split >> 2 << 6);
    out->six_bits[pair][2][row] = static_cast<uint8_t>((scales >> 8 & 63u) | split >> 4 << 6);
  }
}

// A file's 32 bytes hold block 2p in their low nibbles and block 2p + 1 in their high ones.
void pack_k_nibbles(const std::byte* quants, int row, uint8_t (*out)[4][64]) {
  for (int pair = 0; pair < 4; ++pair) {
    for (int v = 0; v < 4; ++v) {
      const uint32_t a = load_word(quants + 32 * pair + 4 * v);       // columns 4v, ..
      const uint32_t b = load_word(quants + 32 * pair + 16 + 4 * v);  // columns 16 + 4v, ..
      store_word(out[2 * pair][v], row, (a & kNibbles) | (b & kNibbles) << 4);
      store_word(out[2 * pair + 1][v], row, (a >> 4 & kNibbles) | (b & ~kNibbles));
    }
  }
}

void pack_block(const std::byte* b, int row, PanelQ4_K* out) {
  pack_k_head(b, row, out);
  pack_k_nibbles(b + 16, row, out->quants);
}

void pack_block(const std::byte* b, int row, PanelQ5_K* out) {
  pack_k_head(b, row, out);
  for (int block = 0; block < 8; ++block) {  // bit `block` of byte k
    uint32_t bits = 0;
    for (int group = 0; group < 8; ++group)
      bits |= (load_word(b + 16 + 4 * group) >> block & 0x01010101u) << group;
    store_word(out->high[block], row, bits);
  }
  pack_k_nibbles(b + 48, row, out->quants);
}

void pack_block(const std::byte* b, int row, PanelQ6_K* out) {
  out->d[row] = load_half(b + 208);
  for (int block = 0; block < 8; ++block) {
    const int part = block % 4;  // the file interleaves four blocks: half of 256
    const std::byte* low = b + block / 4 * 64 + part % 2 * 32;
    const std::byte* high = b + 128 + block / 4 * 32;
    const auto nibbles = [&](int group) {
      return load_word(low + 4 * group) >> (part < 2 ? 0 : 4) & kNibbles;
    };
    const auto upper = [&](int group) {
      return load_word(high + 4 * group) >> 2 * part & 0x03030303u;
    };
    for (int v = 0; v < 4; ++v)
      store_word(out->quants[block][v], row, nibbles(v) | nibbles(v + 4) << 4);
    for (int h = 0; h < 2; ++h) {
      out->scale[block][h][row] = static_cast<int8_t>(b[192 + 2 * block + h]);
      uint32_t bits = 0;
      for (int g = 0; g < 4; ++g) bits |= upper(4 * h + g) << 2 * g;
      store_word(out->high[block][h], row, bits);
    }
  }
}

// ---- One 32-wide block of one row, panel to canonical form ------------------------------------

void set_scale(uint16_t d, CanonicalBlock* out) { out->scale[0] = out->scale[1] = f16_to_f32(d); }

void set_min(float min, CanonicalBlock* out) {
  out->min = min;
  out->has_min = true;
}

// q[k] = the nibble of column k (+ 16 for a fifth bit) - offset. high: the fifth bits or nullptr.
void read_quants(const uint8_t (*quants)[64], const uint8_t* high, int offset, int row,
                 CanonicalBlock* out) {
  for (int k = 0; k < 32; ++k) {
    const int group = k / 4, at = 4 * row + k % 4;
    int q = group < 4 ? quants[group][at] & 15 : quants[group - 4][at] >> 4;
    if (high != nullptr) q |= (high[at] >> group & 1) << 4;
    out->q[k] = static_cast<int8_t>(q - offset);
  }
}

void read_block(const PanelQ8_0& p, int, int row, CanonicalBlock* out) {
  set_scale(p.scale[row], out);
  for (int k = 0; k < 32; ++k)
    out->q[k] = static_cast<int8_t>(p.quants[k / 4][4 * row + k % 4] - 128);
}

void read_block(const PanelQ4_0& p, int, int row, CanonicalBlock* out) {
  set_scale(p.scale[row], out);
  read_quants(p.quants, nullptr, 8, row, out);
}

void read_block(const PanelQ4_1& p, int, int row, CanonicalBlock* out) {
  set_scale(p.scale[row], out);
  set_min(f16_to_f32(p.min[row]), out);
  read_quants(p.quants, nullptr, 0, row, out);
}

void read_block(const PanelQ5_0& p, int, int row, CanonicalBlock* out) {
  set_scale(p.scale[row], out);
  read_quants(p.quants, p.high, 16, row, out);
}

void read_block(const PanelQ5_1& p, int, int row, CanonicalBlock* out) {
  set_scale(p.scale[row], out);
  set_min(f16_to_f32(p.min[row]), out);
  read_quants(p.quants, p.high, 0, row, out);
}

template <typename Panel>
void read_k_head(const Panel& p, int block, int row, CanonicalBlock* out) {
  const auto& s = p.six_bits[block / 2];
  const int first = s[0][row], second = s[1][row], third = s[2][row];
  const bool odd = block % 2;
  const int scale = (odd ? third : first) & 63;
  const int min = odd ? first >> 6 | second >> 6 << 2 | third >> 6 << 4 : second & 63;
  out->scale[0] = out->scale[1] = f16_to_f32(p.d[row]) * static_cast<float>(scale);
  set_min(f16_to_f32(p.minus_dmin[row]) * static_cast<float>(min), out);
}

void read_block(const PanelQ4_K& p, int block, int row, CanonicalBlock* out) {
  read_k_head(p, block, row, out);
  read_quants(p.quants[block], nullptr, 0, row, out);
}

void read_block(const PanelQ5_K& p, int block, int row, CanonicalBlock* out) {
  read_k_head(p, block, row, out);
  read_quants(p.quants[block], p.high[block], 0, row, out);
}

void read_block(const PanelQ6_K& p, int block, int row, CanonicalBlock* out) {
  for (int h = 0; h < 2; ++h)
    out->scale[h] = f16_to_f32(p.d[row]) * static_cast<float>(p.scale[block][h][row]);
  read_quants(p.quants[block], nullptr, 0, row, out);
  for (int k = 0; k < 32; ++k) {
    const int group = k / 4;
    const int bits = p.high[block][group / 4][4 * row + k % 4] >> 2 * (group % 4) & 3;
    out->q[k] = static_cast<int8_t>((out->q[k] | bits << 4) - 32);
  }
}

// ---- Rows -------------------------------------------------------------------------------------

template <typename Panel>
void pack_row(DType type, const std::byte* src, int64_t cols, int row, std::byte* out) {
  const DTypeInfo& info = dtype_info(type);
  auto* blocks = reinterpret_cast<Panel*>(out);
  for (int64_t b = 0; b < cols / info.block_weights; ++b)
    pack_block(src + b * info.block_bytes, row, blocks + b);
}

template <typename Panel>
void dequantize(DType type, const std::byte* panel, int64_t cols, int row, float* out) {
  const int blocks_each = dtype_info(type).block_weights / 32;
  const auto* blocks = reinterpret_cast<const Panel*>(panel);
  for (int64_t b = 0; b < cols / 32; ++b) {
    CanonicalBlock block{};
    read_block(blocks[b / blocks_each], static_cast<int>(b % blocks_each), row, &block);
    for (int k = 0; k < 32; ++k) {
      const float product = block.scale[k / 16] * static_cast<float>(block.q[k]);
      out[b * 32 + k] = block.has_min ? product + block.min : product;
    }
  }
}

// Calls f.operator()<Panel>() with the struct of a quantised type.
template <typename F>
void with_panel_of(DType type, F f) {
  switch (type) {
    case DType::kQ8_0: return f.template operator()<PanelQ8_0>();
    case DType::kQ4_0: return f.template operator()<PanelQ4_0>();
    case DType::kQ4_1: return f.template operator()<PanelQ4_1>();
    case DType::kQ5_0: return f.template operator()<PanelQ5_0>();
    case DType::kQ5_1: return f.template operator()<PanelQ5_1>();
    case DType::kQ4_K: return f.template operator()<PanelQ4_K>();
    case DType::kQ5_K: return f.template operator()<PanelQ5_K>();
    case DType::kQ6_K: return f.template operator()<PanelQ6_K>();
    default: return;
  }
}

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace

size_t panel_bytes(DType type, int64_t cols) {
  return kPanelRows * row_bytes(type, type == DType::kBF16 ? round_up(cols, 32) : cols);
}

void pack_panel(const TensorView& w, int64_t panel, std::byte* out) {
  const int64_t first = panel * kPanelRows;
  const int rows = static_cast<int>(w.rows - first < kPanelRows ? w.rows - first : kPanelRows);
  if (rows < kPanelRows || w.type == DType::kBF16) std::memset(out, 0, panel_bytes(w.type, w.cols));
  for (int r = 0; r < rows; ++r) {
    const std::byte* src = w.row(first + r);
    switch (w.type) {
      case DType::kF32:
        for (int64_t k = 0; k < w.cols; ++k)
          std::memcpy(out + (k * kPanelRows + r) * 4, src + 4 * k, 4);
        break;
      case DType::kF16:
        for (int64_t k = 0; k < w.cols; ++k)
          std::memcpy(out + (k * kPanelRows + r) * 2, src + 2 * k, 2);
        break;
      case DType::kBF16:
        for (int64_t k = 0; k < w.cols; ++k)
          std::memcpy(out + (k / 2 * kPanelRows + r) * 4 + k % 2 * 2, src + 2 * k, 2);
        break;
      default:
        with_panel_of(w.type,
                      [&]<typename Panel>() { pack_row<Panel>(w.type, src, w.cols, r, out); });
    }
  }
}

void dequantize_panel_row(DType type, const std::byte* panels, int64_t cols, int64_t row,
                          float* out) {
  const std::byte* panel = panels + static_cast<size_t>(row / kPanelRows) * panel_bytes(type, cols);
  const int r = static_cast<int>(row % kPanelRows);
  switch (type) {
    case DType::kF32:
      for (int64_t k = 0; k < cols; ++k) std::memcpy(out + k, panel + (k * kPanelRows + r) * 4, 4);
      return;
    case DType::kF16:
      for (int64_t k = 0; k < cols; ++k)
        out[k] = f16_to_f32(load_half(panel + (k * kPanelRows + r) * 2));
      return;
    case DType::kBF16:
      for (int64_t k = 0; k < cols; ++k)
        out[k] = bf16_to_f32(load_half(panel + (k / 2 * kPanelRows + r) * 4 + k % 2 * 2));
      return;
    default:
      with_panel_of(type, [&]<typename Panel>() { dequantize<Panel>(type, panel, cols, r, out); });
  }
}

}  // namespace chimera::cpu
