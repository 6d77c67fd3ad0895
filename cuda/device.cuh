// The primitives that the kernels are written over, with two bodies: CUDA's, and one that runs on
// the CPU (emulator.h). A kernel is written once and includes this; nvcc compiles it for the GPU,
// g++ for the tests. Nothing else in a kernel may name CUDA.
//
//   KERNEL(threads, blocks) void foo_kernel(FooParams p) { ... }      private
//   void foo(Stream stream, const FooParams& p) { launch(...); }      public
//
// A kernel takes one plain struct by value, and waits for those ahead of it (wait_for_previous()).
// All shared memory is dynamic, through shared_memory().
//
// The two builds live in one program where tests are linked with a CUDA build, so everything that
// is compiled twice is in an inline namespace of its own.
//
// Weights, keys and values stand in memory in the order in which the tensor cores want them in
// registers (tape.cuh), so a lane's 16-byte load is its fragment; load_matrices() is for what has
// to be picked together first (attention.cuh).
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "engine/dtype.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define DEVICE __device__ __forceinline__
#define BOTH __host__ __device__ inline
#define KERNEL(threads, blocks) static __global__ __launch_bounds__(threads, blocks)
#define UNROLLED_FOR _Pragma("unroll") for
#define CHIMERA_PRAGMA(text) _Pragma(#text)
#define UNROLL_BY(n) CHIMERA_PRAGMA(unroll n)
#define CHIMERA_CUDA_BODY on_device
#else
#include <cstring>

#include "cuda/emulator.h"
#define DEVICE inline
#define BOTH inline
#define KERNEL(threads, blocks) static inline
#define UNROLLED_FOR for
#define UNROLL_BY(n)
#define CHIMERA_CUDA_BODY emulated
#endif

namespace chimera::cuda {
inline namespace CHIMERA_CUDA_BODY {

inline constexpr int kLanes = 32;
inline constexpr int kLargestCluster = 8;  // blocks, on every device that has clusters

// ---- Plain arithmetic, host and device ---------------------------------------------------------

template <typename T>
BOTH constexpr T least(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
BOTH constexpr T most(T a, T b) {
  return a < b ? b : a;
}
template <typename T>
BOTH constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}
template <typename T>
BOTH constexpr T round_up(T a, T b) {
  return ceil_div(a, b) * b;
}

// One rounding each (nvcc divides and takes roots as IEEE 754 has it, unless told otherwise).
BOTH float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
BOTH float divide(float a, float b) { return a / b; }
BOTH float square_root(float x) { return ::sqrtf(x); }
BOTH uint32_t bits_of(float x) { return std::bit_cast<uint32_t>(x); }
BOTH float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }
BOTH float infinity() { return float_of(0x7f800000u); }
BOTH bool is_nan(float x) { return (bits_of(x) & 0x7fffffffu) > 0x7f800000u; }
BOTH uint32_t pack(uint16_t low, uint16_t high) { return low | static_cast<uint32_t>(high) << 16; }

struct alignas(16) Words4 {  // what one 16-byte access moves
  uint32_t word[4];
};
struct alignas(8) Words2 {
  uint32_t word[2];
};

// ---- What the emulator and the tests take the arithmetic to be, on the host --------------------

// a * b + c of three f16 is exact in double; rounding it to odd in f32 first makes the second
// rounding the only one that counts.
inline uint16_t round_once_f16(double exact) {
  float f = static_cast<float>(exact);
  if (static_cast<double>(f) != exact && f == f) {
    uint32_t u = bits_of(f);
    const bool too_large = (static_cast<double>(f) > exact) == (exact > 0);
    if (too_large) --u;  // toward zero, then the last bit says that something was lost
    f = float_of(u | 1u);
  }
  return f32_to_f16(f);
}
// The emulator's mma, an element of it: c + sum over ascending k of a[k] * b[k], the sum in double,
// rounded to f32 once. (The hardware aligns and truncates the products in a way that NVIDIA
// does not state; what it shares with this model is all that we use: an element depends on its own
// row of A and column of B alone, and sums that are exact come out exact.)
inline float mma_element(float c, const float* a, const float* b) {
  double sum = 0;
  for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[k]) * static_cast<double>(b[k]);
  return static_cast<float>(static_cast<double>(c) + sum);
}

#if defined(__CUDACC__)

// ---- CUDA --------------------------------------------------------------------------------------

DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
DEVICE int block_z() { return static_cast<int>(blockIdx.z); }
DEVICE int grid_x() { return static_cast<int>(gridDim.x); }

DEVICE std::byte* shared_memory() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
  return reinterpret_cast<std::byte*>(dynamic_shared_memory);
}
DEVICE void sync_threads() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE uint32_t shuffle_xor(uint32_t x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

BOTH float f16_to_float(uint16_t h) { return __half2float(__ushort_as_half(h)); }
BOTH uint16_t float_to_f16(float x) { return __half_as_ushort(__float2half_rn(x)); }
BOTH float bf16_to_float(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }
BOTH uint16_t float_to_bf16(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }

// Two f16 in one register. subtract_f16x2, multiply_add_f16x2: each half rounded once.
DEVICE __half2 half2_of(uint32_t x) { return *reinterpret_cast<__half2*>(&x); }
DEVICE uint32_t bits_of(__half2 x) { return *reinterpret_cast<uint32_t*>(&x); }
DEVICE uint32_t subtract_f16x2(uint32_t a, uint32_t b) {
  return bits_of(__hsub2(half2_of(a), half2_of(b)));
}
DEVICE uint32_t multiply_add_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  return bits_of(__hfma2(half2_of(a), half2_of(b), half2_of(c)));
}

// Byte i of the result is byte (selector >> 4 i) % 8 of the eight of a (0 to 3) and b.
DEVICE uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}

// A place in the block's shared memory, as its instructions want it. (A pointer to it has 64 bits,
// and nvcc made it anew, from a special register that warps then wait for, also in the innermost
// loop.)
using SharedAddress = uint32_t;
DEVICE SharedAddress shared_address() {
  SharedAddress a;
  asm volatile(
      "{\n"
      ".reg .u64 at;\n"
      "cvta.to.shared.u64 at, %1;\n"
      "cvt.u32.u64 %0, at;\n"
      "}"
      : "=r"(a)
      : "l"(shared_memory()));
  return a;
}
DEVICE const std::byte* pointer_of(SharedAddress a) {
  return static_cast<const std::byte*>(__cvta_shared_to_generic(a));
}
DEVICE Words4 load_shared_16(SharedAddress a) {
  Words4 w;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(w.word[0]), "=r"(w.word[1]), "=r"(w.word[2]), "=r"(w.word[3])
               : "r"(a));
  return w;
}
DEVICE Words2 load_shared_8(SharedAddress a) {
  Words2 w;
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(w.word[0]), "=r"(w.word[1]) : "r"(a));
  return w;
}
DEVICE uint32_t load_shared_u32(SharedAddress a) {
  uint32_t x;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(a));
  return x;
}
DEVICE uint16_t load_shared_u16(SharedAddress a) {
  uint16_t x;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(a));
  return x;
}

// (x & mask) | bits, one instruction (of which nvcc makes two where both are constants).
DEVICE uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(x), "r"(mask), "r"(bits));
  return result;
}

DEVICE void copy_async_16(SharedAddress shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
DEVICE void copy_async_16(void* shared, const void* global) {
  copy_async_16(static_cast<uint32_t>(__cvta_generic_to_shared(shared)), global);
}
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kInFlight>
DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kInFlight) : "memory");
}

DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of f16 from shared memory. Lane 8 i + j names row j of matrix i: 16 aligned
// bytes, anywhere. r[i]: of matrix i, or of its transpose, elements (lane / 4, 2 (lane % 4)) and
// the one to the right of it.
template <bool kTransposed>
DEVICE void load_matrices(const uint16_t* row, uint32_t (&r)[4]) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}

// A kernel of a graph may begin before the one ahead of it is done (sm_90: programmatic dependent
// launch): when all blocks of that have called let_next_begin(), or have ended. So its blocks are
// there, and have done what they can, when their turn comes. Every kernel waits before it touches
// anything that another one writes, or writes anything: behind it all that was launched before is
// done and seen.
//
// When does a kernel let the next one begin? As a rule when it has waited itself: then all before it
// are done, and the next one may read early what this one does not write: weights, and, by early(),
// the Step. A few short kernels do so at once (the input of a product, RoPE, combine), so the kernel
// behind them may run beside the one ahead of them, and neither of the two may write what it reads
// early. CudaBackend sees to the order of ops.
DEVICE void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DEVICE void wait_alone() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Blocks of a cluster (sm_90; runtime.cuh, Grid::cluster_y) run at the same time and read each
// other's shared memory. Behind sync_cluster() what all of them have written there before is seen;
// a block must not end while another may still read.
DEVICE void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
#endif
}
// What the block of a rank has at the place in its shared memory where this one has p.
DEVICE void load_cluster_16(const float* p, int rank, float (&to)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .u32 at;\n"
      "mapa.shared::cluster.u32 at, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [at];\n"
      "}"
      : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3])
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(p))), "r"(rank)
      : "memory");
