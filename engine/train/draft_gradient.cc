#include "engine/train/draft_gradient.h"

#include <algorithm>
#include <cmath>

namespace chimera::training {
namespace {

constexpr double kEps = 1e-5;  // of rms()
constexpr double kEmbeddingEps = 1.2e-7;

template <typename T>
void need(std::vector<T>& v, int64_t n) {
  v.resize(static_cast<size_t>(n));
}
template <typename T>
void zeros(std::vector<T>& v, int64_t n) {
  v.assign(static_cast<size_t>(n), T{0});
}

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
DraftGradient<T>::DraftGradient(const DraftConfig& config, const T* embedding, const T* head,
                                int64_t vocab, std::span<const int32_t> vocabulary,
                                int dynamic_best, int threads, Precision precision)
    : config_(config),
      layout_(config),
      ops_(threads, precision),
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
  const auto known = static_cast<int64_t>(head_rows_.empty() ? 0 : n_static_);
  need(head_rows_, static_cast<int64_t>(vocabulary_.size()) * d);
  for (auto i = known; i < static_cast<int64_t>(vocabulary_.size()); ++i)
    std::copy_n(head_ + vocabulary_[static_cast<size_t>(i)] * d, d, head_rows_.begin() + i * d);
}

template <typename T>
int64_t DraftGradient<T>::at(int64_t start, int ahead) const {
  const auto s = static_cast<size_t>(start);
  return std::min(start_[s] + ahead, last_[s]);
}

// The batch's index lists, states and embeddings.
template <typename T>
void DraftGradient<T>::gather(std::span<const TrainingText* const> texts, int n_steps) {
  const int64_t d = config_.hidden_size;
  steps_ = n_steps;
  p_ = n_ = 0;
  texts_.clear();
  rope_at_.clear();
  start_.clear();
  last_.clear();
  for (const TrainingText* t : texts) {
    const int64_t positions = t->n_positions();
    texts_.push_back({p_, positions, t->first_start, t->n_starts(), n_});
    for (int64_t i = 0; i < positions; ++i) rope_at_.push_back(static_cast<int32_t>(i));
    for (int64_t s = 0; s < t->n_starts(); ++s) {
      start_.push_back(p_ + t->first_start + s);
      last_.push_back(p_ + positions - 1);
    }
    p_ += positions;
    n_ += t->n_starts();
  }
  need(h_, p_ * d);
  need(e_, p_ * d);
  need(trigram_, p_ * 3 * d);
  for (size_t i = 0; i < texts.size(); ++i) {
    const TrainingText& t = *texts[i];
    const int64_t first = texts_[i].first_position;
    std::copy(t.states.begin(), t.states.end(), h_.begin() + first * d);
    ops_.shares(t.n_positions(), [&](int64_t begin, int64_t end, int) {
      for (int64_t p = begin; p < end; ++p) {
        const T* row = embedding_ + int64_t{t.tokens[static_cast<size_t>(p)]} * d;
        T squares = 0;
        for (int64_t j = 0; j < d; ++j) squares += row[j] * row[j];
        const T inverse =
            T{1} / std::sqrt(squares / static_cast<T>(d) + static_cast<T>(kEmbeddingEps));
        for (int64_t j = 0; j < d; ++j)
          e_[static_cast<size_t>((first + p) * d + j)] = row[j] * inverse;
      }
    });
    ops_.shares(t.n_positions(), [&](int64_t begin, int64_t end, int) {
      for (int64_t p = begin; p < end; ++p) {
        for (int64_t j = 0; j < 3; ++j) {
          const int64_t from = first + std::max<int64_t>(p - 2 + j, 0);
          std::copy_n(e_.begin() + from * d, d, trigram_.begin() + ((first + p) * 3 + j) * d);
        }
      }
    });
  }
}

template <typename T>
void DraftGradient<T>::own_slot(const T* w, int j) {
  const int64_t d = config_.hidden_size, kv = config_.kv_size(), block = (j - 1) * n_;
  T* f_rms = f_rms_.data() + block * d;
  ops_.rms(n_, d, static_cast<T>(kEps), f_.data() + block * d, f_rms, f_inverse_.data() + block);
  T *key_cat = own_key_cat_.data() + block * 2 * d, *key_in = own_key_in_.data() + block * 2 * d;
  T *value_cat = own_value_cat_.data() + block * 2 * d,
    *value_in = own_value_in_.data() + block * 2 * d;
  need(own_at_, n_);
  ops_.shares(n_, [&](int64_t begin, int64_t end, int) {
    for (int64_t s = begin; s < end; ++s) {
      own_at_[static_cast<size_t>(s)] = rope_at_[static_cast<size_t>(at(s, j))];
      std::copy_n(f_rms + s * d, d, key_cat + s * 2 * d);
      std::copy_n(f_rms + s * d, d, value_cat + s * 2 * d);
      std::copy_n(g_rms_.begin() + at(s, j) * d, d, key_cat + (s * 2 + 1) * d);
      std::copy_n(g_rms_.begin() + at(s, j + 1) * d, d, value_cat + (s * 2 + 1) * d);
    }
  });
  T *k = own_k_.data() + block * kv, *v = own_v_.data() + block * kv;
  ops_.scale(n_, 2 * d, key_cat, w + layout_.key_norm.offset, key_in);
  ops_.product(n_, kv, 2 * d, key_in, w + layout_.wk.offset, k);
  ops_.rotate(n_, kv, config_.rope_kv_heads, config_.head_dim, own_at_.data(), config_.rope_base, 1,
              T{1}, k);
  ops_.scale(n_, 2 * d, value_cat, w + layout_.value_norm.offset, value_in);
  ops_.product(n_, kv, 2 * d, value_in, w + layout_.wv.offset, v);
  attention_.own_k[j] = k;
  attention_.own_v[j] = v;
}

template <typename T>
void DraftGradient<T>::own_slot_grad(const T* w, int j, T* dw) {
  const int64_t d = config_.hidden_size, kv = config_.kv_size(), block = (j - 1) * n_;
  T *dk = own_dk_.data() + block * kv, *dv = own_dv_.data() + block * kv;
  for (int64_t s = 0; s < n_; ++s)
    own_at_[static_cast<size_t>(s)] = rope_at_[static_cast<size_t>(at(s, j))];
  ops_.rotate(n_, kv, config_.rope_kv_heads, config_.head_dim, own_at_.data(), config_.rope_base,
              -1, T{1}, dk);
  need(narrow_, n_ * d);
  zeros(narrow_, n_ * d);  // gradient of rms(f)
  for (const bool key : {true, false}) {
    const Parameter& weights = key ? layout_.wk : layout_.wv;
    const Parameter& norm = key ? layout_.key_norm : layout_.value_norm;
    const T* in = (key ? own_key_in_ : own_value_in_).data() + block * 2 * d;
    const T* cat = (key ? own_key_cat_ : own_value_cat_).data() + block * 2 * d;
    const T* dy = key ? dk : dv;
    need(wide_, n_ * 2 * d);
    ops_.grad_weight(n_, kv, 2 * d, dy, in, dw + weights.offset);
    ops_.grad_input(n_, kv, 2 * d, dy, w + weights.offset, wide_.data());
    ops_.scale_grad(n_, 2 * d, cat, w + norm.offset, wide_.data(), wide_.data(), dw + norm.offset);
    // Starts share positions of g: by columns, so that threads do not meet.
    ops_.shares(d, [&](int64_t begin, int64_t end, int) {
      for (int64_t s = 0; s < n_; ++s) {
        const T* from = wide_.data() + s * 2 * d;
        T* to_g = dg_rms_.data() + at(s, key ? j : j + 1) * d;
        for (int64_t i = begin; i < end; ++i) {
          narrow_[static_cast<size_t>(s * d + i)] += from[i];
          to_g[i] += from[d + i];
        }
      }
    });
  }
  ops_.rms_grad(n_, d, f_rms_.data() + block * d, f_inverse_.data() + block, narrow_.data(),
                df_.data() + block * d, true);
}

template <typename T>
void DraftGradient<T>::forward(const T* w) {
  const int64_t d = config_.hidden_size, kv = config_.kv_size(), q = config_.q_size(),
                ffn = config_.ffn_size, rank = config_.head_rank;
  const T eps = static_cast<T>(kEps);

  // Trigram encoder.
  need(encoder_, p_ * d);
  need(encoder_act_, p_ * d);
  need(g_, p_ * d);
  ops_.product(p_, d, 3 * d, trigram_.data(), w + layout_.w1.offset, encoder_.data());
  ops_.silu(p_ * d, encoder_.data(), encoder_act_.data());
  ops_.product(p_, d, d, encoder_act_.data(), w + layout_.w2.offset, g_.data());
  if (config_.skip) ops_.product(p_, d, d, e_.data(), w + layout_.w3.offset, g_.data(), true);

  // What depends on the position alone: queries, and the slots of known states.
  need(g_rms_, p_ * d);
  need(g_inverse_, p_);
  need(h_rms_, p_ * d);
  need(wide_, p_);
  ops_.rms(p_, d, eps, g_.data(), g_rms_.data(), g_inverse_.data());
  ops_.rms(p_, d, eps, h_.data(), h_rms_.data(), wide_.data());
  need(q_in_, p_ * d);
  need(q_, p_ * q);
  ops_.scale(p_, d, g_rms_.data(), w + layout_.attn_norm.offset, q_in_.data());
  ops_.product(p_, q, d, q_in_.data(), w + layout_.wq.offset, q_.data());
  const int group = config_.n_heads / config_.n_kv_heads;
  ops_.rotate(p_, q, config_.rope_kv_heads * group, config_.head_dim, rope_at_.data(),
              config_.rope_base, 1, T{1} / std::sqrt(static_cast<T>(config_.head_dim)), q_.data());
  need(key_cat_, p_ * 2 * d);
  need(key_in_, p_ * 2 * d);
  need(value_cat_, p_ * 2 * d);
  need(value_in_, p_ * 2 * d);
  ops_.shares(p_, [&](int64_t begin, int64_t end, int) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t next = std::min(p + 1, p_ - 1);  // a text's last slot is never seen
      std::copy_n(h_rms_.begin() + p * d, d, key_cat_.begin() + p * 2 * d);
      std::copy_n(h_rms_.begin() + p * d, d, value_cat_.begin() + p * 2 * d);
      std::copy_n(g_rms_.begin() + p * d, d, key_cat_.begin() + (p * 2 + 1) * d);
      std::copy_n(g_rms_.begin() + next * d, d, value_cat_.begin() + (p * 2 + 1) * d);
    }
  });
  need(k_, p_ * kv);
  need(v_, p_ * kv);
  ops_.scale(p_, 2 * d, key_cat_.data(), w + layout_.key_norm.offset, key_in_.data());
  ops_.product(p_, kv, 2 * d, key_in_.data(), w + layout_.wk.offset, k_.data());
  ops_.rotate(p_, kv, config_.rope_kv_heads, config_.head_dim, rope_at_.data(), config_.rope_base,
              1, T{1}, k_.data());
  ops_.scale(p_, 2 * d, value_cat_.data(), w + layout_.value_norm.offset, value_in_.data());
  ops_.product(p_, kv, 2 * d, value_in_.data(), w + layout_.wv.offset, v_.data());
  attention_.shape = {config_.n_heads, config_.n_kv_heads, config_.head_dim};
  attention_.texts = texts_;
  attention_.q = q_.data();
  attention_.k = k_.data();
  attention_.v = v_.data();
  ops_.attention_begin(attention_);

  const int64_t rows = steps_ * n_;
  for (auto* v : {&own_key_cat_, &own_key_in_, &own_value_cat_, &own_value_in_, &head_cat_})
    need(*v, rows * 2 * d);
  for (auto* v : {&own_k_, &own_v_}) need(*v, rows * kv);
  for (auto* v : {&f_rms_, &x2_, &x2_rms_, &y_, &x3_, &x3_rms_, &f_, &u_}) need(*v, rows * d);
  for (auto* v : {&f_inverse_, &x2_inverse_, &x3_inverse_}) need(*v, rows);
  need(attended_, rows * q);
  need(gate_up_, rows * 2 * ffn);
  need(act_, rows * ffn);
  for (auto* v : {&head_low_, &head_act_}) need(*v, rows * rank);
  for (int k = 0; k < steps_; ++k) {
    const int64_t block = k * n_;
    if (k > 0) own_slot(w, k);
    T *attended = attended_.data() + block * q, *x2 = x2_.data() + block * d,
      *x3 = x3_.data() + block * d, *f = f_.data() + block * d;
    ops_.attention_step(attention_, k, attended);
    for (int64_t s = 0; s < n_; ++s) std::copy_n(g_.begin() + at(s, 1 + k) * d, d, x2 + s * d);
    ops_.product(n_, d, q, attended, w + layout_.wo.offset, x2, true);
    T *x2_rms = x2_rms_.data() + block * d, *y = y_.data() + block * d;
    ops_.rms(n_, d, eps, x2, x2_rms, x2_inverse_.data() + block);
    ops_.scale(n_, d, x2_rms, w + layout_.ffn_norm.offset, y);
    T *gate_up = gate_up_.data() + block * 2 * ffn, *act = act_.data() + block * ffn;
    ops_.product(n_, 2 * ffn, d, y, w + layout_.gate_up.offset, gate_up);
    ops_.swiglu(n_, ffn, gate_up, act);
    std::copy_n(x2, n_ * d, x3);
    ops_.product(n_, d, ffn, act, w + layout_.down.offset, x3, true);
    T* x3_rms = x3_rms_.data() + block * d;
    ops_.rms(n_, d, eps, x3, x3_rms, x3_inverse_.data() + block);
    ops_.scale(n_, d, x3_rms, w + layout_.out_norm.offset, f);

    // Residual head.
    const auto head = static_cast<size_t>(std::min(k, config_.n_steps - 1));
    const T scale = w[layout_.head_scale.offset + head];
    T *cat = head_cat_.data() + block * 2 * d, *u = u_.data() + block * d;
    ops_.shares(n_, [&](int64_t begin, int64_t end, int) {
      for (int64_t s = begin; s < end; ++s) {
        const T* h = h_.data() + start_[static_cast<size_t>(s)] * d;
        std::copy_n(h, d, cat + s * 2 * d);
        std::copy_n(f + s * d, d, cat + (s * 2 + 1) * d);
        for (int64_t i = 0; i < d; ++i) u[s * d + i] = scale * h[i] + f[s * d + i];
      }
    });
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
  std::fill(dw, dw + layout_.total, T{0});
  zeros(df_, rows * d);
  for (auto* v : {&dx3_, &dx2_}) need(*v, rows * d);
  need(dact_, rows * ffn);
  need(dgate_up_, rows * 2 * ffn);
  need(dattended_, rows * q);
  need(dhead_low_, n_ * std::max<int64_t>(rank, 1));
  need(dcat_, n_ * 2 * d);
  zeros(dg_, p_ * d);
  zeros(dg_rms_, p_ * d);
  zeros(dq_, p_ * q);
  for (auto* v : {&dk_, &dv_}) zeros(*v, p_ * kv);
  for (auto* v : {&own_dk_, &own_dv_}) zeros(*v, rows * kv);
  attention_.dq = dq_.data();
  attention_.dk = dk_.data();
  attention_.dv = dv_.data();
  for (int j = 1; j < steps_; ++j) {
    attention_.own_dk[j] = own_dk_.data() + (j - 1) * n_ * kv;
    attention_.own_dv[j] = own_dv_.data() + (j - 1) * n_ * kv;
  }

  for (int k = steps_ - 1; k >= 0; --k) {
    const int64_t block = k * n_;
    const auto head = static_cast<size_t>(std::min(k, config_.n_steps - 1));
    const T* du = du_.data() + block * d;
    T* df = df_.data() + block * d;

    // Residual head; then the slot that f was made into.
    double dscale = 0;
    for (int64_t s = 0; s < n_; ++s) {
      const T* h = h_.data() + start_[static_cast<size_t>(s)] * d;
      for (int64_t i = 0; i < d; ++i) {
        dscale += static_cast<double>(du[s * d + i]) * static_cast<double>(h[i]);
        df[s * d + i] += du[s * d + i];
      }
    }
    dw[layout_.head_scale.offset + head] += static_cast<T>(dscale);
    if (rank > 0) {
      ops_.grad_weight(n_, d, rank, du, head_act_.data() + block * rank,
                       dw + layout_.head_up[head].offset);
      ops_.grad_input(n_, d, rank, du, w + layout_.head_up[head].offset, dhead_low_.data());
      ops_.silu_grad(n_ * rank, head_low_.data() + block * rank, dhead_low_.data(),
                     dhead_low_.data());
      ops_.grad_weight(n_, rank, 2 * d, dhead_low_.data(), head_cat_.data() + block * 2 * d,
                       dw + layout_.head_down[head].offset);
      ops_.grad_input(n_, rank, 2 * d, dhead_low_.data(), w + layout_.head_down[head].offset,
                      dcat_.data());
      for (int64_t s = 0; s < n_; ++s) {
        for (int64_t i = 0; i < d; ++i)
          df[s * d + i] += dcat_[static_cast<size_t>((s * 2 + 1) * d + i)];
      }
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
    need(narrow_, n_ * d);
    ops_.grad_input(n_, 2 * ffn, d, dgate_up, w + layout_.gate_up.offset, narrow_.data());
    ops_.scale_grad(n_, d, x2_rms_.data() + block * d, w + layout_.ffn_norm.offset, narrow_.data(),
                    narrow_.data(), dw + layout_.ffn_norm.offset);
    std::copy_n(dx3, n_ * d, dx2);
    ops_.rms_grad(n_, d, x2_rms_.data() + block * d, x2_inverse_.data() + block, narrow_.data(),
                  dx2, true);
    T* dattended = dattended_.data() + block * q;
    ops_.grad_input(n_, d, q, dx2, w + layout_.wo.offset, dattended);
    ops_.attention_step_grad(attention_, k, attended_.data() + block * q, dattended);
    for (int64_t s = 0; s < n_; ++s) {
      T* to = dg_.data() + at(s, 1 + k) * d;
      for (int64_t i = 0; i < d; ++i) to[i] += dx2[s * d + i];
    }
  }
  ops_.grad_weight(rows, d, ffn, dx3_.data(), act_.data(), dw + layout_.down.offset);
  ops_.grad_weight(rows, 2 * ffn, d, dgate_up_.data(), y_.data(), dw + layout_.gate_up.offset);
  ops_.grad_weight(rows, d, q, dx2_.data(), attended_.data(), dw + layout_.wo.offset);

  // Queries and slots of the positions.
  ops_.attention_end_grad(attention_);
  const int group = config_.n_heads / config_.n_kv_heads;
  ops_.rotate(p_, q, config_.rope_kv_heads * group, config_.head_dim, rope_at_.data(),
              config_.rope_base, -1, T{1} / std::sqrt(static_cast<T>(config_.head_dim)),
              dq_.data());
  ops_.grad_weight(p_, q, d, dq_.data(), q_in_.data(), dw + layout_.wq.offset);
  need(narrow_, p_ * d);
  ops_.grad_input(p_, q, d, dq_.data(), w + layout_.wq.offset, narrow_.data());
  ops_.scale_grad(p_, d, g_rms_.data(), w + layout_.attn_norm.offset, narrow_.data(),
                  narrow_.data(), dw + layout_.attn_norm.offset);
  for (int64_t i = 0; i < p_ * d; ++i)
    dg_rms_[static_cast<size_t>(i)] += narrow_[static_cast<size_t>(i)];
  ops_.rotate(p_, kv, config_.rope_kv_heads, config_.head_dim, rope_at_.data(), config_.rope_base,
              -1, T{1}, dk_.data());
  for (const bool key : {true, false}) {
    const Parameter& weights = key ? layout_.wk : layout_.wv;
    const Parameter& norm = key ? layout_.key_norm : layout_.value_norm;
    const T* dy = (key ? dk_ : dv_).data();
    need(wide_, p_ * 2 * d);
    ops_.grad_weight(p_, kv, 2 * d, dy, (key ? key_in_ : value_in_).data(), dw + weights.offset);
    ops_.grad_input(p_, kv, 2 * d, dy, w + weights.offset, wide_.data());
    ops_.scale_grad(p_, 2 * d, (key ? key_cat_ : value_cat_).data(), w + norm.offset, wide_.data(),
                    wide_.data(), dw + norm.offset);
    for (int64_t p = 0; p < p_; ++p) {
      T* to = dg_rms_.data() + std::min(p + (key ? 0 : 1), p_ - 1) * d;
      for (int64_t i = 0; i < d; ++i) to[i] += wide_[static_cast<size_t>((p * 2 + 1) * d + i)];
    }
  }
  ops_.rms_grad(p_, d, g_rms_.data(), g_inverse_.data(), dg_rms_.data(), dg_.data(), true);

  // Trigram encoder.
  if (config_.skip) ops_.grad_weight(p_, d, d, dg_.data(), e_.data(), dw + layout_.w3.offset);
  ops_.grad_weight(p_, d, d, dg_.data(), encoder_act_.data(), dw + layout_.w2.offset);
  ops_.grad_input(p_, d, d, dg_.data(), w + layout_.w2.offset, narrow_.data());
  ops_.silu_grad(p_ * d, encoder_.data(), narrow_.data(), narrow_.data());
  ops_.grad_weight(p_, d, 3 * d, narrow_.data(), trigram_.data(), dw + layout_.w1.offset);
}

template <typename T>
Score DraftGradient<T>::run(const T* parameters, std::span<const TrainingText* const> texts,
                            int n_steps, double step_weight, T* gradient) {
  gather(texts, n_steps);
  choose_vocabulary(texts);
  forward(parameters);

  const int64_t rows = steps_ * n_;
  std::vector<const SoftTarget*> targets(static_cast<size_t>(rows));
  std::vector<T> weights(static_cast<size_t>(rows));
  std::vector<StepScore> scores(static_cast<size_t>(rows));
  double weight = 1.0 / static_cast<double>(std::max<int64_t>(n_, 1));
  size_t row = 0;
  for (int k = 0; k < steps_; ++k, weight *= step_weight) {
    for (const TrainingText* t : texts) {
      for (int64_t s = 0; s < t->n_starts(); ++s, ++row) {
        const bool known = s + k < t->n_starts();
        targets[row] = known ? &t->targets[static_cast<size_t>(s + k)] : nullptr;
        weights[row] = known ? static_cast<T>(weight) : T{0};
      }
    }
  }
  need(du_, rows * config_.hidden_size);
  ops_.cross_entropy(rows, config_.hidden_size, static_cast<int64_t>(vocabulary_.size()), u_.data(),
                     head_rows_.data(), index_of_.data(), targets.data(), weights.data(),
                     gradient != nullptr, du_.data(), scores.data());
  if (gradient != nullptr) backward(parameters, gradient);

  Score score;
  score.starts = n_;
  for (size_t r = 0; r < scores.size(); ++r)
    score.step[r / static_cast<size_t>(std::max<int64_t>(n_, 1))] += scores[r];
  return score;
}

template class DraftGradient<float>;
template class DraftGradient<double>;

}  // namespace chimera::training
