#include "cuda/emulator.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "engine/error.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace chimera::cuda::emulator {

constinit thread_local Thread current;

namespace {

constexpr size_t kStackBytes = 128 * 1024;  // only the pages touched exist

// A stack that can be left and entered again. The first entry goes through ucontext; the others
// through _setjmp and _longjmp, which, unlike swapcontext, make no system call. AddressSanitizer
// must be told of every switch, and wants swapcontext.
struct Context {
  ucontext_t context;
  jmp_buf registers;
  const void* bottom = nullptr;  // the stack; for AddressSanitizer
  size_t bytes = 0;
  void* fake_stack = nullptr;
};

#if defined(__SANITIZE_ADDRESS__)
void switch_to(Context& from, Context& to, bool /*first_entry*/) {
  __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.bytes);
  swapcontext(&from.context, &to.context);
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}
// First thing on a new stack; `from`: where it was entered from.
void entered(Context& from) { __sanitizer_finish_switch_fiber(nullptr, &from.bottom, &from.bytes); }
void forget_frames(void* stack, size_t bytes) { __asan_unpoison_memory_region(stack, bytes); }
#else
void switch_to(Context& from, Context& to, bool first_entry) {
  if (_setjmp(from.registers) == 0) {
    if (first_entry) setcontext(&to.context);
    _longjmp(to.registers, 1);
  }
}
void entered(Context& /*from*/) {}
void forget_frames(void* /*stack*/, size_t /*bytes*/) {}
#endif

struct Copy {
  void* shared;
  const void* global;
};

struct Fiber {
  Context context;
  void* stack = nullptr;
  bool entered = false;
  enum State : uint8_t { kReady, kWaiting, kFinished } state = kReady;
  const char* waits_at = "";  // the instruction it waits at, for messages
  Place place;
  void* operand = nullptr;
  std::vector<Copy> copies;    // not yet landed, oldest first
  std::vector<size_t> groups;  // ends of committed groups in `copies`
};

struct Warp {
  unsigned arrived = 0, finished = 0;
  const char* instruction = nullptr;
  Place place;
};

std::string at(const Place& p) {
  const std::string file = p.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(p.line());
}

class Emulator {
 public:
  ~Emulator() {
    for (auto& f : fibers_) munmap(f->stack, kStackBytes);
  }

  Order order = Order::kAscending;