#endif
}

// x, not from this multiprocessor's L1, which is sure to be of today only behind the wait.
DEVICE int32_t early(const int32_t& x) { return __ldcg(&x); }

DEVICE Words4 early_16(const void* p) {
  const uint4 v = __ldcg(static_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
}

// The 128 bytes around p will be wanted: from memory to L2.
DEVICE void prefetch_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(p)));
}

DEVICE uint32_t atomic_add(uint32_t* p, uint32_t x) { return atomicAdd(p, x); }
DEVICE uint64_t atomic_add(uint64_t* p, uint64_t x) {
  return atomicAdd(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(x));
}
// For one thread of a block, after a barrier: adds 1. What the blocks that arrived before have
// written is seen by this one after its next barrier, if it reads with load_fresh_16().
DEVICE uint32_t arrive(uint32_t* counter) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(counter))
               : "memory");
  return before;
}

#else

// ---- The emulator ------------------------------------------------------------------------------

DEVICE int thread_index() { return static_cast<int>(emulator::current.index); }
DEVICE int block_threads() { return static_cast<int>(emulator::current.count); }
DEVICE int block_x() { return static_cast<int>(emulator::current.block.x); }
DEVICE int block_y() { return static_cast<int>(emulator::current.block.y); }
DEVICE int block_z() { return static_cast<int>(emulator::current.block.z); }
DEVICE int grid_x() { return static_cast<int>(emulator::current.grid.x); }

DEVICE std::byte* shared_memory() { return emulator::current.shared; }
DEVICE void sync_threads(const emulator::Place& place = emulator::Place::current()) {
  emulator::sync_threads(place);
}
DEVICE void sync_warp(const emulator::Place& place = emulator::Place::current()) {
  emulator::warp("__syncwarp", nullptr, nullptr, place);
}
template <typename T>
T shuffle_xor_emulated(T x, int mask, const emulator::Place& place) {
  struct Operand {
    T in, out;
    int mask;
  } operand{x, x, mask};
  emulator::warp(
      "shuffle", &operand,
      [](void* const* all) {
        for (int lane = 0; lane < kLanes; ++lane) {
          auto* mine = static_cast<Operand*>(all[lane]);
          mine->out = static_cast<Operand*>(all[(lane ^ mine->mask) % kLanes])->in;
        }
      },
      place);
  return operand.out;
}
DEVICE float shuffle_xor(float x, int mask,
                         const emulator::Place& place = emulator::Place::current()) {
  return shuffle_xor_emulated(x, mask, place);
}
DEVICE uint32_t shuffle_xor(uint32_t x, int mask,
                            const emulator::Place& place = emulator::Place::current()) {
  return shuffle_xor_emulated(x, mask, place);
}

BOTH float f16_to_float(uint16_t h) { return f16_to_f32(h); }
BOTH uint16_t float_to_f16(float x) { return f32_to_f16(x); }
BOTH float bf16_to_float(uint16_t h) { return bf16_to_f32(h); }
BOTH uint16_t float_to_bf16(float x) { return f32_to_bf16(x); }

DEVICE uint32_t multiply_add_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  for (int i = 0; i < 32; i += 16) {
    const double x = f16_to_f32(static_cast<uint16_t>(a >> i)),
                 y = f16_to_f32(static_cast<uint16_t>(b >> i));
    result |= static_cast<uint32_t>(round_once_f16(
                  x * y + static_cast<double>(f16_to_f32(static_cast<uint16_t>(c >> i)))))
              << i;
  }
  return result;
}
DEVICE uint32_t subtract_f16x2(uint32_t a, uint32_t b) {
  return multiply_add_f16x2(b, 0xbc00bc00u, a);  // a + b * -1
}

DEVICE uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = a | static_cast<uint64_t>(b) << 32;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i)
    result |= static_cast<uint32_t>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return result;
}

