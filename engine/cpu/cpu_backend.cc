// The CPU backend: divides the ops of backend.h among threads and hands rows, panels and chunks to
// the kernels of one instruction set (kernels.h). Nothing here changes a bit of a result: every
// unit of work is one of the contract's fixed sequences, whole.
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "engine/backend.h"
#include "engine/cpu/kernels.h"
#include "engine/cpu/panels.h"
#include "engine/cpu/thread_pool.h"
#include "engine/error.h"

namespace chimera {
namespace cpu {
namespace {

int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Zeroed pages, touched only when written; `huge`: large ones, which cost less to look up but are
// taken whole.
std::shared_ptr<void> map_memory(size_t bytes, bool huge = false) {
  bytes = std::max<size_t>(bytes, 64);
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED)
    throw Error("memory", std::to_string(bytes) + " bytes", "none left", "use a smaller --ctx");
  if (huge) madvise(p, bytes, MADV_HUGEPAGE);
  return {p, [bytes](void* q) { munmap(q, bytes); }};
}

// Weights stand in few large mappings, in the order in which they were prepared, which is the order
// in which a forward pass reads them.
class WeightArena {
 public:
  std::byte* take(size_t bytes) {
    bytes = static_cast<size_t>(round_up(static_cast<int64_t>(bytes), 64));
    if (slabs_.empty() || used_ + bytes > size_) {
      size_ = std::max<size_t>(bytes, 64u << 20);
      used_ = 0;
      slabs_.push_back(map_memory(size_, /*huge=*/true));
    }
    std::byte* p = static_cast<std::byte*>(slabs_.back().get()) + used_;
    used_ += bytes;
    return p;
  }

 private:
  std::vector<std::shared_ptr<void>> slabs_;
  size_t used_ = 0, size_ = 0;
};

struct Segment {
  TensorView file;  // type and shape; data: the file's rows in the engine's order, if no panels
  std::byte* panels = nullptr;
  int64_t first_row = 0;    // in the stacked matrix
  int64_t first_panel = 0;  // units of 16 rows, of panels and of file rows alike
  int64_t n_panels = 0;
};

class CpuMatrix : public Matrix {
 public:
  std::vector<Segment> segments;
  int64_t n_panels = 0;
  bool needs_f32 = false, needs_bf16 = false, needs_q8 = false;
};

const CpuMatrix& cast(const Matrix& m) {
  return static_cast<const CpuMatrix&>(m);
}

// Where the rows of one product's input are transformed and rounded.
struct InputScratch {
  float* f32;      // (rows, cols)
  uint16_t* bf16;  // (rows, cols rounded up to 32)
  int8_t* q8;      // (rows, cols)
  float* scale;    // (rows, cols / 32)
  int32_t* sum;    // (rows, cols / 32)

  static size_t bytes(int64_t rows, int64_t cols) {
    return static_cast<size_t>(rows * round_up(cols, 64)) * (4 + 2 + 1) +
           static_cast<size_t>(rows * round_up(cols, 512)) / 32 * 8 + 320;
  }
  static InputScratch carve(std::byte* p, int64_t rows, int64_t cols) {
    const auto padded = static_cast<size_t>(rows * round_up(cols, 64));
    InputScratch s;
    s.f32 = reinterpret_cast<float*>(p);
    s.bf16 = reinterpret_cast<uint16_t*>(p += padded * 4);
    s.q8 = reinterpret_cast<int8_t*>(p += padded * 2);
    s.scale = reinterpret_cast<float*>(p += padded);
    s.sum =
        reinterpret_cast<int32_t*>(p + static_cast<size_t>(rows * round_up(cols, 512)) / 32 * 4);
    return s;
  }
};

class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(const BackendOptions& options)
      : kernels_(select_kernels()),
        pool_(options.threads > 0 ? options.threads : physical_cores()) {}

  std::string name() const override { return "cpu"; }
  std::string isa() const override { return kernels_.name; }
  std::string description() const override {
    return std::string("cpu ") + kernels_.name + ", " + std::to_string(pool_.size()) + " thread" +
           (pool_.size() > 1 ? "s" : "");
  }
  int contract_version() const override { return kContractVersion; }

