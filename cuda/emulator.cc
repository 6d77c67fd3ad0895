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

struct Block;
struct Fiber {
  Block* block = nullptr;
  unsigned thread = 0;  // of the block
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

struct Block {
  Dim index;
  std::byte* shared = nullptr;
  unsigned arrived = 0, finished = 0;
  Place barrier;
  Warp warps[kMaxThreads / kWarp];
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
  int largest_cluster = kMaxCluster, resident_blocks = 264;

  void run(const char* kernel, Dim grid, unsigned threads, size_t shared_bytes, int cluster_y,
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
    limit("blocks of a cluster", static_cast<uint64_t>(cluster_y), 1,
          static_cast<uint64_t>(largest_cluster));
    const auto n_blocks = static_cast<unsigned>(cluster_y);
    limit("grid.y beyond whole clusters", grid.y % n_blocks, 0, 0);
    while (fibers_.size() < n_blocks * threads) add_fiber();
    body_ = &body;
    // Behind the block's memory lies a guard, where a write shows.
    const size_t stride = (shared_bytes + kGuard + kAlignment - 1) / kAlignment * kAlignment;
    shared_.resize(n_blocks * stride + kAlignment);
    const auto address = reinterpret_cast<uintptr_t>(shared_.data());
    std::byte* shared = shared_.data() + (kAlignment - address % kAlignment) % kAlignment;
    current = {0, threads, {}, grid, shared};
    shared_bytes_ = shared_bytes;
    for (unsigned z = 0; z < grid.z; ++z)
      for (unsigned y = 0; y < grid.y; y += n_blocks)
        for (unsigned x = 0; x < grid.x; ++x) {
          for (unsigned b = 0; b < n_blocks; ++b) {
            blocks_[b] = {{x, y + b, z}, shared + b * stride, 0, 0, {}, {}};
            std::memset(blocks_[b].shared, 0xff, shared_bytes + kGuard);
          }
          run_cluster(n_blocks, threads);
          for (unsigned b = 0; b < n_blocks; ++b) check_guard(blocks_[b]);
        }
  }

  void sync_threads(const Place& place) {
    Block& block = *running_->block;
    if (block.finished > 0)
      refuse_here("__syncthreads", "all threads", "some that have returned", place);
    if (block.arrived > 0 && place.line() != block.barrier.line())
      refuse_here("__syncthreads", "all threads at " + at(block.barrier), "one at another barrier",
                  place);
    block.barrier = place;
    if (++block.arrived < current.count) return wait("__syncthreads", place);
    block.arrived = 0;
    wake(&block);
  }

  void sync_cluster(const Place& place) {
    if (finished_ > 0) refuse_here("sync_cluster", "all blocks", "some that have returned", place);
    if (++arrived_ < n_fibers_) return wait("sync_cluster", place);
    arrived_ = 0;
    wake(nullptr);
  }
  const void* of_cluster(const void* p, int rank, const Place& place) {
    const auto offset = static_cast<const std::byte*>(p) - current.shared;
    if (offset < 0 || static_cast<size_t>(offset) + 16 > shared_bytes_ || rank < 0 ||
        static_cast<unsigned>(rank) * current.count >= n_fibers_)
      refuse_here("mapa", "shared memory of a block of the cluster", "another place", place);
    if (blocks_[rank].finished > 0)
      refuse_here("mapa", "a block that runs", "one that has ended, or is about to", place);
    return blocks_[rank].shared + offset;
  }

