// What the host does with the device: memory, copies, launches, graphs. Two bodies, as device.cuh.
#pragma once

#include <string>

#include "cuda/device.cuh"
#include "engine/error.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#include <cstring>
#else
#include <cstdlib>
#include <functional>
#include <utility>
#include <vector>
#endif

namespace chimera::cuda {
inline namespace CHIMERA_CUDA_BODY {

struct Grid {
  int64_t x = 1, y = 1, z = 1;
  int cluster_y = 1;  // blocks with the same x and z that run at once; divides y
};

#if defined(__CUDACC__)

// watched: each launch is waited for, so that an error names its kernel. Else the host hears of it
// when it next waits for anything.
struct StreamState {
  cudaStream_t handle;
  bool watched;
};
using Stream = const StreamState*;  // nullptr: the default one, watched (tests)
using Graph = cudaGraphExec_t;

inline cudaStream_t handle(Stream stream) { return stream != nullptr ? stream->handle : nullptr; }

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw Error(std::string("cuda: ") + what, "success", cudaGetErrorString(status));
}

inline bool is_sm_90_or_later() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         major >= 9;
}
inline int largest_cluster() { return is_sm_90_or_later() ? kLargestCluster : 1; }

// A kernel must ask for more than 48 KiB of shared memory.
template <typename Params>
void allow_shared(void (*kernel)(Params), size_t bytes, const char* name) {
  if (bytes > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(bytes)),
          name);
}

// Blocks of a kernel that the device has room for at once; of clusters none, where none fits (on a
// slice of a GPU). cluster_y: as in its grid.
template <typename Params>
int64_t resident_blocks(void (*kernel)(Params), int threads, size_t shared_bytes, int cluster_y) {
  allow_shared(kernel, shared_bytes, "occupancy");
  int device = 0, multiprocessors = 0, n = 0;
  if (cluster_y == 1) {
    check(cudaGetDevice(&device), "device");
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
          "multiprocessors");
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&n, kernel, threads, shared_bytes),
          "occupancy");
    return int64_t{most(n, 1)} * multiprocessors;
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {1, static_cast<unsigned>(cluster_y), 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1, static_cast<unsigned>(cluster_y), 1);
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &cluster;
  config.numAttrs = 1;
  check(cudaOccupancyMaxActiveClusters(&n, kernel, &config), "occupancy");
  return int64_t{n} * cluster_y;
}

// Are launches into this stream captured, on a device that can start a kernel before the last one
// is done? Outside a graph a launch takes the host longer than the gap between two kernels.
inline bool overlaps(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (stream == nullptr || cudaStreamIsCapturing(stream->handle, &status) != cudaSuccess ||
      status != cudaStreamCaptureStatusActive)
    return false;
  return is_sm_90_or_later();
}

template <typename Params>
void launch(const char* name, void (*kernel)(Params), Stream stream, Grid grid, int threads,
            size_t shared_bytes, const Params& params) {
  allow_shared(kernel, shared_bytes, name);
  cudaLaunchAttribute attributes[2] = {};
  unsigned n_attributes = 0;
  if (overlaps(stream)) {
    cudaLaunchAttribute& a = attributes[n_attributes++];
    a.id = cudaLaunchAttributeProgrammaticStreamSerialization;  // see let_next_begin()
    a.val.programmaticStreamSerializationAllowed = 1;
  }
  if (grid.cluster_y > 1) {
    cudaLaunchAttribute& a = attributes[n_attributes++];
    a.id = cudaLaunchAttributeClusterDimension;
    a.val.clusterDim = {1, static_cast<unsigned>(grid.cluster_y), 1};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                        static_cast<unsigned>(grid.z));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = handle(stream);
  config.attrs = attributes;
  config.numAttrs = n_attributes;
  check(cudaLaunchKernelEx(&config, kernel, params), name);
  if (stream == nullptr || stream->watched) check(cudaStreamSynchronize(config.stream), name);
}

// Memory of the device alone; memory that the host may read and write as well, and that moves to
// whoever touches it; memory of the host that the device copies from and to. All zeroed.
inline void* allocate_device(size_t bytes) {
  void* p = nullptr;
  check(cudaMalloc(&p, bytes), "allocation");
  check(cudaMemset(p, 0, bytes), "memset");
  check(cudaDeviceSynchronize(), "memset");  // our stream does not wait for the one it runs in
  return p;
}
inline void free_device(void* p) { cudaFree(p); }
inline void* allocate_managed(size_t bytes) {
  void* p = nullptr;
  check(cudaMallocManaged(&p, bytes), "allocation");
  check(cudaMemset(p, 0, bytes), "memset");
  check(cudaDeviceSynchronize(), "memset");
  return p;
}
inline void* allocate_pinned(size_t bytes) {
  void* p = nullptr;
  check(cudaMallocHost(&p, bytes), "allocation");
  std::memset(p, 0, bytes);
  return p;
}
inline void free_pinned(void* p) { cudaFreeHost(p); }
inline void copy(Stream stream, void* to, const void* from, size_t bytes) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, handle(stream)), "copy");
}
inline void synchronize(Stream stream) { check(cudaStreamSynchronize(handle(stream)), "a step"); }
// A watched stream is never captured.
inline Stream make_stream(bool watched = false) {
  cudaStream_t stream;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  return new StreamState{stream, watched};
}
inline void free_stream(Stream stream) {
  cudaStreamDestroy(stream->handle);
  delete stream;
}

