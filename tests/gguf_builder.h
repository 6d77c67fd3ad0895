// Small GGUF files for the loader's tests, valid and broken in any one place.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "engine/error.h"

namespace chimera::test {

// The bytes of a number as the file has them.
template <class T>
std::string raw(T value) {
  std::string bytes(sizeof value, '\0');
  std::memcpy(bytes.data(), &value, sizeof value);
  return bytes;
}

inline std::string raw_string(const std::string& text) {
  return raw<uint64_t>(text.size()) + text;
}

struct GgufBuilder {
  struct Key {
    std::string name;
    std::string value;  // u32 type and what follows it
  };
  struct Tensor {
    std::string name;
    uint32_t type = 0;
    std::vector<int64_t> ne;
    std::string data;
    std::optional<uint64_t> offset = {};  // instead of the right one
    std::optional<uint32_t> n_dims = {};  // instead of ne.size()
  };

  std::string magic = "GGUF";
  uint32_t version = 3;
  uint64_t alignment = 32;
  std::optional<uint64_t> n_tensors, n_keys;  // instead of the right ones
  std::vector<Key> keys;
  std::vector<Tensor> tensors;

  // Adds a key, also if there is one of this name.
  GgufBuilder& add(const std::string& name, uint32_t type, const std::string& value) {
    keys.push_back({name, raw(type) + value});
    return *this;
  }
  // Adds or replaces a key.
  GgufBuilder& set(const std::string& name, uint32_t type, const std::string& value) {
    return remove(name).add(name, type, value);
  }
  GgufBuilder& remove(const std::string& name) {
    std::erase_if(keys, [&](const Key& key) { return key.name == name; });
    return *this;
  }
  GgufBuilder& u32(const std::string& name, uint32_t value) { return set(name, 4, raw(value)); }
  GgufBuilder& f32(const std::string& name, float value) { return set(name, 6, raw(value)); }
  GgufBuilder& boolean(const std::string& name, bool value) {
    return set(name, 7, raw<uint8_t>(value));
  }
  GgufBuilder& string(const std::string& name, const std::string& value) {
    return set(name, 8, raw_string(value));
  }
  GgufBuilder& strings(const std::string& name, const std::vector<std::string>& values) {
    std::string bytes = raw<uint32_t>(8) + raw<uint64_t>(values.size());
    for (const std::string& value : values) bytes += raw_string(value);
    return set(name, 9, bytes);
  }
  GgufBuilder& f32s(const std::string& name, const std::vector<float>& values) {
    return numbers(name, 6, values);
  }
  GgufBuilder& i32s(const std::string& name, const std::vector<int32_t>& values) {
    return numbers(name, 5, values);
  }

  GgufBuilder& tensor(const std::string& name, uint32_t type, const std::vector<int64_t>& ne,
                      const std::string& data) {
    tensors.push_back({name, type, ne, data});
    return *this;
  }
  // An F32 tensor with weights 0, 1, 2, ...
  GgufBuilder& counting(const std::string& name, const std::vector<int64_t>& ne) {
    int64_t n = 1;
    for (const int64_t dim : ne) n *= dim;
    std::string data;
    for (int64_t i = 0; i < n; ++i) data += raw(static_cast<float>(i));
    return tensor(name, 0, ne, data);
  }
  Tensor& at(const std::string& name) {
    for (Tensor& t : tensors) {
      if (t.name == name) return t;
    }
    throw Error("GgufBuilder: no tensor " + name);
  }
  GgufBuilder& drop(const std::string& name) {
    std::erase_if(tensors, [&](const Tensor& t) { return t.name == name; });
    return *this;
  }