  std::shared_ptr<void> allocate(size_t bytes) override { return map_memory(bytes); }
  std::shared_ptr<Step> make_step(int n_sequences) override {
    const auto memory = allocate(sizeof(Step));
    auto* step = static_cast<Step*>(memory.get());
    step->n_sequences = n_sequences;
    return {memory, step};
  }
  void upload(void* device, const void* host, size_t bytes) override {
    std::memcpy(device, host, bytes);
  }

  std::unique_ptr<Matrix> prepare(std::span<const TensorView> stacked) override {
    auto matrix = std::make_unique<CpuMatrix>();
    matrix->cols = stacked.front().cols;
    for (const TensorView& w : stacked) {
      if (w.cols != matrix->cols)
        throw Error("tensor '" + w.name + "'", std::to_string(matrix->cols) + " columns",
                    std::to_string(w.cols));
      Segment s{w, nullptr, matrix->rows, matrix->n_panels, (w.rows + kPanelRows - 1) / kPanelRows};
      if (kernels_.products != nullptr && kernels_.products[static_cast<int>(w.type)] != nullptr) {
        const size_t panel = panel_bytes(w.type, w.cols);
        std::byte* panels = arena_.take(panel * static_cast<size_t>(s.n_panels));
        pool_.run([&](int thread) {
          const auto [begin, end] = share(s.n_panels, thread);
          for (int64_t p = begin; p < end; ++p)
            pack_panel(w, p, panels + static_cast<size_t>(p) * panel);
        });
        s.panels = panels;
        s.file.data = nullptr;
        matrix->bytes += panel * static_cast<size_t>(s.n_panels);
      } else {
        const size_t row = row_bytes(w.type, w.cols);
        std::byte* rows = arena_.take(w.bytes());
        for (int64_t r = 0; r < w.rows; ++r)
          std::memcpy(rows + static_cast<size_t>(r) * row, w.row(r), row);
        s.file.data = rows;
        s.file.interleaved_head_dim = 0;
        matrix->bytes += w.bytes();
      }
      switch (activation_for(w.type)) {
        case Activation::kF32: matrix->needs_f32 = true; break;
        case Activation::kBF16: matrix->needs_bf16 = true; break;
        case Activation::kQ8: matrix->needs_q8 = true; break;
      }
      matrix->rows += w.rows;
      matrix->n_panels += s.n_panels;
      matrix->segments.push_back(s);
    }
    return matrix;
  }

  void replace_row(Matrix& matrix, const TensorView& tensor, int64_t row) override {
    Segment& s = static_cast<CpuMatrix&>(matrix).segments.front();
    if (s.panels != nullptr)
      pack_panel(
          tensor, row / kPanelRows,
          s.panels + static_cast<size_t>(row / kPanelRows) * panel_bytes(tensor.type, tensor.cols));
    else
      std::memcpy(const_cast<std::byte*>(s.file.row(row)), tensor.row(row),
                  row_bytes(tensor.type, tensor.cols));
  }

  // Layout: k (layer, sequence, kv_head, capacity / 16, head_dim, 16), then
  //         v (layer, sequence, kv_head, capacity, padded_dim).
  size_t kv_bytes(const KvShape& s) const override {
    return heads_of(s) * (key_elements(s) + value_elements(s)) * element_size(s);
  }
  KvCache bind_kv(const KvShape& s, void* memory) const override {
    return {s, memory,
            static_cast<std::byte*>(memory) + heads_of(s) * key_elements(s) * element_size(s)};
  }

