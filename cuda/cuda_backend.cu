// The CUDA backend on the device. Not compiled together with stub.cc.
#include "cuda/cuda_backend.cuh"

namespace chimera {
namespace {

// What keeps this machine from running the kernels, or nothing.
std::string obstacle(cudaDeviceProp* device) {
  int devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  if (status == cudaErrorInsufficientDriver)
    return "no NVIDIA driver, or one older than this build's CUDA";
  if (status != cudaSuccess) return cudaGetErrorString(status);
  if (devices == 0) return "no device";
  if (cudaGetDeviceProperties(device, 0) != cudaSuccess) return "a device that does not answer";
  if (device->major < 8)
    return std::string(device->name) + ", sm_" + std::to_string(device->major * 10 + device->minor);
  return "";
}

}  // namespace

bool cuda_available() {
  cudaDeviceProp device;
  return obstacle(&device).empty();
}

std::unique_ptr<Backend> make_cuda_backend(const BackendOptions& /*options*/) {
  cudaDeviceProp device;
  const std::string found = obstacle(&device);
  if (!found.empty())
    throw Error("device cuda", "a GPU of sm_80 or later and its driver", found, "use --device cpu");
  const std::string isa = "sm_" + std::to_string(device.major * 10 + device.minor);
  return std::make_unique<cuda::CudaBackend>(isa, "cuda " + isa + ", " + device.name + ", " +
                                                      std::to_string(device.multiProcessorCount) +
                                                      " multiprocessors");
}

}  // namespace chimera
