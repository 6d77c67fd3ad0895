#include "engine/chimera/draft_model.h"

#include <algorithm>
#include <cstring>

#include "engine/error.h"
#include "engine/rope.h"

namespace chimera {
namespace {

constexpr float kEps = 1e-5f, kEmbeddingEps = 1.2e-7f;

TensorView view(DType type, const std::vector<std::byte>& data, int64_t rows, int64_t cols) {
  return {"draft", type, rows, cols, data.data(), 0};
}

void round_row(DType type, const float* row, int64_t cols, std::byte* out) {
  switch (type) {
    case DType::kQ4_1: quantize_row_q4_1(row, cols, out); return;
    case DType::kQ8_0: quantize_row_q8_0(row, cols, out); return;
    default: std::memcpy(out, row, static_cast<size_t>(cols) * 4);
  }
}

}  // namespace

DraftModel::DraftModel(const Llama& target, const DraftTensors& t, int n_sequences, int context,
                       DType weight_type, Memory memory)
    : backend_(target.backend()),
      target_(target),
      config_(t.config),
      weight_type_(weight_type),
      head_type_(weight_type == DType::kF32 ? DType::kF32 : DType::kQ8_0),
      memory_kind_(memory),
      head_scale_(t.head_scale) {
  check(t, target.config());
  make_buffers(n_sequences);
  prepare_block(t);
  prepare_head(t);
  make_cache(n_sequences, context);
}

size_t DraftModel::plan(const DraftTensors& t, const Backend& backend, int n_sequences,
                        int context) {
  const DraftConfig& c = t.config;
  const int64_t d = c.hidden_size, q = c.q_size(), kv = c.kv_size(), ffn = c.ffn_size,
                rank = c.head_rank, feature = d + qkv_size(c),
                head = static_cast<int64_t>(t.vocabulary.size()) + kMaxDynamic;
  const int64_t weights = (c.trigram ? 4 * d * d : 0) + (c.skip ? d * d : 0) + (q + 2 * kv) * d +
                          2 * kv * d + d * q + 3 * ffn * d +
                          static_cast<int64_t>(t.head_down.size()) * 3 * rank * d;
  // make_buffers(), make_cache()
  const int64_t row = 2 * feature + 10 * d + qkv_size(c) + q + 2 * ffn + rank + head;
  const KvShape shape = kv_shape(c, DType::kF16, n_sequences, context);
  const int64_t floats = kMaxRows * row + n_sequences * (2 * d + feature) +
                         static_cast<int64_t>(kKeptFeatures) * feature +
                         (shape.capacity + 1) * c.head_dim;
  return row_bytes(DType::kQ4_1, weights) +
         2 * static_cast<size_t>(head) * row_bytes(DType::kQ8_0, d) +
         static_cast<size_t>(floats) * 4 + 3 * sizeof(Step) + backend.kv_bytes(shape);
}

void DraftModel::reserve(const DraftConfig& c, Backend& backend, int context) {
  backend.reserve(
      3 * kMaxRows, context + kMaxRows,
      std::max<int64_t>({3 * int64_t{c.hidden_size}, c.ffn_size, c.q_size(), c.head_rank}),
      {c.n_heads, c.n_kv_heads, c.head_dim, c.rope_kv_heads}, 0);
}

// One pass and its buffers, shared by all sequences: they draft one after the other.
void DraftModel::make_buffers(int n_sequences) {
  const int64_t d = config_.hidden_size, rows = kMaxRows;
  const auto floats = [&](int64_t n) { return allocate<float>(static_cast<size_t>(n)); };
  if (memory_kind_ == Memory::kShared) {
    for (Step** step : {&pass_.rows, &pass_.features, &pass_.trigrams}) {
      *step = allocate<Step>(1);
      (*step)->n_sequences = n_sequences;
    }
    pass_.links = allocate<DraftLinks>(1);
    new_features_ = floats(rows * feature_size());
    kept_trigrams_.assign(kKeptFeatures, {{-1, -1, -1}});
    kept_features_.resize(kKeptFeatures * static_cast<size_t>(feature_size()));
    allocated_bytes_ += kept_features_.size() * 4;
  }
  roots_ = floats(n_sequences * root_size());
  features_ = floats(rows * feature_size());
  state_ = floats(rows * d);
  f_ = floats(rows * d);
  trigrams_ = floats(rows * 3 * d);
  hidden_ = floats(rows * d);
  qkv_ = floats(rows * qkv_size());
  attended_ = floats(rows * config_.q_size());
  gated_ = floats(rows * 2 * config_.ffn_size);
  x_ = floats(rows * d);
  head_in_ = floats(rows * 2 * d);
  rank_ = floats(rows * std::max(1, config_.head_rank));
  z_ = floats(rows * d);
}

void DraftModel::prepare_block(const DraftTensors& t) {
  const int64_t d = config_.hidden_size;
  if (config_.trigram) {
    w1_ = prepare(t.w1, d, 3 * d);
    w2_ = prepare(t.w2, d, d);
  }
  if (config_.skip) w3_ = prepare(t.w3, d, d);
  // The columns [first, first + d) of a matrix, its input's norm included.
  const auto part = [&](const std::vector<float>& w, const std::vector<float>& norm, int64_t first,
                        std::vector<float>* out) {
    const auto cols = static_cast<int64_t>(norm.size());
    for (int64_t r = 0; r < static_cast<int64_t>(w.size()) / cols; ++r)
      for (int64_t i = first; i < first + d; ++i)
        out->push_back(w[static_cast<size_t>(r * cols + i)] * norm[static_cast<size_t>(i)]);
  };
  std::vector<float> of_state, of_feature;
  part(t.wk, t.key_norm, 0, &of_state);
  part(t.wv, t.value_norm, 0, &of_state);
  part(t.wq, t.attn_norm, 0, &of_feature);
  if (config_.slot_features) {
    part(t.wk, t.key_norm, d, &of_feature);
    part(t.wv, t.value_norm, d, &of_feature);
  }
  of_feature.resize(static_cast<size_t>(qkv_size() * d));  // zeros where slots hold no features
  wqkv_feature_ = prepare(of_feature, qkv_size(), d);
  wkv_state_ = prepare(of_state, 2 * config_.kv_size(), d);
  wo_ = prepare(t.wo, d, config_.q_size());
  gate_up_ = prepare(t.gate_up, 2 * config_.ffn_size, d);
  down_ = prepare(t.down, d, config_.ffn_size);
  ones_ = place(std::vector<float>(static_cast<size_t>(d), 1.0f));
  ffn_norm_ = place(t.ffn_norm);
  out_norm_ = place(t.out_norm);
}

// The residual heads' corrections, and of the target's head the rows that can be proposed.
void DraftModel::prepare_head(const DraftTensors& t) {
  const int64_t d = config_.hidden_size, rows = kMaxRows;
  for (size_t k = 0; k < t.head_down.size() && config_.head_rank > 0; ++k) {
    head_down_.push_back(prepare(t.head_down[k], config_.head_rank, 2 * d));
    head_up_.push_back(prepare(t.head_up[k], d, config_.head_rank));
  }
  vocabulary_ = t.vocabulary;
  const auto n_static = static_cast<int64_t>(vocabulary_.size());
  head_rows_.resize(static_cast<size_t>(n_static + kMaxDynamic) * row_bytes(head_type_, d));
  const auto scratch = backend_.allocate(sizeof(Step) + static_cast<size_t>(rows * d) * 4);
  auto* scratch_step = static_cast<Step*>(scratch.get());
  round_head_rows(0, vocabulary_, scratch_step, reinterpret_cast<float*>(scratch_step + 1));
  const TensorView head = view(head_type_, head_rows_, n_static + kMaxDynamic, d);
  head_ = backend_.prepare({&head, 1}, nullptr);
  weight_bytes_ += head_->bytes;
  if (memory_kind_ != Memory::kShared) std::vector<std::byte>().swap(head_rows_);
  logits_ = allocate<float>(static_cast<size_t>(rows * head_->rows));
}

// Slots for every sequence, and the scratch that ops over them need.
void DraftModel::make_cache(int n_sequences, int context) {
  const KvShape shape = kv_shape(config_, weight_type_ == DType::kF32 ? DType::kF32 : DType::kF16,
                                 n_sequences, context);
  kv_ = backend_.bind_kv(shape, allocate<std::byte>(backend_.kv_bytes(shape)));

  LlamaConfig rope_config;
  rope_config.head_dim = config_.head_dim;
  rope_config.rope_base = config_.rope_base;
  const int64_t positions = shape.capacity + 1;
  std::vector<float> cos(static_cast<size_t>(positions * config_.head_dim / 2)), sin(cos.size());
  fill_rope_table(rope_config, positions, cos.data(), sin.data());
  rope_ = {place(cos), place(sin), /*query_shift=*/1};
  reserve(config_, backend_, context);
}

std::unique_ptr<Matrix> DraftModel::prepare(const std::vector<float>& w, int64_t rows, int64_t cols,
                                            DType type) {
  if (static_cast<int64_t>(w.size()) != rows * cols)
    throw Error("draft", std::to_string(rows) + " x " + std::to_string(cols) + " weights",
                std::to_string(w.size()));
  const size_t row = row_bytes(type, cols);
  std::vector<std::byte> rounded(static_cast<size_t>(rows) * row);
  for (int64_t r = 0; r < rows; ++r)
    round_row(type, w.data() + r * cols, cols, rounded.data() + static_cast<size_t>(r) * row);
  const TensorView tensor = view(type, rounded, rows, cols);
  auto matrix = backend_.prepare({&tensor, 1}, nullptr);
  weight_bytes_ += matrix->bytes;
  return matrix;
}

const float* DraftModel::place(const std::vector<float>& vector) {
  float* to = allocate<float>(vector.size());
  backend_.upload(to, vector.data(), vector.size() * 4);
  return to;
}

template <typename T>
T* DraftModel::allocate(size_t n) {
  allocated_bytes_ += n * sizeof(T);
  memory_.push_back(backend_.allocate(n * sizeof(T), memory_kind_));
  return static_cast<T*>(memory_.back().get());
}

DraftPass DraftModel::make_device_pass(int max_rows) {
  const auto step = [&](int rows) {
    const std::shared_ptr<Step> made = backend_.make_device_step(1, rows);
    memory_.push_back(made);
    return made.get();
  };
  DraftPass pass;
  pass.rows = step(max_rows);
  pass.features = step(max_rows);
  pass.trigrams = step(3 * max_rows);
  pass.root = step(1);
  pass.links = allocate<DraftLinks>(1);
  return pass;
}

// head_rows_[first + i] = the target's head row of tokens[i]. step, rows (kMaxRows, d): shared
// memory.
void DraftModel::round_head_rows(int first, std::span<const int32_t> tokens, Step* step,
                                 float* rows) {
  const int64_t d = config_.hidden_size;
  std::byte* out = head_rows_.data() + static_cast<size_t>(first) * row_bytes(head_type_, d);
  while (!tokens.empty()) {
    const size_t n = std::min<size_t>(tokens.size(), kMaxRows);
    step->clear();
    step->n_rows = static_cast<int32_t>(n);
    std::copy_n(tokens.begin(), n, step->token);
    backend_.embed(step, target_.head(), rows);
    for (size_t i = 0; i < n; ++i, out += row_bytes(head_type_, d))
      round_row(head_type_, rows + static_cast<int64_t>(i) * d, d, out);
    tokens = tokens.subspan(n);
  }
}

void DraftModel::set_dynamic(int first, std::span<const int32_t> tokens) {
  const int row = static_cast<int>(vocabulary_.size()) + first;
  round_head_rows(row, tokens, pass_.trigrams, x_);
  backend_.replace_rows(*head_, view(head_type_, head_rows_, head_->rows, config_.hidden_size), row,
                        static_cast<int64_t>(tokens.size()));
}

void DraftModel::fill_features(int first, int n, const int32_t* trigrams) {
  const auto size = static_cast<size_t>(feature_size());
  const auto place_of = [](const Trigram& t) {
    uint32_t h = 0;
    for (const int32_t token : t.token) h = (h ^ static_cast<uint32_t>(token)) * 0x9E3779B1u;
    return size_t{h >> 16} % kKeptFeatures;
  };
  int missing[kMaxRows], n_missing = 0;
  int32_t tokens[3 * kMaxRows];
  for (int i = 0; i < n; ++i) {
    const Trigram t{{trigrams[3 * i], trigrams[3 * i + 1], trigrams[3 * i + 2]}};
    const size_t at = place_of(t);
    if (kept_trigrams_[at] == t) {
      std::memcpy(feature(first + i), kept_features_.data() + at * size, size * 4);
    } else {
      std::copy_n(t.token, 3, tokens + 3 * n_missing);
      missing[n_missing++] = i;
    }
  }
  if (n_missing == 0) return;
  pass_.features->clear();
  pass_.features->n_rows = n_missing;
  pass_.trigrams->clear();
  pass_.trigrams->n_rows = 3 * n_missing;
  std::copy_n(tokens, 3 * n_missing, pass_.trigrams->token);
  compute_features(pass_, new_features_);
  for (int j = 0; j < n_missing; ++j) {
    const Trigram t{{tokens[3 * j], tokens[3 * j + 1], tokens[3 * j + 2]}};
    const float* g = new_features_ + static_cast<size_t>(j) * size;
    kept_trigrams_[place_of(t)] = t;
    std::memcpy(kept_features_.data() + place_of(t) * size, g, size * 4);
    std::memcpy(feature(first + missing[j]), g, size * 4);
  }
}

// clang-format off
void DraftModel::compute_features(const DraftPass& pass, float* out) {
  const Step* step = pass.features;
  const int64_t d = config_.hidden_size;
  backend_.embed(pass.trigrams, target_.embedding(), trigrams_);
  backend_.rms_norm(pass.trigrams, trigrams_, ones_, kEmbeddingEps, d, trigrams_);
  // Three embeddings in a row make a trigram.
  if (config_.trigram) {
    backend_.linear(step, {.weights = w1_.get(), .x = trigrams_, .y = hidden_});
    backend_.linear(step, {.weights = w2_.get(), .x = hidden_, .y = out, .y_stride = feature_size(),
                           .input = Linear::Input::kSilu});
  }
  if (config_.skip)
    backend_.linear(step, {.weights = w3_.get(), .x = trigrams_ + 2 * d, .y = out,
                           .y_stride = feature_size(), .x_stride = 3 * d, .accumulate = config_.trigram});
  backend_.linear(step, {.weights = wqkv_feature_.get(), .x = out, .y = out + d, .y_stride = feature_size(),
                         .x_stride = feature_size(), .input = Linear::Input::kRmsNorm, .norm_weight = ones_,
                         .eps = kEps});
}

void DraftModel::forward(const DraftPass& pass, const float* states) {
  append(pass, states);
  encode(pass);
}

void DraftModel::append(const DraftPass& pass, const float* states) {
  using Input = Linear::Input;
  const Step* step = pass.rows;
  const int64_t d = config_.hidden_size, q = config_.q_size(), kv = config_.kv_size(), size = feature_size();
  // A row's own feature asks and gives its value; the feature of the token before it gives the key.
  backend_.copy_rows(step, {features_ + d, qkv_size(), qkv_, nullptr, size});
  backend_.copy_rows(step, {features_ + d + q, kv, qkv_ + q, pass.links->feature, size, qkv_size()});
  backend_.copy_rows(step, {states, d, state_, pass.links->state});
  backend_.linear(step, {.weights = wkv_state_.get(), .x = state_, .y = qkv_ + q, .y_stride = qkv_size(),
                         .input = Input::kRmsNorm, .norm_weight = ones_, .eps = kEps, .accumulate = true});
  backend_.rope_append(step, qkv_, heads(), rope_, kv_, 0);
}

void DraftModel::encode(const DraftPass& pass) {
  using Input = Linear::Input;
  const Step* step = pass.rows;
  const int64_t d = config_.hidden_size;
  backend_.attention(step, qkv_, heads(), kv_, 0, attended_);
  backend_.copy_rows(step, {features_, d, x_, nullptr, feature_size()});
  backend_.linear(step, {.weights = wo_.get(), .x = attended_, .y = x_, .accumulate = true});
  backend_.linear(step, {.weights = gate_up_.get(), .x = x_, .y = gated_,
                          .input = Input::kRmsNorm, .norm_weight = ffn_norm_, .eps = kEps});
  backend_.linear(step, {.weights = down_.get(), .x = gated_, .y = x_, .input = Input::kSwiGlu, .accumulate = true});
  backend_.rms_norm(step, x_, out_norm_, kEps, d, f_);
}
// clang-format on

void DraftModel::run_head(const DraftPass& pass, int k, const float* h) {
  const int64_t d = config_.hidden_size;
  const Step* step = pass.rows;
  const auto head = static_cast<size_t>(std::min(k, config_.n_steps - 1));
  backend_.join_rows(step, h, head_scale_[head], f_, d, head_in_, z_);
  if (config_.head_rank > 0) {
    backend_.linear(step, {.weights = head_down_[head].get(), .x = head_in_, .y = rank_});
    backend_.linear(step, {.weights = head_up_[head].get(),
                           .x = rank_,
                           .y = z_,
                           .input = Linear::Input::kSilu,
                           .accumulate = true});
  }
  backend_.linear(step, {.weights = head_.get(), .x = z_, .y = logits_});
}

void DraftModel::keep_root(const DraftPass& pass, const float* states) {
  const int64_t d = config_.hidden_size;
  backend_.copy_rows(pass.root, {f_, d, f_, &pass.links->root});
  backend_.copy_rows(pass.root, {features_, feature_size(), features_, &pass.links->root});
  backend_.copy_rows(pass.root, {states, d, root(0).h, &pass.links->root_state});
}

}  // namespace chimera