  void reserve(int max_rows, int capacity, int64_t max_cols, const Heads& heads,
               int64_t vocab) override {
    const int padded = static_cast<int>(round_up(heads.head_dim, 16));
    max_chunks_ = std::max(max_chunks_, capacity / kChunk + 1);
    partial_size_ = std::max(partial_size_, partial_size(padded));
    scratch_rows_ = std::max(scratch_rows_, max_rows);
    scratch_cols_ = std::max(scratch_cols_, max_cols);
    vocab_ = std::max(vocab_, vocab);
    const auto threads = static_cast<size_t>(pool_.size());
    const size_t shared = InputScratch::bytes(scratch_rows_, scratch_cols_);
    const size_t own = InputScratch::bytes(pool_.size(), scratch_cols_);
    const size_t partials = size_t{kWaveTiles} * kMaxQueries * static_cast<size_t>(max_chunks_) *
                            static_cast<size_t>(partial_size_) * 4;
    const size_t sampler = static_cast<size_t>(round_up(vocab_, 16)) * 8;
    reserved_ = shared + threads * own + partials + sampler;
    memory_ = map_memory(reserved_);
    auto* p = static_cast<std::byte*>(memory_.get());
    shared_input_ = InputScratch::carve(p, scratch_rows_, scratch_cols_);
    p += shared;
    own_input_.clear();
    for (size_t t = 0; t < threads; ++t, p += own)
      own_input_.push_back(InputScratch::carve(p, pool_.size(), scratch_cols_));
    partials_ = reinterpret_cast<float*>(p);
    p += partials;
    sampler_ = {reinterpret_cast<float*>(p), reinterpret_cast<int32_t*>(p) + round_up(vocab_, 16)};
  }
  size_t reserved_bytes() const override { return reserved_; }

  void submit(uint64_t /*key*/, FunctionRef<void()> ops) override { ops(); }
  void on_host(FunctionRef<void()> op) override { op(); }

  void embed(const Step* step, const Matrix& table, float* out) override {
    const CpuMatrix& m = cast(table);
    for_new_rows(step, [&](int r) {
      const Segment& s = m.segments.front();
      float* row = out + r * m.cols;
      if (s.panels != nullptr)
        dequantize_panel_row(s.file.type, s.panels, m.cols, step->token[r], row);
      else
        dequantize_row(s.file.type, s.file.row(step->token[r]), m.cols, row);
    });
  }

  void rms_norm(const Step* step, const float* x, const float* weight, float eps, int64_t n,
                float* y) override {
    for_new_rows(step, [&](int r) { kernels_.rms_norm(x + r * n, weight, eps, n, y + r * n); });
  }

  void copy_rows(const Step* step, const float* x, int64_t width, float* y) override {
    const int64_t first = step->first_new * width;
    std::memcpy(y + first, x + first, static_cast<size_t>(step->n_rows * width - first) * 4);
  }

  void linear(const Step* step, const Linear& op) override {
    const CpuMatrix& w = cast(*op.weights);
    const bool all = op.rows == Rows::kAll;
    const int m = all ? step->n_rows - step->first_new : step->n_logits;
    if (m == 0) return;
    pool_.run([&](int thread) {
      // A few rows are transformed by every thread for itself, which is cheaper than to wait for
      // each other; many are divided.
      const bool divide = m >= pool_.size();
      const InputScratch& input = divide ? shared_input_ : own_input_[static_cast<size_t>(thread)];
      const auto [first, last] = divide ? share(m, thread) : std::pair<int64_t, int64_t>{0, m};
      for (int64_t i = first; i < last; ++i)
        prepare_input(op, w, all ? step->first_new + i : step->logits_row[i], i, input);
      if (divide) pool_.barrier();

      const Activations x = activations(op, w, input);
      const int64_t y_stride = op.y_stride > 0 ? op.y_stride : w.rows;
      const auto [begin, end] = share(w.n_panels, thread);
      for (const Segment& s : w.segments) {
        const int64_t b = std::max<int64_t>(begin - s.first_panel, 0),
                      e = std::min(end - s.first_panel, s.n_panels);
        if (b >= e) continue;
        float* y = op.y + (all ? step->first_new * y_stride : 0) + s.first_row;
        if (s.panels != nullptr)
          kernels_.products[static_cast<int>(s.file.type)](
              {s.panels, s.file.rows, w.cols, b, e, x, m, y, y_stride, op.accumulate});
        else
          product_reference(s.file, b * kPanelRows, std::min(e * kPanelRows, s.file.rows), x, m, y,
                            y_stride, op.accumulate);
      }
    });
  }

