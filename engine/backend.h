// What a backend does: the ops that a step is made of, over buffers of fixed capacity.
//
// # How a step runs
//   draft    a drafter writes a tree of candidates into the Step   (drafter.h, tree_ops.h)
//   forward  embed, then for every layer norm + qkv product, RoPE + append, attention, output
//            product, norm + gate/up product, SwiGLU + down product; norm; head     (llama.h)
//   accept   sample along the tree as far as it agrees; says which rows are kept
//   keep     move the kept keys, values and states to their final places
//
// All that varies between steps is in the Step (make_step()); the list of ops and every pointer in
// them is the same each time. submit() brackets the list: the CPU runs it as it comes; CUDA
// captures it as a graph and replays that afterwards, without coming back to the host in between.
// (Acceptance is an op for that reason.) Ops that only the host can do go through on_host(), which
// is where such a graph would have to be cut.
//
// Drafting is ops as well where the backend has them (tree_ops()). Then one list is {forward,
// accept, keep, draft the next tree} over a Step that the host never sees (make_device_step()), and
// launch() does not wait: the host reads a step's tokens while the next one runs
// (resident_drafter.h). Where it has not, as on the CPU, the host's drafters grow the trees and run
// the draft model's ops themselves, depth by depth.
//
// # The promise
// A row's results are the same bits whatever else is in the step: see "The arithmetic contract" in
// cpu/kernels.h. Fused ops are defined by their unfused parts; there is one forward.
//
// Buffers are row-major f32, `rows` meaning a capacity of Step::kMaxRows at most; only the live
// rows are touched. Pointers are the backend's memory (allocate()); on the CPU the host may read
// it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "engine/dtype.h"
#include "engine/function_ref.h"
#include "engine/step.h"
#include "engine/tensor.h"

namespace chimera {

using Consumed = std::function<void(std::span<const std::byte>)>;

// A weight matrix in the backend's own layout, made by prepare(). (rows, cols) as stacked.
class Matrix {
 public:
  virtual ~Matrix() = default;
  int64_t rows = 0, cols = 0;
  size_t bytes = 0;
};

struct KvShape {
  DType type = DType::kF16;  // or kF32: what K and V are rounded to, once, on append
  int n_layers = 0, n_kv_heads = 0, head_dim = 0;
  int n_sequences = 1;
  int capacity = 0;  // slots a sequence: context + rows of one step
};
// The keys and values of every layer and sequence. Made by bind_kv(); the layout is the
// backend's.
struct KvCache {
  KvShape shape;
  void* k = nullptr;
  void* v = nullptr;
};

// Which rows of a step an op works on.
enum class Rows : uint8_t { kAll, kLogits };  // every row, or row logits_row[i] as output row i

// y = W f(x), or y += W f(x).
struct Linear {
  enum class Input : uint8_t {
    kPlain,    // x: (rows, cols)
    kRmsNorm,  // f = RMS norm with norm_weight: (cols), eps
    kSwiGlu,   // x: (rows, 2 * cols) holds gate, then up; f = silu(gate) * up
    kSilu,     // x: (rows, cols)
  };
  const Matrix* weights = nullptr;  // (n, cols)
  const float* x = nullptr;
  float* y = nullptr;    // (rows, n), rows y_stride floats apart
  int64_t y_stride = 0;  // 0: n
  int64_t x_stride = 0;  // of x likewise; 0: as wide as the input says
  Input input = Input::kPlain;
  const float* norm_weight = nullptr;
  float eps = 0;
  bool accumulate = false;
  Rows rows = Rows::kAll;
};

// The rotated pairs (i, i + head_dim / 2) of position p turn by angle[p][i].
struct RopeTable {
  const float* cos = nullptr;  // (positions, head_dim / 2)
  const float* sin = nullptr;
  int query_shift = 0;  // queries turn as if they stood this many positions later than their keys
};

struct Heads {
  int n_heads = 0, n_kv_heads = 0, head_dim = 0;
  // KV heads, and their query heads, that turn; the rest keep still. -1: all.
  int rope_kv_heads = -1;
};

// Whose memory it is.
enum class Memory : uint8_t {
  kShared,  // the host's and the device's: either may touch what the other does not touch just then
  kDevice,  // ops alone read and write it; the host puts things there with upload()
  kHost,    // the host's; ops write small results there, which wait() makes visible
};

class TreeOps;

// y[r] = x[from[r]] for the live rows r.
struct RowCopy {
  const float* x;
  int64_t width;                       // floats of a row
  float* y;                            // may be x if no row is both read and written
  const int32_t* from = nullptr;       // (rows); nullptr: row r itself
  int64_t x_stride = 0, y_stride = 0;  // 0: width
};

// One thread at a time may use a backend and whatever was made from it: sessions share its threads
// and its scratch. (Two backends are two machines.) Ops do not throw but for a device's errors.
// In a list, linear(), rope_append() and attention() do not follow at once an op that writes a
// Step: a device looks at it ahead of their turn.
class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::string name() const = 0;         // "cpu"
  virtual std::string description() const = 0;  // "cpu avx512, 2 threads"
  virtual std::string isa() const = 0;          // "avx512"
  virtual int contract_version() const = 0;

