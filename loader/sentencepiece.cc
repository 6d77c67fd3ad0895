#include "loader/sentencepiece.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string_view>

#include "engine/error.h"

namespace chimera {
namespace {

// The fields of one protocol buffer message, in order
// (https://protobuf.dev/programming-guides/encoding).
class Message {
 public:
  Message(std::string_view bytes, const std::string& file) : left_(bytes), file_(file) {}

  uint64_t field = 0;      // its number
  uint64_t number = 0;     // wire type 0: the value; 5: its four bytes
  std::string_view bytes;  // wire type 2: text or a message

  // Steps to the next field and sets the three above; false at the end.
  bool next() {
    if (left_.empty()) return false;
    const uint64_t tag = varint();
    field = tag >> 3;
    wire_ = tag & 7;
    number = 0;
    bytes = {};
    switch (wire_) {
      case 0:
        number = varint();
        break;
      case 1:
        take(8);
        break;
      case 2:
        bytes = take(varint());
        break;
      case 5:
        std::memcpy(&number, take(4).data(), 4);
        break;
      default:
        fail("wire type 0, 1, 2 or 5", std::to_string(wire_));
    }
    return true;
  }

  // Throws unless the current field is encoded as the schema says.
  void expect_number() const { expect(0); }
  void expect_bytes() const { expect(2); }
  float as_float() const {
    expect(5);
    const auto bits = static_cast<uint32_t>(number);
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

 private:
  [[noreturn]] void fail(const std::string& expected, const std::string& found) const {
    throw Error(file_, expected, found, "is this a SentencePiece tokenizer.model?");
  }

  void expect(uint64_t wire) const {
    if (wire_ != wire) {
      fail("field " + std::to_string(field) + " of wire type " + std::to_string(wire),
           std::to_string(wire_));
    }
  }

  std::string_view take(uint64_t count) {
    if (count > left_.size()) {
      fail(std::to_string(count) + " more bytes", std::to_string(left_.size()));
    }
    const std::string_view taken = left_.substr(0, count);
    left_.remove_prefix(count);
    return taken;
  }

  uint64_t varint() {
    uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      const auto byte = static_cast<unsigned char>(take(1)[0]);
      value |= static_cast<uint64_t>(byte & 127) << shift;
      if (byte < 128) return value;
    }
    fail("a number of at most 10 bytes", "a longer one");
  }

  std::string_view left_;
  const std::string& file_;
  uint64_t wire_ = 0;
};

void read_piece(Message in, const std::string& where, Vocabulary* v) {
  std::string text;
  float score = 0;
  uint64_t type = 1;
  while (in.next()) {
    switch (in.field) {
      case 1:
        in.expect_bytes();
        text = in.bytes;
        break;
      case 2:
        score = in.as_float();
        break;
      case 3:
        in.expect_number();
        type = in.number;
        break;
    }
  }
  if (!std::isfinite(score)) throw Error(where, "a finite score", std::to_string(score));
  if (type < 1 || type > 6) throw Error(where, "a type from 1 to 6", std::to_string(type));
  v->tokens.push_back(text);
  v->scores.push_back(score);
  v->types.push_back(static_cast<TokenType>(type));
}

void read_trainer(Message in, const std::string& name, Vocabulary* v) {
  uint64_t model_type = 1;
  while (in.next()) {
    if (in.field != 3 && (in.field < 40 || in.field > 42)) continue;
    in.expect_number();
    const auto id = static_cast<int32_t>(in.number);  // negative: none
    switch (in.field) {
      case 3:
        model_type = in.number;
        break;
      case 40:
        v->unk = id;
        break;
      case 41:
        v->bos = id;
        break;
      case 42:
        v->eos = id;
        break;
    }
  }
  if (model_type != 2) {
    throw Error(name, "a BPE model (type 2)", "type " + std::to_string(model_type),
                "only BPE SentencePiece models are supported");
  }
}

void read_normalizer(Message in, const std::string& name, Vocabulary* v) {
  while (in.next()) {
    switch (in.field) {
      case 2:
        in.expect_bytes();
        if (!in.bytes.empty()) {
          throw Error(name, "a model that leaves characters as they are", "a character map",
                      "SentencePiece normalisation is not supported");
        }
        break;
      case 3:
        in.expect_number();
        v->add_space_prefix = in.number != 0;
        break;
    }
  }
}

void check_id(const std::string& name, const char* what, int32_t* id, size_t n_tokens) {
  if (*id < 0) {
    *id = -1;
  } else if (static_cast<size_t>(*id) >= n_tokens) {
    throw Error(name, std::string(what) + " below " + std::to_string(n_tokens),
                std::to_string(*id));
  }
}

}  // namespace

Vocabulary read_sentencepiece(std::span<const std::byte> bytes, const std::string& name) {
  Vocabulary v;
  v.model = TokenizerModel::kSentencePiece;
  v.unk = 0;  // the schema's defaults
  v.bos = 1;
  v.eos = 2;
  bool trained = false, normalizes = false;
  Message in({reinterpret_cast<const char*>(bytes.data()), bytes.size()}, name);
  while (in.next()) {
    if (in.field < 1 || in.field > 3) continue;
    in.expect_bytes();
    switch (in.field) {
      case 1:
        read_piece(Message(in.bytes, name), name + ": piece " + std::to_string(v.tokens.size()),
                   &v);
        break;
      case 2:
        read_trainer(Message(in.bytes, name), name, &v);
        trained = true;
        break;
      case 3:
        read_normalizer(Message(in.bytes, name), name, &v);
        normalizes = true;
        break;
    }
  }
  if (v.tokens.empty() || !trained || !normalizes) {
    throw Error(name, "pieces, a trainer_spec and a normalizer_spec", "not all of them",
                "is this a SentencePiece tokenizer.model?");
  }
  check_id(name, "unk_id", &v.unk, v.tokens.size());
  check_id(name, "bos_id", &v.bos, v.tokens.size());
  check_id(name, "eos_id", &v.eos, v.tokens.size());
  v.add_bos = v.bos >= 0;
  return v;
}

}  // namespace chimera