  void rope_append(const Step* step, float* qkv, const Heads& h, const RopeTable& rope,
                   const KvCache& kv, int layer) override {
    const float scale = 1.0f / std::sqrt(static_cast<float>(h.head_dim));
    const int half = h.head_dim / 2, width = (h.n_heads + 2 * h.n_kv_heads) * h.head_dim;
    const int group = h.n_heads / h.n_kv_heads,
              turning = h.rope_kv_heads < 0 ? h.n_kv_heads : h.rope_kv_heads;
    for_new_rows(step, [&](int r) {
      float* q = qkv + static_cast<int64_t>(r) * width;
      float* k = q + h.n_heads * h.head_dim;
      const float* v = k + h.n_kv_heads * h.head_dim;
      const int64_t key_at = static_cast<int64_t>(step->position[r]) * half,
                    query_at = key_at + rope.query_shift * half;
      for (int i = 0; i < h.n_heads; ++i) {
        float* head = q + i * h.head_dim;
        if (i / group < turning)
          kernels_.rotate(head, rope.cos + query_at, rope.sin + query_at, h.head_dim, scale);
        else
          for (int d = 0; d < h.head_dim; ++d) head[d] *= scale;
      }
      for (int i = 0; i < h.n_kv_heads; ++i) {
        if (i < turning)
          kernels_.rotate(k + i * h.head_dim, rope.cos + key_at, rope.sin + key_at, h.head_dim,
                          1.0f);
        append(kv, layer, step->sequence[r], i, step->slot[r], k + i * h.head_dim,
               v + i * h.head_dim);
      }
    });
  }

  void attention(const Step* step, const float* qkv, const Heads& h, const KvCache& kv, int layer,
                 float* out) override {
    // A tile is up to kMaxQueries (row, query head) pairs of one sequence and one KV head. Its work
    // comes in chunks; tiles go through in waves, so that the partial results of a wave fit the
    // scratch.
    struct Tile {
      int sequence, kv_head, first,
          count;  // pairs [first, first + count) of the sequence's rows x group
    };
    const int group = h.n_heads / h.n_kv_heads;
    const auto first_row = [&](int s) {
      return std::max(step->sequences[s].first_row, step->first_new);
    };
    const auto n_rows = [&](int s) {
      const Step::Sequence& seq = step->sequences[s];
      return std::max(0, seq.first_row + seq.n_rows - first_row(s));
    };
    const auto tiles_of = [&](int s) {
      return (n_rows(s) * group + kMaxQueries - 1) / kMaxQueries;
    };
    int total = 0, chunks = 1;
    for (int s = 0; s < step->n_sequences; ++s) {
      if (step->sequences[s].n_rows == 0) continue;
      total += tiles_of(s) * h.n_kv_heads;
      // No row sees further than all its sequence's rows in a chain.
      chunks = std::max(
          chunks, (step->sequences[s].committed + step->sequences[s].n_rows - 1) / kChunk + 1);
    }
    const auto tile_at = [&](int index) {
      int s = 0;
      for (;; ++s) {
        const int n = tiles_of(s) * h.n_kv_heads;
        if (index < n) break;
        index -= n;
      }
      const int pairs = n_rows(s) * group, first = index / h.n_kv_heads * kMaxQueries;
      return Tile{s, index % h.n_kv_heads, first, std::min(kMaxQueries, pairs - first)};
    };
    const int width = (h.n_heads + 2 * h.n_kv_heads) * h.head_dim;
    const int padded = static_cast<int>(round_up(h.head_dim, 16)), psize = partial_size(padded);
    const auto partial = [&](int tile_in_wave, int query, int chunk) {
      return partials_ +
             (static_cast<int64_t>(tile_in_wave * kMaxQueries + query) * max_chunks_ + chunk) *
                 psize;
    };
    const auto length = [&](int row) { return step->position[row] + 1; };

    const auto attend = [&](const Tile& tile, int tile_in_wave, int chunk) {
      const Step::Sequence& seq = step->sequences[tile.sequence];
      AttentionChunk c;
      c.type = kv.shape.type;
      c.k = keys(kv, layer, tile.sequence, tile.kv_head);
      c.v = values(kv, layer, tile.sequence, tile.kv_head);
      c.head_dim = h.head_dim;
      c.padded_dim = padded;
      c.begin = chunk * kChunk;
      c.committed = seq.committed;
      c.n_queries = 0;
      int32_t paths[kMaxQueries][Step::kMaxRows];
      int path_row = -1, direct = 0, n_paths = 0;
      for (int i = 0; i < tile.count; ++i) {
        const int row = first_row(tile.sequence) + (tile.first + i) / group;
        const int head = tile.kv_head * group + (tile.first + i) % group;
        if (length(row) <= c.begin) continue;
        if (row != path_row) {  // query heads of a row are neighbours and share its path
          path_row = row;
          int32_t* path = paths[n_paths++];
          for (int node = row; node >= 0; node = step->parent[node])
            path[step->position[node] - seq.committed] = step->slot[node];
          direct = seq.committed;
          while (direct < length(row) && path[direct - seq.committed] == direct) ++direct;
        }
        c.query[c.n_queries++] = {qkv + static_cast<int64_t>(row) * width + head * h.head_dim,
                                  paths[n_paths - 1], direct, length(row),
                                  partial(tile_in_wave, i, chunk)};
      }
      if (c.n_queries > 0) kernels_.attention(c);
    };
    const auto finish = [&](const Tile& tile, int tile_in_wave) {
      for (int i = 0; i < tile.count; ++i) {
        const int row = first_row(tile.sequence) + (tile.first + i) / group;
        const int head = tile.kv_head * group + (tile.first + i) % group;
        kernels_.combine(
            partial(tile_in_wave, i, 0), (length(row) - 1) / kChunk + 1, psize, h.head_dim, padded,
            out + static_cast<int64_t>(row) * h.n_heads * h.head_dim + head * h.head_dim);
      }
    };

    next_.store(0, std::memory_order_relaxed);
    pool_.run([&](int thread) {
      for (int wave = 0; wave < total; wave += kWaveTiles) {
        const int tiles = std::min(kWaveTiles, total - wave);
        // next_ counts the (tile, chunk) pairs of all waves, so it never has to be reset inside.
        const int begin = wave * chunks, end = (wave + tiles) * chunks;
        for (;;) {
          int i = next_.load(std::memory_order_relaxed);
          if (i >= end) break;
          if (!next_.compare_exchange_weak(i, i + 1, std::memory_order_relaxed)) continue;
          attend(tile_at(wave + (i - begin) / chunks), (i - begin) / chunks, (i - begin) % chunks);
        }
        pool_.barrier();
        for (int i = thread; i < tiles; i += pool_.size()) finish(tile_at(wave + i), i);
        if (wave + kWaveTiles < total) pool_.barrier();
      }
    });
  }