  void run(const char* kernel, Dim grid, unsigned threads, size_t shared_bytes,
           FunctionRef<void()> body) {
    kernel_ = kernel;
    const std::string where = std::string("kernel ") + kernel;
    const auto limit = [&](const char* what, uint64_t value, uint64_t least, uint64_t most) {
      if (value < least || value > most)
        throw Error(
            where,
            std::string(what) + " from " + std::to_string(least) + " to " + std::to_string(most),
            std::to_string(value));
    };
    limit("threads a block", threads, 1, kMaxThreads);
    limit("grid.x", grid.x, 1, kMaxGridX);
    limit("grid.y", grid.y, 1, kMaxGridYZ);
    limit("grid.z", grid.z, 1, kMaxGridYZ);
    limit("bytes of shared memory", shared_bytes, 0, kMaxShared);
    while (fibers_.size() < threads) add_fiber();
    body_ = &body;
    // A page of its own end: a write behind the block's memory lands in the guard, where it is
    // seen.
    shared_.resize(shared_bytes + 2 * kGuard);
    const auto address = reinterpret_cast<uintptr_t>(shared_.data());
    std::byte* shared = shared_.data() + (kAlignment - address % kAlignment) % kAlignment;
    current = {0, threads, {}, grid, shared};
    shared_bytes_ = shared_bytes;
    for (unsigned z = 0; z < grid.z; ++z)
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
          current.block = {x, y, z};
          std::memset(shared, 0xff, shared_bytes + kGuard);
          run_block(threads);
          const std::byte* guard = shared + shared_bytes;  // all equal, and 0xff
          if (guard[0] == std::byte{0xff} && std::memcmp(guard, guard + 1, kGuard - 1) == 0)
            continue;
          for (size_t i = 0; i < kGuard; ++i)
            if (guard[i] != std::byte{0xff})
              throw Error(where_block(), std::to_string(shared_bytes) + " bytes of shared memory",
                          "a write at byte " + std::to_string(shared_bytes + i));
        }
  }

  void sync_threads(const Place& place) {
    if (finished_ > 0)
      refuse_here("__syncthreads", "all threads", "some that have returned", place);
    if (arrived_ > 0 && place.line() != barrier_.line())
      refuse_here("__syncthreads", "all threads at " + at(barrier_), "one at another barrier",
                  place);
    barrier_ = place;
    if (++arrived_ == current.count) {
      arrived_ = 0;
      for (unsigned t = 0; t < current.count; ++t) fibers_[t]->state = Fiber::kReady;
    } else {
      wait("__syncthreads", place);
    }
  }

  void warp(const char* instruction, void* operand, WarpOperation operation, const Place& place) {
    const unsigned first = current.index / kWarp * kWarp;
    Warp& w = warps_[current.index / kWarp];
    if (first + kWarp > current.count)
      refuse_here(instruction, "32 lanes", std::to_string(current.count - first), place);
    if (w.finished > 0) refuse_here(instruction, "32 lanes", "some that have returned", place);
    if (w.arrived > 0 &&
        (std::strcmp(w.instruction, instruction) != 0 || w.place.line() != place.line()))
      refuse_here(instruction,
                  std::string(w.instruction) + " at " + at(w.place) + ", where other lanes wait",
                  "another instruction", place);
    w.instruction = instruction;
    w.place = place;
    fibers_[current.index]->operand = operand;
    if (++w.arrived < kWarp) return wait(instruction, place);
    w.arrived = 0;
    if (operation != nullptr) {
      void* operands[kWarp];
      for (unsigned i = 0; i < kWarp; ++i) operands[i] = fibers_[first + i]->operand;
      operation(operands);
    }
    for (unsigned i = 0; i < kWarp; ++i) fibers_[first + i]->state = Fiber::kReady;
  }

  void copy_async(void* to, const void* from, const Place& place) {
    if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0)
      refuse_here("cp.async", "addresses aligned to 16 bytes", "others", place);
    const auto offset = static_cast<std::byte*>(to) - current.shared;
    if (offset < 0 || static_cast<size_t>(offset) + 16 > shared_bytes_)
      refuse_here(
          "cp.async",
          "a target in the block's " + std::to_string(shared_bytes_) + " bytes of shared memory",
          "offset " + std::to_string(offset), place);
    fibers_[current.index]->copies.push_back({to, from});
  }
  void copy_commit() {
    Fiber& f = *fibers_[current.index];
    f.groups.push_back(f.copies.size());
  }
  void copy_wait(int in_flight) {
    Fiber& f = *fibers_[current.index];
    if (f.groups.size() <= static_cast<size_t>(in_flight)) return;
    const size_t landing = f.groups.size() - static_cast<size_t>(in_flight),
                 end = f.groups[landing - 1];
    for (size_t i = 0; i < end; ++i) std::memcpy(f.copies[i].shared, f.copies[i].global, 16);
    f.copies.erase(f.copies.begin(), f.copies.begin() + static_cast<std::ptrdiff_t>(end));
    f.groups.erase(f.groups.begin(), f.groups.begin() + static_cast<std::ptrdiff_t>(landing));
    for (size_t& group : f.groups) group -= end;
  }

  [[noreturn]] void refuse_here(const char* what, const std::string& expected,
                                const std::string& found, const Place& place) {
    throw Error(where_block() + ", thread " + std::to_string(current.index) + ", " + at(place) +
                    ": " + what,
                expected, found);
  }

  void fiber_main() {
    entered(scheduler_);
    for (;;) {
      Fiber& f = *fibers_[current.index];
      try {
        (*body_)();
      } catch (...) {
        error_ = std::current_exception();
      }
      if (!error_ && arrived_ > 0)
        error_ = std::make_exception_ptr(
            Error(where_block() + ", " + at(barrier_) + ": __syncthreads", "all threads",
                  "thread " + std::to_string(current.index) + " returns without it"));
      Warp& w = warps_[current.index / kWarp];
      if (!error_ && w.arrived > 0)
        error_ = std::make_exception_ptr(
            Error(where_block() + ", " + at(w.place) + ": " + w.instruction, "32 lanes",
                  "thread " + std::to_string(current.index) + " returns without it"));
      f.state = Fiber::kFinished;
      ++w.finished;
      ++finished_;
      switch_to(f.context, scheduler_, false);
    }
  }

 private:
  static constexpr size_t kAlignment = 1024, kGuard = 4096;

  std::string where_block() const {
    return std::string("kernel ") + kernel_ + ", block (" + std::to_string(current.block.x) + ", " +
           std::to_string(current.block.y) + ", " + std::to_string(current.block.z) + ")";
  }

  static void entry();

  void add_fiber() {
    auto f = std::make_unique<Fiber>();
    f->stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (f->stack == MAP_FAILED)
      throw Error("emulator", "a stack for each CUDA thread", "no memory");
    f->copies.reserve(64);
    f->groups.reserve(16);
    fibers_.push_back(std::move(f));
  }

  void run_block(unsigned threads) {
    for (Warp& w : warps_) w = {};
    arrived_ = finished_ = 0;
    error_ = nullptr;
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& f = *fibers_[t];
      f.state = Fiber::kReady;
      f.copies.clear();
      f.groups.clear();
    }
    while (finished_ < threads) {
      bool progress = false;
      for (unsigned i = 0; i < threads; ++i) {
        const unsigned t = order == Order::kAscending ? i : threads - 1 - i;
        Fiber& f = *fibers_[t];
        if (f.state != Fiber::kReady) continue;
        progress = true;
        current.index = t;
        enter(f);
        if (error_) {  // the other fibers stand in the middle of the kernel: they start afresh next
                       // time
          for (auto& fiber : fibers_) fiber->entered = false;
          std::rethrow_exception(error_);
        }
      }
      if (!progress) {
        for (auto& fiber : fibers_) fiber->entered = false;
        std::string waiting;
        for (unsigned t = 0; t < threads && waiting.size() < 200; ++t)
          if (fibers_[t]->state == Fiber::kWaiting &&
              (t == 0 || fibers_[t]->place.line() != fibers_[t - 1]->place.line()))
            waiting += (waiting.empty() ? "" : ", ") + std::string("thread ") + std::to_string(t) +
                       " at " + fibers_[t]->waits_at + " " + at(fibers_[t]->place);
        throw Error(where_block(), "threads that meet", "all waiting: " + waiting);
      }
    }
  }

  void enter(Fiber& f) {
    const bool first = !f.entered;
    if (first) {
      f.entered = true;
      forget_frames(f.stack, kStackBytes);  // of a kernel that was abandoned on it
      f.context.bottom = f.stack;
      f.context.bytes = kStackBytes;
      getcontext(&f.context.context);
      f.context.context.uc_stack.ss_sp = f.stack;
      f.context.context.uc_stack.ss_size = kStackBytes;
      f.context.context.uc_link = nullptr;
      makecontext(&f.context.context, entry, 0);
    }
    switch_to(scheduler_, f.context, first);
  }

  void wait(const char* instruction, const Place& place) {
    Fiber& f = *fibers_[current.index];
    f.state = Fiber::kWaiting;
    f.waits_at = instruction;
    f.place = place;
    switch_to(f.context, scheduler_, false);
  }

  const char* kernel_ = "";
  FunctionRef<void()>* body_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<std::byte> shared_;
  size_t shared_bytes_ = 0;
  Context scheduler_;
  Warp warps_[kMaxThreads / kWarp];
  unsigned arrived_ = 0, finished_ = 0;
  Place barrier_;
  std::exception_ptr error_;
};

