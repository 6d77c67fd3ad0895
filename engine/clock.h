// How long things take, here and in the tools.
#pragma once

#include <chrono>

namespace chimera {

using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace chimera
