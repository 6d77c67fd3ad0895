// make ladder: climbs both ladders on this machine, one thread, and prints what every rung gains.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <exception>
#include <random>
#include <string>
#include <vector>

#include "engine/cpu/panels.h"
#include "engine/error.h"
#include "tools/ladder/ladder.h"

namespace chimera::ladder {
namespace {

// Microseconds of one call. Rungs differ by a factor of a hundred; each gets a tenth of a second
// and three calls at least, and the fastest counts: a limit should not depend on what else runs.
template <typename F>
double microseconds(const F& call) {
  using Clock = std::chrono::steady_clock;
  double best = 1e30, spent = 0;
  for (int i = 0; i < 3 || spent < 0.1; ++i) {
    const auto start = Clock::now();
    call();
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    spent += seconds;
    best = std::min(best, seconds);
  }
  return 1e6 * best;
}

void require_same(const std::vector<float>& result, const std::vector<float>& reference,
                  const char* rung) {
  if (std::memcmp(result.data(), reference.data(), result.size() * sizeof(float)) != 0)
    throw Error(std::string("rung '") + rung + "'", "the bits of the plain loop", "others");
}

void print_row(const char* name, double us, double first, double before, const char* idea) {
  std::printf("%-20s %10.1f %9.1f %9.2f   %s\n", name, us, first / us, before / us, idea);
  std::fflush(stdout);
}

void print_head(const std::string& title) {
  std::printf("\n%s\n%-20s %10s %9s %9s   %s\n", title.c_str(), "rung", "us", "x first", "x before",
              "the idea");
}

// The gate and up product of SmolLM2-135M. Its 1.1 MB stay in cache, so that arithmetic is what is
// measured; chimera bench has the figures from memory.
void climb_product(int m) {
  constexpr int64_t kRows = 3072, kCols = 576, kBlocks = kCols / 32;
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0, 1);
  std::vector<std::byte> file(kRows * row_bytes(DType::kQ4_1, kCols));
  for (size_t i = 0; i < file.size(); i += 20) {
    for (size_t j = 0; j < 20; ++j) file[i + j] = static_cast<std::byte>(random());
    for (size_t j = 0; j < 4; j += 2) {
      const uint16_t half = f32_to_f16(0.01f * normal(random));
      std::memcpy(&file[i + j], &half, 2);
    }
  }
  const TensorView view{"ladder", DType::kQ4_1, kRows, kCols, file.data()};
  std::vector<std::byte> panels(kRows / cpu::kPanelRows * cpu::panel_bytes(DType::kQ4_1, kCols));
  for (int64_t p = 0; p < kRows / cpu::kPanelRows; ++p)
    cpu::pack_panel(view, p,
                    &panels[static_cast<size_t>(p) * cpu::panel_bytes(DType::kQ4_1, kCols)]);

  const auto rows = static_cast<size_t>(m);
  std::vector<float> x(rows * kCols), scale(rows * kBlocks), y(rows * kRows), reference;
  std::vector<int8_t> q8(x.size());
  std::vector<int32_t> sum(scale.size());
  for (float& v : x) v = normal(random);
  cpu::kScalarKernels.quantize_q8(x.data(), static_cast<int64_t>(x.size()), q8.data(), scale.data(),
                                  sum.data());
  cpu::ProductInput activations;
  activations.q8 = q8.data();
  activations.scale = scale.data();
  activations.sum = sum.data();

  print_head("Product of a 3072 x 576 matrix in Q4_1 with " + std::to_string(m) +
             (m == 1 ? " token" : " tokens"));
  double first = 0, before = 0;
  for (const ProductRung& rung : kProductRungs) {
    if (!cpu::machine_has(rung.isa)) continue;
    std::fill(y.begin(), y.end(), 0.0f);
    const ProductCase c{view, panels.data(), activations, m, y.data()};
    rung.run(c);
    if (reference.empty()) reference = y;
    require_same(y, reference, rung.name);
    const double us = microseconds([&] { rung.run(c); });
    if (first == 0) first = before = us;
    print_row(rung.name, us, first, before, rung.idea);
    before = us;
  }
}

// A tree of 16 nodes, 3 query heads, behind 240 committed positions: the last chunk of a KV head.
void climb_attention() {
  constexpr int kNodes = 16, kGroup = 3, kDim = 64, kCommitted = 240, kSlots = 256;
  constexpr int kQueries = kNodes * kGroup;
  std::mt19937 random(2);
  std::normal_distribution<float> normal(0, 1);
  std::vector<uint16_t> k(kSlots * kDim), v(kSlots * kDim);
  std::vector<float> q(kQueries * kDim);
  for (uint16_t& x : k) x = f32_to_f16(normal(random));
  for (uint16_t& x : v) x = f32_to_f16(normal(random));
  for (float& x : q) x = 0.3f * normal(random);
  const auto size = static_cast<size_t>(cpu::partial_size(kDim));
  std::vector<float> partials(kQueries * size), reference;

  std::vector<std::vector<int32_t>> paths;  // a binary tree: the parent of node i is (i - 1) / 2
  for (int node = 0; node < kNodes; ++node) {
    std::vector<int32_t> path;
    for (int i = node;; i = (i - 1) / 2) {
      path.insert(path.begin(), kCommitted + i);
      if (i == 0) break;
    }
    paths.push_back(path);
  }
  std::vector<cpu::AttentionChunk> tiles;
  for (int i = 0; i < kQueries; ++i) {
    if (i % cpu::kMaxQueries == 0)
      tiles.push_back({DType::kF16,
                       k.data(),
                       v.data(),
                       cpu::kChunk * kDim,
                       cpu::kChunk * kDim,
                       kDim,
                       kDim,
                       0,
                       kCommitted,
                       0,
                       {}});
    const std::vector<int32_t>& path = paths[static_cast<size_t>(i / kGroup)];
    int direct = 0;
    while (direct < static_cast<int>(path.size()) &&
           path[static_cast<size_t>(direct)] == kCommitted + direct)
      ++direct;
    cpu::AttentionChunk& tile = tiles.back();
    tile.query[tile.n_queries++] = {&q[static_cast<size_t>(i) * kDim], path.data(),
                                    kCommitted + direct, kCommitted + static_cast<int>(path.size()),
                                    &partials[static_cast<size_t>(i) * size]};
  }

  print_head("Attention of a tree of 16 nodes, 3 heads, to 240 committed positions and its own");
  double first = 0, before = 0;
  for (const AttentionRung& rung : kAttentionRungs) {
    if (!cpu::machine_has(rung.isa)) continue;
    std::fill(partials.begin(), partials.end(), 0.0f);
    rung.run(tiles);
    if (reference.empty()) reference = partials;
    require_same(partials, reference, rung.name);
    const double us = microseconds([&] { rung.run(tiles); });
    if (first == 0) first = before = us;
    print_row(rung.name, us, first, before, rung.idea);
    before = us;
  }
}

}  // namespace
}  // namespace chimera::ladder

int main() {
  try {
    std::printf(
        "One thread. Every rung gives the bits of the first; \"x\" is how many times faster.\n");
    for (const int m : {1, 8, 32}) chimera::ladder::climb_product(m);
    chimera::ladder::climb_attention();
  } catch (const std::exception& e) {
    std::fprintf(stderr, "ladder: %s\n", e.what());
    return 1;
  }
}