// One for each host thread that launches: they share nothing.
Emulator& emulator() {
  static thread_local Emulator e;
  return e;
}

void Emulator::entry() { emulator().fiber_main(); }

}  // namespace

namespace {
struct Guarded {
  std::byte* memory = nullptr;
  size_t bytes = 0, used = 0;
  int opened = 0;
  void protect(int protection) const {
    if (memory != nullptr) mprotect(memory, bytes, protection);
  }
} guarded;
}  // namespace

GuardedMemory::GuardedMemory(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw Error("emulator", "room for the device's memory", "none");
  guarded = {static_cast<std::byte*>(p), bytes, 0, 0};
}
GuardedMemory::~GuardedMemory() {
  munmap(guarded.memory, guarded.bytes);
  guarded = {};
}
bool GuardedMemory::owns(const void* p) {
  return p >= guarded.memory && p < guarded.memory + guarded.bytes;
}
void* GuardedMemory::allocate(size_t bytes) {
  if (bytes > guarded.bytes - guarded.used) return nullptr;
  guarded.used += bytes;
  return guarded.memory + guarded.used - bytes;
}
GuardedMemory::Opened::Opened() {
  if (guarded.opened++ == 0) guarded.protect(PROT_READ | PROT_WRITE);
}
GuardedMemory::Opened::~Opened() {
  if (--guarded.opened == 0) guarded.protect(PROT_NONE);
}

namespace {
struct {
  const char* kernel = nullptr;
  bool happened = false;
} fault;
}  // namespace

Fault::Fault(const char* kernel) { fault = {kernel, false}; }
Fault::~Fault() { fault = {}; }
bool Fault::happens(const char* kernel) {
  if (fault.kernel != nullptr && std::strcmp(kernel, fault.kernel) == 0) fault.happened = true;
  return fault.happened;
}
void Fault::check(const char* what) {
  if (fault.happened)
    throw Error(std::string("cuda: ") + what, "success", "an illegal memory access");
}

void set_order(Order order) { emulator().order = order; }
void run(const char* kernel, Dim grid, unsigned threads, size_t shared_bytes,
         FunctionRef<void()> body) {
  if (Fault::happens(kernel)) return;
  emulator().run(kernel, grid, threads, shared_bytes, body);
}
void sync_threads(const Place& place) { emulator().sync_threads(place); }
void warp(const char* instruction, void* operand, WarpOperation operation, const Place& place) {
  emulator().warp(instruction, operand, operation, place);
}
void copy_async(void* shared, const void* global, const Place& place) {
  emulator().copy_async(shared, global, place);
}
void copy_commit() { emulator().copy_commit(); }
void copy_wait(int groups_in_flight) { emulator().copy_wait(groups_in_flight); }
void refuse(const char* what, const char* expected, const char* found, const Place& place) {
  emulator().refuse_here(what, expected, found, place);
}

}  // namespace chimera::cuda::emulator
