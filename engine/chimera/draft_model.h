// The Chimera draft model at run time: the formulas of draft_tensors.h as ops of a backend.
//
// A draft row stands for a token x_p whose feature is g_p. It asks with its own feature, and it
// brings the slot of position p - 1: the one that says "there stood x_{p-1}, and after it came
// x_p", made from the state of position p - 1 (the target's h, or the f of its parent row where
// that is not known yet). So a row sees the slots of its ancestors and its own, exactly as
// attention() has it, and the rows of a depth go through in one batch under the tree mask.
//
// A feature depends on the last three tokens alone, and so does what is made of it: a feature row
// is [g; its part of q; of k; of v], all that a trigram ever needs to have computed.
//
// Row 0 of a pass is no row of the sequence: it holds what the first rows need of the token before
// them, its feature row, and, where a tree is drafted, f. The rows are written by the host (step(),
// fill_features(), link()) or by ops (tree_ops.h); the formulas are the same.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "engine/chimera/draft_tensors.h"
#include "engine/draft_state.h"
#include "engine/llama.h"

namespace chimera {

class DraftModel {
 public:
  static constexpr int kMaxRows = DraftLinks::kMaxRows;  // of a pass

  // weight_type: what the weights are rounded to: 4 bits (which costs no acceptance that could be
  // measured, and half the bytes of 8), or f32, to compare with exact values. The rows of the
  // target's head are kept in 8 bits, or f32. memory: kShared where the host writes the rows and
  // reads logits, kDevice where ops do.
  DraftModel(const Llama& target, const DraftTensors& tensors, int n_sequences, int context,
             DType weight_type = DType::kQ4_1, Memory memory = Memory::kShared);

  const DraftConfig& config() const { return config_; }
  std::span<const int32_t> vocabulary() const { return vocabulary_; }
  size_t weight_bytes() const { return weight_bytes_; }  // read by one pass

  // What a DraftModel that the host drafts with will take of the host's memory, to be known before
  // there is one; and what this one has taken. (The backend's scratch apart, which reserve() is
  // about.)
  static size_t plan(const DraftTensors& tensors, const Backend& backend, int n_sequences,
                     int context);
  size_t allocated_bytes() const { return allocated_bytes_ + weight_bytes_ + head_rows_.size(); }
  static void reserve(const DraftConfig& config, Backend& backend, int context);

  // ---- Ops, whoever wrote the rows ----

  // Feature rows, in `out` (rows, feature_size), for those of pass.features, from the three tokens
  // of each in pass.trigrams.
  void compute_features(const DraftPass& pass, float* out);
  // Fills f for the new rows [first_new, n_rows) and appends their slots. Their own feature rows
  // are in features(); what else they read comes by pass.links, from there and from states: the
  // target's, or f() itself.
  void forward(const DraftPass& pass, const float* states);
  // Its two halves, for rows of which only some need their f: the slots, then f of rows whose slots
  // are there.
  void append(const DraftPass& pass, const float* states);
  void encode(const DraftPass& pass);
  // logits() of head `k` for the new rows; h: (d) the last known state of the target.
  void run_head(const DraftPass& pass, int k, const float* h);
  // After forward() over kept rows: the last of them is the next root. Its f and feature row go to
  // row 0, the last state to root(0).h.
  void keep_root(const DraftPass& pass, const float* states);

  float* features() { return features_; }  // (rows, feature_size)
  int64_t feature_size() const { return config_.hidden_size + qkv_size(); }
  float* f() { return f_; }  // (rows, d)
  // (rows, logits_stride): over vocabulary(), then over the dynamic rows.
  const float* logits() const { return logits_; }
  int64_t logits_stride() const { return head_->rows; }
  Matrix* head() { return head_.get(); }  // (static + kMaxDynamic, d)
  // What drafting starts from: the target's last known state (d), the root's f (d) and feature row.
  struct Root {
    float *h, *f, *feature;
  };
  Root root(int sequence) {
    float* h = roots_ + sequence * root_size();
    return {h, h + config_.hidden_size, h + 2 * config_.hidden_size};
  }
  // The Steps and links of a pass over up to max_rows new rows that ops write.
  DraftPass make_device_pass(int max_rows);

  // ---- Rows that the host writes ----