using SharedAddress = std::byte*;
DEVICE SharedAddress shared_address() { return emulator::current.shared; }
DEVICE const std::byte* pointer_of(SharedAddress a) { return a; }
DEVICE uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) { return (x & mask) | bits; }

DEVICE void copy_async_16(void* shared, const void* global,
                          const emulator::Place& place = emulator::Place::current()) {
  emulator::copy_async(shared, global, place);
}
DEVICE void copy_async_commit() { emulator::copy_commit(); }
template <int kInFlight>
DEVICE void copy_async_wait() {
  emulator::copy_wait(kInFlight);
}

template <float (*kToFloat)(uint16_t)>
void mma_emulated(const char* name, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  const emulator::Place& place) {
  struct Operand {
    float* d;
    const uint32_t *a, *b;
  } operand{d, a, b};
  emulator::warp(
      name, &operand,
      [](void* const* all) {
        // Lane 4 g + t holds A(g, 2t..), A(g + 8, 2t..), A(g, 2t + 8..), A(g + 8, 2t + 8..), two k
        // a register; B(2t.., g), B(2t + 8.., g); and D(g, 2t), D(g, 2t + 1), D(g + 8, 2t), D(g +
        // 8, 2t + 1).
        double rows[16][16], columns[16][8], sum[16][8] = {};
        for (int lane = 0; lane < kLanes; ++lane) {
          const auto* o = static_cast<const Operand*>(all[lane]);
          const int g = lane / 4, t = lane % 4;
          for (int half = 0; half < 2; ++half) {
            for (int r = 0; r < 4; ++r)
              rows[g + 8 * (r % 2)][2 * t + 8 * (r / 2) + half] =
                  static_cast<double>(kToFloat(static_cast<uint16_t>(o->a[r] >> (16 * half))));
            for (int r = 0; r < 2; ++r)
              columns[2 * t + 8 * r + half][g] =
                  static_cast<double>(kToFloat(static_cast<uint16_t>(o->b[r] >> (16 * half))));
          }
        }
        for (int i = 0; i < 16; ++i)
          for (int k = 0; k < 16; ++k)
            for (int j = 0; j < 8; ++j) sum[i][j] += rows[i][k] * columns[k][j];
        for (int lane = 0; lane < kLanes; ++lane) {
          const auto* o = static_cast<const Operand*>(all[lane]);
          for (int i = 0; i < 4; ++i)
            o->d[i] = static_cast<float>(static_cast<double>(o->d[i]) +
                                         sum[lane / 4 + 8 * (i / 2)][lane % 4 * 2 + i % 2]);
        }
      },
      place);
}
DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                    const emulator::Place& place = emulator::Place::current()) {
  mma_emulated<f16_to_f32>("mma.f16", d, a, b, place);
}
DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     const emulator::Place& place = emulator::Place::current()) {
  mma_emulated<bf16_to_f32>("mma.bf16", d, a, b, place);
}

template <bool kTransposed>
void load_matrices(const uint16_t* row, uint32_t (&r)[4],
                   const emulator::Place& place = emulator::Place::current()) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
    emulator::refuse("ldmatrix", "an aligned address", "another", place);
  struct Operand {
    const uint16_t* row;
    uint32_t* r;
  } operand{row, r};
  emulator::warp(
      "ldmatrix", &operand,
      [](void* const* all) {
        const auto element = [&](int i, int row, int column) {
          return static_cast<const Operand*>(all[8 * i + row])->row[column];
        };
        for (int lane = 0; lane < kLanes; ++lane)
          for (int i = 0; i < 4; ++i) {
            const int g = lane / 4, t = 2 * (lane % 4);
            static_cast<Operand*>(all[lane])->r[i] =
                kTransposed ? pack(element(i, t, g), element(i, t + 1, g))
                            : pack(element(i, g, t), element(i, g, t + 1));
          }
      },
      place);
}

DEVICE void let_next_begin() {}
DEVICE void sync_cluster(const emulator::Place& place = emulator::Place::current()) {
  emulator::sync_cluster(place);
}
DEVICE void load_cluster_16(const float* p, int rank, float (&to)[4],
                            const emulator::Place& place = emulator::Place::current()) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0)
    emulator::refuse("vector load", "an aligned address", "another", place);
  std::memcpy(to, emulator::of_cluster(p, rank, place), sizeof to);
}
DEVICE void wait_alone() {}
DEVICE int32_t early(const int32_t& x) { return x; }
// Reads, so that an address that is nobody's shows.
DEVICE void prefetch_l2(const void* p) { (void)*static_cast<const volatile unsigned char*>(p); }