  // ---- memory ----
  // Zeroed, aligned to 64 bytes. Throws Error if there is not enough.
  virtual std::shared_ptr<void> allocate(size_t bytes, Memory memory = Memory::kShared) = 0;
  // A Step without rows, in memory that the host reads and writes as its own. (A Step in memory
  // from allocate() works too, but slower.)
  virtual std::shared_ptr<Step> make_step(int n_sequences) = 0;
  // A Step without rows that only ops read and write, of which a pass works on at most max_rows:
  // nothing of it goes to the device or back, and whatever it holds, the ops are launched alike.
  virtual std::shared_ptr<Step> make_device_step(int n_sequences, int /*max_rows*/) {
    return make_step(n_sequences);
  }
  virtual void upload(void* device, const void* host, size_t bytes) = 0;
  // Stacks matrices of the same width (rows of the first, then of the second, ...) and repacks them
  // for this machine. consumed, or nullptr: told of bytes of the views as soon as they are not
  // needed any more, from any thread, so that a file's pages can be dropped while a large tensor is
  // still being read. The views may be dropped afterwards, except those that are lasting. The CPU
  // backend takes weights from large blocks, which it gives back when it goes itself.
  virtual std::unique_ptr<Matrix> prepare(std::span<const TensorView> stacked,
                                          const Consumed& consumed) = 0;
  // Rows [first, first + n) of a tensor that was prepared alone have changed: brings them into the
  // matrix.
  virtual void replace_rows(Matrix& matrix, const TensorView& tensor, int64_t first, int64_t n) = 0;
  virtual size_t kv_bytes(const KvShape& shape) const = 0;
  // memory: kv_bytes() of it, zeroed.
  virtual KvCache bind_kv(const KvShape& shape, void* memory) const = 0;
  // Scratch for steps of up to max_rows rows with attention over up to `capacity` slots and
  // products as wide as max_cols, of the matrices prepared so far; never less than what an earlier
  // call reserved. Forgets what submit() remembers: keys are addresses of Steps, and a new one may
  // stand where another was freed. So whoever makes a Step that lists are about calls this after.
  virtual void reserve(int max_rows, int capacity, int64_t max_cols, const Heads& heads,
                       int64_t vocab) = 0;
  virtual size_t reserved_bytes() const = 0;

