#include "tests/tiny_model.h"

#include <cctype>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <iterator>
#include <random>
#include <set>
#include <vector>

#include "engine/dtype.h"
#include "loader/output_file.h"
#include "tests/gguf_builder.h"

namespace chimera::test {
namespace {

constexpr int kHidden = 256, kLayers = 2, kHeads = 4, kKvHeads = 2, kHeadDim = 64, kFfn = 512,
              kVocab = 512;

// The type, its number in a GGUF file, and the scale of a block of random bits that gives weights a
// deviation of about 1/16; of those without blocks, the largest weight.
struct Type {
  const char* name;
  DType type;
  uint32_t number;
  float scale;
};
constexpr Type kTypes[] = {
    {"f32", DType::kF32, 0, 0.108f},      {"f16", DType::kF16, 1, 0.108f},
    {"bf16", DType::kBF16, 30, 0.108f},   {"q8_0", DType::kQ8_0, 8, 8.5e-4f},
    {"q4_0", DType::kQ4_0, 2, 1.36e-2f},  {"q4_1", DType::kQ4_1, 3, 1.36e-2f},
    {"q5_0", DType::kQ5_0, 6, 6.8e-3f},   {"q5_1", DType::kQ5_1, 7, 6.8e-3f},
    {"q4_k", DType::kQ4_K, 12, 2.42e-4f}, {"q5_k", DType::kQ5_K, 13, 1.19e-4f},
    {"q6_k", DType::kQ6_K, 14, 4.6e-5f}};
static_assert(std::size(kTypes) == std::size(kQuantTypes));

// Only what the standard defines to the bit, so that the file is the same everywhere.
std::string random_matrix(const Type& t, int64_t weights, std::mt19937& random) {
  const DTypeInfo& info = dtype_info(t.type);
  std::string bytes(row_bytes(t.type, weights), '\0');
  const auto put = [&](size_t at, auto value) { std::memcpy(&bytes[at], &value, sizeof value); };
  const auto fraction = [&] { return static_cast<float>(random() >> 16) * 0x1p-16f; };  // [0, 1)
  for (char& byte : bytes) byte = static_cast<char>(random());
  for (size_t at = 0; at < bytes.size(); at += static_cast<size_t>(info.block_bytes)) {
    const float weight = (2 * fraction() - 1) * t.scale;
    const uint16_t scale = f32_to_f16((0.75f + 0.5f * fraction()) * t.scale);
    // What is taken from the quants: half of the largest one, times the scale.
    const auto less = [&](float half) { return f32_to_f16(half * f16_to_f32(scale)); };
    switch (t.type) {
      case DType::kF32: put(at, weight); break;
      case DType::kF16: put(at, f32_to_f16(weight)); break;
      case DType::kBF16: put(at, f32_to_bf16(weight)); break;
      case DType::kQ8_0:
      case DType::kQ4_0:
      case DType::kQ5_0: put(at, scale); break;
      case DType::kQ4_1: put(at, scale), put(at + 2, less(-7.5f)); break;
      case DType::kQ5_1: put(at, scale), put(at + 2, less(-15.5f)); break;
      case DType::kQ4_K: put(at, scale), put(at + 2, less(7.5f)); break;
      case DType::kQ5_K: put(at, scale), put(at + 2, less(15.5f)); break;
      case DType::kQ6_K: put(at + 208, scale); break;
    }
  }
  return bytes;
}

std::vector<std::string> pieces() {
  std::vector<std::string> p = {"<unk>", "<s>", "</s>"};
  for (int byte = 0; byte < 256; ++byte) {
    char name[8];
    std::snprintf(name, sizeof name, "<0x%02X>", byte);
    p.emplace_back(name);
  }
  const std::string space = "\xe2\x96\x81";
  p.push_back(space);
  for (const std::string& before : {std::string(), space}) {
    for (char letter = 'a'; letter <= 'z'; ++letter) p.push_back(before + letter);
    for (const char consonant : std::string("bcdfghjklmnprstvwxyz"))
      for (const char vowel : std::string("aeiou")) p.push_back(before + consonant + vowel);
  }
  return p;
}

std::string file_of(const Type& t) {
  GgufBuilder b;
  b.string("general.architecture", "llama").string("general.name", std::string("tiny ") + t.name);
  b.u32("llama.context_length", 2048).u32("llama.embedding_length", kHidden);
  b.u32("llama.block_count", kLayers).u32("llama.feed_forward_length", kFfn);
  b.u32("llama.attention.head_count", kHeads).u32("llama.attention.head_count_kv", kKvHeads);
  b.f32("llama.attention.layer_norm_rms_epsilon", 1e-5f);

  const std::vector<std::string> tokens = pieces();
  std::vector<float> scores;
  std::vector<int32_t> types;
  for (size_t i = 0; i < tokens.size(); ++i) {
    scores.push_back(-static_cast<float>(tokens.size() - i));  // longer pieces are likelier
    types.push_back(i == 0 ? 2 : i < 3 ? 3 : i < 259 ? 6 : 1);
  }
  b.string("tokenizer.ggml.model", "llama").strings("tokenizer.ggml.tokens", tokens);
  b.f32s("tokenizer.ggml.scores", scores).i32s("tokenizer.ggml.token_type", types);
  b.u32("tokenizer.ggml.bos_token_id", 1).u32("tokenizer.ggml.eos_token_id", 2);
  b.u32("tokenizer.ggml.unknown_token_id", 0);

  std::mt19937 random(t.number);
  const auto matrix = [&](const std::string& name, int64_t rows, int64_t cols) {
    b.tensor(name, t.number, {cols, rows}, random_matrix(t, rows * cols, random));
  };
  const auto norm = [&](const std::string& name) {
    std::string weights;
    for (int i = 0; i < kHidden; ++i)
      weights += raw(0.75f + static_cast<float>(random() % 512) / 1024);
    b.tensor(name, 0, {kHidden}, weights);
  };
  matrix("token_embd.weight", kVocab, kHidden);
  norm("output_norm.weight");
  matrix("output.weight", kVocab, kHidden);
  for (int i = 0; i < kLayers; ++i) {
    const std::string block = "blk." + std::to_string(i) + ".";
    norm(block + "attn_norm.weight");
    matrix(block + "attn_q.weight", kHeads * kHeadDim, kHidden);
    matrix(block + "attn_k.weight", kKvHeads * kHeadDim, kHidden);
    matrix(block + "attn_v.weight", kKvHeads * kHeadDim, kHidden);
    matrix(block + "attn_output.weight", kHidden, kHeads * kHeadDim);
    norm(block + "ffn_norm.weight");
    matrix(block + "ffn_gate.weight", kFfn, kHidden);
    matrix(block + "ffn_up.weight", kFfn, kHidden);
    matrix(block + "ffn_down.weight", kHidden, kFfn);
  }
  return b.bytes();
}

}  // namespace

std::string tiny(const std::string& type) {
  static std::set<std::string> written;  // by this process: an older file may be another model
  const char* build = std::getenv("CHIMERA_BUILD");
  const std::filesystem::path folder = build != nullptr ? build : "build";
  const std::string path = folder / ("tiny-" + type + ".gguf");
  if (!written.insert(type).second) return path;
  for (const Type& t : kTypes)
    if (type == t.name) {
      std::filesystem::create_directories(folder);
      OutputFile file(path);
      file.write(file_of(t));
      file.commit();
    }
  return path;
}

}  // namespace chimera::test
