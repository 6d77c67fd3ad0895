// A draft model that others trained, with golden values (shared/draft_prototype). Its file has
// other names than ours, and rotates the pairs (2 j, 2 j + 1) of a head.
#pragma once

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "engine/chimera/draft_tensors.h"
#include "loader/mapped_file.h"
#include "loader/safetensors.h"

namespace chimera::test {

inline DraftTensors load_prototype(const std::string& path) {
  const MappedFile file(path);
  SafeTensors st = parse_safetensors(file.bytes(), file.name());
  const auto take = [&](const std::string& name) { return st.tensors.at(name).floats(); };
  DraftTensors t;
  DraftConfig& c = t.config;
  c.hidden_size = 576;
  c.n_heads = 9, c.n_kv_heads = 3, c.head_dim = 64;
  c.ffn_size = 512;
  c.rope_base = 100000;
  const auto permute = [](const std::vector<float>& w, size_t cols) {
    std::vector<float> out(w.size());
    for (size_t r = 0; r < w.size() / cols; ++r) {
      const size_t i = r % 64, from = r - i + (i < 32 ? 2 * i : 2 * (i - 32) + 1);
      std::copy_n(w.begin() + static_cast<std::ptrdiff_t>(from * cols), cols,
                  out.begin() + static_cast<std::ptrdiff_t>(r * cols));
    }
    return out;
  };
  t.w1 = take("encoder.w1"), t.w2 = take("encoder.w2"), t.w3 = take("encoder.w3");
  t.key_norm = take("attn.key_norm"), t.value_norm = take("attn.value_norm"),
  t.attn_norm = take("attn.norm");
  t.wq = permute(take("attn.q"), 576), t.wk = permute(take("attn.k"), 1152);
  t.wv = take("attn.v"), t.wo = take("attn.o");
  t.ffn_norm = take("ffn.norm"), t.gate_up = take("ffn.gate_up"), t.down = take("ffn.down");
  t.out_norm = take("out_norm"), t.head_scale = take("head.a");
  for (const char* k : {"0", "1", "2", "3"}) {
    t.head_down.push_back(take(std::string("head.") + k + ".down"));
    t.head_up.push_back(take(std::string("head.") + k + ".up"));
  }
  const SafeTensor& ids = st.tensors.at("vocabulary");
  t.vocabulary.resize(static_cast<size_t>(ids.count()));
  std::memcpy(t.vocabulary.data(), ids.data, ids.bytes);
  return t;
}

}  // namespace chimera::test
