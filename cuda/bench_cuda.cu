// bench_cuda [--json FILE]: every kernel at the shapes of SmolLM2-135M, LLaMA-2-7B and 13B, beside
// the speed at which this GPU reads its memory, and cuBLAS where it is installed.
#include <cstdio>
#include <cstring>
#include <set>

#include "cuda/bench_kernels.cuh"
#include "cuda/cublas.cuh"
#include "engine/error.h"

namespace chimera::cuda {
namespace {

// Column-major: y (rows, tokens) = W^T of (cols, rows) times x (cols, tokens).
bool cublas_product(Stream stream, const void* w, const void* x, float* y, int64_t rows,
                    int64_t cols, int tokens) {
  static const Cublas cublas;
  return cublas.available() &&
         cublas.gemm(stream, /*a_t=*/true, /*b_t=*/false, rows, tokens, cols, w, cols, x, cols,
                     CUDA_R_16BF, 0, y, rows, CUBLAS_COMPUTE_32F);
}

// A line a timing, for people; and in `json`, if it is open, for programs.
class Report {
 public:
  Report(const std::string& device, double gb_per_second, std::FILE* json)
      : gb_per_second_(gb_per_second), json_(json) {
    std::printf("%s, reads %.1f GB/s\n\n%-13s %-30s %-5s %6s %10s %9s %6s\n", device.c_str(),
                gb_per_second, "shape", "kernel", "type", "tokens", "us", "GB/s", "share");
    if (json_ != nullptr)
      std::fprintf(json_, "{\"device\":\"%s\",\"read_bandwidth_gb_s\":%.1f,\"kernels\":[",
                   device.c_str(), gb_per_second);
  }
  void add(const ModelShape& shape, const std::vector<Timing>& timings) {
    for (const Timing& t : timings) {
      const double us = 1e6 * t.seconds, rate = t.bytes / t.seconds / 1e9,
                   share = rate / gb_per_second_;
      std::printf("%-13s %-30s %-5s %6d %10.2f %9.1f %6.2f\n", shape.name, t.kernel.c_str(),
                  t.type.c_str(), t.tokens, us, rate, share);
      if (json_ == nullptr) continue;
      std::fprintf(json_,
                   "%s\n{\"shape\":\"%s\",\"kernel\":\"%s\",\"type\":\"%s\",\"tokens\":%d,"
                   "\"us\":%.2f,\"gb_s\":%.1f,\"share\":%.3f}",
                   first_ ? "" : ",", shape.name, t.kernel.c_str(), t.type.c_str(), t.tokens, us,
                   rate, share);
      first_ = false;
    }
    std::fflush(stdout);
  }
  void finish() {
    if (json_ != nullptr) std::fprintf(json_, "]}\n");
  }

 private:
  double gb_per_second_;
  std::FILE* json_;
  bool first_ = true;
};

void run(std::FILE* json) {
  const auto backend = make_cuda_backend({});  // says plainly what is missing
  Report report(backend->description(), cuda_read_bandwidth(size_t{4} << 30), json);
  const std::vector<int> tokens = {1, 8, 16, 32, 64};
  KernelBench bench(size_t{256} << 20, 5);
  for (const ModelShape& m : kModelShapes) {
    if (m.name == kTinyShape.name) continue;
    // The matrices of a layer and the head, each size once. (A step launches those that share their
    // input as one.)
    const std::set<std::pair<int, int>> products = {{m.heads * m.head_dim(), m.hidden},
                                                    {m.kv_heads * m.head_dim(), m.hidden},
                                                    {m.hidden, m.heads * m.head_dim()},
                                                    {m.ffn, m.hidden},
                                                    {m.hidden, m.ffn},
                                                    {m.vocab, m.hidden}};
    for (const DType type : {DType::kBF16, DType::kQ8_0, DType::kQ4_0, DType::kQ4_K})
      for (const auto& [rows, cols] : products)
        if (cols % dtype_info(type).block_weights == 0)
          report.add(m, bench.product(type, rows, cols, tokens, cublas_product));
    for (const int context : {1024, 3584}) report.add(m, bench.others(m, context, tokens));
  }
  report.finish();
}

}  // namespace
}  // namespace chimera::cuda

int main(int argc, char** argv) {
  const bool json = argc == 3 && std::strcmp(argv[1], "--json") == 0;
  if (argc > 1 && !json) {
    std::fprintf(stderr, "usage: bench_cuda [--json FILE]\n");
    return 2;
  }
  try {
    const std::string path = json ? argv[2] : "", part = path + ".part";
    std::FILE* file = nullptr;
    if (json && (file = std::fopen(part.c_str(), "w")) == nullptr)
      throw chimera::Error(part, "a file that can be written", "none");
    chimera::cuda::run(file);
    if (file != nullptr && (std::fclose(file) != 0 || std::rename(part.c_str(), path.c_str()) != 0))
      throw chimera::Error(path, "room to write", "none");
    return 0;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "bench_cuda: %s\n", e.what());
    return 1;
  }
}