  // The file. It ends with the last byte of the last tensor.
  std::string bytes() const {
    std::string out = magic + raw(version) + raw<uint64_t>(n_tensors.value_or(tensors.size())) +
                      raw<uint64_t>(n_keys.value_or(keys.size()));
    for (const Key& key : keys) out += raw_string(key.name) + key.value;
    uint64_t offset = 0;
    for (const Tensor& t : tensors) {
      out += raw_string(t.name) + raw(t.n_dims.value_or(static_cast<uint32_t>(t.ne.size())));
      for (const int64_t n : t.ne) out += raw(n);
      out += raw(t.type) + raw(t.offset.value_or(offset));
      offset = pad(offset + t.data.size());
    }
    for (const Tensor& t : tensors) {
      out.resize(pad(out.size()));
      out += t.data;
    }
    return out;
  }

 private:
  template <class T>
  GgufBuilder& numbers(const std::string& name, uint32_t type, const std::vector<T>& values) {
    std::string bytes = raw(type) + raw<uint64_t>(values.size());
    for (const T value : values) bytes += raw(value);
    return set(name, 9, bytes);
  }
  uint64_t pad(uint64_t n) const { return (n + alignment - 1) / alignment * alignment; }
};

// A complete model: hidden 4, 2 heads and 1 KV head of 2, ffn 8, vocabulary 5, one layer, F32,
// tied.
inline GgufBuilder tiny_llama() {
  GgufBuilder b;
  b.string("general.architecture", "llama").string("general.name", "tiny");
  b.u32("llama.context_length", 16).u32("llama.embedding_length", 4).u32("llama.block_count", 1);
  b.u32("llama.feed_forward_length", 8).u32("llama.attention.head_count", 2);
  b.u32("llama.attention.head_count_kv", 1);
  b.f32("llama.attention.layer_norm_rms_epsilon", 1e-5f);
  b.string("tokenizer.ggml.model", "llama");
  b.strings("tokenizer.ggml.tokens", {"<unk>", "<s>", "</s>", "a", "b"});
  b.f32s("tokenizer.ggml.scores", {0, 0, 0, -1, -2});
  b.i32s("tokenizer.ggml.token_type", {2, 3, 3, 1, 1});
  b.u32("tokenizer.ggml.bos_token_id", 1).u32("tokenizer.ggml.eos_token_id", 2);
  b.u32("tokenizer.ggml.unknown_token_id", 0);
  b.counting("token_embd.weight", {4, 5}).counting("output_norm.weight", {4});
  b.counting("blk.0.attn_norm.weight", {4}).counting("blk.0.attn_q.weight", {4, 4});
  b.counting("blk.0.attn_k.weight", {4, 2}).counting("blk.0.attn_v.weight", {4, 2});
  b.counting("blk.0.attn_output.weight", {4, 4}).counting("blk.0.ffn_norm.weight", {4});
  b.counting("blk.0.ffn_gate.weight", {4, 8}).counting("blk.0.ffn_up.weight", {4, 8});
  b.counting("blk.0.ffn_down.weight", {8, 4});
  return b;
}

// A file that is gone at the end of the scope.
class TempFile {
 public:
  explicit TempFile(const std::string& bytes, const std::string& suffix = ".gguf") {
    static int count = 0;
    path_ =
        "/tmp/chimera_test_" + std::to_string(getpid()) + "_" + std::to_string(count++) + suffix;
    std::ofstream(path_, std::ios::binary) << bytes;
  }
  ~TempFile() { std::remove(path_.c_str()); }
  TempFile(const TempFile&) = delete;
  TempFile& operator=(const TempFile&) = delete;

  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// The message of the Error that `action` throws; empty if it throws none.
template <class Action>
std::string error_of(Action action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

// What is wrong with an error message that should be one line with all of `words` in it; empty:
// nothing.
inline std::string complaint(const std::string& message, const std::vector<std::string>& words) {
  if (message.empty()) return "no error was thrown";
  for (const char c : message) {
    if (static_cast<unsigned char>(c) < 0x20) return "not one printable line: " + message;
  }
  for (const std::string& word : words) {
    if (message.find(word) == std::string::npos) return "no '" + word + "' in: " + message;
  }
  return "";
}

}  // namespace chimera::test
