#include "engine/train/parameters.h"

#include <algorithm>
#include <cmath>

#include "engine/error.h"
#include "engine/philox.h"

namespace chimera::training {
namespace {

// The tensors in the order of the layout.
template <typename Tensors, typename F>
void each_tensor(Tensors& t, const F& f) {
  for (auto* v : {&t.w1, &t.w2, &t.w3, &t.key_norm, &t.value_norm, &t.attn_norm, &t.wq, &t.wk,
                  &t.wv, &t.wo, &t.ffn_norm, &t.gate_up, &t.down, &t.out_norm, &t.head_scale}) {
    f(*v);
  }
  for (auto& v : t.head_down) f(v);
  for (auto& v : t.head_up) f(v);
}

}  // namespace

ParameterLayout::ParameterLayout(const DraftConfig& c) {
  const int64_t d = c.hidden_size;
  const auto add = [&](Parameter* p, const std::string& name, int64_t rows, int64_t cols) {
    *p = {name, rows, cols, total, rows > 1};
    total += p->size();
    all.push_back(*p);
  };
  add(&w1, "w1", c.trigram ? d : 0, 3 * d);
  add(&w2, "w2", c.trigram ? d : 0, d);
  add(&w3, "w3", c.skip ? d : 0, d);
  add(&key_norm, "key_norm", 1, c.slot_size());
  add(&value_norm, "value_norm", 1, c.slot_size());
  add(&attn_norm, "attn_norm", 1, d);
  add(&wq, "wq", c.q_size(), d);
  add(&wk, "wk", c.kv_size(), c.slot_size());
  add(&wv, "wv", c.kv_size(), c.slot_size());
  add(&wo, "wo", d, c.q_size());
  add(&ffn_norm, "ffn_norm", 1, d);
  add(&gate_up, "gate_up", 2 * int64_t{c.ffn_size}, d);
  add(&down, "down", d, c.ffn_size);
  add(&out_norm, "out_norm", 1, d);
  add(&head_scale, "head_scale", 1, c.n_steps);
  head_down.resize(static_cast<size_t>(c.n_steps));
  head_up.resize(static_cast<size_t>(c.n_steps));
  for (size_t k = 0; k < head_down.size(); ++k) {
    add(&head_down[k], "head_down." + std::to_string(k), c.head_rank, 2 * d);
  }
  for (size_t k = 0; k < head_up.size(); ++k) {
    add(&head_up[k], "head_up." + std::to_string(k), d, c.head_rank);
  }
}

std::vector<float> pack_parameters(const DraftTensors& tensors) {
  std::vector<float> values;
  each_tensor(tensors, [&](const std::vector<float>& v) {
    values.insert(values.end(), v.begin(), v.end());
  });
  const size_t expected = ParameterLayout(tensors.config).total;
  if (values.size() != expected) {
    throw Error("draft", std::to_string(expected) + " parameters", std::to_string(values.size()));
  }
  return values;
}

void unpack_parameters(const std::vector<float>& values, DraftTensors* tensors) {
  const ParameterLayout layout(tensors->config);
  tensors->head_down.resize(layout.head_down.size());
  tensors->head_up.resize(layout.head_up.size());
  size_t i = 0;
  each_tensor(*tensors, [&](std::vector<float>& v) {
    const Parameter& p = layout.all[i++];
    v.assign(values.begin() + static_cast<std::ptrdiff_t>(p.offset),
             values.begin() + static_cast<std::ptrdiff_t>(p.offset + p.size()));
  });
}

DraftConfig config_for(const LlamaConfig& target) {
  DraftConfig c;
  c.hidden_size = target.hidden_size;
  c.n_heads = target.n_heads;
  c.n_kv_heads = target.n_kv_heads;
  c.head_dim = target.head_dim;
  c.rope_base = target.rope_base;
  return c;
}

DraftTensors initial_draft(const DraftConfig& config, const std::vector<float>& target_norm,
                           uint64_t seed) {
  const ParameterLayout layout(config);
  const auto d = static_cast<size_t>(config.hidden_size);
  std::vector<float> values(layout.total);
  uint64_t drawn = 0;
  // Variance 1 / inputs: what goes in with size 1 comes out with size 1. (Uniform: no libm.)
  const auto random = [&](const Parameter& p, double gain) {
    const double width = gain * std::sqrt(3.0 / static_cast<double>(std::max<int64_t>(p.cols, 1)));
    for (size_t i = 0; i < p.size(); ++i) {
      values[p.offset + i] = static_cast<float>((2 * philox_uniform(seed, drawn++) - 1) * width);
    }
  };
  const auto fill = [&](const Parameter& p, float value) {
    std::fill_n(values.begin() + static_cast<std::ptrdiff_t>(p.offset), p.size(), value);
  };
  random(layout.w1, 1);
  random(layout.w2, 1);
  random(layout.w3, 1);
  for (const Parameter* p :
       {&layout.key_norm, &layout.value_norm, &layout.attn_norm, &layout.ffn_norm})
    fill(*p, 1);
  random(layout.wq, 1);
  random(layout.wk, 1);
  // A query finds the slots of its own token from the start: wk's part for g is wq's, the mean over
  // the query heads that share a KV head being as good as any of them, the first is taken.
  const int group = config.n_heads / config.n_kv_heads;
  for (int h = 0; h < config.n_kv_heads && config.slot_features; ++h) {
    for (int r = 0; r < config.head_dim; ++r) {
      const size_t to = static_cast<size_t>(h * config.head_dim + r) * 2 * d + d;
      const size_t from = static_cast<size_t>(h * group * config.head_dim + r) * d;
      for (size_t i = 0; i < d; ++i)
        values[layout.wk.offset + to + i] = values[layout.wq.offset + from + i];
    }
  }
  random(layout.wv, 1);
  random(layout.wo, 0.5);
  random(layout.gate_up, 1);
  random(layout.down, 0.5);
  for (size_t i = 0; i < d; ++i) values[layout.out_norm.offset + i] = 0.3f * target_norm[i];
  fill(layout.head_scale, 0.5f);
  for (const Parameter& p : layout.head_down) random(p, 1);
  DraftTensors tensors;
  tensors.config = config;
  unpack_parameters(values, &tensors);
  return tensors;
}

}  // namespace chimera::training
