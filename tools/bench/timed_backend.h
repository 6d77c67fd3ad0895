// Where the time of a step goes: a backend that hands every op to another one and times it, or that
// hands on those of one part only, so that the part can be timed as a whole. (A GPU runs a step as
// one graph; ops timed one by one there would be launches and waits for the most part.)
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "engine/backend.h"

namespace chimera {

class TimedBackend final : public Backend {
 public:
  enum class Part : uint8_t { kAll, kProducts, kAttention, kRest };

  // All calls of one op. Products are told apart by their shape and by what is done to their input.
  struct Op {
    std::string name;  // "norm, product 960 x 576"
    Part part = Part::kRest;
    int64_t calls = 0;
    double seconds = 0;
    size_t weight_bytes = 0;  // read by these calls
  };

  explicit TimedBackend(std::unique_ptr<Backend> backend) : backend_(std::move(backend)) {}

  // Leaves out all other ops from now on.
  void only(Part part) { only_ = part; }

  // Times ops from now on, from zero. Off at first: the ops are passed on and nothing else is done.
  void start();
  bool timing() const { return on_; }
  // Stops, and returns the ops in the order in which they were first called.
  std::vector<Op> stop();

  std::string name() const override { return backend_->name(); }
  std::string description() const override { return backend_->description(); }
  std::string isa() const override { return backend_->isa(); }
  int contract_version() const override { return backend_->contract_version(); }

  std::shared_ptr<void> allocate(size_t bytes, Memory memory) override {
    return backend_->allocate(bytes, memory);
  }
  std::shared_ptr<Step> make_step(int n_sequences) override {
    return backend_->make_step(n_sequences);
  }
  std::shared_ptr<Step> make_device_step(int n_sequences, int max_rows) override {
    return backend_->make_device_step(n_sequences, max_rows);
  }
  void upload(void* device, const void* host, size_t bytes) override {
    backend_->upload(device, host, bytes);
  }
  std::unique_ptr<Matrix> prepare(std::span<const TensorView> stacked,
                                  const Consumed& consumed) override {
    return backend_->prepare(stacked, consumed);
  }
  void replace_rows(Matrix& matrix, const TensorView& tensor, int64_t first, int64_t n) override {
    backend_->replace_rows(matrix, tensor, first, n);
  }
  size_t kv_bytes(const KvShape& shape) const override { return backend_->kv_bytes(shape); }
  KvCache bind_kv(const KvShape& shape, void* memory) const override {
    return backend_->bind_kv(shape, memory);
  }
  void reserve(int max_rows, int capacity, int64_t max_cols, const Heads& heads,
               int64_t vocab) override {
    backend_->reserve(max_rows, capacity, max_cols, heads, vocab);
  }
  size_t reserved_bytes() const override { return backend_->reserved_bytes(); }

  // A part is another list of ops: the key says which, in bits that no address has.
  void submit(uint64_t key, FunctionRef<void()> ops) override {
    backend_->submit(key_of_part(key), ops);
  }
  void on_host(FunctionRef<void()> op) override { backend_->on_host(op); }
  uint64_t launch(uint64_t key, FunctionRef<void()> ops) override {
    return backend_->launch(key_of_part(key), ops);
  }
  void wait(uint64_t ticket) override { backend_->wait(ticket); }
  TreeOps* tree_ops() override { return backend_->tree_ops(); }  // these are not timed

  void embed(const Step* step, const Matrix& table, float* out) override;
  void rms_norm(const Step* step, const float* x, const float* weight, float eps, int64_t n,
                float* y) override;
  void linear(const Step* step, const Linear& op) override;
  void rope_append(const Step* step, float* qkv, const Heads& heads, const RopeTable& rope,
                   const KvCache& kv, int layer) override;
  void attention(const Step* step, const float* qkv, const Heads& heads, const KvCache& kv,
                 int layer, float* out) override;
  void copy_rows(const Step* step, const RowCopy& op) override;
  void join_rows(const Step* step, const float* h, float scale, const float* f, int64_t width,
                 float* joined, float* sum) override;
  void likely_tokens(const Step* step, const float* logits, int64_t vocab,
                     LikelyTokens* out) override {
    backend_->likely_tokens(step, logits, vocab, out);
  }
  void accept(Step* step, const float* logits, int32_t vocab) override;
  void keep(const Step* step, const KvCache& kv) override;
  void keep_rows(const Step* step, int64_t width, float* x) override;

 private:
  uint64_t key_of_part(uint64_t key) const {
    return key == 0 ? 0 : key | static_cast<uint64_t>(only_) << 56;
  }
  template <typename F>
  void timed(Part part, const std::string& name, size_t weight_bytes, const F& call);

  std::unique_ptr<Backend> backend_;
  bool on_ = false;
  Part only_ = Part::kAll;
  std::vector<Op> ops_;
};

}  // namespace chimera
