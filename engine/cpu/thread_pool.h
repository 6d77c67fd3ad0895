// A small thread pool for work that comes every few microseconds: the caller is thread 0, the
// others spin for a while between jobs before they sleep.
//
// # How threads meet
// Every thread counts the meetings it has come to in a mark of its own, and goes on when the marks
// of all others say that they have come as well: one cache line on its way from core to core, all
// of them at once. The meeting between two jobs is no different, since what comes next was handed
// out before it: thread 0 keeps its own part of a job until it is given the next one. So nobody
// waits first for the others to finish, and then to be told how to go on.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>
#include <thread>
#include <type_traits>
#include <vector>

namespace chimera::cpu {

// Physical cores that this process may run on; at least 1.
int physical_cores();

class ThreadPool {
 public:
  // idle(context, thread), if there is one, is called again and again by a thread that waits for
  // others and has a core to itself, between two looks at whether they are done: a little work for
  // later, well under a microsecond. Not where they take long.
  using Job = void (*)(void* context, int thread);
  // Throws Error where the system has no more threads.
  explicit ThreadPool(int threads, Job idle = nullptr, void* idle_context = nullptr);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return size_; }

  // Every thread calls f(thread), of a copy of f that they share, when all have finished the job
  // before. The others go about it at once; the caller does its part when it comes back with the
  // next job or to join(), which waits for all of them. Not reentrant. A job that throws ends the
  // program: the others are still at work.
  template <typename F>
  void start(const F& f) noexcept {
    static_assert(std::is_trivially_copyable_v<F> && sizeof(F) <= kMostBytes &&
                  alignof(F) <= alignof(std::max_align_t));
    Slot& slot = slots_[++started_ % kSlots];
    slot.job = [](void* context, int thread) { (*static_cast<F*>(context))(thread); };
    new (slot.context) F(f);
    start();
  }
  void join();

  // f(thread) on every thread, which all have finished when it returns.
  template <typename F>
  void run(F&& f) {
    start([p = &f](int thread) { (*p)(thread); });
    join();
  }

  // Inside a job: waits until every thread is here.
  void barrier(int thread);

 private:
  static constexpr size_t kMostBytes = 240;
  // A job is handed out while the caller still has one to do and others may be at the one before,
  // so three are in use. A power of two, because the jobs' numbers start over at 2^32.
  static constexpr uint32_t kSlots = 4;
  static_assert((kSlots & (kSlots - 1)) == 0);
  struct alignas(64) Slot {
    Job job = nullptr;
    alignas(std::max_align_t) std::byte context[kMostBytes];
  };
  struct alignas(64) Mark {
    std::atomic<uint32_t> meetings{0};
  };

  void start() noexcept;
  void do_own_part() noexcept;  // of the job that thread 0 has come to last
  void work(int thread);
  void end_workers();
  uint32_t come(int thread);  // to its next meeting
  bool has_come(int thread, uint32_t meeting) const;
  void wait_for_others(int thread, uint32_t meeting);
  template <typename F>
  void spin_until(int thread, const F& done);
  void wait_a_little(int thread);
  void wake_others();

  const int size_;
  const int spins_;  // before a waiting thread yields; none where threads have to share cores
  const Job idle_;
  void* const idle_context_;
  std::vector<Mark> marks_;  // by thread
  std::vector<std::thread> workers_;
  bool stop_ = false;
  Slot slots_[kSlots];
  // Jobs started, and those of which thread 0 has done its own part. It alone looks here, so the
  // line stays with it: what one core writes and another reads costs both a trip.
  alignas(64) uint32_t started_ = 0, done_ = 0;
  alignas(64) std::atomic<int> asleep_{0};  // workers that have to be woken
};

}  // namespace chimera::cpu
