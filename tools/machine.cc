#include "tools/machine.h"

#include <malloc.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <fstream>

#include "engine/clock.h"
#include "engine/error.h"

namespace chimera {
namespace {

// The value of the first line "key : value".
std::string field_of(const char* path, const std::string& key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with(key)) continue;
    const size_t colon = line.find(':');
    const size_t begin = line.find_first_not_of(" \t", colon + 1);
    return colon == std::string::npos || begin == std::string::npos ? "" : line.substr(begin);
  }
  return "";
}

constexpr size_t kBlock = 128;  // bytes a round of the loop below

// Every byte, in loads of 16 that do not wait for each other: memory is the limit.
uint64_t sum_of(const std::byte* data, size_t bytes) {
  typedef uint64_t Vector __attribute__((vector_size(16)));
  constexpr int kVectors = kBlock / sizeof(Vector);
  Vector sums[kVectors] = {};
  for (size_t i = 0; i < bytes; i += kBlock) {
    const auto* block = reinterpret_cast<const Vector*>(data + i);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[v] += block[v];
  }
  Vector sum = {};
  for (const Vector& s : sums) sum += s;
  return sum[0] + sum[1];
}

}  // namespace

// Not getrusage(): its maximum includes what the process was before exec(), so a large parent (a
// test runner, Python) would show in it.
size_t peak_memory_bytes() {
  const std::string kilobytes = field_of("/proc/self/status", "VmHWM");
  return kilobytes.empty() ? 0 : std::stoull(kilobytes) * 1024;
}

void return_freed_memory() {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

std::string cpu_model() {
  return field_of("/proc/cpuinfo", "model name");
}

std::string cpu_generation() {
  const auto of = [](const char* key) { return field_of("/proc/cpuinfo", key); };
#if defined(__x86_64__)
  return " " + of("cpu family") + "/" + of("model\t");
#else
  return " " + of("CPU implementer") + "/" + of("CPU part");
#endif
}

ReadBandwidth::ReadBandwidth(size_t bytes, int threads)
    : share_((bytes / static_cast<size_t>(threads) + kBlock) / kBlock * kBlock), pool_(threads) {
  const size_t size = share_ * static_cast<size_t>(threads);
  void* p = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) throw MemoryError(size);
  madvise(p, size, MADV_HUGEPAGE);
  buffer_ = {static_cast<std::byte*>(p), [size](std::byte* q) { munmap(q, size); }};
  // By the threads that will read it: that decides on which memory node it lies.
  pool_.run(
      [&](int t) { std::memset(buffer_.get() + static_cast<size_t>(t) * share_, 1, share_); });
}

double ReadBandwidth::measure() {
  std::atomic<uint64_t> sum{0};
  double best = 1e9;
  for (const auto start = Clock::now(); seconds_since(start) < 0.2;) {
    const auto pass = Clock::now();
    pool_.run(
        [&](int t) { sum += sum_of(buffer_.get() + static_cast<size_t>(t) * share_, share_); });
    best = std::min(best, seconds_since(pass));
  }
  sum_ += sum;
  return static_cast<double>(share_) * pool_.size() / best / 1e9;
}

double meeting_seconds(int threads) {
  constexpr int kJobs = 1000, kTimes = 5;
  // Of a few hundred nanoseconds: what a job is told, some 200 bytes in a step, comes meanwhile.
  struct Work {
    uint64_t told[20] = {1, 2, 3};
    [[gnu::noinline]] void operator()(int thread) const {
      uint64_t x = told[0];
      for (int i = 0; i < 400; ++i) x = x * told[1] + told[2] + static_cast<uint64_t>(thread);
      asm volatile("" ::"r"(x));
    }
  };
  cpu::ThreadPool pool(threads);
  double apart = 1e9, together = 1e9;
  for (int i = 0; i < kTimes; ++i) {
    auto start = Clock::now();
    for (int job = 0; job < kJobs; ++job) pool.start(Work{});
    pool.join();
    apart = std::min(apart, seconds_since(start));
    start = Clock::now();
    pool.run([](int thread) {
      for (int job = 0; job < kJobs; ++job) Work{}(thread);
    });
    together = std::min(together, seconds_since(start));
  }
  return std::max(0.0, apart - together) / kJobs;
}

double read_bandwidth(const Backend& backend, size_t bytes, int threads) {
  return backend.name() == "cuda" ? cuda_read_bandwidth(std::min<size_t>(bytes, 4ull << 30))
                                  : ReadBandwidth(bytes, threads).measure();
}

}  // namespace chimera
