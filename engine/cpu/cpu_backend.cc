// The CPU backend: divides the ops of backend.h among threads and hands rows, panels and chunks to
// the kernels of one instruction set (kernels.h). Nothing here changes a bit of a result: every
// unit of work is one of the contract's fixed sequences, whole.
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <tuple>
#include <vector>

#include "engine/backend.h"
#include "engine/cpu/kernels.h"
#include "engine/cpu/panels.h"
#include "engine/cpu/thread_pool.h"
#include "engine/cpu/work_shares.h"
#include "engine/error.h"

namespace chimera {
namespace cpu {
namespace {

int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Zeroed pages, taken when first written: large ones where the system has them, which cost less to
// look up.
std::shared_ptr<void> map_memory(size_t bytes) {
  bytes = std::max<size_t>(bytes, 64);
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) throw MemoryError(bytes, "use a smaller context, or a smaller model");
  madvise(p, bytes, MADV_HUGEPAGE);
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
      slabs_.push_back(map_memory(size_));
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
  TensorView file;              // type and shape; data: the file's rows, if there are no panels
  std::byte* panels = nullptr;  // none: made from the rows whenever they are needed, or never
  int64_t first_row = 0;        // in the stacked matrix
  int64_t first_panel = 0;      // units of 16 rows, of panels and of file rows alike
  int64_t n_panels = 0;
};

class CpuMatrix : public Matrix {
 public:
  std::vector<Segment> segments;
  int64_t n_panels = 0;
  size_t number = 0;  // in the order of preparation
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

// The attention of a step in tiles of up to kMaxQueries (row, query head) pairs of one sequence and
// one KV head.
class AttentionTiles {
 public:
  struct Tile {
    int sequence, kv_head;
    int first, count;  // pairs [first, first + count) of the sequence's rows x query heads
  };

  AttentionTiles(const Step* step, const Heads& h)
      : step_(step), n_kv_heads_(h.n_kv_heads), group_(h.n_heads / h.n_kv_heads) {
    first_tile_[0] = 0;
    for (int s = 0; s < step->n_sequences; ++s) {
      const int tiles = (n_rows(s) * group_ + kMaxQueries - 1) / kMaxQueries;
      first_tile_[s + 1] = first_tile_[s] + tiles * n_kv_heads_;
      // No row sees further than all its sequence's rows in a chain.
      const Step::Sequence& seq = step->sequences[s];
      if (tiles > 0) chunks_ = std::max(chunks_, (seq.committed + seq.n_rows - 1) / kChunk + 1);
    }
  }

  int count() const { return first_tile_[step_->n_sequences]; }
  int chunks() const { return chunks_; }  // that a row may see, at most
  Tile at(int index) const {
    const int* after = std::upper_bound(first_tile_, first_tile_ + step_->n_sequences, index);
    const int s = static_cast<int>(after - first_tile_) - 1;
    index -= first_tile_[s];
    const int pairs = n_rows(s) * group_, tiles = (pairs + kMaxQueries - 1) / kMaxQueries,
              first = index % tiles * kMaxQueries;
    return {s, index / tiles, first, std::min(kMaxQueries, pairs - first)};
  }
  // The row and the query head of a tile's pair.
  int row(const Tile& t, int i) const { return first_row(t.sequence) + (t.first + i) / group_; }
  int head(const Tile& t, int i) const { return t.kv_head * group_ + (t.first + i) % group_; }

 private:
  int first_row(int s) const { return std::max(step_->sequences[s].first_row, step_->first_new); }
  int n_rows(int s) const {
    const Step::Sequence& seq = step_->sequences[s];
    return std::max(0, seq.first_row + seq.n_rows - first_row(s));
  }

  const Step* step_;
  int n_kv_heads_, group_;
  int first_tile_[Step::kMaxSequences + 1];  // by sequence
  int chunks_ = 1;
};

class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(const BackendOptions& options)
      : kernels_(select_kernels()),
        ahead_(static_cast<size_t>(options.threads > 0 ? options.threads : physical_cores())),
        work_(static_cast<int>(ahead_.size())),
        pool_(
            static_cast<int>(ahead_.size()),
            [](void* self, int thread) { static_cast<CpuBackend*>(self)->read_ahead(thread, 512); },
            this) {}

