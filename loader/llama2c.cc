#include "loader/llama2c.h"

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>

#include "engine/error.h"
#include "loader/llama_config.h"
#include "loader/mapped_file.h"
#include "loader/sentencepiece.h"

namespace chimera {
namespace {

static_assert(std::endian::native == std::endian::little, "llama2.c files are little-endian");

constexpr char kDamaged[] = "the file is truncated or damaged: download it again";
constexpr size_t kHeaderBytes = 7 * sizeof(int32_t);

struct Header {
  int64_t dim, hidden, layers, heads, kv_heads, vocab, seq_len;
  bool own_classifier;
};

Header read_header(std::span<const std::byte> bytes) {
  std::array<int32_t, 7> h;
  std::memcpy(h.data(), bytes.data(), kHeaderBytes);
  return {.dim = h[0],
          .hidden = h[1],
          .layers = h[2],
          .heads = h[3],
          .kv_heads = h[4],
          .vocab = std::llabs(h[5]),
          .seq_len = h[6],
          .own_classifier = h[5] < 0};
}

LlamaConfig check_header(const Header& h, const std::string& name) {
  LlamaConfig c;
  c.hidden_size = checked_size(name + ": dim", h.dim, kMaxHidden);
  c.ffn_size = checked_size(name + ": hidden_dim", h.hidden, kMaxFfn);
  c.n_layers = checked_size(name + ": n_layers", h.layers, kMaxLayers);
  c.n_heads = checked_size(name + ": n_heads", h.heads, kMaxHeads);
  c.n_kv_heads = checked_size(name + ": n_kv_heads", h.kv_heads, kMaxHeads);
  c.vocab_size = checked_size(name + ": vocab_size", h.vocab, kMaxVocab);
  c.max_context = checked_size(name + ": seq_len", h.seq_len, kMaxContext);
  if (c.hidden_size % c.n_heads != 0) {
    throw Error(name + ": dim", "a multiple of the " + std::to_string(c.n_heads) + " heads",
                std::to_string(c.hidden_size));
  }
  c.head_dim = checked_size(name + ": head size", c.hidden_size / c.n_heads, kMaxHeadDim);
  check_heads(name, c);
  return c;
}

// Bytes that a checkpoint with this configuration has. The limits of checked_size() keep every
// product and the sum below 2^60.
uint64_t checkpoint_bytes(const LlamaConfig& c, bool own_classifier) {
  const auto u = [](int64_t n) { return static_cast<uint64_t>(n); };
  const uint64_t dim = u(c.hidden_size), embedding = u(c.vocab_size) * dim;
  const uint64_t layer =
      2 * dim + 2 * dim * u(c.q_size()) + 2 * dim * u(c.kv_size()) + 3 * dim * u(c.ffn_size);
  const uint64_t angles = u(c.max_context) * u(c.head_dim);
  return kHeaderBytes + sizeof(float) * (embedding + u(c.n_layers) * layer + dim + angles +
                                         (own_classifier ? embedding : 0));
}

// Hands out consecutive F32 tensors. The caller has checked that they are all there.
class TensorReader {
 public:
  explicit TensorReader(const std::byte* start) : at_(start) {}

  TensorView matrix(const std::string& name, int64_t rows, int64_t cols) {
    TensorView view{.name = name, .type = DType::kF32, .rows = rows, .cols = cols, .data = at_};
    at_ += view.bytes();
    return view;
  }
  void skip(uint64_t floats) { at_ += floats * sizeof(float); }

