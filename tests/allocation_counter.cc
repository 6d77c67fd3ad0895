#include "tests/allocation_counter.h"

#include <atomic>
#include <cstdlib>
#include <new>

namespace {

std::atomic<int64_t> count{0};

void* counted(void* p) {
  ++count;
  return p != nullptr ? p : throw std::bad_alloc();
}

}  // namespace

// The forms for arrays call these. So does nothrow, but for AddressSanitizer's, whose memory the
// operators below must not free.
void* operator new(size_t n) {
  return counted(std::malloc(n ? n : 1));
}
void* operator new(size_t n, const std::nothrow_t&) noexcept {
  ++count;
  return std::malloc(n ? n : 1);
}
void* operator new(size_t n, std::align_val_t alignment) {
  const auto a = static_cast<size_t>(alignment);
  return counted(std::aligned_alloc(a, (n + a - 1) / a * a));
}
void* operator new(size_t n, std::align_val_t alignment, const std::nothrow_t&) noexcept {
  const auto a = static_cast<size_t>(alignment);
  ++count;
  return std::aligned_alloc(a, (n + a - 1) / a * a);
}
void operator delete(void* p) noexcept {
  std::free(p);
}
void operator delete(void* p, size_t) noexcept {
  std::free(p);
}
void operator delete(void* p, std::align_val_t) noexcept {
  std::free(p);
}
void operator delete(void* p, size_t, std::align_val_t) noexcept {
  std::free(p);
}

namespace chimera::test {
int64_t allocation_count() {
  return count;
}
}  // namespace chimera::test
