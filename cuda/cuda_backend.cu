// The CUDA backend on the device. Not compiled together with stub.cc.
#include <algorithm>
#include <chrono>

#include "cuda/bandwidth.cuh"
#include "cuda/cuda_backend.cuh"
#include "cuda/train_ops.cuh"

namespace chimera {
namespace {

// What keeps this machine from running the kernels, or nothing.
std::string obstacle(cudaDeviceProp* device) {
  int devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  if (status == cudaErrorInsufficientDriver)
    return "no NVIDIA driver, or one older than this build's CUDA " +
           std::to_string(CUDART_VERSION / 1000);
  if (status == cudaErrorNoDevice || (status == cudaSuccess && devices == 0)) return "no GPU";
  if (status != cudaSuccess) return cudaGetErrorString(status);
  if (cudaGetDeviceProperties(device, 0) != cudaSuccess) return "a GPU that does not answer";
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, cuda::read_kernel) == cudaSuccess) return "";
  cudaGetLastError();  // else the next call would report it
  return std::string(device->name) + ", sm_" + std::to_string(device->major * 10 + device->minor) +
         " (this build has code for sm_" CHIMERA_CUDA_ARCHS ")";
}

cudaDeviceProp require_device() {
  cudaDeviceProp device;
  const std::string found = obstacle(&device);
  if (!found.empty())
    throw Error("device cuda", "an NVIDIA GPU that this build can run on, and its driver", found,
                "use --device cpu");
  return device;
}

}  // namespace

bool cuda_available() {
  cudaDeviceProp device;
  return obstacle(&device).empty();
}

std::unique_ptr<Backend> make_cuda_backend(const BackendOptions& options) {
  const cudaDeviceProp device = require_device();
  const std::string isa = "sm_" + std::to_string(device.major * 10 + device.minor);
  return std::make_unique<cuda::CudaBackend>(isa,
                                             "cuda " + isa + ", " + device.name + ", " +
                                                 std::to_string(device.multiProcessorCount) +
                                                 " multiprocessors",
                                             options.eager);
}

std::unique_ptr<training::Ops<float>> training::make_cuda_training_ops(Precision precision) {
  require_device();
  return std::make_unique<cuda::CudaTrainingOps>(precision);
}

double cuda_read_bandwidth(size_t bytes) {
  constexpr int kPasses = 16;
  int resident = 0;  // blocks of a multiprocessor
  const int multiprocessors = require_device().multiProcessorCount;
  cuda::check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, cuda::read_kernel,
                                                            cuda::kReadThreads, 0),
              "occupancy");
  const int blocks = multiprocessors * resident;
  const cuda::DeviceMemory data(cuda::allocate_device(bytes)),
      sums(cuda::allocate_device(static_cast<size_t>(blocks) * 4));
  const auto stream = cuda::make_stream();
  const auto pass = [&] {
    cuda::read(stream,
               {static_cast<const std::byte*>(data.get()), static_cast<int64_t>(bytes / 16),
                static_cast<uint32_t*>(sums.get())},
               blocks);
  };
  pass();
  cuda::synchronize(stream);
  double best = 1e9;
  for (int repeat = 0; repeat < 5; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < kPasses; ++i) pass();
    cuda::synchronize(stream);
    best = std::min(
        best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  cuda::free_stream(stream);
  return static_cast<double>(bytes) * kPasses / best / 1e9;
}

}  // namespace chimera
