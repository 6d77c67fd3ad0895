// A small thread pool for work that comes every few microseconds: the caller is thread 0, the
// others spin for a while between jobs before they sleep.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace chimera::cpu {

// Physical cores that this process may run on; at least 1.
int physical_cores();

class ThreadPool {
 public:
  // idle(context, thread), if there is one, is called again and again by a thread that waits for
  // others, between two looks at whether they are done: a little work for later, well under a
  // microsecond.
  using Job = void (*)(void* context, int thread);
  // Throws Error where the system has no more threads.
  explicit ThreadPool(int threads, Job idle = nullptr, void* idle_context = nullptr);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return size_; }

  // Runs job(context, thread) on every thread and returns when all have finished. Not reentrant. A
  // job that throws ends the program: the others are still working on what the caller would unwind.
  void run(Job job, void* context) noexcept;
  template <typename F>
  void run(F&& f) {
    run([](void* context,
           int thread) { (*static_cast<std::remove_reference_t<F>*>(context))(thread); },
        &f);
  }

  // Inside a job: waits until every thread is here.
  void barrier(int thread);

 private:
  void work(int thread);
  void end_workers();
  template <typename F>
  void spin_until(int thread, const F& done);
  void wait_a_little(int thread);

  const int size_;
  const int spins_;  // before a waiting thread yields; none where threads have to share cores
  const Job idle_;
  void* const idle_context_;
  std::vector<std::thread> workers_;
  // Each group on its own cache line: they are written by different threads.
  alignas(64) std::atomic<uint32_t> generation_{0};  // counts jobs; the job comes on the same line
  Job job_ = nullptr;
  void* context_ = nullptr;
  bool stop_ = false;
  alignas(64) std::atomic<int> asleep_{0};         // workers that have to be woken
  alignas(64) std::atomic<int> busy_{0};           // workers still in the current job
  alignas(64) std::atomic<int> arrived_{0};        // threads at the barrier
  alignas(64) std::atomic<uint32_t> barriers_{0};  // counts barriers passed
};

}  // namespace chimera::cpu