  void accept(Step* step, const float* logits, int32_t vocab) override {
    for (int s = 0; s < step->n_sequences; ++s) {
      Step::Sequence& seq = step->sequences[s];
      if (seq.n_rows == 0) continue;
      const int end = seq.first_row + seq.n_rows;
      for (int r = seq.first_row; r < end; ++r)
        step->kept_at[r] = seq.root < 0 ? step->position[r] : -1;
      seq.n_kept = seq.n_rows;
      if (seq.root >= 0) {
        int node = seq.root;
        for (int r = node; r >= 0; r = step->parent[r]) step->kept_at[r] = step->position[r];
        for (;;) {
          seq.next = sample(kernels_.sampling,
                            logits + static_cast<int64_t>(step->logits_index[node]) * vocab, vocab,
                            seq.sampling, step->position[node] + 1, sampler_);
          int child = node + 1;
          while (child < end && !(step->parent[child] == node && step->token[child] == seq.next))
            ++child;
          if (child == end) break;
          node = child;
          step->kept_at[node] = step->position[node];
        }
        seq.n_kept = step->position[node] + 1 - seq.committed;
      }
      seq.committed += seq.n_kept;
    }
  }

  void keep(const Step* step, const KvCache& kv) override {
    int moves = 0;
    for (int r = 0; r < step->n_rows; ++r)
      moves += step->kept_at[r] >= 0 && step->kept_at[r] != step->slot[r];
    if (moves == 0) return;
    pool_.run([&](int thread) {
      const auto [begin, end] = share(kv.shape.n_layers, thread);
      for (int64_t layer = begin; layer < end; ++layer)
        for (int r = 0; r < step->n_rows;
             ++r)  // parents first: a row never moves onto one still to move
          if (step->kept_at[r] >= 0 && step->kept_at[r] != step->slot[r])
            move(kv, static_cast<int>(layer), step->sequence[r], step->slot[r], step->kept_at[r]);
    });
  }