  std::string name() const override { return "cpu"; }
  std::string isa() const override { return kernels_.name; }
  std::string description() const override {
    return std::string("cpu ") + kernels_.name + ", " + std::to_string(pool_.size()) + " thread" +
           (pool_.size() > 1 ? "s" : "");
  }
  int contract_version() const override { return kContractVersion; }

  std::shared_ptr<void> allocate(size_t bytes, Memory /*memory*/) override {
    return map_memory(bytes);
  }
  std::shared_ptr<Step> make_step(int n_sequences) override {
    const auto memory = map_memory(sizeof(Step));
    auto* step = static_cast<Step*>(memory.get());
    step->n_sequences = n_sequences;
    return {memory, step};
  }
  void upload(void* device, const void* host, size_t bytes) override {
    std::memcpy(device, host, bytes);
  }

  std::unique_ptr<Matrix> prepare(std::span<const TensorView> stacked,
                                  const Consumed& consumed) override {
    auto matrix = std::make_unique<CpuMatrix>();
    matrix->cols = stacked.front().cols;
    for (const TensorView& w : stacked) {
      if (w.cols != matrix->cols)
        throw Error("tensor " + in_quotes(w.name), std::to_string(matrix->cols) + " columns",
                    std::to_string(w.cols));
      Segment s{w, nullptr, matrix->rows, matrix->n_panels, (w.rows + kPanelRows - 1) / kPanelRows};
      const size_t panel = panel_bytes(w.type, w.cols);
      if (w.lasting) {
        most_panel_bytes_ = std::max(most_panel_bytes_, panel);
        matrix->bytes += w.bytes();
      } else if (product_for(w.type) != nullptr) {
        std::byte* panels = arena_.take(panel * static_cast<size_t>(s.n_panels));
        // Rows of a head may stand in another order in the file: a unit is read from its own rows.
        const int64_t unit = w.interleaved_head_dim == 0
                                 ? 1
                                 : std::lcm(w.interleaved_head_dim, kPanelRows) / kPanelRows;
        pool_.run([&](int thread) {
          constexpr int64_t kAtOnce = 1 << 20;  // bytes of the file between two calls of consumed
          const int64_t group = std::max<int64_t>(1, kAtOnce / static_cast<int64_t>(panel) / unit);
          const auto [begin, end] = share((s.n_panels + unit - 1) / unit, thread);
          for (int64_t at = begin; at < end; at += group) {
            const int64_t first = at * unit,
                          last = std::min(s.n_panels, std::min(end, at + group) * unit);
            for (int64_t p = first; p < last; ++p)
              pack_panel(w, p, panels + static_cast<size_t>(p) * panel);
            if (consumed) consumed(w.memory(first * kPanelRows, last * kPanelRows));
          }
        });
        s.panels = panels;
        s.file.data = nullptr;
        matrix->bytes += panel * static_cast<size_t>(s.n_panels);
      } else {
        const size_t row = row_bytes(w.type, w.cols);
        std::byte* rows = arena_.take(w.bytes());
        for (int64_t r = 0; r < w.rows; ++r)
          std::memcpy(rows + static_cast<size_t>(r) * row, w.row(r), row);
        if (consumed) consumed({w.data, w.bytes()});
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
    matrix->number = shares_.size() / static_cast<size_t>(pool_.size());
    for (int thread = 0; thread < pool_.size(); ++thread)
      shares_.push_back(
          weights_of(*matrix, work_.first_of(matrix->n_panels, static_cast<size_t>(thread))));
    return matrix;
  }

  void replace_rows(Matrix& matrix, const TensorView& tensor, int64_t first, int64_t n) override {
    Segment& s = static_cast<CpuMatrix&>(matrix).segments.front();
    if (s.panels != nullptr) {
      for (int64_t p = first / kPanelRows; p <= (first + n - 1) / kPanelRows; ++p)
        pack_panel(tensor, p,
                   s.panels + static_cast<size_t>(p) * panel_bytes(tensor.type, tensor.cols));
    } else if (s.file.row(first) != tensor.row(first)) {
      std::memcpy(const_cast<std::byte*>(s.file.row(first)), tensor.row(first),
                  static_cast<size_t>(n) * row_bytes(tensor.type, tensor.cols));
    }
  }

  // Layout: k (sequence, capacity / kChunk, layer, kv_head, kChunk / 16, head_dim, 16), then
  //         v (sequence, capacity / kChunk, layer, kv_head, kChunk, padded_dim).
  // What a text has used of it lies together, so that large pages hold little else.
  size_t kv_bytes(const KvShape& s) const override {
    return chunks_of(s) * heads_of(s) * (key_elements(s) + value_elements(s)) * element_size(s);
  }
  KvCache bind_kv(const KvShape& s, void* memory) const override {
    return {s, memory,
            static_cast<std::byte*>(memory) +
                chunks_of(s) * heads_of(s) * key_elements(s) * element_size(s)};
  }

  void reserve(int max_rows, int capacity, int64_t max_cols, const Heads& heads,
               int64_t vocab) override {
    const int padded = static_cast<int>(round_up(heads.head_dim, 16));
    const int chunks = std::max(max_chunks_, capacity / kChunk + 1),
              partial = std::max(partial_size_, partial_size(padded)),
              rows = std::max(scratch_rows_, max_rows);
    const int64_t cols = std::max(scratch_cols_, max_cols),
                  stride = round_up(std::max(vocab_, vocab), 16);
    const auto threads = static_cast<size_t>(pool_.size());
    const size_t shared = InputScratch::bytes(rows, cols);
    const int64_t own_cols = std::max(cols, kOwnInput + kOwnInput / 4);
    const size_t own = InputScratch::bytes(1, own_cols);  // one row, or several shorter ones
    const size_t tile =
        size_t{kMaxQueries} * static_cast<size_t>(chunks) * static_cast<size_t>(partial) * 4;
    const size_t wave = std::clamp<size_t>(kWaveBytes / tile, kFewTiles, kManyTiles);
    const size_t partials = wave * tile, sampler = static_cast<size_t>(stride) * 12,
                 panels = threads * most_panel_bytes_;
    const size_t bytes = shared + threads * own + partials + sampler + panels;
    own_input_.resize(threads);
    memory_ = map_memory(bytes);
    // From here on nothing throws: if there is no room, what was reserved before is as it was.
    reserved_ = bytes;
    max_chunks_ = chunks;
    partial_size_ = partial;
    scratch_rows_ = rows;
    scratch_cols_ = cols;
    vocab_ = std::max(vocab_, vocab);
    wave_tiles_ = static_cast<int>(wave);
    scratch_panel_bytes_ = most_panel_bytes_;
    auto* p = static_cast<std::byte*>(memory_.get());
    shared_input_ = InputScratch::carve(p, rows, cols);
    p += shared;
    for (size_t t = 0; t < threads; ++t, p += own)
      own_input_[t] = InputScratch::carve(p, 1, own_cols);
    partials_ = reinterpret_cast<float*>(p);
    p += partials;
    sampler_ = {reinterpret_cast<float*>(p), reinterpret_cast<float*>(p) + stride,
                reinterpret_cast<int32_t*>(p) + 2 * stride};
    scratch_panels_ = p + sampler;
  }
  size_t reserved_bytes() const override { return reserved_; }

  void submit(uint64_t /*key*/, FunctionRef<void()> ops) override {
    const List list(*this, true);
    ops();
  }
  void on_host(FunctionRef<void()> op) override {
    const List none(*this, false);
    op();
  }

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

  void copy_rows(const Step* step, const RowCopy& op) override {
    const int64_t x_stride = op.x_stride > 0 ? op.x_stride : op.width,
                  y_stride = op.y_stride > 0 ? op.y_stride : op.width;
    pool_.join();
    for (int r = step->first_new; r < step->n_rows; ++r)
      std::memcpy(op.y + r * y_stride, op.x + (op.from != nullptr ? op.from[r] : r) * x_stride,
                  static_cast<size_t>(op.width) * 4);
  }
  void join_rows(const Step* step, const float* h, float scale, const float* f, int64_t width,
                 float* joined, float* sum) override {
    pool_.join();
    for (int r = step->first_new; r < step->n_rows; ++r) {
      const float* row = f + r * width;
      std::memcpy(joined + 2 * r * width, h, static_cast<size_t>(width) * 4);
      std::memcpy(joined + (2 * r + 1) * width, row, static_cast<size_t>(width) * 4);
      for (int64_t i = 0; i < width; ++i) sum[r * width + i] = scale * h[i] + row[i];
    }
  }

  void linear(const Step* step, const Linear& op) override {
    const CpuMatrix& w = cast(*op.weights);
    const bool all = op.rows == Rows::kAll;
    const int m = all ? step->n_rows - step->first_new : step->n_logits;
    if (m == 0) return;
    const WorkShares::Deal panels = deal(w.n_panels);
    start([this, step, op, &w, all, m, panels](int thread) {
      // A few rows are transformed by every thread for itself, which is cheaper than to wait for
      // the others and to fetch from their caches what they have made; many are divided.
      const bool divide = m > 1 && m * std::max(w.cols, kOwnInput / 16) > kOwnInput;
      const InputScratch& input = divide ? shared_input_ : own_input_[static_cast<size_t>(thread)];
      const auto [first, last] = divide ? share(m, thread) : std::pair<int64_t, int64_t>{0, m};
      read_ahead(thread, 8 << 10);  // they come while the input is transformed
      for (int64_t i = first; i < last; ++i)
        prepare_input(op, w, all ? step->first_new + i : step->logits_row[i], i, input);
      if (divide) pool_.barrier(thread);

      const ProductInput x = product_input(w, input);
      const int64_t y_stride = op.y_stride > 0 ? op.y_stride : w.rows;
      float* y = op.y + (all ? step->first_new * y_stride : 0);
      for (;;) {
        const auto [begin, end] = work_.take(panels, thread);
        if (begin == end) break;
        multiply(w, begin, end, x, m, y, y_stride, op.accumulate,
                 scratch_panels_ + static_cast<size_t>(thread) * scratch_panel_bytes_);
      }
      const size_t next = (w.number + 1) * static_cast<size_t>(pool_.size());
      ahead_[static_cast<size_t>(thread)].next =
          shares_[next % shares_.size() + static_cast<size_t>(thread)];
      ahead_[static_cast<size_t>(thread)].bytes = kReadAhead;
    });
  }

  void rope_append(const Step* step, float* qkv, const Heads& h, const RopeTable& rope,
                   const KvCache& kv, int layer) override {
    const float scale = 1.0f / std::sqrt(static_cast<float>(h.head_dim));
    const int half = h.head_dim / 2, width = (h.n_heads + 2 * h.n_kv_heads) * h.head_dim;
    const int group = h.n_heads / h.n_kv_heads,
              turning = h.rope_kv_heads < 0 ? h.n_kv_heads : h.rope_kv_heads;
    // One KV head of a row, with its query heads.
    const auto one = [=, this](int r, int head) {
      float* q = qkv + static_cast<int64_t>(r) * width + head * group * h.head_dim;
      float* k = qkv + static_cast<int64_t>(r) * width + (h.n_heads + head) * h.head_dim;
      const float* v = k + h.n_kv_heads * h.head_dim;
      const int64_t key_at = static_cast<int64_t>(step->position[r]) * half,
                    query_at = key_at + rope.query_shift * half;
      for (int i = 0; i < group; ++i, q += h.head_dim) {
        if (head < turning)
          kernels_.rotate(q, rope.cos + query_at, rope.sin + query_at, h.head_dim, scale);
        else
          for (int d = 0; d < h.head_dim; ++d) q[d] *= scale;
      }
      if (head < turning)
        kernels_.rotate(k, rope.cos + key_at, rope.sin + key_at, h.head_dim, 1.0f);
      append(kv, layer, step->sequence[r], head, step->slot[r], k, v);
    };
    const int first = step->first_new, n = step->n_rows - first;
    // Rows that follow each other write to the same cache lines of a head's keys, so they stay with
    // one thread.
    const WorkShares::Deal units =
        deal(static_cast<int64_t>(h.n_kv_heads) * ((n + kKeyBlock - 1) / kKeyBlock));
    start([=, this](int thread) {
      for (auto [unit, end] = work_.take(units, thread); unit < end;) {
        const int head = static_cast<int>(unit) % h.n_kv_heads;
        const int row = first + static_cast<int>(unit) / h.n_kv_heads * kKeyBlock;
        for (int r = row; r < std::min(row + kKeyBlock, step->n_rows); ++r) one(r, head);
        if (++unit == end) std::tie(unit, end) = work_.take(units, thread);
      }
    });
  }

  void attention(const Step* step, const float* qkv, const Heads& h, const KvCache& kv, int layer,
                 float* out) override {
    const AttentionTiles all_tiles(step, h);
    // A tile's work comes in chunks: all tiles of a KV head over a chunk of it, which is read once
    // and in the cache after that, then the next head, then the next chunk. Tiles go through in
    // waves, so that the partial results of a wave fit the scratch.
    const int chunks = all_tiles.chunks(), total = all_tiles.count();
    const auto tiles_in = [this, total](int wave) { return std::min(wave_tiles_, total - wave); };
    const int waves = std::max(1, (total + wave_tiles_ - 1) / wave_tiles_);
    const WorkShares::Deal first_wave = deal(int64_t{tiles_in(0)} * chunks, waves);
    start([=, this](int thread) {
      const AttentionTiles tiles(step, h);  // anew: a job is told little, and hears it sooner
      const AttentionOp op{step, qkv, h, kv, layer, out, tiles};
      WorkShares::Deal units_left = first_wave;
      for (int wave = 0; wave < total; wave += wave_tiles_) {
        const int n = tiles_in(wave), units = n * chunks;
        for (auto [begin, end] = work_.take(units_left, thread); begin < end;
             std::tie(begin, end) = work_.take(units_left, thread))
          for (int unit = static_cast<int>(begin); unit < end; ++unit) {
            const int next = std::min(unit + 1, units - 1);  // the thread's own, nearly always
            const AttentionTiles::Tile tile = tiles.at(wave + unit % n);
            attend(op, tile, unit % n, unit / n, keys_of(op, tiles.at(wave + next % n), next / n));
            if (chunks == 1) finish(op, tile, unit);
          }
        const bool last = wave + wave_tiles_ >= total;
        if (chunks == 1 && last) break;  // nobody waits for another's chunks
        pool_.barrier(thread);
        for (int i = thread; i < tiles_in(wave) && chunks > 1; i += pool_.size())
          finish(op, tiles.at(wave + i), i);
        if (last) break;
        units_left = units_left.next(int64_t{tiles_in(wave + wave_tiles_)} * chunks);
        pool_.barrier(thread);
      }
    });
  }

  void likely_tokens(const Step* step, const float* logits, int64_t vocab,
                     LikelyTokens* out) override {
    pool_.run([&](int thread) {
      for (int i = thread; i < step->n_logits; i += pool_.size())
        out[i] = chimera::likely_tokens(logits + i * vocab, vocab);
    });
  }

  void accept(Step* step, const float* logits, int32_t vocab) override {
    pool_.join();
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
          seq.next = sample(logits + static_cast<int64_t>(step->logits_index[node]) * vocab, vocab,
                            seq.sampling, step->position[node] + 1);
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
            (kv.shape.type == DType::kF16 ? move<uint16_t>
                                          : move<float>)(kv, static_cast<int>(layer),
                                                         step->sequence[r], step->slot[r],
                                                         step->kept_at[r]);
    });
  }

