// Times the kernels one by one, at the shapes of real models. Launches are captured as a graph, as
// in a step, so that the host's part is not measured; weights rotate through more memory than any
// cache holds. Written over runtime.cuh: the emulator runs it in the tests, at a tiny shape.
#pragma once

#include <algorithm>
#include <chrono>
#include <limits>
#include <string>
#include <vector>

#include "cuda/accept.cuh"
#include "cuda/attention.cuh"
#include "cuda/cuda_backend.cuh"
#include "cuda/rows.cuh"
#include "engine/model_shapes.h"

namespace chimera::cuda {
inline namespace CHIMERA_CUDA_BODY {

struct Timing {
  std::string kernel;  // "product 4096 x 11008"
  std::string type;    // of weights or cache; empty: f32
  int tokens;
  double seconds;
  double bytes;  // that it must at least move
};

// What cuBLAS takes for the same product with BF16 weights, or 0 where it cannot be had. Called
// with the stream, the weights, x (tokens, cols) in bf16 and y (tokens, rows).
using OtherProduct = bool (*)(Stream stream, const void* w, const void* x, float* y, int64_t rows,
                              int64_t cols, int tokens);

class KernelBench {
 public:
  // cold_bytes: of weights that are read in turn. repeats: of each measurement; the fastest counts.
  KernelBench(size_t cold_bytes, int repeats)
      : cold_bytes_(cold_bytes), repeats_(repeats), stream_(make_stream()) {
    uint32_t random = 1;
    noise_.resize(1 << 20);
    for (uint32_t& word : noise_) word = random = random * 1664525u + 1013904223u;
  }
  ~KernelBench() { free_stream(stream_); }
  KernelBench(const KernelBench&) = delete;
  KernelBench& operator=(const KernelBench&) = delete;

  // y = W x for one matrix, with the preparation of x apart. other, if there is one: "cuBLAS".
  std::vector<Timing> product(DType type, int64_t rows, int64_t cols,
                              const std::vector<int>& tokens, OtherProduct other = nullptr) {
    const int most = *std::max_element(tokens.begin(), tokens.end());
    const int64_t bytes = tape_bytes(type, rows, cols);
    const auto copies = static_cast<int>(1 + static_cast<int64_t>(cold_bytes_) / bytes);
    const DeviceMemory weights = noise(static_cast<size_t>(copies * bytes)),
                       x = zeros(static_cast<size_t>(fragment_bytes(most, cols)) * 2),
                       y = zeros(static_cast<size_t>(most * rows) * 4),
                       partials = zeros(
                           static_cast<size_t>(partial_floats(type, rows, rows, cols, most) * 4)),
                       counters = zeros(static_cast<size_t>(counter_words(rows, most)) * 4),
                       step = device_step(0, most);
    std::vector<Timing> timings;
    for (const int n : tokens) {
      send_step(step.get(), 0, n, false);
      LinearParams p{
          as<Step>(step),      Rows::kAll, as<std::byte>(x),       rows, cols, rows, false,
          as<float>(partials), most,       as<uint32_t>(counters), {},   1};
      const auto weight = [&](int i) { return as<std::byte>(weights) + i % copies * bytes; };
      const std::string name = "product " + std::to_string(rows) + " x " + std::to_string(cols);
      timings.push_back({name, dtype_info(type).name, n,
                         seconds(copies,
                                 [&](int i) {
                                   p.segments[0] = {weight(i), rows, as<float>(y)};
                                   linear(stream_, type, p, n);
                                 }),
                         static_cast<double>(bytes)});
      if (other != nullptr && type == DType::kBF16 && rows % 16 == 0 && cols % 32 == 0 &&
          other(stream_, weight(0), x.get(), as<float>(y), rows, cols, n))
        timings.push_back(
            {"cuBLAS " + name, dtype_info(type).name, n,
             seconds(
                 copies,
                 [&](int i) { other(stream_, weight(i), x.get(), as<float>(y), rows, cols, n); }),
             static_cast<double>(bytes)});
    }
    return timings;
  }

  // Everything else in a layer, after `context` positions; tokens > 1 are a tree.
  std::vector<Timing> others(const ModelShape& m, int context, const std::vector<int>& tokens) {
    const int most = *std::max_element(tokens.begin(), tokens.end());
    const int width = (m.heads + 2 * m.kv_heads) * m.head_dim(), layers = 4;
    const int capacity = round_up(context + most, kKvTile), chunks = capacity / kChunk + 1;
    KvCache kv{{DType::kF16, layers, m.kv_heads, m.head_dim(), 1, capacity}, nullptr, nullptr};
    const KvLayer layer = kv_layer(kv, 0);
    const auto half = static_cast<size_t>(layers * layer.head_offset(1, 0)) * 2;
    const DeviceMemory memory = zeros(2 * half), step = device_step(context, most),
                       x = zeros(static_cast<size_t>(most * std::max(2 * m.ffn, width)) * 4),
                       y = zeros(static_cast<size_t>(most * std::max(m.hidden, width)) * 4),
                       norm = zeros(static_cast<size_t>(m.hidden) * 4),
                       fragments = zeros(
                           static_cast<size_t>(fragment_bytes(most, std::max(m.hidden, m.ffn)))),
                       rope = zeros(static_cast<size_t>(capacity * m.head_dim()) * 4),
                       partials = zeros(static_cast<size_t>(most * m.heads * chunks) *
                                        static_cast<size_t>(2 + layer.padded_dim) * 4),
                       table =
                           noise(static_cast<size_t>(tape_bytes(DType::kBF16, m.vocab, m.hidden))),
                       logits = zeros(static_cast<size_t>(most) * static_cast<size_t>(m.vocab) * 4),
                       sampled = zeros(static_cast<size_t>(most * kSampleParts) * 8);
    kv.k = memory.get();
    kv.v = static_cast<std::byte*>(memory.get()) + half;
    const Heads heads{m.heads, m.kv_heads, m.head_dim()};
    std::vector<Timing> timings;
    const auto time = [&](const char* name, const char* type, int n, double bytes, auto launch) {
      timings.push_back({name, type, n, seconds(1, launch), bytes});
    };
    for (const int n : tokens) {
      send_step(step.get(), context, n, true);
      auto* s = as<Step>(step);
      const double row = 4.0 * n;
      time("embed", "BF16", n, row * m.hidden * 1.5, [&](int) {
        embed(stream_, {s, DType::kBF16, as<std::byte>(table), m.hidden, as<float>(y)}, n);
      });
      time("norm for a product", "", n, row * m.hidden * 1.5, [&](int) {
        prepare_input(stream_,
                      {s, Rows::kAll, Linear::Input::kRmsNorm, as<float>(x), as<float>(norm), 1e-5f,
                       m.hidden, nullptr, nullptr, as<std::byte>(fragments)},
                      n);
      });
      time("SwiGLU for a product", "", n, row * m.ffn * 2.5, [&](int) {
        prepare_input(stream_,
                      {s, Rows::kAll, Linear::Input::kSwiGlu, as<float>(x), nullptr, 0, m.ffn,
                       nullptr, nullptr, as<std::byte>(fragments)},
                      n);
      });
      time("RoPE and append", "F16", n, row * width * 2, [&](int) {
        rope_append(stream_,
                    {s,
                     as<float>(x),
                     heads,
                     {as<float>(rope), as<float>(rope) + capacity * m.head_dim() / 2},
                     1.0f,
                     kv_layer(kv, 0)},
                    n);
      });
      time(("attention after " + std::to_string(context)).c_str(), "F16", n,
           4.0 * (context + n) * m.kv_heads * m.head_dim(), [&](int i) {
             attention(stream_,
                       {s, as<float>(x), heads, kv_layer(kv, i % layers), chunks,
                        as<float>(partials), as<float>(y)},
                       n, chunks, 1);
           });
      time("final norm", "", n, row * m.hidden * 2, [&](int) {
        rms_norm(stream_, {s, as<float>(x), as<float>(norm), 1e-5f, m.hidden, as<float>(y)}, n);
      });
      time("keep, a layer", "F16", n, 0, [&](int) {
        keep(stream_, {s, kv_layer(kv, 0), layer.head_offset(1, 0)}, 1);
      });
      time("sample", "", n, row * m.vocab, [&](int) {
        accept(stream_, {s, as<float>(logits), m.vocab, as<uint64_t>(sampled)}, n, 1);
      });
    }
    return timings;
  }

 private:
  // Of one launch, at the least.
  template <typename F>
  double seconds(int copies, const F& launch_one) {
    const int n = std::max(copies, repeats_ > 1 ? 64 : 1);
    launch_one(0);  // loads the kernel
    synchronize(stream_);
    begin_capture(stream_);
    for (int i = 0; i < n; ++i) launch_one(i);
    const Graph graph = end_capture(stream_);
    double best = std::numeric_limits<double>::infinity();
    for (int i = 0; i < repeats_; ++i) {
      const auto start = std::chrono::steady_clock::now();
      replay(stream_, graph);
      synchronize(stream_);
      best = std::min(
          best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    free_graph(graph);
    return best / n;
  }

  template <typename T>
  static T* as(const DeviceMemory& m) {
    return static_cast<T*>(m.get());
  }
  static DeviceMemory zeros(size_t bytes) {
    return DeviceMemory(allocate_device(std::max<size_t>(bytes, 256)));
  }
  // Bytes that no memory or bus finds easier than others.
  DeviceMemory noise(size_t bytes) {
    DeviceMemory m = zeros(bytes);
    for (size_t at = 0; at < bytes; at += noise_.size() * 4)
      copy(stream_, static_cast<std::byte*>(m.get()) + at, noise_.data(),
           std::min(bytes - at, noise_.size() * 4));
    synchronize(stream_);
    return m;
  }
  DeviceMemory device_step(int committed, int rows) {
    DeviceMemory m = zeros(sizeof(Step));
    send_step(m.get(), committed, rows, false);
    return m;
  }
  // n rows after the committed positions: a binary tree, or rows that nobody asks about.
  void send_step(void* to, int committed, int n, bool tree) {
    Step step{};
    step.n_sequences = 1;
    step.sequences[0].committed = committed;
    step.clear();
    step.begin_sequence(0);
    for (int i = 0; i < n; ++i) step.add_row(1, i == 0 ? -1 : (i - 1) / 2, tree);
    // Sampling says 0, which no row holds: the walk ends at the root.
    if (tree) step.set_root(0);
    copy(stream_, to, &step, sizeof step);
    synchronize(stream_);
  }

  size_t cold_bytes_;
  int repeats_;
  Stream stream_;
  std::vector<uint32_t> noise_;
};

}  // namespace CHIMERA_CUDA_BODY
}  // namespace chimera::cuda