  void keep_rows(const Step* step, int64_t width, float* x) override {
    for (int s = 0; s < step->n_sequences; ++s) {
      const Step::Sequence& seq = step->sequences[s];
      int to = seq.first_row;
      for (int r = seq.first_row; r < seq.first_row + seq.n_rows; ++r) {
        if (step->kept_at[r] < 0) continue;
        if (r != to) std::memcpy(x + to * width, x + r * width, static_cast<size_t>(width) * 4);
        ++to;
      }
    }
  }

 private:
  static constexpr int kWaveTiles = 16;
  static constexpr int kFewRows =
      4;  // row loops shorter than this are not worth waking threads for

  // The contiguous part of n that belongs to a thread.
  std::pair<int64_t, int64_t> share(int64_t n, int thread) const {
    return {n * thread / pool_.size(), n * (thread + 1) / pool_.size()};
  }
  template <typename F>
  void for_new_rows(const Step* step, const F& f) {
    const int first = step->first_new, n = step->n_rows - first;
    if (n < kFewRows) {
      for (int r = first; r < step->n_rows; ++r) f(r);
      return;
    }
    pool_.run([&](int thread) {
      const auto [begin, end] = share(n, thread);
      for (int64_t r = begin; r < end; ++r) f(first + static_cast<int>(r));
    });
  }

  // Row `from` of the op's input, transformed and rounded into row `to` of the scratch.
  void prepare_input(const Linear& op, const CpuMatrix& w, int64_t from, int64_t to,
                     const InputScratch& s) {
    const int64_t n = w.cols;
    const float* x = op.x + from * (op.input == Linear::Input::kSwiGlu ? 2 * n : n);
    float* f = s.f32 + to * n;
    switch (op.input) {
      case Linear::Input::kPlain:
        if (w.needs_f32) std::memcpy(f, x, static_cast<size_t>(n) * 4);
        break;
      case Linear::Input::kRmsNorm: kernels_.rms_norm(x, op.norm_weight, op.eps, n, f); break;
      case Linear::Input::kSwiGlu: kernels_.swiglu(x, n, f); break;
      case Linear::Input::kSilu: kernels_.silu(x, n, f); break;
    }
    const float* y = op.input == Linear::Input::kPlain ? x : f;
    if (w.needs_q8)
      kernels_.quantize_q8(y, n, s.q8 + to * n, s.scale + to * (n / 32), s.sum + to * (n / 32));
    if (w.needs_bf16) kernels_.round_bf16(y, n, s.bf16 + to * round_up(n, 32));
  }
  static Activations activations(const Linear& /*op*/, const CpuMatrix& w, const InputScratch& s) {
    Activations x;
    if (w.needs_f32) x.f32 = s.f32;
    if (w.needs_bf16) x.bf16 = s.bf16;
    if (w.needs_q8) {
      x.q8 = s.q8;
      x.scale = s.scale;
      x.sum = s.sum;
    }
    return x;
  }

  static size_t element_size(const KvShape& s) { return s.type == DType::kF16 ? 2 : 4; }
  static size_t heads_of(const KvShape& s) {
    return static_cast<size_t>(s.n_layers) * static_cast<size_t>(s.n_sequences) *
           static_cast<size_t>(s.n_kv_heads);
  }
  static size_t key_elements(const KvShape& s) {
    return static_cast<size_t>(round_up(s.capacity, kKeyBlock)) * static_cast<size_t>(s.head_dim);
  }
  static size_t value_elements(const KvShape& s) {
    return static_cast<size_t>(round_up(s.capacity, kKeyBlock)) *
           static_cast<size_t>(round_up(s.head_dim, 16));
  }
  static size_t head_index(const KvShape& s, int layer, int sequence, int head) {
    return (static_cast<size_t>(layer) * static_cast<size_t>(s.n_sequences) +
            static_cast<size_t>(sequence)) *
               static_cast<size_t>(s.n_kv_heads) +
           static_cast<size_t>(head);
  }
  static std::byte* keys(const KvCache& kv, int layer, int sequence, int head) {
    return static_cast<std::byte*>(kv.k) + head_index(kv.shape, layer, sequence, head) *
                                               key_elements(kv.shape) * element_size(kv.shape);
  }
  static std::byte* values(const KvCache& kv, int layer, int sequence, int head) {
    return static_cast<std::byte*>(kv.v) + head_index(kv.shape, layer, sequence, head) *
                                               value_elements(kv.shape) * element_size(kv.shape);
  }

