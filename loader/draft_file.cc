#include "loader/draft_file.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <nlohmann/json.hpp>
#include <set>

#include "engine/error.h"
#include "loader/mapped_file.h"
#include "loader/safetensors.h"

namespace chimera {
namespace {

constexpr char kVersion[] = "1";
constexpr char kTrainAgain[] = "train the draft again with chimera train";

// Each tensor with its name and shape.
template <typename Tensors, typename F>
void each_tensor(Tensors& t, const F& f) {
  const DraftConfig& c = t.config;
  const int64_t d = c.hidden_size, q = c.q_size(), kv = c.kv_size(), ffn = c.ffn_size,
                rank = c.head_rank, slot = c.slot_size();
  using Shape = std::vector<int64_t>;
  if (c.trigram) f("w1", t.w1, Shape{d, 3 * d});
  if (c.trigram) f("w2", t.w2, Shape{d, d});
  if (c.skip) f("w3", t.w3, Shape{d, d});
  f("key_norm", t.key_norm, Shape{slot});
  f("value_norm", t.value_norm, Shape{slot});
  f("attn_norm", t.attn_norm, Shape{d});
  f("wq", t.wq, Shape{q, d});
  f("wk", t.wk, Shape{kv, slot});
  f("wv", t.wv, Shape{kv, slot});
  f("wo", t.wo, Shape{d, q});
  f("ffn_norm", t.ffn_norm, Shape{d});
  f("gate_up", t.gate_up, Shape{2 * ffn, d});
  f("down", t.down, Shape{d, ffn});
  f("out_norm", t.out_norm, Shape{d});
  f("head_scale", t.head_scale, Shape{c.n_steps});
  if (rank == 0) return;
  for (size_t k = 0; k < static_cast<size_t>(c.n_steps); ++k) {
    f("head_down." + std::to_string(k), t.head_down[k], Shape{rank, 2 * d});
    f("head_up." + std::to_string(k), t.head_up[k], Shape{d, rank});
  }
}

std::string write_config(const DraftConfig& c) {
  nlohmann::ordered_json json{{"hidden_size", c.hidden_size}, {"n_heads", c.n_heads},
                              {"n_kv_heads", c.n_kv_heads},   {"head_dim", c.head_dim},
                              {"ffn_size", c.ffn_size},       {"n_steps", c.n_steps},
                              {"head_rank", c.head_rank},     {"rope_kv_heads", c.rope_kv_heads},
                              {"rope_base", c.rope_base},     {"skip", c.skip}};
  // Not there in older files, and older programs take files without them.
  if (!c.trigram) json["trigram"] = false;
  if (!c.slot_features) json["slot_features"] = false;
  const auto short_numbers = [](const std::vector<float>& values) {
    std::vector<double> numbers;
    for (const float v : values) numbers.push_back(std::round(double{v} * 1000) / 1000);
    return numbers;
  };
  for (const auto& [name, calibration] :
       {std::pair{"greedy", &c.greedy}, std::pair{"sampled", &c.sampled}})
    if (!calibration->temperature.empty())
      json[name] = {{"temperature", short_numbers(calibration->temperature)},
                    {"coverage", short_numbers(calibration->coverage)}};
  return json.dump();
}

// An absent one is as good as one of ones.
DraftCalibration take_calibration(nlohmann::json* config, const char* name,
                                  const std::string& where) {
  DraftCalibration calibration;
  const auto found = config->find(name);
  if (found == config->end()) return calibration;
  const auto read = [&](const char* key, std::vector<float>* values, float most) {
    bool good = found->is_object() && found->contains(key) && (*found)[key].is_array() &&
                !(*found)[key].empty() && (*found)[key].size() <= 32;
    for (size_t i = 0; good && i < (*found)[key].size(); ++i) {
      const nlohmann::json& value = (*found)[key][i];
      good = value.is_number() && value.get<float>() >= DraftCalibration::kLeast &&
             value.get<float>() <= most;
      if (good) values->push_back(value.get<float>());
    }
    if (!good)
      throw Error(where + ": " + name + ": " + key,
                  "1 to 32 numbers from 0.01 to " + std::to_string(static_cast<int>(most)),
                  printable(found->dump()), kTrainAgain);
  };
  read("temperature", &calibration.temperature, 100);
  read("coverage", &calibration.coverage, 1);
  if (found->size() != 2 || calibration.temperature.size() != calibration.coverage.size())
    throw Error(where + ": " + name, "temperature and coverage of the same length",
                printable(found->dump()), kTrainAgain);
  config->erase(found);
  return calibration;
}

DraftConfig read_config(const std::string& text, const std::string& where) {
  // Flat, short and of known members: a depth or duplicate could only fall back on an error below.
  if (text.size() > 4096)
    throw Error(where, "a short object", std::to_string(text.size()) + " bytes", kTrainAgain);
  nlohmann::json json = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) throw Error(where, "a JSON object", in_quotes(text), kTrainAgain);
  DraftConfig c;
  const auto take = [&](const char* key, int min, int max) {
    const auto it = json.find(key);
    if (it == json.end() || !it->is_number_integer() || *it < min || *it > max) {
      throw Error(where + ": " + key,
                  "a whole number from " + std::to_string(min) + " to " + std::to_string(max),
                  it == json.end() ? "nothing" : printable(it->dump()), kTrainAgain);
    }
    const int value = it->get<int>();
    json.erase(it);
    return value;
  };
  c.hidden_size = take("hidden_size", 1, 1 << 16);
  c.n_heads = take("n_heads", 1, 1 << 10);
  c.n_kv_heads = take("n_kv_heads", 1, c.n_heads);
  c.head_dim = take("head_dim", 2, kMaxHeadDim);
  c.ffn_size = take("ffn_size", 1, 1 << 18);
  c.n_steps = take("n_steps", 1, 8);
  c.head_rank = take("head_rank", 0, 1 << 14);
  c.rope_kv_heads = take("rope_kv_heads", 0, c.n_kv_heads);
  if (c.n_heads % c.n_kv_heads != 0 || c.head_dim % 2 != 0) {
    throw Error(where, "heads in equal groups, of an even size",
                std::to_string(c.n_heads) + " heads of " + std::to_string(c.head_dim) + ", " +
                    std::to_string(c.n_kv_heads) + " for keys",
                kTrainAgain);
  }
  const auto base = json.find("rope_base");
  if (base == json.end() || !base->is_number() || !(base->get<double>() >= 1) ||
      !std::isfinite(base->get<double>())) {
    throw Error(where + ": rope_base", "a number of 1 or more",
                base == json.end() ? "nothing" : printable(base->dump()), kTrainAgain);
  }
  c.rope_base = base->get<double>();
  json.erase(base);
  if (!json.contains("skip"))
    throw Error(where + ": skip", "true or false", "nothing", kTrainAgain);
  for (const auto& [key, setting] :
       {std::pair{"skip", &c.skip}, {"trigram", &c.trigram}, {"slot_features", &c.slot_features}}) {
    const auto it = json.find(key);
    if (it == json.end()) continue;
    if (!it->is_boolean())
      throw Error(where + ": " + key, "true or false", printable(it->dump()), kTrainAgain);
    *setting = it->get<bool>();
    json.erase(it);
  }
  c.greedy = take_calibration(&json, "greedy", where);
  c.sampled = take_calibration(&json, "sampled", where);
  if (!json.empty()) {
    throw Error(where, "what this version knows", in_quotes(json.begin().key()),
                "use a newer version of chimera");
  }
  return c;
}

// FNV-1a, 64 bits, over words of 8 bytes where there are such.
class Hash {
 public:
  void add(const void* bytes, size_t n) {
    const auto* p = static_cast<const unsigned char*>(bytes);
    for (; n >= 8; n -= 8, p += 8) {
      uint64_t word;
      std::memcpy(&word, p, 8);
      mix(word);
    }
    for (; n > 0; --n, ++p) mix(*p);
  }
  void add(int64_t n) { mix(static_cast<uint64_t>(n)); }
  void add(const std::string& s) {
    add(static_cast<int64_t>(s.size()));
    add(s.data(), s.size());
  }
  std::string hex() const {
    char text[17];
    std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(state_));
    return text;
  }

