#include "engine/cpu/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <fstream>
#include <set>
#include <string>
#include <system_error>

#include "engine/error.h"

namespace chimera::cpu {
namespace {

constexpr int kSpins = 4000;  // some 50 us: longer than the host works between two ops of a step

}  // namespace

int physical_cores() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return 1;
  std::set<std::string> cores;  // distinct sets of sibling threads
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed)) continue;
    std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) +
                       "/topology/thread_siblings_list");
    std::string siblings;
    if (!std::getline(file, siblings)) siblings = std::to_string(cpu);
    cores.insert(siblings);
  }
  return std::max<int>(1, static_cast<int>(cores.size()));
}

ThreadPool::ThreadPool(int threads, Job idle, void* idle_context)
    : size_(std::max(1, threads)),
      spins_(size_ > physical_cores() ? 0 : kSpins),
      idle_(idle),
      idle_context_(idle_context) {
  try {
    for (int t = 1; t < size_; ++t) workers_.emplace_back([this, t] { work(t); });
  } catch (const std::system_error& e) {
    end_workers();
    throw Error("threads", std::to_string(size_), e.what(), "use fewer (--threads)");
  }
}

ThreadPool::~ThreadPool() {
  end_workers();
}

void ThreadPool::end_workers() {
  stop_ = true;
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::wait_a_little(int thread) {
  if (idle_ != nullptr) idle_(idle_context_, thread);
  __builtin_ia32_pause();
}

// Spins until done() holds, and after spins_ looks lets others run: what we wait for may need the
// core.
template <typename F>
void ThreadPool::spin_until(int thread, const F& done) {
  for (int spins = 0; !done(); ++spins) {
    if (spins < spins_)
      wait_a_little(thread);
    else
      std::this_thread::yield();
  }
}

void ThreadPool::run(Job job, void* context) noexcept {
  if (size_ > 1) {
    job_ = job;
    context_ = context;
    busy_.store(size_ - 1, std::memory_order_relaxed);
    generation_.fetch_add(1);
    if (asleep_.load() > 0) generation_.notify_all();
  }
  job(context, 0);
  if (size_ > 1) spin_until(0, [this] { return busy_.load(std::memory_order_acquire) == 0; });
}

void ThreadPool::work(int thread) {
  uint32_t seen = 0;
  for (;;) {
    for (int spins = 0; spins < spins_ && generation_.load(std::memory_order_acquire) == seen;
         ++spins)
      wait_a_little(thread);
    if (generation_.load(std::memory_order_acquire) == seen) {
      asleep_.fetch_add(1);    // before the last look at the generation, and run() looks here after
      generation_.wait(seen);  // it has written that: one of the two sees the other
      asleep_.fetch_sub(1);
    }
    ++seen;
    if (stop_) return;
    job_(context_, thread);
    busy_.fetch_sub(1, std::memory_order_release);
  }
}

void ThreadPool::barrier(int thread) {
  if (size_ == 1) return;
  const uint32_t passed = barriers_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    barriers_.fetch_add(1, std::memory_order_release);
  } else {
    spin_until(thread, [&] { return barriers_.load(std::memory_order_acquire) != passed; });
  }
}

}  // namespace chimera::cpu
