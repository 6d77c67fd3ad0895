#include "engine/cpu/lanes_avx512.h"

// What fits the registers beside a row of b and one element of a.
constexpr int kTileRows = 14, kTileLanes = 2;

// The lanes come first.
#include "engine/train/gemm.h"
#include "engine/train/gemm_lanes.h"

namespace chimera::training {

const TileKernel kTileAvx512 = {kTileRows, 16 * kTileLanes, 1, pack_f32, tile};

}  // namespace chimera::training
