#include "loader/gguf.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <random>

#include "loader/llama_gguf.h"
#include "loader/mapped_file.h"
#include "tests/gguf_builder.h"

namespace chimera {
namespace {

using test::complaint;
using test::error_of;
using test::GgufBuilder;
using test::raw;
using test::raw_string;
using test::TempFile;
using test::tiny_llama;

struct BadFile {
  const char* what;
  std::function<void(GgufBuilder&)> break_it;
  std::vector<std::string> words;  // of the message
};

// Opens a file with these bytes.
std::string error_of_file(const std::string& bytes) {
  const TempFile file(bytes);
  std::string message = error_of([&] {
    const MappedFile mapped(file.path());
    const GgufFile gguf(mapped.bytes(), mapped.name());
  });
  if (!message.empty() && !message.starts_with(file.path() + ": ")) return "no path: " + message;
  return message;
}

void expect_refused(const std::vector<BadFile>& cases) {
  for (const BadFile& bad : cases) {
    GgufBuilder b = tiny_llama();
    bad.break_it(b);
    EXPECT_EQ(complaint(error_of_file(b.bytes()), bad.words), "") << bad.what;
  }
}

std::vector<std::byte> to_bytes(const std::string& text) {
  const auto* start = reinterpret_cast<const std::byte*>(text.data());
  return {start, start + text.size()};
}

TEST(GgufTest, ReadsWhatTheFileSays) {
  for (const uint32_t version : {2u, 3u}) {
    GgufBuilder b = tiny_llama();
    b.version = version;
    b.add("n.u8", 0, raw<uint8_t>(200)).add("n.i8", 1, raw<int8_t>(-2));
    b.add("n.u16", 2, raw<uint16_t>(60000)).add("n.i16", 3, raw<int16_t>(-3));
    b.add("n.i32", 5, raw<int32_t>(-4)).add("n.u64", 10, raw<uint64_t>(1));
    b.add("n.i64", 11, raw<int64_t>(-5)).add("n.f64", 12, raw(0.25));
    b.boolean("n.bool", true);
    const std::vector<std::byte> bytes = to_bytes(b.bytes());
    const GgufFile file(bytes, "tiny.gguf");
    EXPECT_EQ(file.version(), version);
    EXPECT_EQ(file.get<int64_t>("n.u8"), 200);
    EXPECT_EQ(file.get<int64_t>("n.i8"), -2);
    EXPECT_EQ(file.get<int64_t>("n.u16"), 60000);
    EXPECT_EQ(file.get<int64_t>("n.i16"), -3);
    EXPECT_EQ(file.get<int64_t>("n.i32"), -4);
    EXPECT_EQ(file.get<int64_t>("n.u64"), 1);
    EXPECT_EQ(file.get<int64_t>("n.i64"), -5);
    EXPECT_EQ(file.get<double>("n.f64"), 0.25);
    EXPECT_TRUE(file.get<bool>("n.bool"));
    EXPECT_EQ(file.get<std::string>("general.name"), "tiny");
    EXPECT_EQ(file.get<std::vector<std::string>>("tokenizer.ggml.tokens")[3], "a");
    EXPECT_EQ(file.get<std::vector<float>>("tokenizer.ggml.scores")[4], -2.0f);
    EXPECT_EQ(file.get<std::vector<int32_t>>("tokenizer.ggml.token_type")[0], 2);
    EXPECT_FALSE(file.has("absent"));
    EXPECT_FALSE(file.find<int64_t>("absent"));

    ASSERT_EQ(file.tensors().size(), 11u);
    const GgufTensor* down = file.find_tensor("blk.0.ffn_down.weight");
    ASSERT_NE(down, nullptr);
    EXPECT_EQ(down->shape_text(), "8 x 4");
    EXPECT_EQ(down->type, DType::kF32);
    EXPECT_EQ(down->bytes, 128u);
    EXPECT_EQ(down->data + down->bytes, bytes.data() + bytes.size());
    float last;
    std::memcpy(&last, down->data + 124, 4);
    EXPECT_EQ(last, 31.0f);
    EXPECT_EQ(file.find_tensor("absent"), nullptr);
  }
}

TEST(GgufTest, ReadsOtherAlignmentsAndTypes) {
  GgufBuilder b = tiny_llama();
  b.alignment = 256;
  b.u32("general.alignment", 256);
  b.tensor("extra.i8", 24, {3}, "abc").tensor("extra.mxfp4", 39, {32}, std::string(17, 'x'));
  const std::vector<std::byte> bytes = to_bytes(b.bytes());
  const GgufFile file(bytes, "tiny.gguf");
  const GgufTensor* extra = file.find_tensor("extra.i8");
  ASSERT_NE(extra, nullptr);
  EXPECT_FALSE(extra->type);
  EXPECT_EQ(extra->type_name(), "I8");
  EXPECT_EQ(static_cast<char>(extra->data[2]), 'c');
  EXPECT_EQ((extra->data - bytes.data()) % 256, 0);
}

TEST(GgufTest, WrongTypesOfValuesNameBothTypes) {
  GgufBuilder b = tiny_llama();
  b.add("big", 10, raw(std::numeric_limits<uint64_t>::max())).add("two", 7, raw<uint8_t>(2));
  const std::vector<std::byte> bytes = to_bytes(b.bytes());
  const GgufFile f(bytes, "m.gguf");
  const std::string s = "general.name", n = "llama.block_count", a = "tokenizer.ggml.scores";
  EXPECT_EQ(complaint(error_of([&] { f.get<int64_t>(s); }),
                      {"m.gguf: key 'general.name'", "an integer", "found string"}),
            "");
  EXPECT_EQ(complaint(error_of([&] { f.get<double>(n); }), {"floating", "found u32"}), "");
  EXPECT_EQ(complaint(error_of([&] { f.get<bool>(n); }), {"a bool", "found u32"}), "");
  EXPECT_EQ(complaint(error_of([&] { f.get<std::string>(n); }), {"a string", "found u32"}), "");
  EXPECT_EQ(complaint(error_of([&] { f.get<std::vector<std::string>>(a); }),
                      {"an array of strings", "array of 5 f32"}),
            "");
  EXPECT_EQ(complaint(error_of([&] { f.get<std::vector<int32_t>>(a); }), {"array of i32"}), "");
  EXPECT_EQ(complaint(error_of([&] { f.get<std::vector<float>>(n); }), {"array of f32"}), "");
  EXPECT_EQ(complaint(error_of([&] { f.get<int64_t>("big"); }), {"2^63"}), "");
  EXPECT_EQ(complaint(error_of([&] { f.get<bool>("two"); }), {"0 or 1", "found 2"}), "");
  EXPECT_EQ(complaint(error_of([&] { f.get<bool>("none"); }), {"'none'", "no such key"}), "");
}

TEST(GgufTest, RefusesOtherMagicAndVersions) {  // bad_inputs 18
  expect_refused({
      {"magic", [](auto& b) { b.magic = "GGML"; }, {"'GGUF'", "'GGML'"}},
      {"magic with control bytes", [](auto& b) { b.magic = "G\n\x1b\xff"; }, {"G\\x0a\\x1b\\xff"}},
      {"swapped magic", [](auto& b) { b.magic = "FUGG"; }, {"little-endian", "swapped"}},
      {"version 0", [](auto& b) { b.version = 0; }, {"version 0"}},
      {"version 1", [](auto& b) { b.version = 1; }, {"version 1", "convert"}},
      {"version 4", [](auto& b) { b.version = 4; }, {"version 4"}},
      {"big-endian", [](auto& b) { b.version = 0x03000000; }, {"big-endian"}},
  });
}

TEST(GgufTest, RefusesCountsThatTheFileCannotHold) {  // 19, 20
  for (const uint64_t n : {uint64_t{1} << 63, ~uint64_t{0}, uint64_t{1} << 40, uint64_t{500}}) {
    expect_refused({
        {"tensors", [=](auto& b) { b.n_tensors = n; }, {"at most", "tensors", std::to_string(n)}},
        {"keys", [=](auto& b) { b.n_keys = n; }, {"at most", "keys", std::to_string(n)}},
    });
  }
  // Few enough for the file's size, but more than there are.
  expect_refused({
      {"tensors", [](auto& b) { b.n_tensors = b.tensors.size() + 1; }, {"tensor"}},
      {"keys", [](auto& b) { b.n_keys = b.keys.size() + 1; }, {"found"}},
  });
}

TEST(GgufTest, RefusesBadKeys) {  // 21, 22
  const uint64_t wraps = ~uint64_t{0};
  const std::string huge = raw<uint64_t>(wraps) + "x";
  expect_refused({
      {"string that wraps",
       [=](auto& b) { b.set("general.name", 8, huge); },
       {"key 'general.name'", std::to_string(wraps)}},
      {"string past the end",
       [](auto& b) { b.add("s", 8, raw<uint64_t>(100000) + "x"); },
       {"key 's'", "100000"}},
      {"string of 2^40",
       [](auto& b) { b.add("s", 8, raw<uint64_t>(uint64_t{1} << 40)); },
       {"key 's'", "1099511627776"}},
      {"string in an array that wraps",
       [=](auto& b) { b.add("s", 9, raw<uint32_t>(8) + raw<uint64_t>(1) + huge); },
       {"key 's'", std::to_string(wraps)}},
      {"empty key", [](auto& b) { b.u32("", 1); }, {"empty"}},
      {"key of 70000 bytes", [](auto& b) { b.u32(std::string(70000, 'k'), 1); }, {"70000"}},
      {"key with a newline", [](auto& b) { b.u32("a\nb", 1); }, {"ASCII", "a\\x0ab"}},
      {"key not ASCII", [](auto& b) { b.u32("caf\xc3\xa9", 1); }, {"ASCII", "\\xc3\\xa9"}},
      {"duplicate key",
       [](auto& b) { b.add("general.name", 4, raw<uint32_t>(1)); },
       {"'general.name'", "once", "twice"}},
  });
}

TEST(GgufTest, RefusesBadValues) {  // 23, 24
  const auto array = [](uint32_t element, uint64_t count, const std::string& data) {
    return raw(element) + raw(count) + data;
  };
  expect_refused({
      {"type 13", [](auto& b) { b.add("v", 13, "12345678"); }, {"key 'v'", "type 13"}},
      {"type -1", [](auto& b) { b.add("v", ~0u, "12345678"); }, {"key 'v'", "4294967295"}},
      {"element type 13", [=](auto& b) { b.add("v", 9, array(13, 1, "1")); }, {"type 13"}},
      {"nested",
       [=](auto& b) { b.add("v", 9, array(9, 1, array(4, 1, "1234"))); },
       {"array of arrays"}},
      {"count * 4 wraps",
       [=](auto& b) { b.add("v", 9, array(5, uint64_t{1} << 62, "1234")); },
       {"key 'v'", "elements", "4611686018427387904"}},
      {"count past the end",
       [=](auto& b) { b.add("v", 9, array(0, 100000, "1234")); },
       {"elements", "100000"}},
      {"strings past the end",
       [=](auto& b) { b.add("v", 9, array(8, 100000, "1234")); },
       {"elements", "100000"}},
  });
}

TEST(GgufTest, RefusesBadAlignments) {  // 25
  for (const uint32_t n : {0u, 1u, 24u, 33u, 1u << 21, 1u << 31}) {
    expect_refused({{"alignment",
                     [=](auto& b) { b.u32("general.alignment", n); },
                     {"general.alignment", "power of two", std::to_string(n)}}});
  }
  expect_refused(
      {{"u64",
        [](auto& b) { b.add("general.alignment", 10, raw<uint64_t>(32)); },
        {"general.alignment", "u32", "u64"}},
       {"another than used", [](auto& b) { b.u32("general.alignment", 256); }, {"offset 256"}}});
}

TEST(GgufTest, RefusesBadTensors) {  // 26 to 34
  const std::string name = "output_norm.weight";
  const auto with_type = [=](uint32_t type) {
    return [=](GgufBuilder& b) { b.at(name).type = type; };
  };
  const auto with_shape = [=](const std::vector<int64_t>& ne) {
    return [=](GgufBuilder& b) { b.at(name).ne = ne; };
  };
  const auto with_offset = [=](uint64_t offset) {
    return [=](GgufBuilder& b) { b.at(name).offset = offset; };
  };
  const int64_t big = std::numeric_limits<int64_t>::max();
  expect_refused({
      {"name of 64 bytes", [](auto& b) { b.counting(std::string(64, 'n'), {1}); }, {"63", "64"}},
      {"empty name", [](auto& b) { b.counting("", {1}); }, {"empty"}},
      {"duplicate", [=](auto& b) { b.counting(name, {4}); }, {name, "twice"}},
      {"5 dimensions",
       [=](auto& b) {
         b.at(name).ne = {1, 1, 1, 1, 4};
       },
       {name, "at most 4", "5"}},
      {"2^32 - 1 dimensions", [=](auto& b) { b.at(name).n_dims = ~0u; }, {name, "4294967295"}},
      {"negative", with_shape({-4}), {name, "at least 1", "-4"}},
      {"two negatives", with_shape({-2, -2}), {name, "at least 1", "-2 x -2"}},
      {"zero", with_shape({4, 0}), {name, "at least 1", "4 x 0"}},
      {"product wraps", with_shape({big, 3}), {name, "fits in the file"}},
      {"product wraps to 0", with_shape({1 << 16, 1 << 16, 1 << 16, 1 << 16}), {"fits"}},
      {"partial product wraps", with_shape({big, big, 1}), {name, "fits"}},
      {"bytes wrap to the right number", with_shape({4, (int64_t{1} << 60) + 1}), {name, "fits"}},
      {"padding wraps", with_shape({4, (1 << 30) - 1, (1 << 30) + 1}), {name, "fits"}},
      {"quantised bytes wrap",
       [=](auto& b) {
         b.at(name).type = 2;
         b.at(name).ne = {32, (int64_t{1} << 58) - 1};
       },
       {name, "fits"}},
      {"larger than the file", with_shape({100000}), {name, "fits", "100000"}},
      {"sum of sizes wraps",
       [=](auto& b) {
         b.at(name).ne = {4, int64_t{1} << 58};
         b.at("blk.0.attn_norm.weight").ne = {4, int64_t{3} << 58};
       },
       {name, "fits"}},
      {"type -1", with_type(~0u), {name, "type -1"}},
      {"type 4, removed", with_type(4), {name, "type 4"}},
      {"type 5, removed", with_type(5), {name, "type 5"}},
      {"type 31, removed", with_type(31), {name, "type 31"}},
      {"type 36, removed", with_type(36), {name, "type 36"}},
      {"type 43", with_type(43), {name, "type 43"}},
      {"type 1000000", with_type(1000000), {name, "type 1000000"}},
      {"block of 32", with_type(3), {name, "multiple of 32", "Q4_1"}},
      {"block of 256",
       [=](auto& b) {
         b.at(name).type = 12;
         b.at(name).ne = {32};
       },
       {name, "multiple of 256", "Q4_K"}},
      {"not aligned", with_offset(97), {name, "offset 96", "97"}},
      {"a hole", with_offset(128), {name, "offset 96", "128"}},
      {"an overlap", with_offset(0), {name, "offset 96", "found 0"}},
      {"offset that wraps", with_offset(~uint64_t{31}), {name, "offset 96"}},
      {"part of a split file",
       [](auto& b) { b.add("split.count", 2, raw<uint16_t>(3)); },
       {"split.count", "3 files", "merge"}},
  });
}

TEST(GgufTest, RefusesEveryTruncation) {  // 35; also of every table before the data
  const std::string whole = tiny_llama().bytes();
  const auto open = [](const std::string& bytes) {
    // On the heap, at its exact size, where a sanitizer sees a read past the end.
    const std::vector<std::byte> exact = to_bytes(bytes);
    return error_of([&] { const GgufFile gguf(exact, "m.gguf"); });
  };
  ASSERT_EQ(open(whole), "");
  EXPECT_EQ(open(whole + "more"), "");
  for (size_t size = 0; size < whole.size(); ++size) {
    ASSERT_EQ(complaint(open(whole.substr(0, size)), {"m.gguf: "}), "") << size << " bytes";
  }
  EXPECT_EQ(complaint(open(whole.substr(0, whole.size() - 1)),
                      {"blk.0.ffn_down.weight", "128 bytes", "127"}),
            "");
}

// Opens what may be damaged and reads all that was accepted.
void try_model(const std::string& bytes) {
  const std::vector<std::byte> exact = to_bytes(bytes);
  const std::string message = error_of([&] {
    const GgufFile gguf(exact, "m.gguf");
    unsigned sum = 0;
    for (const GgufTensor& t : gguf.tensors()) {
      for (size_t i = 0; i < t.bytes; ++i) sum += static_cast<unsigned>(t.data[i]);
    }
    std::vector<std::string> warnings;
    const LlamaTensors model = read_gguf_llama(gguf, &warnings);
    const TensorView& q = model.layers.at(0).wq;
    for (int64_t r = 0; r < q.rows; ++r) sum += static_cast<unsigned>(*q.row(r));
    const Vocabulary v = read_gguf_vocabulary(gguf);
    EXPECT_EQ(v.types.size(), v.tokens.size());
    EXPECT_GE(sum, 0u);
  });
  if (!message.empty()) {
    ASSERT_EQ(complaint(message, {"m.gguf: "}), "");
  }
}

TEST(GgufTest, SurvivesEveryBitFlip) {
  const std::string whole = tiny_llama().bytes();
  for (size_t i = 0; i < whole.size(); ++i) {
    for (int bit = 0; bit < 8; ++bit) {
      std::string bytes = whole;
      bytes[i] = static_cast<char>(bytes[i] ^ (1 << bit));
      try_model(bytes);
    }
  }
}

TEST(GgufFull, SurvivesRandomDamage) {
  const std::string whole = tiny_llama().bytes();
  std::mt19937_64 random(20240607);
  const auto below = [&](size_t n) { return random() % n; };
  for (int round = 0; round < 200000; ++round) {
    std::string bytes = whole;
    for (size_t damage = 1 + below(4); damage > 0; --damage) {
      const size_t at = below(bytes.size() - 8);
      switch (below(4)) {
        case 0: bytes[at] = static_cast<char>(random()); break;
        case 1: bytes.replace(at, 8, raw<uint64_t>(random() >> below(64))); break;
        case 2: bytes.erase(at, below(8)); break;
        case 3: bytes.insert(at, raw<uint64_t>(~uint64_t{0}).substr(below(8))); break;
      }
    }
    try_model(bytes);
  }
}

// The tokenizer's keys.

Vocabulary vocabulary_of(const GgufBuilder& b) {
  const std::vector<std::byte> bytes = to_bytes(b.bytes());
  return read_gguf_vocabulary(GgufFile(bytes, "m.gguf"));
}

GgufBuilder tiny_bpe() {
  GgufBuilder b;
  b.string("tokenizer.ggml.model", "gpt2").string("tokenizer.ggml.pre", "smollm");
  b.strings("tokenizer.ggml.tokens", {"<e>", "a", "b", "ab"});
  b.strings("tokenizer.ggml.merges", {"a b"});
  b.i32s("tokenizer.ggml.token_type", {3, 1, 1, 1});
  b.u32("tokenizer.ggml.eos_token_id", 0);
  return b;
}

TEST(GgufVocabularyTest, ReadsBothKinds) {
  const Vocabulary spm = vocabulary_of(tiny_llama());
  EXPECT_EQ(spm.model, TokenizerModel::kSentencePiece);
  EXPECT_EQ(spm.pre, PreTokenizer::kNone);
  EXPECT_EQ(spm.tokens, (std::vector<std::string>{"<unk>", "<s>", "</s>", "a", "b"}));
  EXPECT_EQ(spm.scores, (std::vector<float>{0, 0, 0, -1, -2}));
  EXPECT_EQ(spm.types[0], TokenType::kUnknown);
  EXPECT_EQ(spm.types[4], TokenType::kNormal);
  EXPECT_EQ(spm.bos, 1);
  EXPECT_EQ(spm.eos, 2);
  EXPECT_EQ(spm.unk, 0);
  EXPECT_TRUE(spm.add_bos);
  EXPECT_TRUE(spm.add_space_prefix);

  GgufBuilder b = tiny_bpe();
  b.string("tokenizer.chat_template", "{{ x }}").boolean("tokenizer.ggml.add_space_prefix", false);
  b.f32s("tokenizer.ggml.scores", {1, 2});  // of no use to BPE, so of no harm
  const Vocabulary bpe = vocabulary_of(b);
  EXPECT_EQ(bpe.model, TokenizerModel::kByteBpe);
  EXPECT_EQ(bpe.pre, PreTokenizer::kSmolLm);
  EXPECT_EQ(bpe.merges, std::vector<std::string>{"a b"});
  EXPECT_TRUE(bpe.scores.empty());
  EXPECT_EQ(bpe.bos, -1);
  EXPECT_EQ(bpe.eos, 0);
  EXPECT_EQ(bpe.unk, -1);
  EXPECT_FALSE(bpe.add_bos);
  EXPECT_FALSE(bpe.add_space_prefix);
  EXPECT_EQ(bpe.chat_template, "{{ x }}");

  b.u32("tokenizer.ggml.bos_token_id", 0).boolean("tokenizer.ggml.add_bos_token", true);
  b.string("tokenizer.ggml.pre", "gpt-2");
  EXPECT_TRUE(vocabulary_of(b).add_bos);
  EXPECT_EQ(vocabulary_of(b).pre, PreTokenizer::kGpt2);
  GgufBuilder no_bos = tiny_llama();
  no_bos.boolean("tokenizer.ggml.add_bos_token", false);
  EXPECT_FALSE(vocabulary_of(no_bos).add_bos);
}

TEST(GgufVocabularyTest, RefusesWhatItCannotTokenizeWith) {  // 43, 44, 48, 49
  const std::string t = "tokenizer.ggml.";
  const float inf = std::numeric_limits<float>::infinity();
  const std::vector<BadFile> spm = {
      {"model", [=](auto& b) { b.string(t + "model", "t5"); }, {"tokenizer.ggml.model", "'t5'"}},
      {"no model", [=](auto& b) { b.remove(t + "model"); }, {"tokenizer.ggml.model", "no such"}},
      {"pre", [=](auto& b) { b.string(t + "pre", "qwen2"); }, {"tokenizer.ggml.pre", "'qwen2'"}},
      {"no tokens", [=](auto& b) { b.remove(t + "tokens"); }, {"tokens", "no such key"}},
      {"0 tokens", [=](auto& b) { b.strings(t + "tokens", {}); }, {"tokens", "empty"}},
      {"tokens are numbers",
       [=](auto& b) {
         b.i32s(t + "tokens", {1, 2});
       },
       {"array of strings"}},
      {"no scores", [=](auto& b) { b.remove(t + "scores"); }, {"scores", "no such key"}},
      {"few scores", [=](auto& b) { b.f32s(t + "scores", {1}); }, {"scores", "5", "found 1"}},
      {"scores of u8",
       [=](auto& b) { b.set(t + "scores", 9, raw(0u) + raw<uint64_t>(5) + "12345"); },
       {"scores", "array of f32", "5 u8"}},
      {"scores NaN",
       [=](auto& b) {
         b.f32s(t + "scores", {0, 0, NAN, 0, 0});
       },
       {"nan", "token 2"}},
      {"scores inf",
       [=](auto& b) {
         b.f32s(t + "scores", {inf, 0, 0, 0, 0});
       },
       {"inf", "token 0"}},
      {"few types", [=](auto& b) { b.i32s(t + "token_type", {1}); }, {"token_type", "found 1"}},
      {"type 7",
       [=](auto& b) {
         b.i32s(t + "token_type", {1, 1, 7, 1, 1});
       },
       {"7 for token 2"}},
      {"type 0",
       [=](auto& b) {
         b.i32s(t + "token_type", {0, 1, 1, 1, 1});
       },
       {"0 for token 0"}},
      {"bos", [=](auto& b) { b.u32(t + "bos_token_id", 5); }, {"bos_token_id", "below 5"}},
      {"eos", [=](auto& b) { b.u32(t + "eos_token_id", ~0u); }, {"eos_token_id", "4294967295"}},
      {"unk", [=](auto& b) { b.set(t + "unknown_token_id", 5, raw(-1)); }, {"unknown", "found -1"}},
      {"add_bos without bos",
       [=](auto& b) { b.remove(t + "bos_token_id").boolean(t + "add_bos_token", true); },
       {"add_bos_token"}},
      {"add_eos", [=](auto& b) { b.boolean(t + "add_eos_token", true); }, {"add_eos_token"}},
  };
  for (const BadFile& bad : spm) {
    GgufBuilder b = tiny_llama();
    bad.break_it(b);
    EXPECT_EQ(complaint(error_of([&] { vocabulary_of(b); }), bad.words), "") << bad.what;
  }
  const std::vector<BadFile> bpe = {
      {"pre", [=](auto& b) { b.string(t + "pre", "qwen2"); }, {"pre", "'qwen2'"}},
      {"pre default", [=](auto& b) { b.string(t + "pre", "default"); }, {"pre", "'default'"}},
      {"no pre", [=](auto& b) { b.remove(t + "pre"); }, {"pre", "no such key"}},
      {"no merges", [=](auto& b) { b.remove(t + "merges"); }, {"merges", "no such key"}},
      {"0 merges", [=](auto& b) { b.strings(t + "merges", {}); }, {"merges", "empty"}},
  };
  for (const BadFile& bad : bpe) {
    GgufBuilder b = tiny_bpe();
    bad.break_it(b);
    EXPECT_EQ(complaint(error_of([&] { vocabulary_of(b); }), bad.words), "") << bad.what;
  }
}

// The mapping under it.

size_t resident_pages() {
  size_t total = 0, resident = 0;
  std::ifstream("/proc/self/statm") >> total >> resident;
  return resident;
}

TEST(MappedFileTest, RefusesWhatIsNotAFileWithData) {  // 55
  const std::string fifo = TempFile("").path();
  ASSERT_EQ(mkfifo(fifo.c_str(), 0600), 0);
  EXPECT_EQ(complaint(error_of([&] { MappedFile{fifo}; }), {fifo, "regular file", "FIFO"}), "");
  std::remove(fifo.c_str());
  EXPECT_EQ(complaint(error_of([&] { MappedFile{fifo}; }), {fifo, "No such file"}), "");
  EXPECT_EQ(complaint(error_of([] { MappedFile{"/tmp"}; }), {"/tmp", "a directory"}), "");
  EXPECT_EQ(complaint(error_of([] { MappedFile{"/dev/null"}; }), {"a device"}), "");
  EXPECT_EQ(complaint(error_of([] { MappedFile{"no\nsuch"}; }), {"no\\x0asuch"}), "");
  const TempFile empty("");
  EXPECT_EQ(complaint(error_of([&] { MappedFile{empty.path()}; }), {"empty file"}), "");
  const TempFile secret("x");
  ASSERT_EQ(chmod(secret.path().c_str(), 0), 0);
  if (geteuid() != 0) {  // root may read everything
    EXPECT_EQ(complaint(error_of([&] { MappedFile{secret.path()}; }), {"Permission denied"}), "");
  }
}

TEST(MappedFileTest, MovesWithoutMovingTheBytes) {
  const TempFile file("hello");
  MappedFile a(file.path());
  const std::byte* data = a.bytes().data();
  MappedFile b(std::move(a));
  EXPECT_TRUE(a.bytes().empty());  // or both would unmap it
  EXPECT_EQ(a.bytes().data(), nullptr);
  MappedFile c;
  c = std::move(b);
  EXPECT_EQ(c.bytes().data(), data);
  EXPECT_EQ(c.bytes().size(), 5u);
  EXPECT_EQ(std::memcmp(c.bytes().data(), "hello", 5), 0);
  EXPECT_EQ(c.name(), file.path());
}

TEST(MappedFileTest, DropsPagesThatCanBeReadAgain) {
  const size_t size = size_t{16} << 20;
  std::string text(size, 'x');
  text.back() = 'y';
  const TempFile file(text);
  const MappedFile mapped(file.path());
  const auto sum = [&] {
    size_t total = 0;
    for (const std::byte b : mapped.bytes()) total += static_cast<size_t>(b);
    return total;
  };
  const size_t expected = 'x' * (size - 1) + 'y';
  ASSERT_EQ(sum(), expected);
  const size_t before = resident_pages();
  mapped.drop(mapped.bytes().subspan(1));
  const size_t after = resident_pages();
  EXPECT_GT(before, after + size / static_cast<size_t>(sysconf(_SC_PAGESIZE)) / 2);
  EXPECT_EQ(sum(), expected);
}

}  // namespace
}  // namespace chimera
