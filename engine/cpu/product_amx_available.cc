// Apart from product_amx.cc because it runs on machines that cannot run a line of that file.
#include "engine/cpu/product_amx.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace chimera::cpu {
namespace {

bool ask() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25,
                     kAll = kBf16 | kTile | kInt8;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAll) != kAll) return false;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned kTileState = 3u << 17;  // tile configuration and data, saved by the kernel
  if ((low & kTileState) != kTileState) return false;
  // Tile data are 8 KB of context for each thread, so Linux gives them only to who asks.
  constexpr int kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
}

}  // namespace

bool amx_available() {
  static const bool available = ask();
  return available;
}

}  // namespace chimera::cpu