  // ---- running ----
  // Runs `ops`, or what they launched when they last ran with this key. Same key: the same ops with
  // the same pointers, whatever their Steps hold; such a list has no on_host(). The address of the
  // Step that a list is about is a good key. 0: any list, run as it comes.
  virtual void submit(uint64_t key, FunctionRef<void()> ops) = 0;
  // Inside such a list: what the host does at this point, with the results of the ops before it.
  virtual void on_host(FunctionRef<void()> op) = 0;
  // submit() for a list whose Steps are all the device's, without waiting for it: what it writes to
  // Memory::kHost can be read after wait(ticket). Lists run in the order of their launches; at most
  // kMostTickets are not waited for. On a backend without a device the list has run.
  static constexpr int kMostTickets = 4;
  virtual uint64_t launch(uint64_t key, FunctionRef<void()> ops) {
    submit(key, ops);
    return 0;
  }
  virtual void wait(uint64_t /*ticket*/) {}
  // A number that it gives only once: a key for lists that no Step's address stands for.
  uint64_t new_key() { return ++last_key_; }

  // Ops that grow candidate trees in the device's memory (tree_ops.h); nullptr: here the host grows
  // them.
  virtual TreeOps* tree_ops() { return nullptr; }

  // ---- ops ----
  // out[r] = row token[r] of the table, dequantised.
  virtual void embed(const Step* step, const Matrix& table, float* out) = 0;
  virtual void rms_norm(const Step* step, const float* x, const float* weight, float eps, int64_t n,
                        float* y) = 0;
  virtual void linear(const Step* step, const Linear& op) = 0;
  // qkv: (rows, (n_heads + 2 n_kv_heads) * head_dim). Rotates q in place and scales it by
  // 1 / sqrt(head_dim); rotates k; rounds k and v into the slots of their rows.
  virtual void rope_append(const Step* step, float* qkv, const Heads& heads, const RopeTable& rope,
                           const KvCache& kv, int layer) = 0;
  // out: (rows, n_heads * head_dim). Each row sees its sequence's committed positions and its
  // ancestors, itself included.
  virtual void attention(const Step* step, const float* qkv, const Heads& heads, const KvCache& kv,
                         int layer, float* out) = 0;
  virtual void copy_rows(const Step* step, const RowCopy& op) = 0;
  // What the residual heads of a draft model read, of every row f[r] and of one row h: joined[r] =
  // [h; f[r]], (rows, 2 width), and sum[r] = scale * h + f[r], two roundings.
  virtual void join_rows(const Step* step, const float* h, float scale, const float* f,
                         int64_t width, float* joined, float* sum) = 0;
  // Of every row that wants logits. out: (n_logits).
  virtual void likely_tokens(const Step* step, const float* logits, int64_t vocab,
                             LikelyTokens* out) = 0;
  // For every sequence with a root: t = sample(logits of the root); while the current node has a
  // child with token t, go there and sample again. Keeps the root's ancestors and the nodes walked;
  // writes kept_at, n_kept, next; advances committed. Sequences without a root keep all their rows.
  virtual void accept(Step* step, const float* logits, int32_t vocab) = 0;
  // After accept(): moves the kept rows' keys and values of all layers to their positions.
  virtual void keep(const Step* step, const KvCache& kv) = 0;
  // After accept(): moves the kept rows of a sequence to its first rows, in order.
  virtual void keep_rows(const Step* step, int64_t width, float* x) = 0;

 private:
  uint64_t last_key_ = 0;
};

struct BackendOptions {
  int threads = 0;     // CPU: 0 = one for each physical core
  bool eager = false;  // CUDA: no graphs, and each kernel is waited for, so that errors name it
};
// name: "cpu", "cuda" or "auto" (CUDA where it can be had, else the CPU). Throws Error for others,
// and for "cuda" where this build or this machine has none.
std::unique_ptr<Backend> make_backend(const std::string& name, const BackendOptions& options);

std::unique_ptr<Backend> make_cpu_backend(const BackendOptions& options);   // engine/cpu
std::unique_ptr<Backend> make_cuda_backend(const BackendOptions& options);  // cuda/, or its stub
bool cuda_available();                                                      // cuda/, or its stub
// GB/s (1e9) at which the GPU reads `bytes` of its memory, as fast as it can.
double cuda_read_bandwidth(size_t bytes);  // cuda/, or its stub

}  // namespace chimera