 private:
  const std::byte* at_;
};

// Replaces every ' ' by U+2581, SentencePiece's mark for a space.
std::string escape_spaces(std::string_view text) {
  std::string out;
  for (const char c : text) {
    if (c == ' ') {
      out += "\xe2\x96\x81";
    } else {
      out += c;
    }
  }
  return out;
}

TokenType type_of(int id, const std::string& token) {
  if (id == 0) return TokenType::kUnknown;
  if (id <= 2) return TokenType::kControl;
  char byte_token[16];
  std::snprintf(byte_token, sizeof byte_token, "<0x%02X>", static_cast<unsigned>(id - 3));
  return token == byte_token ? TokenType::kByte : TokenType::kNormal;
}

}  // namespace

bool looks_like_llama2c(std::span<const std::byte> bytes) {
  if (bytes.size() < kHeaderBytes) return false;
  try {
    check_header(read_header(bytes), "");
    return true;
  } catch (const Error&) {
    return false;
  }
}

LlamaTensors read_llama2c(std::span<const std::byte> bytes, const std::string& name) {
  if (bytes.size() < kHeaderBytes) {
    throw Error(name, "a llama2.c header of 28 bytes", std::to_string(bytes.size()), kDamaged);
  }
  const Header header = read_header(bytes);
  LlamaTensors model;
  model.name = name.substr(name.rfind('/') + 1);
  model.config = check_header(header, name);
  LlamaConfig& c = model.config;
  c.rms_eps = 1e-5f;
  c.rope_base = 10000.0;
  const uint64_t expected = checkpoint_bytes(c, header.own_classifier);
  if (bytes.size() != expected) {
    throw Error(name, std::to_string(expected) + " bytes for the header's sizes",
                std::to_string(bytes.size()), kDamaged);
  }

  TensorReader in(bytes.data() + kHeaderBytes);
  model.layers.resize(static_cast<size_t>(c.n_layers));
  const auto for_layers = [&](TensorView LlamaLayerTensors::*member, const char* what, int64_t rows,
                              int64_t cols) {
    for (int i = 0; i < c.n_layers; ++i) {
      model.layers[static_cast<size_t>(i)].*member =
          in.matrix("layers." + std::to_string(i) + "." + what, rows, cols);
    }
  };
  using L = LlamaLayerTensors;
  model.embedding = in.matrix("tok_embeddings", c.vocab_size, c.hidden_size);
  for_layers(&L::attn_norm, "att_norm", 1, c.hidden_size);
  for_layers(&L::wq, "wq", c.q_size(), c.hidden_size);
  for_layers(&L::wk, "wk", c.kv_size(), c.hidden_size);
  for_layers(&L::wv, "wv", c.kv_size(), c.hidden_size);
  for_layers(&L::wo, "wo", c.hidden_size, c.q_size());
  for_layers(&L::ffn_norm, "ffn_norm", 1, c.hidden_size);
  for_layers(&L::w_gate, "w1", c.ffn_size, c.hidden_size);
  for_layers(&L::w_down, "w2", c.hidden_size, c.ffn_size);
  for_layers(&L::w_up, "w3", c.ffn_size, c.hidden_size);
  model.output_norm = in.matrix("final_norm", 1, c.hidden_size);
  in.skip(static_cast<uint64_t>(c.max_context) * static_cast<uint64_t>(c.head_dim));
  if (header.own_classifier) {
    model.head = in.matrix("classifier", c.vocab_size, c.hidden_size);
  }

  check_finite(name, model.output_norm);
  for (LlamaLayerTensors& layer : model.layers) {
    check_finite(name, layer.attn_norm);
    check_finite(name, layer.ffn_norm);
    layer.wq.interleaved_head_dim = c.head_dim;
    layer.wk.interleaved_head_dim = c.head_dim;
  }
  return model;
}

Vocabulary read_llama2c_vocabulary(std::span<const std::byte> bytes, const std::string& name,
                                   int vocab_size) {
  if (vocab_size < 3) {
    throw Error(name, "a vocabulary with <unk>, <s> and </s>",
                std::to_string(vocab_size) + " tokens");
  }
  Vocabulary v;
  v.model = TokenizerModel::kSentencePiece;
  v.bos = v.eos = 1;
  v.unk = 0;
  v.add_bos = true;
  size_t offset = sizeof(int32_t);  // the longest token: only for llama2.c's buffers
  for (int id = 0; id < vocab_size; ++id) {
    const std::string where =
        name + ": token " + std::to_string(id) + " at byte " + std::to_string(offset);
    float score;
    int32_t length;
    if (offset > bytes.size() || bytes.size() - offset < sizeof score + sizeof length) {
      throw Error(where, std::to_string(vocab_size) + " tokens", "the end of the file",
                  "use the tokenizer that belongs to the model");
    }
    std::memcpy(&score, bytes.data() + offset, sizeof score);
    std::memcpy(&length, bytes.data() + offset + sizeof score, sizeof length);
    offset += sizeof score + sizeof length;
    if (!std::isfinite(score))
      throw Error(where, "a finite score", std::to_string(score), kDamaged);
    const size_t left = bytes.size() - offset;
    if (length < 1 || static_cast<size_t>(length) > left) {
      throw Error(where, "a length from 1 to " + std::to_string(left), std::to_string(length),
                  kDamaged);
    }
    std::string_view text(reinterpret_cast<const char*>(bytes.data() + offset),
                          static_cast<size_t>(length));
    offset += static_cast<size_t>(length);
    if ((id == 1 || id == 2) && text.size() > 2 && text.front() == '\n' && text.back() == '\n') {
      text = text.substr(1, text.size() - 2);
    }
    v.tokens.push_back(escape_spaces(text));
    v.scores.push_back(score);
    v.types.push_back(type_of(id, v.tokens.back()));
  }
  if (offset != bytes.size()) {
    throw Error(name, "the end of the file after " + std::to_string(vocab_size) + " tokens",
                std::to_string(bytes.size() - offset) + " more bytes",
                "use the tokenizer that belongs to the model");
  }
  return v;
}

Vocabulary load_llama2c_vocabulary(const std::string& checkpoint_path, int vocab_size) {
  namespace fs = std::filesystem;
  const fs::path folder = fs::path(checkpoint_path).parent_path();
  const std::string own = "tok" + std::to_string(vocab_size);
  std::error_code ignored;  // what cannot be looked at does not exist
  for (const std::string& file : {own + ".bin", std::string("tokenizer.bin")}) {
    if (!fs::exists(folder / file, ignored)) continue;
    const MappedFile mapped((folder / file).string());
    return read_llama2c_vocabulary(mapped.bytes(), mapped.name(), vocab_size);
  }
  for (const std::string& file : {own + ".model", std::string("tokenizer.model")}) {
    if (!fs::exists(folder / file, ignored)) continue;
    const MappedFile mapped((folder / file).string());
    Vocabulary v = read_sentencepiece(mapped.bytes(), mapped.name());
    if (v.tokens.size() != static_cast<size_t>(vocab_size)) {
      throw Error(mapped.name(), std::to_string(vocab_size) + " tokens",
                  std::to_string(v.tokens.size()), "use the tokenizer that belongs to the model");
    }
    v.eos = v.bos;
    return v;
  }
  throw Error(printable(checkpoint_path, 4096),
              "its tokenizer beside it (" + own + ".bin, tokenizer.bin, " + own +
                  ".model or tokenizer.model)",
              "none of them", "put the tokenizer into the same folder");
}

}  // namespace chimera