 private:
  void mix(uint64_t word) {
    state_ = (state_ ^ word) * 0x100000001b3u;
    state_ ^= state_ >> 32;
  }
  uint64_t state_ = 0xcbf29ce484222325u;
};

}  // namespace

void check_vocabulary(std::span<const int32_t> ids, const std::string& where,
                      const std::string& hint) {
  std::set<int32_t> seen;
  for (const int32_t id : ids)
    if (id < 0 || !seen.insert(id).second)
      throw Error(where, "different token ids", std::to_string(id) + (id < 0 ? "" : " twice"),
                  hint);
}

DraftTensors load_draft(const std::string& path) {
  const MappedFile mapped(path);
  const std::string& file = mapped.name();
  refuse_pickle(mapped.bytes(), file, "a safetensors draft", "a safetensors file");
  SafeTensors st = parse_safetensors(mapped.bytes(), file);
  const auto meta = [&](const char* key) {
    const auto it = st.metadata.find(key);
    if (it == st.metadata.end()) {
      throw Error(file + ": metadata", std::string("'") + key + "'", "none",
                  "this is not a Chimera draft: make one with chimera train");
    }
    return it->second;
  };
  if (const std::string version = meta("chimera_draft"); version != kVersion) {
    throw Error(file, "version 1 of the draft format", in_quotes(version),
                "use a newer version of chimera");
  }
  DraftTensors t;
  t.config = read_config(meta("config"), file + ": config");
  t.target_name = meta("target_name");
  t.target_fingerprint = meta("target_fingerprint");
  t.training = meta("training");
  t.licence = meta("licence");
  t.head_down.resize(static_cast<size_t>(t.config.n_steps));
  t.head_up.resize(static_cast<size_t>(t.config.n_steps));
  const auto take = [&](const std::string& tensor) {
    const auto it = st.tensors.find(tensor);
    if (it == st.tensors.end())
      throw Error(file + ": tensor " + in_quotes(tensor), "to be there", "none", kTrainAgain);
    SafeTensor found = std::move(it->second);
    st.tensors.erase(it);
    return found;
  };
  each_tensor(t, [&](const std::string& name, std::vector<float>& values,
                     const std::vector<int64_t>& shape) {
    const SafeTensor found = take(name);
    const std::string where = file + ": tensor " + in_quotes(name);
    SafeTensor wanted;
    wanted.shape = shape;
    if (found.shape != shape)
      throw Error(where, wanted.shape_text(), found.shape_text(), kTrainAgain);
    if (found.type == SafeType::kI32) throw Error(where, "BF16, F16 or F32", "I32", kTrainAgain);
    values = found.floats();
    for (const float v : values) {
      if (!std::isfinite(v))
        throw Error(where, "finite numbers", "an infinity or NaN", kTrainAgain);
    }
  });
  const SafeTensor ids = take("vocabulary");
  const std::string where = file + ": tensor 'vocabulary'";
  if (ids.type != SafeType::kI32 || ids.shape.size() != 1 || ids.count() < 1) {
    throw Error(where, "I32 [1 or more]", std::string(name(ids.type)) + " " + ids.shape_text(),
                kTrainAgain);
  }
  t.vocabulary.resize(static_cast<size_t>(ids.count()));
  std::memcpy(t.vocabulary.data(), ids.data, ids.bytes);
  check_vocabulary(t.vocabulary, where, kTrainAgain);
  if (!st.tensors.empty()) {
    throw Error(file, "the tensors of a draft", in_quotes(st.tensors.begin()->first) + " besides",
                "use a newer version of chimera");
  }
  return t;
}

