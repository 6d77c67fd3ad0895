// How keys and values stand in device memory: as fragments of the tensor core's A operand, like
// weights (tape.cuh), in tiles of 16 positions x 16 coordinates, 256 elements each.
//
//   scores   S^T (positions, queries) = K Q^T      A = K:   row = position, k = coordinate
//   output   O^T (coordinates, queries) = V^T E^T  A = V^T: row = coordinate, k = position
//
// So a lane's 16-byte load is its fragment of 16 positions, and a position's elements can be found
// one by one where a tree's ancestors are gathered. A head has (capacity / 16, padded_dim / 16)
// tiles, of K and of V alike; heads stand in the order (layer, sequence, kv_head). Padding is zero
// and stays so.
#pragma once

#include "cuda/device.cuh"
#include "cuda/tape.cuh"
#include "engine/backend.h"

namespace chimera::cuda {
inline namespace CHIMERA_CUDA_BODY {

inline constexpr int kKvTile = 16;

// The cache of one layer.
struct KvLayer {
  DType type;  // kF16 or kF32
  void* k;     // (sequence, kv_head, capacity / 16, padded_dim / 16, 256)
  void* v;
  int n_kv_heads, head_dim, padded_dim, padded_capacity;

  BOTH int64_t head_elements() const { return static_cast<int64_t>(padded_capacity) * padded_dim; }
  BOTH int64_t head_offset(int sequence, int kv_head) const {
    return (static_cast<int64_t>(sequence) * n_kv_heads + kv_head) * head_elements();
  }
  // The tile of 16 positions and 16 coordinates; elements.
  BOTH int64_t tile(int slot_tile, int dim_tile) const {
    return (static_cast<int64_t>(slot_tile) * (padded_dim / kKvTile) + dim_tile) * 256;
  }
  BOTH int64_t element(int slot, int d, Place16 at) const {
    return tile(slot / kKvTile, d / kKvTile) + at.lane * 8 + at.reg * 2 + at.half;
  }
  BOTH int64_t k_index(int slot, int d) const {
    return element(slot, d, place_a(slot % 16, d % 16));
  }
  BOTH int64_t v_index(int slot, int d) const {
    return element(slot, d, place_a(d % 16, slot % 16));
  }
};

inline KvLayer kv_layer(const KvCache& kv, int layer) {
  const KvShape& s = kv.shape;
  KvLayer l{s.type,
            kv.k,
            kv.v,
            s.n_kv_heads,
            s.head_dim,
            round_up(s.head_dim, kKvTile),
            round_up(s.capacity, kKvTile)};
  const int64_t bytes = layer * l.head_offset(s.n_sequences, 0) * (s.type == DType::kF16 ? 2 : 4);
  l.k = static_cast<std::byte*>(kv.k) + bytes;
  l.v = static_cast<std::byte*>(kv.v) + bytes;
  return l;
}

BOTH void store_kv(DType type, void* base, int64_t i, float x) {
  if (type == DType::kF16)
    static_cast<uint16_t*>(base)[i] = float_to_f16(x);
  else
    static_cast<float*>(base)[i] = x;
}
BOTH float load_kv(DType type, const void* base, int64_t i) {
  return type == DType::kF16 ? f16_to_float(static_cast<const uint16_t*>(base)[i])
                             : static_cast<const float*>(base)[i];
}
BOTH void move_kv(DType type, void* base, int64_t from, int64_t to) {
  if (type == DType::kF16)
    static_cast<uint16_t*>(base)[to] = static_cast<uint16_t*>(base)[from];
  else
    static_cast<float*>(base)[to] = static_cast<float*>(base)[from];
}

}  // namespace CHIMERA_CUDA_BODY
}  // namespace chimera::cuda
