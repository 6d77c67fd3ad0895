// The draft model's loss over a batch of texts, and its gradient. The formulas are those of
// engine/chimera/draft_tensors.h; T is float, or double for checking.
//
// What depends on the position of a text alone, slots and queries, is made once a position, and
// only what a rollout adds (its own slots) for each rollout. Rows of step k are the batch's
// rollouts (rollouts.h); buffers over all steps hold step 0, then step 1, ...
#pragma once

#include <array>
#include <span>
#include <vector>

#include "engine/train/ops.h"
#include "engine/train/parameters.h"
#include "engine/train/rollouts.h"

namespace chimera::training {

struct StepScore {
  double loss = 0;  // summed cross entropy, unweighted
  int64_t rows = 0, correct = 0;
  StepScore& operator+=(const StepScore& o) {
    loss += o.loss, rows += o.rows, correct += o.correct;
    return *this;
  }
};
struct Score {
  std::array<StepScore, kMaxSteps> step;
  int64_t starts = 0;
  double weighted_loss(double step_weight) const;  // a start: what is minimised
  Score& operator+=(const Score& o);
};

template <typename T>
class DraftGradient {
 public:
  // ops: not owned. embedding (vocab, d): E. head (vocab, d): LM; it may be the same. Both in the
  // memory of the ops, not copied.
  // The draft chooses from `vocabulary` and, for the texts of a batch, from what would be in its
  // dynamic vocabulary (draft_model.h): their tokens, and the target's dynamic_best likeliest ones
  // at each position (not those of branches). 0: from `vocabulary` alone.
  DraftGradient(Ops<T>* ops, const DraftConfig& config, const T* embedding, const T* head,
                int64_t vocab, std::span<const int32_t> vocabulary, int dynamic_best);

  // Step k of a rollout counts step_weight^k, rollouts count the same; the loss is their sum,
  // divided by the number of starts. gradient: written, or nullptr for none. Both arrays are laid
  // out as ParameterLayout, in the memory of the ops.
  Score run(const T* parameters, std::span<const TrainingText* const> texts, int n_steps,
            double step_weight, T* gradient);

  // For tests: of the last run, g (positions, d) and f (steps, rollouts, d), and what the head
  // reads.
  const Buffer<T>& features() const { return g_; }
  const Buffer<T>& f() const { return f_; }
  const Buffer<T>& head_input() const { return u_; }

 private:
  using Index = Buffer<int32_t>;
  template <typename U>
  void zeros(Buffer<U>* buffer, int64_t n) {
    ops_.need(buffer, n);
    ops_.zero(n, buffer->data());
  }
  void gather(std::span<const TrainingText* const> texts, int n_steps);
  void choose_vocabulary(std::span<const TrainingText* const> texts);
  void forward(const T* w);
  void loss(double step_weight, bool want_gradient);
  void backward(const T* w, T* dw);

  // The keys of slots, or their values.
  enum Part { kKeys, kValues };
  struct Projection {
    Buffer<T> joined, in, out, grad;  // (rows, 2 d), (rows, slot_size), (rows, kv) twice
  };
  // Some rows of one, and what they are made of.
  struct Slots {
    Part part;
    Projection* all;
    int64_t first, rows;
    const T* state;          // (rows, d): rms of it
    const int32_t* feature;  // (rows) of g_rms_
  };
  Slots slots(Part part);             // of the positions
  Slots own_slots(Part part, int j);  // own slot j of every rollout: from f of step j - 1
  void project(const T* w, const Slots& s);
  // dstate (rows, d): added to; nullptr where it is not wanted.
  void project_grad(const T* w, const Slots& s, T* dw, T* dstate);
  void own_slot(const T* w, int j);
  void own_slot_grad(const T* w, int j, T* dw);

  DraftConfig config_;
  ParameterLayout layout_;
  Ops<T>& ops_;
  const T *embedding_, *head_;
  int dynamic_best_;
  size_t n_static_;
  std::vector<int32_t> vocabulary_;  // static, then dynamic
  std::vector<int32_t> index_of_;    // (vocab): place in vocabulary_, -1
  Index vocabulary_at_;              // vocabulary_, for the ops
  Buffer<T> head_rows_;              // (vocabulary_, d)

  // Of the batch: its lists, and in the memory of the ops the same, (P, d) states, (G, d)
  // embeddings and (G, 3 d) trigrams.
  Rollouts rollouts_;
  int64_t p_ = 0, g_tokens_ = 0, q_rows_ = 0, n_ = 0;  // P, G, Q, N
  int steps_ = 0;                                      // K
  Index token_, trigram_at_, position_, next_, query_token_, query_position_, start_, ahead_,
      query_, ahead_position_;
  Buffer<T> h_, e_, trigram_;
  const int32_t* ahead(int a) const { return ahead_.data() + (a - 1) * n_; }

  // Kept from forward for backward. (G, ...) first, h_rms_ (P, d), then of the queries:
  Buffer<T> encoder_, encoder_act_, g_, g_rms_, g_inverse_, h_rms_;
  Buffer<T> q_rms_, q_in_, q_;
  Projection slots_[2];  // by Part
  // (K, N, ...):
  Projection own_slots_[2];
  Buffer<T> f_rms_, f_inverse_;  // of f_{j-1}, at j
  Buffer<T> attended_, x2_, x2_rms_, x2_inverse_, y_, gate_up_, act_, x3_, x3_rms_, x3_inverse_, f_;
  Buffer<T> head_cat_, head_low_, head_act_, u_;
  // Gradients.
  Buffer<T> du_, df_, dx3_, dx2_, dact_, dgate_up_, dattended_, dhead_low_, dcat_, dg_, dg_rms_,
      dq_, wide_, narrow_;
  typename Ops<T>::Attention attention_ = {};
  Buffer<SoftTarget> targets_;   // of the texts and branches; their tokens are rows of head_rows_
  Index target_of_;              // (K, N)
  Buffer<T> row_weight_, loss_;  // (K, N)
  Index correct_;                // (K, N)
};

}  // namespace chimera::training