void save_draft(const DraftTensors& draft, const std::string& path) {
  std::vector<SafeOutput> out;
  each_tensor(draft, [&](const std::string& name, const std::vector<float>& values,
                         const std::vector<int64_t>& shape) {
    out.push_back({name, shape, SafeType::kBF16, values.data()});
    uint64_t count = 1;
    for (const int64_t s : shape) count *= static_cast<uint64_t>(s);
    if (values.size() != count)
      throw Error("draft tensor '" + name + "'", std::to_string(count) + " values",
                  std::to_string(values.size()));
  });
  out.push_back({"vocabulary",
                 {static_cast<int64_t>(draft.vocabulary.size())},
                 SafeType::kI32,
                 draft.vocabulary.data()});
  write_safetensors(path, out,
                    {{"chimera_draft", kVersion},
                     {"target_name", draft.target_name},
                     {"target_fingerprint", draft.target_fingerprint},
                     {"config", write_config(draft.config)},
                     {"training", draft.training},
                     {"licence", draft.licence}});
}

std::string fingerprint(const LlamaTensors& tensors, const Vocabulary& vocabulary) {
  constexpr size_t kSample = 4096,
                   kEvery = 64 * 1024;  // bytes read of so many: a file is not read whole
  Hash hash;
  const LlamaConfig& c = tensors.config;
  for (const int64_t n :
       {c.vocab_size, c.hidden_size, c.n_layers, c.n_heads, c.n_kv_heads, c.head_dim, c.ffn_size})
    hash.add(n);
  hash.add(&c.rms_eps, sizeof c.rms_eps);
  hash.add(&c.rope_base, sizeof c.rope_base);
  hash.add(c.rope_divisors.data(), c.rope_divisors.size() * sizeof(float));
  const auto tensor = [&](const TensorView& v) {
    hash.add(static_cast<int64_t>(v.type));
    hash.add(v.rows);
    hash.add(v.cols);
    if (v.empty()) return;
    const size_t bytes = v.bytes();
    for (size_t at = 0; at < bytes; at += kEvery)
      hash.add(v.data + at, std::min(kSample, bytes - at));
  };
  tensor(tensors.embedding);
  tensor(tensors.output_norm);
  tensor(tensors.head);
  for (const LlamaLayerTensors& l : tensors.layers) {
    for (const TensorView* v :
         {&l.attn_norm, &l.wq, &l.wk, &l.wv, &l.wo, &l.ffn_norm, &l.w_gate, &l.w_up, &l.w_down})
      tensor(*v);
  }
  for (const std::string& token : vocabulary.tokens) hash.add(token);
  return hash.hex();
}

}  // namespace chimera