  void append(const KvCache& kv, int layer, int sequence, int head, int slot, const float* k,
              const float* v) {
    const auto dim = static_cast<size_t>(kv.shape.head_dim),
               padded = static_cast<size_t>(round_up(kv.shape.head_dim, 16));
    const auto at = static_cast<size_t>(slot);
    const size_t column = at / kKeyBlock * dim * kKeyBlock + at % kKeyBlock;
    if (kv.shape.type == DType::kF16) {
      uint16_t rounded[1024];
      kernels_.round_f16(k, kv.shape.head_dim, rounded);
      auto* keys_at = reinterpret_cast<uint16_t*>(keys(kv, layer, sequence, head)) + column;
      for (size_t d = 0; d < dim; ++d) keys_at[d * kKeyBlock] = rounded[d];
      kernels_.round_f16(
          v, kv.shape.head_dim,
          reinterpret_cast<uint16_t*>(values(kv, layer, sequence, head)) + at * padded);
    } else {
      auto* keys_at = reinterpret_cast<float*>(keys(kv, layer, sequence, head)) + column;
      for (size_t d = 0; d < dim; ++d) keys_at[d * kKeyBlock] = k[d];
      std::memcpy(reinterpret_cast<float*>(values(kv, layer, sequence, head)) + at * padded, v,
                  dim * 4);
    }
  }

  template <typename T>
  static void move_head(T* k, T* v, size_t dim, size_t padded, size_t from, size_t to) {
    const T* source = k + from / kKeyBlock * dim * kKeyBlock + from % kKeyBlock;
    T* target = k + to / kKeyBlock * dim * kKeyBlock + to % kKeyBlock;
    for (size_t d = 0; d < dim; ++d) target[d * kKeyBlock] = source[d * kKeyBlock];
    std::memcpy(v + to * padded, v + from * padded, padded * sizeof(T));
  }
  static void move(const KvCache& kv, int layer, int sequence, int from, int to) {
    const auto dim = static_cast<size_t>(kv.shape.head_dim),
               padded = static_cast<size_t>(round_up(kv.shape.head_dim, 16));
    for (int head = 0; head < kv.shape.n_kv_heads; ++head) {
      std::byte *k = keys(kv, layer, sequence, head), *v = values(kv, layer, sequence, head);
      const auto f = static_cast<size_t>(from), t = static_cast<size_t>(to);
      if (kv.shape.type == DType::kF16)
        move_head(reinterpret_cast<uint16_t*>(k), reinterpret_cast<uint16_t*>(v), dim, padded, f,
                  t);
      else
        move_head(reinterpret_cast<float*>(k), reinterpret_cast<float*>(v), dim, padded, f, t);
    }
  }

  const Kernels& kernels_;
  ThreadPool pool_;
  WeightArena arena_;

  std::shared_ptr<void> memory_;
  size_t reserved_ = 0;
  int scratch_rows_ = 0, max_chunks_ = 0, partial_size_ = 0;
  int64_t scratch_cols_ = 0, vocab_ = 0;
  InputScratch shared_input_{};
  std::vector<InputScratch> own_input_;
  float* partials_ = nullptr;  // (kWaveTiles, kMaxQueries, max_chunks_, partial_size)
  SamplerScratch sampler_{};
  alignas(64) std::atomic<int> next_{0};
};

}  // namespace
}  // namespace cpu

std::unique_ptr<Backend> make_cpu_backend(const BackendOptions& options) {
  return std::make_unique<cpu::CpuBackend>(options);
}

}  // namespace chimera
