#include "engine/train/draft_gradient.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

namespace chimera::training {
namespace {

constexpr double kEps = 1e-5;  // of rms()
constexpr double kEmbeddingEps = 1.2e-7;

}  // namespace

double Score::weighted_loss(double step_weight) const {
  double sum = 0, weight = 1;
  for (const StepScore& s : step) {
    sum += weight * s.loss;
    weight *= step_weight;
  }
  return starts == 0 ? 0 : sum / static_cast<double>(starts);
}

Score& Score::operator+=(const Score& o) {
  for (size_t k = 0; k < step.size(); ++k) step[k] += o.step[k];
  starts += o.starts;
  return *this;
}

template <typename T>
DraftGradient<T>::DraftGradient(Ops<T>* ops, const DraftConfig& config, const T* embedding,
                                const T* head, int64_t vocab, std::span<const int32_t> vocabulary,
                                int dynamic_best)
    : config_(config),
      layout_(config),
      ops_(*ops),
      embedding_(embedding),
      head_(head),
      dynamic_best_(dynamic_best),
      n_static_(vocabulary.size()),
      vocabulary_(vocabulary.begin(), vocabulary.end()),
      index_of_(static_cast<size_t>(vocab), -1) {
  for (size_t i = 0; i < n_static_; ++i)
    index_of_[static_cast<size_t>(vocabulary_[i])] = static_cast<int32_t>(i);
}

template <typename T>
void DraftGradient<T>::choose_vocabulary(std::span<const TrainingText* const> texts) {
  for (size_t i = n_static_; i < vocabulary_.size(); ++i)
    index_of_[static_cast<size_t>(vocabulary_[i])] = -1;
  vocabulary_.resize(n_static_);
  const auto add = [&](int32_t token) {
    if (token < 0 || index_of_[static_cast<size_t>(token)] >= 0) return;
    index_of_[static_cast<size_t>(token)] = static_cast<int32_t>(vocabulary_.size());
    vocabulary_.push_back(token);
  };
  if (dynamic_best_ > 0) {
    for (const TrainingText* t : texts) {
      for (const int32_t token : t->tokens) add(token);
      for (const SoftTarget& target : t->targets)
        std::for_each_n(target.token, std::min(dynamic_best_, SoftTarget::kMost), add);
    }
  }
  const int64_t d = config_.hidden_size;
  const auto n = static_cast<int64_t>(vocabulary_.size());
  const bool afresh = ops_.need(&head_rows_, n * d);
  const auto known = afresh ? 0 : static_cast<int64_t>(n_static_);
  ops_.put(vocabulary_, &vocabulary_at_);
  ops_.gather_rows(n - known, d, head_, vocabulary_at_.data() + known,
                   head_rows_.data() + known * d);
}

// The batch's index lists, states and embeddings.
template <typename T>
void DraftGradient<T>::gather(std::span<const TrainingText* const> texts, int n_steps) {
  const int64_t d = config_.hidden_size;
  rollouts_ = Rollouts(texts, n_steps);
  steps_ = n_steps;
  p_ = rollouts_.n_positions();
  g_tokens_ = rollouts_.n_tokens();
  q_rows_ = rollouts_.n_queries();
  n_ = rollouts_.size();
  ops_.put(rollouts_.token, &token_);
  ops_.put(rollouts_.position, &position_);
  ops_.put(rollouts_.next, &next_);
  ops_.put(rollouts_.query_token, &query_token_);
  ops_.put(rollouts_.query_position, &query_position_);
  ops_.put(rollouts_.start, &start_);
  ops_.put(rollouts_.ahead, &ahead_);
  ops_.put(rollouts_.query, &query_);
  ops_.put(rollouts_.ahead_position, &ahead_position_);

  ops_.need(&h_, p_ * d);
  for (size_t i = 0; i < texts.size(); ++i) {
    T* to = h_.data() + rollouts_.texts[i].first_slot * d;
    if constexpr (std::is_same_v<T, float>) {
      ops_.upload(to, texts[i]->states.data(), texts[i]->states.size() * sizeof(T));
    } else {
      const std::vector<T> states(texts[i]->states.begin(), texts[i]->states.end());
      ops_.upload(to, states.data(), states.size() * sizeof(T));
    }
  }
  ops_.need(&e_, g_tokens_ * d);
  ops_.embed(g_tokens_, d, static_cast<T>(kEmbeddingEps), embedding_, token_.data(), e_.data());
  if (!config_.trigram) return;
  ops_.put(rollouts_.trigram, &trigram_at_);
  ops_.need(&trigram_, g_tokens_ * 3 * d);
  ops_.gather_rows(g_tokens_ * 3, d, e_.data(), trigram_at_.data(), trigram_.data());
}

template <typename T>
auto DraftGradient<T>::slots(Part part) -> Slots {
  return {part, &slots_[part], 0, p_, h_rms_.data(), part == kKeys ? nullptr : next_.data()};
}

template <typename T>
auto DraftGradient<T>::own_slots(Part part, int j) -> Slots {
  const int64_t first = (j - 1) * n_;
  return {part,
          &own_slots_[part],
          first,
          n_,
          f_rms_.data() + first * config_.hidden_size,
          ahead(part == kKeys ? j : j + 1)};
}

template <typename T>
void DraftGradient<T>::project(const T* w, const Slots& s) {
  const int64_t kv = config_.kv_size(), width = config_.slot_size();
  const Parameter& norm = s.part == kKeys ? layout_.key_norm : layout_.value_norm;
  const Parameter& weights = s.part == kKeys ? layout_.wk : layout_.wv;
  const T* x = s.state;
  if (config_.slot_features) {
    T* joined = s.all->joined.data() + s.first * width;
    ops_.concat(s.rows, config_.hidden_size, s.state, nullptr, g_rms_.data(), s.feature, joined);
    x = joined;
  }
  T* in = s.all->in.data() + s.first * width;
  ops_.scale(s.rows, width, x, w + norm.offset, in);
  ops_.product(s.rows, kv, width, in, w + weights.offset, s.all->out.data() + s.first * kv);
}

template <typename T>
void DraftGradient<T>::project_grad(const T* w, const Slots& s, T* dw, T* dstate) {
  const int64_t d = config_.hidden_size, kv = config_.kv_size(), width = config_.slot_size();
  const Parameter& norm = s.part == kKeys ? layout_.key_norm : layout_.value_norm;
  const Parameter& weights = s.part == kKeys ? layout_.wk : layout_.wv;
  const T* x = config_.slot_features ? s.all->joined.data() + s.first * width : s.state;
  const T* dy = s.all->grad.data() + s.first * kv;
  ops_.need(&wide_, s.rows * width);
  ops_.grad_weight(s.rows, kv, width, dy, s.all->in.data() + s.first * width, dw + weights.offset);
  ops_.grad_input(s.rows, kv, width, dy, w + weights.offset, wide_.data());
  ops_.scale_grad(s.rows, width, x, w + norm.offset, wide_.data(), wide_.data(), dw + norm.offset);
  if (dstate != nullptr) ops_.add_rows(s.rows, d, wide_.data(), width, nullptr, dstate);
  if (config_.slot_features)
    ops_.add_rows(s.rows, d, wide_.data() + d, width, s.feature, dg_rms_.data());
}

template <typename T>
void DraftGradient<T>::own_slot(const T* w, int j) {
  const int64_t d = config_.hidden_size, kv = config_.kv_size(), block = (j - 1) * n_;
  ops_.rms(n_, d, static_cast<T>(kEps), f_.data() + block * d, f_rms_.data() + block * d,
           f_inverse_.data() + block);
  for (const Part part : {kKeys, kValues}) project(w, own_slots(part, j));
  T* k = own_slots_[kKeys].out.data() + block * kv;
  ops_.rotate(n_, kv, config_.rope_kv_heads, config_.head_dim, ahead_position_.data() + block,
              config_.rope_base, 1, T{1}, k);
  attention_.own_k[j] = k;
  attention_.own_v[j] = own_slots_[kValues].out.data() + block * kv;
}

template <typename T>
void DraftGradient<T>::own_slot_grad(const T* w, int j, T* dw) {
  const int64_t d = config_.hidden_size, kv = config_.kv_size(), block = (j - 1) * n_;
  ops_.rotate(n_, kv, config_.rope_kv_heads, config_.head_dim, ahead_position_.data() + block,
              config_.rope_base, -1, T{1}, own_slots_[kKeys].grad.data() + block * kv);
  zeros(&narrow_, n_ * d);  // gradient of rms(f)
  for (const Part part : {kKeys, kValues}) project_grad(w, own_slots(part, j), dw, narrow_.data());
  ops_.rms_grad(n_, d, f_rms_.data() + block * d, f_inverse_.data() + block, narrow_.data(),
                df_.data() + block * d, true);
}

template <typename T>
void DraftGradient<T>::forward(const T* w) {
  const int64_t d = config_.hidden_size, kv = config_.kv_size(), q = config_.q_size(),
                ffn = config_.ffn_size, rank = config_.head_rank;
  const T eps = static_cast<T>(kEps);

  // Encoder.
  ops_.need(&g_, g_tokens_ * d);
  if (config_.trigram) {
    ops_.need(&encoder_, g_tokens_ * d);
    ops_.need(&encoder_act_, g_tokens_ * d);
    ops_.product(g_tokens_, d, 3 * d, trigram_.data(), w + layout_.w1.offset, encoder_.data());
    ops_.silu(g_tokens_ * d, encoder_.data(), encoder_act_.data());
    ops_.product(g_tokens_, d, d, encoder_act_.data(), w + layout_.w2.offset, g_.data());
  }
  if (config_.skip)
    ops_.product(g_tokens_, d, d, e_.data(), w + layout_.w3.offset, g_.data(), config_.trigram);

  // What depends on the position alone: queries, and the slots of known states.
  ops_.need(&g_rms_, g_tokens_ * d);
  ops_.need(&g_inverse_, g_tokens_);
  ops_.need(&h_rms_, p_ * d);
  ops_.need(&wide_, p_);
  ops_.rms(g_tokens_, d, eps, g_.data(), g_rms_.data(), g_inverse_.data());
  ops_.rms(p_, d, eps, h_.data(), h_rms_.data(), wide_.data());
  for (auto* v : {&q_rms_, &q_in_}) ops_.need(v, q_rows_ * d);
  ops_.need(&q_, q_rows_ * q);
  ops_.gather_rows(q_rows_, d, g_rms_.data(), query_token_.data(), q_rms_.data());
  ops_.scale(q_rows_, d, q_rms_.data(), w + layout_.attn_norm.offset, q_in_.data());
  ops_.product(q_rows_, q, d, q_in_.data(), w + layout_.wq.offset, q_.data());
  const int group = config_.n_heads / config_.n_kv_heads;
  ops_.rotate(q_rows_, q, config_.rope_kv_heads * group, config_.head_dim, query_position_.data(),
              config_.rope_base, 1, T{1} / std::sqrt(static_cast<T>(config_.head_dim)), q_.data());
  const int64_t rows = steps_ * n_;
  for (const Part part : {kKeys, kValues}) {
    for (const auto& [all, n] :
         {std::pair{&slots_[part], p_}, std::pair{&own_slots_[part], rows}}) {
      if (config_.slot_features) ops_.need(&all->joined, n * 2 * d);
      ops_.need(&all->in, n * config_.slot_size());
      ops_.need(&all->out, n * kv);
    }
    project(w, slots(part));
  }
  T* k = slots_[kKeys].out.data();
  ops_.rotate(p_, kv, config_.rope_kv_heads, config_.head_dim, position_.data(), config_.rope_base,
              1, T{1}, k);
  attention_.shape = {config_.n_heads, config_.n_kv_heads, config_.head_dim};
  attention_.texts = rollouts_.texts;
  attention_.query = query_.data();
  attention_.seen = ahead_position_.data();  // of step 0: 0..n
  attention_.n_rows = n_;
  attention_.q = q_.data();
  attention_.k = k;
  attention_.v = slots_[kValues].out.data();
  ops_.attention_begin(attention_);

  ops_.need(&head_cat_, rows * 2 * d);
  for (auto* v : {&f_rms_, &x2_, &x2_rms_, &y_, &x3_, &x3_rms_, &f_, &u_}) ops_.need(v, rows * d);
  for (auto* v : {&f_inverse_, &x2_inverse_, &x3_inverse_}) ops_.need(v, rows);
  ops_.need(&attended_, rows * q);
  ops_.need(&gate_up_, rows * 2 * ffn);
  ops_.need(&act_, rows * ffn);
  for (auto* v : {&head_low_, &head_act_}) ops_.need(v, rows * rank);
  for (int k = 0; k < steps_; ++k) {
    const int64_t block = k * n_;
    if (k > 0) own_slot(w, k);
    T *attended = attended_.data() + block * q, *x2 = x2_.data() + block * d,
      *x3 = x3_.data() + block * d, *f = f_.data() + block * d;
    ops_.attention_step(attention_, k, attended);
    ops_.gather_rows(n_, d, g_.data(), ahead(1 + k), x2);
    ops_.product(n_, d, q, attended, w + layout_.wo.offset, x2, true);
    T *x2_rms = x2_rms_.data() + block * d, *y = y_.data() + block * d;
    ops_.rms(n_, d, eps, x2, x2_rms, x2_inverse_.data() + block);
    ops_.scale(n_, d, x2_rms, w + layout_.ffn_norm.offset, y);
    T *gate_up = gate_up_.data() + block * 2 * ffn, *act = act_.data() + block * ffn;
    ops_.product(n_, 2 * ffn, d, y, w + layout_.gate_up.offset, gate_up);
    ops_.swiglu(n_, ffn, gate_up, act);
    ops_.gather_rows(n_, d, x2, nullptr, x3);
    ops_.product(n_, d, ffn, act, w + layout_.down.offset, x3, true);
    T* x3_rms = x3_rms_.data() + block * d;
    ops_.rms(n_, d, eps, x3, x3_rms, x3_inverse_.data() + block);
    ops_.scale(n_, d, x3_rms, w + layout_.out_norm.offset, f);

    // Residual head.
    const auto head = static_cast<size_t>(std::min(k, config_.n_steps - 1));
    T *cat = head_cat_.data() + block * 2 * d, *u = u_.data() + block * d;
    ops_.concat(n_, d, h_.data(), start_.data(), f, nullptr, cat);
    ops_.residual(n_, d, cat, w + layout_.head_scale.offset + head, u);
    if (rank == 0) continue;
    T *low = head_low_.data() + block * rank, *low_act = head_act_.data() + block * rank;
    ops_.product(n_, rank, 2 * d, cat, w + layout_.head_down[head].offset, low);
    ops_.silu(n_ * rank, low, low_act);
    ops_.product(n_, d, rank, low_act, w + layout_.head_up[head].offset, u, true);
  }
}

template <typename T>
void DraftGradient<T>::backward(const T* w, T* dw) {
  const int64_t d = config_.hidden_size, kv = config_.kv_size(), q = config_.q_size(),
                ffn = config_.ffn_size, rank = config_.head_rank;
  const int64_t rows = steps_ * n_;
  ops_.zero(static_cast<int64_t>(layout_.total), dw);
  zeros(&df_, rows * d);
  for (auto* v : {&dx3_, &dx2_}) ops_.need(v, rows * d);
  ops_.need(&dact_, rows * ffn);
  ops_.need(&dgate_up_, rows * 2 * ffn);
  ops_.need(&dattended_, rows * q);
  ops_.need(&dhead_low_, n_ * std::max<int64_t>(rank, 1));
  ops_.need(&dcat_, n_ * 2 * d);
  zeros(&dg_, g_tokens_ * d);
  zeros(&dg_rms_, g_tokens_ * d);
  zeros(&dq_, q_rows_ * q);
  for (Projection& all : slots_) zeros(&all.grad, p_ * kv);
  for (Projection& all : own_slots_) zeros(&all.grad, rows * kv);
  attention_.dq = dq_.data();
  attention_.dk = slots_[kKeys].grad.data();
  attention_.dv = slots_[kValues].grad.data();
  for (int j = 1; j < steps_; ++j) {
    attention_.own_dk[j] = own_slots_[kKeys].grad.data() + (j - 1) * n_ * kv;
    attention_.own_dv[j] = own_slots_[kValues].grad.data() + (j - 1) * n_ * kv;
  }

  for (int k = steps_ - 1; k >= 0; --k) {
    const int64_t block = k * n_;
    const auto head = static_cast<size_t>(std::min(k, config_.n_steps - 1));
    const T* du = du_.data() + block * d;
    T* df = df_.data() + block * d;

    // Residual head; then the slot that f was made into.
    const T* cat = head_cat_.data() + block * 2 * d;
    ops_.residual_grad(n_, d, cat, du, dw + layout_.head_scale.offset + head, df);
    if (rank > 0) {
      ops_.grad_weight(n_, d, rank, du, head_act_.data() + block * rank,
                       dw + layout_.head_up[head].offset);
      ops_.grad_input(n_, d, rank, du, w + layout_.head_up[head].offset, dhead_low_.data());
      ops_.silu_grad(n_ * rank, head_low_.data() + block * rank, dhead_low_.data(),
                     dhead_low_.data());
      ops_.grad_weight(n_, rank, 2 * d, dhead_low_.data(), cat,
                       dw + layout_.head_down[head].offset);
      ops_.grad_input(n_, rank, 2 * d, dhead_low_.data(), w + layout_.head_down[head].offset,
                      dcat_.data());
      ops_.add_rows(n_, d, dcat_.data() + d, 2 * d, nullptr, df);
    }
    if (k + 1 < steps_) own_slot_grad(w, k + 1, dw);

    // The block. (Its weights' gradients follow for all steps at once.)
    T *dx3 = dx3_.data() + block * d, *dx2 = dx2_.data() + block * d;
    ops_.scale_grad(n_, d, x3_rms_.data() + block * d, w + layout_.out_norm.offset, df, df,
                    dw + layout_.out_norm.offset);
    ops_.rms_grad(n_, d, x3_rms_.data() + block * d, x3_inverse_.data() + block, df, dx3, false);
    T *dact = dact_.data() + block * ffn, *dgate_up = dgate_up_.data() + block * 2 * ffn;
    ops_.grad_input(n_, d, ffn, dx3, w + layout_.down.offset, dact);
    ops_.swiglu_grad(n_, ffn, gate_up_.data() + block * 2 * ffn, dact, dgate_up);
    ops_.need(&narrow_, n_ * d);
    ops_.grad_input(n_, 2 * ffn, d, dgate_up, w + layout_.gate_up.offset, narrow_.data());
    ops_.scale_grad(n_, d, x2_rms_.data() + block * d, w + layout_.ffn_norm.offset, narrow_.data(),
                    narrow_.data(), dw + layout_.ffn_norm.offset);
    ops_.gather_rows(n_, d, dx3, nullptr, dx2);
    ops_.rms_grad(n_, d, x2_rms_.data() + block * d, x2_inverse_.data() + block, narrow_.data(),
                  dx2, true);
    T* dattended = dattended_.data() + block * q;
    ops_.grad_input(n_, d, q, dx2, w + layout_.wo.offset, dattended);
    ops_.attention_step_grad(attention_, k, attended_.data() + block * q, dattended);
    ops_.add_rows(n_, d, dx2, d, ahead(1 + k), dg_.data());
  }
  ops_.grad_weight(rows, d, ffn, dx3_.data(), act_.data(), dw + layout_.down.offset);
  ops_.grad_weight(rows, 2 * ffn, d, dgate_up_.data(), y_.data(), dw + layout_.gate_up.offset);
  ops_.grad_weight(rows, d, q, dx2_.data(), attended_.data(), dw + layout_.wo.offset);

  // Queries and slots of the positions.
  ops_.attention_end_grad(attention_);
  const int group = config_.n_heads / config_.n_kv_heads;
  ops_.rotate(q_rows_, q, config_.rope_kv_heads * group, config_.head_dim, query_position_.data(),
              config_.rope_base, -1, T{1} / std::sqrt(static_cast<T>(config_.head_dim)),
              dq_.data());
  ops_.grad_weight(q_rows_, q, d, dq_.data(), q_in_.data(), dw + layout_.wq.offset);
  ops_.need(&narrow_, std::max(q_rows_, g_tokens_) * d);
  ops_.grad_input(q_rows_, q, d, dq_.data(), w + layout_.wq.offset, narrow_.data());
  ops_.scale_grad(q_rows_, d, q_rms_.data(), w + layout_.attn_norm.offset, narrow_.data(),
                  narrow_.data(), dw + layout_.attn_norm.offset);
  ops_.add_rows(q_rows_, d, narrow_.data(), d, query_token_.data(), dg_rms_.data());
  ops_.rotate(p_, kv, config_.rope_kv_heads, config_.head_dim, position_.data(), config_.rope_base,
              -1, T{1}, attention_.dk);
  for (const Part part : {kKeys, kValues}) project_grad(w, slots(part), dw, nullptr);
  ops_.rms_grad(g_tokens_, d, g_rms_.data(), g_inverse_.data(), dg_rms_.data(), dg_.data(), true);

  // Encoder.
  if (config_.skip)
    ops_.grad_weight(g_tokens_, d, d, dg_.data(), e_.data(), dw + layout_.w3.offset);
  if (!config_.trigram) return;
  ops_.grad_weight(g_tokens_, d, d, dg_.data(), encoder_act_.data(), dw + layout_.w2.offset);
  ops_.grad_input(g_tokens_, d, d, dg_.data(), w + layout_.w2.offset, narrow_.data());
  ops_.silu_grad(g_tokens_ * d, encoder_.data(), narrow_.data(), narrow_.data());
  ops_.grad_weight(g_tokens_, d, 3 * d, narrow_.data(), trigram_.data(), dw + layout_.w1.offset);
}

// The loss of the rows u, and its gradient du.
template <typename T>
void DraftGradient<T>::loss(double step_weight, bool want_gradient) {
  const int64_t rows = steps_ * n_;
  std::vector<SoftTarget> targets = rollouts_.targets;
  for (SoftTarget& t : targets) {
    for (int32_t& token : t.token) token = token < 0 ? -1 : index_of_[static_cast<size_t>(token)];
  }
  std::vector<T> weights;
  double weight = 1.0 / static_cast<double>(std::max<int64_t>(rollouts_.n_starts, 1));
  for (int k = 0; k < steps_; ++k, weight *= step_weight)
    weights.insert(weights.end(), static_cast<size_t>(n_), static_cast<T>(weight));
  ops_.put(targets, &targets_);
  ops_.put(rollouts_.target_of, &target_of_);
  ops_.put(weights, &row_weight_);
  ops_.need(&du_, rows * config_.hidden_size);
  ops_.need(&loss_, rows);
  ops_.need(&correct_, rows);
  ops_.cross_entropy(rows, config_.hidden_size, static_cast<int64_t>(vocabulary_.size()), u_.data(),
                     head_rows_.data(), targets_.data(), target_of_.data(), row_weight_.data(),
                     want_gradient, du_.data(), loss_.data(), correct_.data());
}

template <typename T>
Score DraftGradient<T>::run(const T* parameters, std::span<const TrainingText* const> texts,
                            int n_steps, double step_weight, T* gradient) {
  gather(texts, n_steps);
  choose_vocabulary(texts);
  forward(parameters);
  loss(step_weight, gradient != nullptr);
  if (gradient != nullptr) backward(parameters, gradient);

  // (Only now, when all is on its way: this waits.)
  const std::vector<T> loss = ops_.get(loss_);
  const std::vector<int32_t> correct = ops_.get(correct_);
  Score score;
  score.starts = rollouts_.n_starts;
  for (size_t r = 0; r < loss.size(); ++r) {
    if (correct[r] >= 0)
      score.step[r / static_cast<size_t>(n_)] += {static_cast<double>(loss[r]), 1, correct[r]};
  }
  return score;
}

template class DraftGradient<float>;
template class DraftGradient<double>;

}  // namespace chimera::training
