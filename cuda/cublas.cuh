// cuBLAS where it is installed: taken from the library at run time, so that the program runs
// without it. The emulated body has none.
#pragma once

#include "cuda/runtime.cuh"

#if defined(__CUDACC__)
#include <cublas_v2.h>
#include <dlfcn.h>

#include <type_traits>
#endif

namespace chimera::cuda {
inline namespace CHIMERA_CUDA_BODY {

#if defined(__CUDACC__)

class Cublas {
 public:
  Cublas() {
    for (const char* name : {"libcublas.so.13", "libcublas.so.12", "libcublas.so"}) {
      void* library = dlopen(name, RTLD_NOW);
      if (library == nullptr) continue;
      const auto find = [library](auto* f, const char* symbol) {
        *f = reinterpret_cast<std::remove_pointer_t<decltype(f)>>(dlsym(library, symbol));
        return *f != nullptr;
      };
      decltype(&cublasCreate_v2) create;
      if (!find(&create, "cublasCreate_v2") || !find(&set_workspace_, "cublasSetWorkspace_v2") ||
          !find(&set_stream_, "cublasSetStream_v2") || !find(&gemm_, "cublasGemmEx") ||
          create(&handle_) != CUBLAS_STATUS_SUCCESS)
        continue;
      workspace_ = allocate_device(kWorkspace);
      return;
    }
    handle_ = nullptr;
  }
  bool available() const { return handle_ != nullptr; }

  // Column-major: c (m, n) = a (m, k) b (k, n) + beta c; with a_t, a lies as (k, m), with b_t, b as
  // (n, k). The bits are the same each time: one stream, one workspace. false: it failed.
  bool gemm(Stream stream, bool a_t, bool b_t, int64_t m, int64_t n, int64_t k, const void* a,
            int64_t lda, const void* b, int64_t ldb, cudaDataType type, float beta, float* c,
            int64_t ldc, cublasComputeType_t compute) const {
    const float one = 1;
    const auto i = [](int64_t x) { return static_cast<int>(x); };
    // In this order: cublasSetStream() goes back to a workspace of the library's own.
    return set_stream_(handle_, handle(stream)) == CUBLAS_STATUS_SUCCESS &&
           set_workspace_(handle_, workspace_, kWorkspace) == CUBLAS_STATUS_SUCCESS &&
           gemm_(handle_, a_t ? CUBLAS_OP_T : CUBLAS_OP_N, b_t ? CUBLAS_OP_T : CUBLAS_OP_N, i(m),
                 i(n), i(k), &one, a, type, i(lda), b, type, i(ldb), &beta, c, CUDA_R_32F, i(ldc),
                 compute, CUBLAS_GEMM_DEFAULT) == CUBLAS_STATUS_SUCCESS;
  }

 private:
  cublasHandle_t handle_ = nullptr;
  // Spelled out: the header adds overloads of its name.
  cublasStatus_t (*gemm_)(cublasHandle_t, cublasOperation_t, cublasOperation_t, int, int, int,
                          const void*, const void*, cudaDataType, int, const void*, cudaDataType,
                          int, const void*, void*, cudaDataType, int, cublasComputeType_t,
                          cublasGemmAlgo_t) = nullptr;
  decltype(&cublasSetStream_v2) set_stream_ = nullptr;
  decltype(&cublasSetWorkspace_v2) set_workspace_ = nullptr;
  static constexpr size_t kWorkspace = 64 << 20;  // given, since a graph may not allocate one
  void* workspace_ = nullptr;
};

#else

class Cublas {
 public:
  bool available() const { return false; }
};

#endif

}  // namespace CHIMERA_CUDA_BODY
}  // namespace chimera::cuda