  void keep_rows(const Step* step, int64_t width, float* x) override {
    pool_.join();
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
  static constexpr size_t kWaveBytes =
      4 << 20;  // of partial results; the threads meet after each wave
  static constexpr size_t kFewTiles = 16, kManyTiles = 128;
  // Elements of a product's input, measured on two cores that share no cache: 2 to 6 rows of a step
  // take 5 to 10% less time than with divided ones, and the same on two that share one.
  static constexpr int64_t kOwnInput = 6144;
  static constexpr int kFewRows =
      4;  // row loops shorter than this are not worth waking threads for

  struct AttentionOp {
    const Step* step;
    const float* qkv;
    Heads heads;
    KvCache kv;
    int layer;
    float* out;
    const AttentionTiles& tiles;
  };

  static const void* keys_of(const AttentionOp& op, const AttentionTiles::Tile& tile, int chunk) {
    return keys(op.kv, op.layer, tile.sequence, chunk * kChunk, tile.kv_head);
  }
  // Where the chunk's result for a query of the wave stands.
  float* partial(const AttentionOp& op, int tile_in_wave, int query, int chunk) const {
    const int64_t at =
        static_cast<int64_t>(tile_in_wave * kMaxQueries + query) * max_chunks_ + chunk;
    return partials_ + at * partial_size(padded_dim(op.heads));
  }
  static int padded_dim(const Heads& h) { return static_cast<int>(round_up(h.head_dim, 16)); }

  // One chunk of a tile's attention.
  void attend(const AttentionOp& op, const AttentionTiles::Tile& tile, int tile_in_wave, int chunk,
              const void* next_k) {
    const Step* step = op.step;
    const Step::Sequence& seq = step->sequences[tile.sequence];
    const Heads& h = op.heads;
    const int width = (h.n_heads + 2 * h.n_kv_heads) * h.head_dim;
    AttentionChunk c;
    c.type = op.kv.shape.type;
    c.next_k = next_k;
    c.k = keys_of(op, tile, 0);
    c.v = values(op.kv, op.layer, tile.sequence, 0, tile.kv_head);
    c.k_stride = static_cast<int64_t>(heads_of(op.kv.shape) * key_elements(op.kv.shape));
    c.v_stride = static_cast<int64_t>(heads_of(op.kv.shape) * value_elements(op.kv.shape));
    c.head_dim = h.head_dim;
    c.padded_dim = padded_dim(h);
    c.begin = chunk * kChunk;
    c.committed = seq.committed;
    c.n_queries = 0;
    int32_t paths[kMaxQueries][Step::kMaxRows];
    int path_row = -1, direct = 0, n_paths = 0;
    for (int i = 0; i < tile.count; ++i) {
      const int row = op.tiles.row(tile, i), length = step->position[row] + 1;
      if (length <= c.begin) continue;
      if (row != path_row) {  // query heads of a row are neighbours and share its path
        path_row = row;
        int32_t* path = paths[n_paths++];
        for (int node = row; node >= 0; node = step->parent[node])
          path[step->position[node] - seq.committed] = step->slot[node];
        direct = seq.committed;
        while (direct < length && path[direct - seq.committed] == direct) ++direct;
      }
      const int64_t q_at = static_cast<int64_t>(row) * width + op.tiles.head(tile, i) * h.head_dim;
      c.query[c.n_queries++] = {op.qkv + q_at, paths[n_paths - 1], direct, length,
                                partial(op, tile_in_wave, i, chunk)};
    }
    if (c.n_queries > 0) kernels_.attention(c);
  }

  // Combines the chunks of a tile.
  void finish(const AttentionOp& op, const AttentionTiles::Tile& tile, int tile_in_wave) {
    const int head_dim = op.heads.head_dim, padded = padded_dim(op.heads);
    for (int i = 0; i < tile.count; ++i) {
      const int row = op.tiles.row(tile, i), chunks = op.step->position[row] / kChunk + 1;
      const int64_t at = static_cast<int64_t>(row) * op.heads.n_heads + op.tiles.head(tile, i);
      kernels_.combine(partial(op, tile_in_wave, i, 0), chunks, partial_size(padded), head_dim,
                       padded, op.out + at * head_dim);
    }
  }

  // As chimera::sample(), with its noise made by all threads.
  int32_t sample(const float* logits, int32_t vocab, const Sampling& sampling, int64_t position) {
    if (sampling.temperature < kLeastTemperature) return kernels_.sampling.argmax(logits, vocab);
    pool_.run([&](int thread) {
      const auto [begin, end] = share(round_up(vocab, 64) / 64, thread);
      add_noise(kernels_.sampling, logits, 64 * begin, std::min<int64_t>(64 * end, vocab), sampling,
                position, sampler_.noise);
    });
    return choose(kernels_.sampling, logits, vocab, sampling, sampler_);
  }

  // While it lives, ops are in a list or not.
  class List {
   public:
    List(CpuBackend& backend, bool in_list)
        : backend_(backend), before_(std::exchange(backend.in_list_, in_list)) {
      backend_.pool_.join();
    }
    ~List() {
      backend_.pool_.join();
      backend_.in_list_ = before_;
    }
    List(const List&) = delete;
    List& operator=(const List&) = delete;

   private:
    CpuBackend& backend_;
    const bool before_;
  };

  // f(thread) on every thread. In a list this returns before it is done, so that the next op is
  // handed out meanwhile; an op whose work the caller does alone calls pool_.join() first. f is
  // copied, and so captures no reference to what its op leaves behind.
  template <typename F>
  void start(const F& f) {
    pool_.start(f);
    if (!in_list_) pool_.join();
  }
  WorkShares::Deal deal(int64_t n, int times = 1) {
    if (work_.starts_anew(times)) pool_.join();
    return work_.deal(n, times);
  }

  // The contiguous part of n that belongs to a thread.
  std::pair<int64_t, int64_t> share(int64_t n, int thread) const {
    return {n * thread / pool_.size(), n * (thread + 1) / pool_.size()};
  }
  template <typename F>
  void for_new_rows(const Step* step, const F& f) {
    const int first = step->first_new, n = step->n_rows - first;
    if (n < kFewRows) {
      pool_.join();
      for (int r = first; r < step->n_rows; ++r) f(r);
      return;
    }
    pool_.run([&](int thread) {
      const auto [begin, end] = share(n, thread);
      for (int64_t r = begin; r < end; ++r) f(first + static_cast<int>(r));
    });
  }

  ProductFunction product_for(DType type) const {
    return kernels_.products != nullptr ? kernels_.products[static_cast<int>(type)] : nullptr;
  }

  // Panels [begin, end) of a product.
  void multiply(const CpuMatrix& w, int64_t begin, int64_t end, const ProductInput& x, int m,
                float* y, int64_t y_stride, bool accumulate, std::byte* scratch_panel) const {
    for (const Segment& s : w.segments) {
      const int64_t b = std::max<int64_t>(begin - s.first_panel, 0),
                    e = std::min(end - s.first_panel, s.n_panels);
      if (b >= e) continue;
      float* out = y + s.first_row;
      const ProductFunction product = product_for(s.file.type);
      if (s.panels != nullptr) {
        product({s.panels, s.file.rows, w.cols, b, e, x, m, out, y_stride, accumulate});
      } else if (product != nullptr) {
        for (int64_t p = b; p < e; ++p) {
          pack_panel(s.file, p, scratch_panel);
          const int64_t row = p * kPanelRows;
          product({scratch_panel, std::min<int64_t>(kPanelRows, s.file.rows - row), w.cols, 0, 1, x,
                   m, out + row, y_stride, accumulate});
        }
      } else {
        product_reference(s.file, b * kPanelRows, std::min(e * kPanelRows, s.file.rows), x, m, out,
                          y_stride, accumulate);
      }
    }
  }

  // The first byte of a matrix's panel.
  static const std::byte* weights_of(const CpuMatrix& w, int64_t panel) {
    for (const Segment& s : w.segments) {
      const int64_t p = panel - s.first_panel;
      if (p >= s.n_panels) continue;
      return s.panels != nullptr
                 ? s.panels + static_cast<size_t>(p) * panel_bytes(s.file.type, w.cols)
                 : s.file.row(p * kPanelRows);
    }
    return nullptr;
  }

  // Memory would be idle while a thread waits for another: the thread asks for the weights that it
  // will need next, which is as a rule its share of the matrix that was prepared next.
  struct alignas(64) Ahead {
    const std::byte* next = nullptr;
    size_t bytes = 0;
  };
  static constexpr size_t kReadAhead = 64 << 10;
  void read_ahead(int thread, size_t bytes) {
    Ahead& a = ahead_[static_cast<size_t>(thread)];
    const std::byte* end = a.next + std::min(bytes, a.bytes);
    a.bytes -= static_cast<size_t>(end - a.next);
    for (; a.next < end; a.next += 64) __builtin_prefetch(a.next, 0, 2);
  }

  // Row `from` of the op's input, transformed and rounded into row `to` of the scratch.
  void prepare_input(const Linear& op, const CpuMatrix& w, int64_t from, int64_t to,
                     const InputScratch& s) {
    const int64_t n = w.cols;
    const int64_t width = op.input == Linear::Input::kSwiGlu ? 2 * n : n;
    const float* x = op.x + from * (op.x_stride > 0 ? op.x_stride : width);
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
  static ProductInput product_input(const CpuMatrix& w, const InputScratch& s) {
    ProductInput x;
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
  static size_t chunks_of_sequence(const KvShape& s) {
    return static_cast<size_t>(round_up(s.capacity, kChunk) / kChunk);
  }
  static size_t chunks_of(const KvShape& s) {
    return static_cast<size_t>(s.n_sequences) * chunks_of_sequence(s);
  }
  static size_t heads_of(const KvShape& s) {  // of one chunk
    return static_cast<size_t>(s.n_layers) * static_cast<size_t>(s.n_kv_heads);
  }
  static size_t key_elements(const KvShape& s) {  // of one head and chunk
    return size_t{kChunk} * static_cast<size_t>(s.head_dim);
  }
  static size_t value_elements(const KvShape& s) {
    return size_t{kChunk} * static_cast<size_t>(round_up(s.head_dim, 16));
  }
  static size_t head_index(const KvShape& s, int layer, int sequence, int slot, int head) {
    return (static_cast<size_t>(sequence) * chunks_of_sequence(s) +
            static_cast<size_t>(slot / kChunk)) *
               heads_of(s) +
           static_cast<size_t>(layer * s.n_kv_heads + head);
  }
  // The keys and the values of the chunk that a slot belongs to.
  static std::byte* keys(const KvCache& kv, int layer, int sequence, int slot, int head) {
    return static_cast<std::byte*>(kv.k) + head_index(kv.shape, layer, sequence, slot, head) *
                                               key_elements(kv.shape) * element_size(kv.shape);
  }
  static std::byte* values(const KvCache& kv, int layer, int sequence, int slot, int head) {
    return static_cast<std::byte*>(kv.v) + head_index(kv.shape, layer, sequence, slot, head) *
                                               value_elements(kv.shape) * element_size(kv.shape);
  }
  // A slot's first key element in its chunk; the others follow kKeyBlock apart.
  static size_t key_column(const KvShape& s, int slot) {
    const auto at = static_cast<size_t>(slot % kChunk);
    return at / kKeyBlock * static_cast<size_t>(s.head_dim) * kKeyBlock + at % kKeyBlock;
  }
  static size_t value_row(const KvShape& s, int slot) {
    return static_cast<size_t>(slot % kChunk) * static_cast<size_t>(round_up(s.head_dim, 16));
  }

  void append(const KvCache& kv, int layer, int sequence, int head, int slot, const float* k,
              const float* v) {
    const KvShape& shape = kv.shape;
    const auto dim = static_cast<size_t>(shape.head_dim);
    std::byte *keys_of = keys(kv, layer, sequence, slot, head),
              *values_of = values(kv, layer, sequence, slot, head);
    if (shape.type == DType::kF16) {
      uint16_t rounded[kMaxHeadDim];
      kernels_.round_f16(k, shape.head_dim, rounded);
      auto* to = reinterpret_cast<uint16_t*>(keys_of) + key_column(shape, slot);
      for (size_t d = 0; d < dim; ++d) to[d * kKeyBlock] = rounded[d];
      kernels_.round_f16(v, shape.head_dim,
                         reinterpret_cast<uint16_t*>(values_of) + value_row(shape, slot));
    } else {
      auto* to = reinterpret_cast<float*>(keys_of) + key_column(shape, slot);
      for (size_t d = 0; d < dim; ++d) to[d * kKeyBlock] = k[d];
      std::memcpy(reinterpret_cast<float*>(values_of) + value_row(shape, slot), v, dim * 4);
    }
  }

  template <typename T>
  static void move(const KvCache& kv, int layer, int sequence, int from, int to) {
    const KvShape& s = kv.shape;
    for (int head = 0; head < s.n_kv_heads; ++head) {
      const T* k =
          reinterpret_cast<T*>(keys(kv, layer, sequence, from, head)) + key_column(s, from);
      T* k_to = reinterpret_cast<T*>(keys(kv, layer, sequence, to, head)) + key_column(s, to);
      for (int d = 0; d < s.head_dim; ++d) k_to[d * kKeyBlock] = k[d * kKeyBlock];
      std::memcpy(
          reinterpret_cast<T*>(values(kv, layer, sequence, to, head)) + value_row(s, to),
          reinterpret_cast<T*>(values(kv, layer, sequence, from, head)) + value_row(s, from),
          value_elements(s) / kChunk * sizeof(T));
    }
  }

  const Kernels& kernels_;
  std::vector<Ahead> ahead_;  // by thread
  WorkShares work_;
  ThreadPool pool_;
  bool in_list_ = false;
  WeightArena arena_;
  std::vector<const std::byte*> shares_;  // where the share of a thread starts (matrix, thread)

  std::shared_ptr<void> memory_;
  size_t reserved_ = 0;
  int scratch_rows_ = 0, max_chunks_ = 0, partial_size_ = 0;
  int64_t scratch_cols_ = 0, vocab_ = 0;
  InputScratch shared_input_{};
  std::vector<InputScratch> own_input_;
  int wave_tiles_ = 0;
  float* partials_ = nullptr;  // (wave_tiles, kMaxQueries, max_chunks_, partial_size)
  SamplerScratch sampler_{};
  size_t most_panel_bytes_ = 0,  // of the largest panel that is made anew for every pass, and ...
      scratch_panel_bytes_ = 0;  // ... of what a thread has for one
  std::byte* scratch_panels_ = nullptr;  // (threads, scratch_panel_bytes)
};

}  // namespace
}  // namespace cpu

std::unique_ptr<Backend> make_cpu_backend(const BackendOptions& options) {
  return std::make_unique<cpu::CpuBackend>(options);
}

}  // namespace chimera
