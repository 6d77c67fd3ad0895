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
constexpr uint32_t kWakeEvery = 64;  // looks of thread 0 at others that have not come

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
      idle_context_(idle_context),
      marks_(static_cast<size_t>(size_)) {
  try {
    for (int t = 1; t < size_; ++t) workers_.emplace_back([this, t] { work(t); });
  } catch (const std::system_error& e) {
    end_workers();
    throw Error("threads", std::to_string(size_), e.what(), "use fewer");
  }
}

ThreadPool::~ThreadPool() {
  join();
  end_workers();
}

void ThreadPool::end_workers() {
  stop_ = true;
  marks_[0].meetings.fetch_add(1, std::memory_order_release);
  marks_[0].meetings.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::wait_a_little(int thread) {
  if (idle_ != nullptr) idle_(idle_context_, thread);
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");  // not yield, which processors may take for a nop
#endif
}

// Spins until done() holds, and after spins_ looks lets others run: what we wait for may need the
// core.
template <typename F>
void ThreadPool::spin_until(int thread, const F& done) {
  for (uint32_t spins = 0; !done(); ++spins) {
    if (thread == 0 && spins % kWakeEvery == kWakeEvery - 1) wake_others();
    if (spins < static_cast<uint32_t>(spins_))
      wait_a_little(thread);
    else
      std::this_thread::yield();
  }
}

uint32_t ThreadPool::come(int thread) {
  std::atomic<uint32_t>& mark = marks_[static_cast<size_t>(thread)].meetings;
  const uint32_t meeting = mark.load(std::memory_order_relaxed) + 1;
  mark.store(meeting, std::memory_order_release);
  return meeting;
}

bool ThreadPool::has_come(int thread, uint32_t meeting) const {
  const uint32_t last =
      marks_[static_cast<size_t>(thread)].meetings.load(std::memory_order_acquire);
  return static_cast<int32_t>(last - meeting) >= 0;  // it may have gone on to the next one
}

void ThreadPool::wait_for_others(int thread, uint32_t meeting) {
  for (int t = 0; t < size_; ++t)
    if (t != thread) spin_until(thread, [&] { return has_come(t, meeting); });
}

void ThreadPool::start() noexcept {
  if (started_ - done_ > 1) do_own_part();
  come(0);
  wake_others();
}

// A thread may fall asleep just as thread 0 comes, and neither see what the other has written. To
// rule that out each would have to wait until its word has reached the other core, at every
// meeting. So thread 0 looks again now and then while it waits.
void ThreadPool::wake_others() {
  if (asleep_.load(std::memory_order_relaxed) > 0) marks_[0].meetings.notify_all();
}

void ThreadPool::do_own_part() noexcept {
  wait_for_others(0, marks_[0].meetings.load(std::memory_order_relaxed));
  Slot& slot = slots_[++done_ % kSlots];
  slot.job(slot.context, 0);
}

void ThreadPool::join() {
  if (started_ != done_) do_own_part();
  wait_for_others(0, marks_[0].meetings.load(std::memory_order_relaxed) + 1);
}

void ThreadPool::work(int thread) {
  for (uint32_t job = 1;; ++job) {
    const uint32_t meeting = come(thread);
    // Handed out a while ago, as a rule, so it can come from thread 0's cache meanwhile.
    Slot& slot = slots_[job % kSlots];
    for (size_t at = 0; at < sizeof slot; at += 64)
      __builtin_prefetch(reinterpret_cast<const std::byte*>(&slot) + at);
    for (int spins = 0; spins < spins_ && !has_come(0, meeting); ++spins) wait_a_little(thread);
    if (!has_come(0, meeting)) {
      asleep_.fetch_add(1);
      marks_[0].meetings.wait(meeting - 1);
      asleep_.fetch_sub(1);
    }
    if (stop_) return;
    wait_for_others(thread, meeting);
    slot.job(slot.context, thread);
  }
}

void ThreadPool::barrier(int thread) {
  wait_for_others(thread, come(thread));
}

}  // namespace chimera::cpu