DEVICE uint32_t atomic_add(uint32_t* p, uint32_t x) {
  const uint32_t old = *p;
  *p = old + x;
  return old;
}
DEVICE uint64_t atomic_add(uint64_t* p, uint64_t x) {
  const uint64_t old = *p;
  *p = old + x;
  return old;
}
DEVICE uint32_t arrive(uint32_t* counter) { return atomic_add(counter, 1); }

#endif

// ---- Built from the above ----------------------------------------------------------------------

DEVICE void wait_for_previous() {
  wait_alone();
  let_next_begin();
}

// For a block that has nothing to do. When a kernel is done, so must be all before it: one block of
// it waits for them, and the others need not stand in the way of those that work.
DEVICE void leave() {
  if (block_x() == 0 && block_y() == 0 && block_z() == 0) wait_alone();
}

DEVICE int lane_index() { return thread_index() % kLanes; }
DEVICE int warp_index() { return thread_index() / kLanes; }

// Vector loads; the hardware traps where the address is not aligned to their size.
#if defined(__CUDACC__)
DEVICE Words4 load_16(const void* p) { return *static_cast<const Words4*>(p); }
DEVICE Words2 load_8(const void* p) { return *static_cast<const Words2*>(p); }
// What no kernel writes and nobody else on this multiprocessor reads: past its L1.
DEVICE Words4 load_once_16(const void* p) {
  Words4 w;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(w.word[0]), "=r"(w.word[1]), "=r"(w.word[2]), "=r"(w.word[3])
               : "l"(__cvta_generic_to_global(p)));
  return w;
}
// Not from this multiprocessor's L1.
DEVICE void load_fresh_16(const float* p, float (&to)[4]) {
  const float4 v = __ldcg(reinterpret_cast<const float4*>(p));
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}
DEVICE void store_16(float* p, const float (&from)[4]) {
  *reinterpret_cast<float4*>(p) = make_float4(from[0], from[1], from[2], from[3]);
}
#else
template <typename T>
T load_vector(const void* p, const emulator::Place& place) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0)
    emulator::refuse("vector load", "an aligned address", "another", place);
  return *static_cast<const T*>(p);
}
DEVICE Words4 load_16(const void* p, const emulator::Place& place = emulator::Place::current()) {
  return load_vector<Words4>(p, place);
}
DEVICE Words2 load_8(const void* p, const emulator::Place& place = emulator::Place::current()) {
  return load_vector<Words2>(p, place);
}
DEVICE Words4 early_16(const void* p, const emulator::Place& place = emulator::Place::current()) {
  return load_vector<Words4>(p, place);
}
DEVICE Words4 load_once_16(const void* p,
                           const emulator::Place& place = emulator::Place::current()) {
  return load_vector<Words4>(p, place);
}
DEVICE Words4 load_shared_16(SharedAddress a,
                             const emulator::Place& place = emulator::Place::current()) {
  return load_vector<Words4>(a, place);
}
DEVICE Words2 load_shared_8(SharedAddress a,
                            const emulator::Place& place = emulator::Place::current()) {
  return load_vector<Words2>(a, place);
}
DEVICE uint32_t load_shared_u32(SharedAddress a,
                                const emulator::Place& place = emulator::Place::current()) {
  return load_vector<uint32_t>(a, place);
}
DEVICE uint16_t load_shared_u16(SharedAddress a,
                                const emulator::Place& place = emulator::Place::current()) {
  return load_vector<uint16_t>(a, place);
}
DEVICE void load_fresh_16(const float* p, float (&to)[4],
                          const emulator::Place& place = emulator::Place::current()) {
  const Words4 w = load_vector<Words4>(p, place);
  std::memcpy(to, w.word, sizeof to);
}
DEVICE void store_16(float* p, const float (&from)[4],
                     const emulator::Place& place = emulator::Place::current()) {
  load_vector<Words4>(p, place);  // refuses what is not aligned
  std::memcpy(p, from, sizeof from);
}
#endif

}  // namespace CHIMERA_CUDA_BODY
}  // namespace chimera::cuda
