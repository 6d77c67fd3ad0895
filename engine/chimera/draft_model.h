// The Chimera draft model at run time: the formulas of draft_tensors.h as ops of a backend.
//
// A draft row stands for a token x_p whose feature is g_p. It asks with its own feature, and it
// brings the slot of position p - 1: the one that says "there stood x_{p-1}, and after it came
// x_p", made from the state of position p - 1 (the target's h, or the f of its parent row where
// that is not known yet). So a row sees the slots of its ancestors and its own, exactly as
// attention() has it, and the rows of a depth go through in one batch under the tree mask.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "engine/chimera/draft_tensors.h"
#include "engine/llama.h"

namespace chimera {

class DraftModel {
 public:
  static constexpr int kMaxRows = 64;  // of a draft step

  // weight_type: what the weights are rounded to: 4 bits (which costs no acceptance that could be
  // measured, and half the bytes of 8), or f32, to compare with exact values. The rows of the
  // target's head are kept in 8 bits, or f32.
  DraftModel(const Llama& target, const DraftTensors& tensors, int n_sequences, int context,
             DType weight_type = DType::kQ4_1);

  const DraftConfig& config() const { return config_; }
  std::span<const int32_t> vocabulary() const { return vocabulary_; }
  size_t weight_bytes() const { return weight_bytes_; }  // read by one pass

  // The rows of the current draft step. To use: step().clear(), begin_sequence(), then rows; set
  // tokens (trigram), state and previous feature of every new row; forward(); read f and feature.
  Step& step() { return *step_; }

  // Sets feature(row) for rows [first, first + n) from the last three tokens of each: trigrams (n,
  // 3). A feature depends on its trigram alone: those of the last few hundred are kept, since the
  // tree of a step mostly holds the trigrams of the one before.
  void features(int first, int n, const int32_t* trigrams);
  float* feature(int row) { return g_ + int64_t{row} * config_.hidden_size; }  // g_p
  float* previous_feature(int row) {
    return g_prev_ + int64_t{row} * config_.hidden_size;
  }                                                                              // g_{p-1}
  float* state(int row) { return state_ + int64_t{row} * config_.hidden_size; }  // h_{p-1} or f
  float* f(int row) { return f_ + int64_t{row} * config_.hidden_size; }

  // Fills f for the step's new rows [first_new, n_rows) and appends their slots.
  void forward();
  // Logits of head `k` for new rows: over vocabulary(), then over the dynamic rows; h: (hidden) the
  // last known state of the target. Rows logits_stride floats apart; row i belongs to row first_new
  // + i.
  const float* logits(int k, const float* h);
  int logits_stride() const { return static_cast<int>(head_->rows); }

  // The dynamic part of the vocabulary: up to kMaxDynamic tokens, replaced oldest first.
  static constexpr int kMaxDynamic = 512;
  void set_dynamic(int index, int32_t token);  // index <= number of dynamic tokens
  int n_dynamic() const { return n_dynamic_; }
  void clear_dynamic() { n_dynamic_ = 0; }

  // Slots of the draft's own cache.
  int committed(int sequence) const { return step_->sequences[sequence].committed; }
  void set_committed(int sequence, int n) { step_->sequences[sequence].committed = n; }

 private:
  std::unique_ptr<Matrix> prepare(const std::vector<float>& w, int64_t rows, int64_t cols) {
    return prepare(w, rows, cols, weight_type_);
  }
  std::unique_ptr<Matrix> prepare(const std::vector<float>& w, int64_t rows, int64_t cols,
                                  DType type);
  const float* place(const std::vector<float>& vector);
  void compute_features(int n, const int32_t* trigrams);
  void embed_head_row(int index, int32_t token);

  Backend& backend_;
  const Llama& target_;
  DraftConfig config_;
  DType weight_type_, head_type_;
  std::vector<int32_t> vocabulary_;
  size_t weight_bytes_ = 0;
  int n_dynamic_ = 0;

  std::unique_ptr<Matrix> w1_, w2_, w3_;
  // The slots' products, taken apart by what they read; the norms' weights are multiplied in.
  std::unique_ptr<Matrix> wq_, wkv_state_;           // (q, d), (2 kv, d): of h or f
  std::unique_ptr<Matrix> wk_feature_, wv_feature_;  // (kv, d): of g_{p-1}, of g_p
  std::unique_ptr<Matrix> wo_, gate_up_, down_;
  std::vector<std::unique_ptr<Matrix>> head_down_, head_up_;
  std::unique_ptr<Matrix> head_;      // (static + kMaxDynamic, d), from the target's head
  std::vector<std::byte> head_rows_;  // the same in rows, for replace_row()
  std::vector<float> head_scale_;
  const float *ones_, *attn_norm_, *ffn_norm_, *out_norm_;
  std::vector<std::shared_ptr<void>> memory_;

  // Features of trigrams, by hash.
  static constexpr size_t kKeptFeatures = 512;
  struct Trigram {
    int32_t token[3];
    bool operator==(const Trigram&) const = default;
  };
  std::vector<Trigram> kept_trigrams_;
  std::vector<float> kept_features_;  // (kKeptFeatures, d)

  Step *step_, *trigram_step_;
  KvCache kv_;
  RopeTable rope_;
  float *g_, *g_prev_, *state_, *f_;  // (rows, d)
  float *trigrams_, *hidden_;         // (rows, 3 d), (rows, d)
  float* new_features_;               // (rows, d)
  float *qkv_, *attended_, *gated_;   // (rows, q + 2 kv), (rows, q), (rows, 2 ffn)
  float *x_, *head_in_, *rank_, *z_;  // (rows, d), (rows, 2 d), (rows, rank), (rows, d)
  float* logits_;                     // (rows, static + kMaxDynamic)
};

}  // namespace chimera
