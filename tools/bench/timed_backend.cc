#include "tools/bench/timed_backend.h"

#include <algorithm>
#include <utility>

#include "engine/clock.h"

namespace chimera {
namespace {

std::string name_of(const Linear& op) {
  const char* input = "";
  switch (op.input) {
    case Linear::Input::kPlain: break;
    case Linear::Input::kRmsNorm: input = "norm, "; break;
    case Linear::Input::kSwiGlu: input = "SwiGLU, "; break;
    case Linear::Input::kSilu: input = "SiLU, "; break;
  }
  return input + std::string("product ") + std::to_string(op.weights->rows) + " x " +
         std::to_string(op.weights->cols);
}

}  // namespace

void TimedBackend::start() {
  ops_.clear();
  on_ = true;
}

std::vector<TimedBackend::Op> TimedBackend::stop() {
  on_ = false;
  return std::exchange(ops_, {});
}

template <typename F>
void TimedBackend::timed(Part part, const std::string& name, size_t weight_bytes, const F& call) {
  if (only_ != Part::kAll && only_ != part) return;
  if (!on_) return call();
  const auto begin = Clock::now();
  call();
  const double seconds = seconds_since(begin);
  auto op = std::find_if(ops_.begin(), ops_.end(), [&](const Op& o) { return o.name == name; });
  if (op == ops_.end()) op = ops_.insert(op, Op{name, part});
  ++op->calls;
  op->seconds += seconds;
  op->weight_bytes += weight_bytes;
}

void TimedBackend::embed(const Step* step, const Matrix& table, float* out) {
  timed(Part::kRest, "embed", 0, [&] { backend_->embed(step, table, out); });
}

void TimedBackend::rms_norm(const Step* step, const float* x, const float* weight, float eps,
                            int64_t n, float* y) {
  timed(Part::kRest, "norm", 0, [&] { backend_->rms_norm(step, x, weight, eps, n, y); });
}

void TimedBackend::linear(const Step* step, const Linear& op) {
  timed(Part::kProducts, on_ ? name_of(op) : "", op.weights->bytes,
        [&] { backend_->linear(step, op); });
}

void TimedBackend::rope_append(const Step* step, float* qkv, const Heads& heads,
                               const RopeTable& rope, const KvCache& kv, int layer) {
  timed(Part::kRest, "RoPE, append", 0,
        [&] { backend_->rope_append(step, qkv, heads, rope, kv, layer); });
}

void TimedBackend::attention(const Step* step, const float* qkv, const Heads& heads,
                             const KvCache& kv, int layer, float* out) {
  timed(Part::kAttention, "attention", 0,
        [&] { backend_->attention(step, qkv, heads, kv, layer, out); });
}

void TimedBackend::copy_rows(const Step* step, const RowCopy& op) {
  timed(Part::kRest, "copy rows", 0, [&] { backend_->copy_rows(step, op); });
}

void TimedBackend::join_rows(const Step* step, const float* h, float scale, const float* f,
                             int64_t width, float* joined, float* sum) {
  timed(Part::kRest, "copy rows", 0,
        [&] { backend_->join_rows(step, h, scale, f, width, joined, sum); });
}

void TimedBackend::accept(Step* step, const float* logits, int32_t vocab) {
  timed(Part::kRest, "sample, accept", 0, [&] { backend_->accept(step, logits, vocab); });
}

void TimedBackend::keep(const Step* step, const KvCache& kv) {
  timed(Part::kRest, "keep", 0, [&] { backend_->keep(step, kv); });
}

void TimedBackend::keep_rows(const Step* step, int64_t width, float* x) {
  timed(Part::kRest, "keep", 0, [&] { backend_->keep_rows(step, width, x); });
}

}  // namespace chimera