  void warp(const char* instruction, void* operand, WarpOperation operation, const Place& place) {
    const unsigned first = current.index / kWarp * kWarp;
    Warp& w = running_->block->warps[current.index / kWarp];
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
    running_->operand = operand;
    if (++w.arrived < kWarp) return wait(instruction, place);
    w.arrived = 0;
    const auto lanes = fibers_.begin() + static_cast<std::ptrdiff_t>(first_fiber() + first);
    if (operation != nullptr) {
      void* operands[kWarp];
      for (unsigned i = 0; i < kWarp; ++i) operands[i] = lanes[i]->operand;
      operation(operands);
    }
    for (unsigned i = 0; i < kWarp; ++i) lanes[i]->state = Fiber::kReady;
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
    running_->copies.push_back({to, from});
  }
  void copy_commit() {
    Fiber& f = *running_;
    f.groups.push_back(f.copies.size());
  }
  void copy_wait(int in_flight) {
    Fiber& f = *running_;
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
      Fiber& f = *running_;
      try {
        (*body_)();
      } catch (...) {
        error_ = std::current_exception();
      }
      const auto left_alone = [&](unsigned arrived, const std::string& instruction,
                                  const char* expected) {
        if (!error_ && arrived > 0)
          error_ = std::make_exception_ptr(
              Error(where_block() + ", " + instruction, expected,
                    "thread " + std::to_string(current.index) + " returns without it"));
      };
      Block& block = *f.block;
      Warp& w = block.warps[current.index / kWarp];
      left_alone(block.arrived, at(block.barrier) + ": __syncthreads", "all threads");
      left_alone(w.arrived, w.arrived > 0 ? at(w.place) + ": " + w.instruction : "", "32 lanes");
      left_alone(arrived_, "sync_cluster", "all blocks");
      f.state = Fiber::kFinished;
      ++w.finished;
      ++block.finished;
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

  unsigned first_fiber() const {  // of the block that runs
    return static_cast<unsigned>(running_->block - blocks_) * current.count;
  }
  void wake(const Block* block) {  // nullptr: all blocks
    for (unsigned i = 0; i < n_fibers_; ++i)
      if (block == nullptr || fibers_[i]->block == block) fibers_[i]->state = Fiber::kReady;
  }

  void check_guard(const Block& block) {
    const std::byte* guard = block.shared + shared_bytes_;  // all equal, and 0xff
    if (guard[0] == std::byte{0xff} && std::memcmp(guard, guard + 1, kGuard - 1) == 0) return;
    for (size_t i = 0; i < kGuard; ++i)
      if (guard[i] != std::byte{0xff}) {
        current.block = block.index;
        throw Error(where_block(), std::to_string(shared_bytes_) + " bytes of shared memory",
                    "a write at byte " + std::to_string(shared_bytes_ + i));
      }
  }

  void run_cluster(unsigned n_blocks, unsigned threads) {
    arrived_ = finished_ = 0;
    n_fibers_ = n_blocks * threads;
    error_ = nullptr;
    for (unsigned i = 0; i < n_fibers_; ++i) {
      Fiber& f = *fibers_[i];
      f.block = &blocks_[i / threads];
      f.thread = i % threads;
      f.state = Fiber::kReady;
      f.copies.clear();
      f.groups.clear();
    }
    while (finished_ < n_fibers_) {
      bool progress = false;
      for (unsigned i = 0; i < n_fibers_; ++i) {
        Fiber& f = *fibers_[order == Order::kAscending ? i : n_fibers_ - 1 - i];
        if (f.state != Fiber::kReady) continue;
        progress = true;
        running_ = &f;
        current.index = f.thread;
        current.block = f.block->index;
        current.shared = f.block->shared;
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
        for (unsigned i = 0; i < n_fibers_ && waiting.size() < 200; ++i)
          if (fibers_[i]->state == Fiber::kWaiting &&
              (i == 0 || fibers_[i]->place.line() != fibers_[i - 1]->place.line()))
            waiting += (waiting.empty() ? "" : ", ") + std::string("thread ") +
                       std::to_string(fibers_[i]->thread) + " at " + fibers_[i]->waits_at + " " +
                       at(fibers_[i]->place);
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
    Fiber& f = *running_;
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
  Block blocks_[kMaxCluster];
  Fiber* running_ = nullptr;
  unsigned n_fibers_ = 0, arrived_ = 0, finished_ = 0;  // of the cluster; arrived at sync_cluster
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
void set_largest_cluster(int blocks) { emulator().largest_cluster = blocks; }
int largest_cluster() { return emulator().largest_cluster; }
void set_resident_blocks(int n) { emulator().resident_blocks = n; }
int resident_blocks() { return emulator().resident_blocks; }
void run(const char* kernel, Dim grid, unsigned threads, size_t shared_bytes, int cluster_y,
         FunctionRef<void()> body) {
  if (Fault::happens(kernel)) return;
  emulator().run(kernel, grid, threads, shared_bytes, cluster_y, body);
}
void sync_threads(const Place& place) { emulator().sync_threads(place); }
void sync_cluster(const Place& place) { emulator().sync_cluster(place); }
const void* of_cluster(const void* p, int rank, const Place& place) {
  return emulator().of_cluster(p, rank, place);
}
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
