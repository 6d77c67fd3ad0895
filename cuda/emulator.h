// Runs CUDA kernels on the CPU, so that every machine can test them and a reader can step through
// one in gdb. Each CUDA thread of a block is a fiber (a stack of its own, switched by hand, no
// operating system involved); blocks run one after the other, those of a cluster together. Barriers
// and warp instructions are places where fibers wait for each other: the last one to arrive does
// the work for all.
//
// It is strict where the hardware would be silent, or slow, or hang. It throws Error, with the
// kernel, block and thread, for
//   a launch over the limits (threads, grid, cluster, shared memory)
//   a barrier that some thread of the block does not reach, or that is reached at two places
//   a warp instruction (shuffle, mma, __syncwarp) with an absent lane
//   an asynchronous copy that is not aligned to 16 bytes, or leaves the block's shared memory
//   a vector load that is not aligned to its size; a write just behind the shared memory
// and it is unkind where the hardware is free to be: shared memory starts as NaNs, an asynchronous
// copy lands only when its thread waits for it, and the order in which threads run can be reversed
// (set_order), which moves the result of most races.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>

#include "engine/function_ref.h"

namespace chimera::cuda::emulator {

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

// What the running fiber is.
struct Thread {
  unsigned index = 0;  // threadIdx.x
  unsigned count = 0;  // blockDim.x
  Dim block, grid;     // blockIdx, gridDim
  std::byte* shared = nullptr;
};
extern constinit thread_local Thread current;

inline constexpr unsigned kWarp = 32;
inline constexpr unsigned kMaxThreads = 1024;  // a block
inline constexpr unsigned kMaxGridX = 0x7fffffffu, kMaxGridYZ = 65535;
inline constexpr int kMaxCluster = 8;            // blocks
inline constexpr size_t kMaxShared = 99 * 1024;  // a block: sm_89, the least of our targets

enum class Order : uint8_t { kAscending, kDescending };
void set_order(Order order);

// Blocks that a cluster may have: kMaxCluster, or 1, as on devices before sm_90.
void set_largest_cluster(int blocks);
int largest_cluster();
// Blocks that it pretends to have room for at once, which launches are cut for: two on each of an
// H100's multiprocessors, unless set.
void set_resident_blocks(int n);
int resident_blocks();

// Runs every thread of every block. body: the kernel with its arguments. cluster_y: blocks that
// follow each other in y and run together.
void run(const char* kernel, Dim grid, unsigned threads, size_t shared_bytes, int cluster_y,
         FunctionRef<void()> body);

// While one lives, allocate_device() gives out memory that the host cannot touch, as on a GPU, but
// through copy(): whoever does is stopped by the operating system. (Memory is not given out twice.)
class GuardedMemory {
 public:
  explicit GuardedMemory(size_t bytes);
  ~GuardedMemory();
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;

  static bool owns(const void* p);
  static void* allocate(size_t bytes);  // nullptr: there is none, or no room
  struct Opened {                       // for the kernel, or the copy, that is running
    Opened();
    ~Opened();
  };
};

// While one lives, the device fails as a GPU does that touches what it must not: in a kernel, which
// says nothing. From then on whatever waits for the device, or asks it for more, throws.
class Fault {
 public:
  explicit Fault(const char* kernel);  // the next launch of the name
  ~Fault();
  Fault(const Fault&) = delete;
  Fault& operator=(const Fault&) = delete;

  static bool happens(const char* kernel);
  static void check(const char* what);
};

// ---- For device.cuh: called by the running fiber -----------------------------------------------

using Place = std::source_location;

void sync_threads(const Place& place);
void sync_cluster(const Place& place);
// Where the block of a rank in the cluster has the 16 bytes that this one has at p.
const void* of_cluster(const void* p, int rank, const Place& place);

// A warp instruction. Every lane brings its operand; `operation` gets those of the 32 lanes.
using WarpOperation = void (*)(void* const* operands);
void warp(const char* instruction, void* operand, WarpOperation operation, const Place& place);

// cp.async of 16 bytes, cp.async.commit_group, cp.async.wait_group
void copy_async(void* shared, const void* global, const Place& place);
void copy_commit();
void copy_wait(int groups_in_flight);

[[noreturn]] void refuse(const char* what, const char* expected, const char* found,
                         const Place& place);

}  // namespace chimera::cuda::emulator