  // To use: step().clear(), one row before begin_sequence(), then rows, with
  // fill_features() and link() for each; forward().
  const DraftPass& pass() const { return pass_; }
  Step& step() { return *pass_.rows; }
  // Sets feature(row) for rows [first, first + n) from the last three tokens of each: trigrams (n,
  // 3). Those of the last few hundred trigrams are kept, since the tree of a step mostly holds the
  // trigrams of the one before.
  void fill_features(int first, int n, const int32_t* trigrams);
  // The token before is that of row `feature`; the state is row `state` of forward()'s states.
  void link(int row, int feature, int state) {
    pass_.links->feature[row] = feature;
    pass_.links->state[row] = state;
  }
  float* feature(int row) { return features_ + row * feature_size(); }
  float* f(int row) { return f_ + int64_t{row} * config_.hidden_size; }
  const float* logits(int row) const { return logits_ + row * logits_stride(); }

  // The dynamic part of the vocabulary: up to kMaxDynamic tokens, of which these are the ones from
  // number `first` on.
  static constexpr int kMaxDynamic = DraftState::kMostDynamic;
  void set_dynamic(int first, std::span<const int32_t> tokens);

  // Slots of the draft's own cache.
  int committed(int sequence) { return step().sequences[sequence].committed; }
  void set_committed(int sequence, int n) { step().sequences[sequence].committed = n; }

 private:
  std::unique_ptr<Matrix> prepare(const std::vector<float>& w, int64_t rows, int64_t cols) {
    return prepare(w, rows, cols, weight_type_);
  }
  std::unique_ptr<Matrix> prepare(const std::vector<float>& w, int64_t rows, int64_t cols,
                                  DType type);
  void make_buffers(int n_sequences);
  void prepare_block(const DraftTensors& t);
  void prepare_head(const DraftTensors& t);
  void make_cache(int n_sequences, int context);
  const float* place(const std::vector<float>& vector);
  void round_head_rows(int first, std::span<const int32_t> tokens, Step* step, float* rows);
  template <typename T>
  T* allocate(size_t n);
  int64_t qkv_size() const { return qkv_size(config_); }
  static int64_t qkv_size(const DraftConfig& c) { return c.q_size() + 2 * c.kv_size(); }
  Heads heads() const {
    return {config_.n_heads, config_.n_kv_heads, config_.head_dim, config_.rope_kv_heads};
  }
  static KvShape kv_shape(const DraftConfig& c, DType type, int n_sequences, int context) {
    return {type, 1, c.n_kv_heads, c.head_dim, n_sequences, context + kMaxRows};
  }
  int64_t root_size() const { return 2 * int64_t{config_.hidden_size} + feature_size(); }

  Backend& backend_;
  const Llama& target_;
  DraftConfig config_;
  DType weight_type_, head_type_;
  Memory memory_kind_;
  std::vector<int32_t> vocabulary_;
  size_t weight_bytes_ = 0, allocated_bytes_ = 0;

  std::unique_ptr<Matrix> w1_, w2_, w3_;
  // The block's products, taken apart by what they read; the norms' weights are multiplied in.
  std::unique_ptr<Matrix> wqkv_feature_, wkv_state_;  // (q + 2 kv, d): of g; (2 kv, d): of h or f
  std::unique_ptr<Matrix> wo_, gate_up_, down_;
  std::vector<std::unique_ptr<Matrix>> head_down_, head_up_;
  std::unique_ptr<Matrix> head_;      // (static + kMaxDynamic, d), from the target's head
  std::vector<std::byte> head_rows_;  // the same in rows, for replace_rows(); host only
  std::vector<float> head_scale_;
  const float *ones_, *ffn_norm_, *out_norm_;
  std::vector<std::shared_ptr<void>> memory_;

  // Feature rows of trigrams, by hash.
  static constexpr size_t kKeptFeatures = 512;
  struct Trigram {
    int32_t token[3];
    bool operator==(const Trigram&) const = default;
  };
  std::vector<Trigram> kept_trigrams_;
  std::vector<float> kept_features_;  // (kKeptFeatures, feature_size)

  DraftPass pass_;  // the host's
  KvCache kv_;
  RopeTable rope_;
  float* features_;                   // (rows, feature_size)
  float* new_features_ = nullptr;     // the same; host only
  float *state_, *f_;                 // (rows, d)
  float *trigrams_, *hidden_;         // (rows, 3 d), (rows, d)
  float* roots_;                      // (sequences, root_size)
  float *qkv_, *attended_, *gated_;   // (rows, q + 2 kv), (rows, q), (rows, 2 ffn)
  float *x_, *head_in_, *rank_, *z_;  // (rows, d), (rows, 2 d), (rows, rank), (rows, d)
  float* logits_;                     // (rows, static + kMaxDynamic)
};

}  // namespace chimera