// A place in a stream that can be waited for.
using Event = cudaEvent_t;
inline Event make_event() {
  Event event;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "event");
  return event;
}
inline void free_event(Event event) { cudaEventDestroy(event); }
inline void record(Event event, Stream stream) {
  check(cudaEventRecord(event, handle(stream)), "event");
}
inline void wait(Event event) { check(cudaEventSynchronize(event), "a step"); }

inline void begin_capture(Stream stream) {
  check(cudaStreamBeginCapture(stream->handle, cudaStreamCaptureModeThreadLocal), "capture");
}
inline Graph end_capture(Stream stream) {
  cudaGraph_t graph;
  Graph executable;
  check(cudaStreamEndCapture(stream->handle, &graph), "capture");
  check(cudaGraphInstantiate(&executable, graph, 0), "graph");
  check(cudaGraphDestroy(graph), "graph");
  return executable;
}
inline void abandon_capture(Stream stream) {
  cudaGraph_t graph;
  if (cudaStreamEndCapture(stream->handle, &graph) == cudaSuccess && graph != nullptr)
    cudaGraphDestroy(graph);
  cudaGetLastError();
}
inline void replay(Stream stream, const Graph& graph) {
  check(cudaGraphLaunch(graph, stream->handle), "graph");
}
inline void free_graph(const Graph& graph) { cudaGraphExecDestroy(graph); }

#else

// A stream runs what it is given at once, or, while it captures, writes it down.
struct StreamState {
  bool watched = false, capturing = false;
  std::vector<std::function<void()> > captured;
  void run(std::function<void()> work) {
    if (capturing)
      captured.push_back(std::move(work));
    else
      work();
  }
};
using Stream = StreamState*;
using Graph = std::vector<std::function<void()> >;

template <typename Params>
void launch(const char* name, void (*kernel)(Params), Stream stream, Grid grid, int threads,
            size_t shared_bytes, const Params& params) {
  const auto work = [=] {
    const emulator::GuardedMemory::Opened opened;
    const auto body = [&] { kernel(params); };
    emulator::run(name,
                  {static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                   static_cast<unsigned>(grid.z)},
                  static_cast<unsigned>(threads), shared_bytes, grid.cluster_y, body);
    if (stream == nullptr || stream->watched) emulator::Fault::check(name);
  };
  if (stream == nullptr)
    work();
  else
    stream->run(work);
}

inline int largest_cluster() { return emulator::largest_cluster(); }
template <typename Params>
int64_t resident_blocks(void (*)(Params), int, size_t, int cluster_y) {
  return emulator::resident_blocks() / cluster_y * cluster_y;
}

inline void* allocate_pinned(size_t bytes) {
  void* p = std::aligned_alloc(256, round_up<size_t>(bytes, 256));
  if (p == nullptr) throw MemoryError(bytes);
  std::memset(p, 0, bytes);
  return p;
}
inline void* allocate_managed(size_t bytes) { return allocate_pinned(bytes); }
inline void* allocate_device(size_t bytes) {
  void* guarded = emulator::GuardedMemory::allocate(round_up<size_t>(bytes, 256));
  return guarded != nullptr ? guarded : allocate_pinned(bytes);
}
inline void free_device(void* p) {
  if (!emulator::GuardedMemory::owns(p)) std::free(p);
}
inline void free_pinned(void* p) { std::free(p); }
inline void copy(Stream stream, void* to, const void* from, size_t bytes) {
  emulator::Fault::check("copy");
  stream->run([=] {
    const emulator::GuardedMemory::Opened opened;
    std::memcpy(to, from, bytes);
  });
}
inline void synchronize(Stream /*stream*/) { emulator::Fault::check("a step"); }
inline Stream make_stream(bool watched = false) { return new StreamState{watched, false, {}}; }
inline void free_stream(Stream stream) { delete stream; }

struct Event {};
inline Event make_event() { return {}; }
inline void free_event(Event /*event*/) {}
inline void record(Event /*event*/, Stream /*stream*/) {}
inline void wait(Event /*event*/) { emulator::Fault::check("a step"); }

inline void begin_capture(Stream stream) { stream->capturing = true; }
inline Graph end_capture(Stream stream) {
  stream->capturing = false;
  return std::exchange(stream->captured, {});
}
inline void abandon_capture(Stream stream) { end_capture(stream); }
inline void replay(Stream /*stream*/, const Graph& graph) {
  for (const auto& work : graph) work();
}
inline void free_graph(const Graph& /*graph*/) {}

#endif

}  // namespace CHIMERA_CUDA_BODY
}  // namespace chimera::cuda
