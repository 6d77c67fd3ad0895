// Philox 4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy
// as 1, 2, 3" (SC 2011): random bits as a pure function of (key, counter), so that a draw belongs
// to a position of a text and not to the history of a run.
#pragma once

#include <cstdint>

namespace chimera {

struct PhiloxBlock {
  uint32_t word[4];
};

constexpr PhiloxBlock philox4x32(uint64_t key, uint64_t counter_low, uint64_t counter_high = 0) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  uint32_t c0 = static_cast<uint32_t>(counter_low), c1 = static_cast<uint32_t>(counter_low >> 32);
  uint32_t c2 = static_cast<uint32_t>(counter_high), c3 = static_cast<uint32_t>(counter_high >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;  // Weyl sequence: golden ratio
    k1 += 0xBB67AE85u;  // sqrt(3) - 1
  }
  return {{c0, c1, c2, c3}};
}

// The bits of one token at one position. Sixteen blocks in a row serve 64 tokens, each word of
// theirs 16 tokens in a row, so that lanes need no shuffling.
constexpr uint32_t token_bits(uint64_t seed, uint64_t position, uint32_t token) {
  return philox4x32(seed, position, token >> 6 << 4 | (token & 15)).word[token >> 4 & 3];
}

// Uniform in [0, 1) with 53 bits.
constexpr double philox_uniform(uint64_t seed, uint64_t position) {
  const PhiloxBlock b = philox4x32(seed, position);
  const uint64_t bits = (uint64_t{b.word[0]} << 32 | b.word[1]) >> 11;
  return static_cast<double>(bits) * 0x1p-53;
}

}  // namespace chimera
