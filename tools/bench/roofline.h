// The roofline of a machine and a model, as an SVG picture: what passes of 1 to 64 rows reach,
// under what memory and arithmetic allow.
//
//   multiply-adds      |          ______________  arithmetic: products whose weights are in cache
//   a second           |       / o  o o
//                      |    / o
//                      | / o              o  a measured pass
//                      +---------------------
//                        multiply-adds for each byte of weights read
#pragma once

#include <string>
#include <vector>

namespace chimera {

struct Roofline {
  std::string title;
  double bytes_per_second = 0;          // memory
  double multiply_adds_per_second = 0;  // arithmetic
  double weight_bytes = 0;              // read in a pass
  double multiply_adds = 0;             // of a row
  struct Pass {
    int rows;
    double seconds;
  };
  std::vector<Pass> passes;
};

// Throws Error; there is never half a file.
void write_roofline(const Roofline& roofline, const std::string& path);

}  // namespace chimera
