#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <functional>
#include <iterator>
#include <memory>
#include <random>
#include <type_traits>

#include "loader/gguf.h"
#include "loader/llama2c.h"
#include "loader/llama_gguf.h"
#include "loader/load.h"
#include "loader/sentencepiece.h"
#include "tests/gguf_builder.h"
#include "tokenizer/tokenizer.h"

namespace chimera {
namespace {

using test::complaint;
using test::error_of;
using test::GgufBuilder;
using test::raw;
using test::raw_string;
using test::TempFile;
using test::tiny_llama;

const std::string kModels = "../shared/data/models/";
const std::string kTokenizers = "../shared/data/tokenizers/";
const std::string kSmolLm2 = "models/SmolLM2-135M-Instruct.Q4_1.gguf";

#define SKIP_WITHOUT(path) \
  if (!std::filesystem::exists(path)) GTEST_SKIP() << "not there: " << (path)

std::vector<std::byte> to_bytes(const std::string& text) {
  const auto* start = reinterpret_cast<const std::byte*>(text.data());
  return {start, start + text.size()};
}

std::string read_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

std::vector<float> row_of(const TensorView& t, int64_t r) {
  std::vector<float> row(static_cast<size_t>(t.cols));
  dequantize_row(t.type, t.row(r), t.cols, row.data());
  return row;
}

struct Loaded {
  LlamaTensors tensors;
  std::vector<std::string> warnings;
  std::vector<std::byte> bytes;  // what the tensors point into
};

Loaded load(const GgufBuilder& b) {
  Loaded out;
  out.bytes = to_bytes(b.bytes());
  const GgufFile file(out.bytes, "m.gguf");
  out.tensors = read_gguf_llama(file, &out.warnings);
  return out;
}

// GGUF.

TEST(Error, TextsOfOthersAreOneShortLine) {
  EXPECT_EQ(in_quotes("a b"), "'a b'");
  EXPECT_EQ(in_quotes("a\n\xFF"), "'a\\x0a\\xff'");
  EXPECT_EQ(in_quotes(std::string(1000, 'x')), "'" + std::string(80, 'x') + "...'");
}

TEST(LlamaGgufTest, FillsInTheModel) {
  const Loaded m = load(tiny_llama());
  const LlamaConfig& c = m.tensors.config;
  EXPECT_EQ(m.tensors.name, "tiny");
  EXPECT_EQ(c.vocab_size, 5);
  EXPECT_EQ(c.hidden_size, 4);
  EXPECT_EQ(c.n_layers, 1);
  EXPECT_EQ(c.n_heads, 2);
  EXPECT_EQ(c.n_kv_heads, 1);
  EXPECT_EQ(c.head_dim, 2);
  EXPECT_EQ(c.ffn_size, 8);
  EXPECT_EQ(c.max_context, 16);
  EXPECT_EQ(c.rms_eps, 1e-5f);
  EXPECT_EQ(c.rope_base, 10000.0);
  EXPECT_TRUE(c.rope_divisors.empty());
  EXPECT_TRUE(m.warnings.empty());

  ASSERT_EQ(m.tensors.layers.size(), 1u);
  const LlamaLayerTensors& layer = m.tensors.layers[0];
  EXPECT_EQ(layer.w_down.rows, 4);
  EXPECT_EQ(layer.w_down.cols, 8);
  EXPECT_EQ(row_of(layer.w_down, 3)[7], 31.0f);
  EXPECT_EQ(layer.wk.rows, 2);
  EXPECT_EQ(layer.w_up.rows, 8);
  EXPECT_EQ(m.tensors.output_norm.cols, 4);
  EXPECT_TRUE(m.tensors.head.empty());
  EXPECT_EQ(m.tensors.output().rows, 5);
}

TEST(LlamaGgufTest, HandsOutQueryAndKeyRowsInTheEnginesOrder) {
  GgufBuilder b = tiny_llama();
  b.u32("llama.attention.head_count", 1);  // one head of 4: the file pairs its rows 0, 1 and 2, 3
  for (const char* name : {"blk.0.attn_k.weight", "blk.0.attn_v.weight"}) {
    b.drop(name).counting(name, {4, 4});
  }
  const Loaded m = load(b);
  const LlamaLayerTensors& layer = m.tensors.layers[0];
  EXPECT_EQ(layer.wq.interleaved_head_dim, 4);
  EXPECT_EQ(layer.wk.interleaved_head_dim, 4);
  EXPECT_EQ(layer.wv.interleaved_head_dim, 0);
  EXPECT_EQ(layer.wo.interleaved_head_dim, 0);
  const float first[] = {0, 8, 4,
                         12};  // file rows 0, 2, 1, 3, which begin with 4 times their number
  for (int r = 0; r < 4; ++r) {
    EXPECT_EQ(row_of(layer.wq, r)[0], first[r]);
    EXPECT_EQ(row_of(layer.wk, r)[0], first[r]);
    EXPECT_EQ(row_of(layer.wv, r)[0], 4.0f * static_cast<float>(r));
  }
}

TEST(LlamaGgufTest, ReadsWhatIsOptional) {
  GgufBuilder b = tiny_llama();
  b.counting("output.weight", {4, 5});
  b.u32("llama.vocab_size", 5).u32("llama.rope.dimension_count", 2);
  b.u32("llama.attention.key_length", 2).u32("llama.attention.value_length", 2);
  b.f32("llama.rope.freq_base", 500000.0f);
  b.string("llama.rope.scaling.type", "linear").f32("llama.rope.scaling.factor", 4.0f);
  const Loaded m = load(b);
  EXPECT_FALSE(m.tensors.head.empty());
  EXPECT_EQ(&m.tensors.output(), &m.tensors.head);
  EXPECT_EQ(m.tensors.config.rope_base, 500000.0);
  EXPECT_EQ(m.tensors.config.rope_divisors, std::vector<float>{4.0f});

  b.string("llama.rope.scaling.type", "none");
  EXPECT_TRUE(load(b).tensors.config.rope_divisors.empty());
  b.tensor("rope_freqs.weight", 0, {1}, raw(8.0f));
  EXPECT_EQ(load(b).tensors.config.rope_divisors, std::vector<float>{8.0f});
  EXPECT_TRUE(load(b).warnings.empty());
  b.remove("llama.rope.scaling.type");  // a factor without a type is linear
  EXPECT_EQ(load(b).tensors.config.rope_divisors, std::vector<float>{32.0f});

  // A head size of its own: 2 heads of 4 over a hidden size of 4.
  GgufBuilder wide = tiny_llama();
  wide.u32("llama.attention.key_length", 4);
  for (const char* name : {"attn_q", "attn_k", "attn_v", "attn_output"}) {
    wide.drop("blk.0." + std::string(name) + ".weight");
  }
  wide.counting("blk.0.attn_q.weight", {4, 8}).counting("blk.0.attn_k.weight", {4, 4});
  wide.counting("blk.0.attn_v.weight", {4, 4}).counting("blk.0.attn_output.weight", {8, 4});
  EXPECT_EQ(load(wide).tensors.config.q_size(), 8);
  EXPECT_EQ(load(wide).tensors.layers[0].wo.cols, 8);

  GgufBuilder all_heads = tiny_llama();
  all_heads.remove("llama.attention.head_count_kv");
  for (const char* name : {"blk.0.attn_k.weight", "blk.0.attn_v.weight"}) {
    all_heads.drop(name).counting(name, {4, 4});
  }
  EXPECT_EQ(load(all_heads).tensors.config.n_kv_heads, 2);
}

TEST(LlamaGgufTest, WarnsOfTensorsItDoesNotKnow) {
  GgufBuilder b = tiny_llama();
  b.counting("rotary_emb.inv_freq", {4});
  const Loaded one = load(b);
  ASSERT_EQ(one.warnings.size(), 1u);
  EXPECT_EQ(complaint(one.warnings[0], {"m.gguf", "'rotary_emb.inv_freq'", "ignored"}), "");
  for (int i = 0; i < 20; ++i) b.counting("extra." + std::to_string(i), {4});
  const Loaded many = load(b);
  ASSERT_EQ(many.warnings.size(), 9u);
  EXPECT_EQ(complaint(many.warnings[8], {"13 more"}), "");
}

struct BadModel {
  const char* what;
  std::function<void(GgufBuilder&)> break_it;
  std::vector<std::string> words;
};

TEST(LlamaGgufTest, RefusesModelsThatMakeNoSense) {  // bad_inputs 37 to 42, 17
  const std::string l = "llama.", a = "llama.attention.", r = "llama.rope.";
  const auto u32 = [](const std::string& key, uint32_t value) {
    return [=](GgufBuilder& b) { b.u32(key, value); };
  };
  const auto f32 = [](const std::string& key, float value) {
    return [=](GgufBuilder& b) { b.f32(key, value); };
  };
  const auto without = [](const std::string& key) {
    return [=](GgufBuilder& b) { b.remove(key); };
  };
  const std::string eps = a + "layer_norm_rms_epsilon";
  std::vector<BadModel> cases = {
      {"architecture",
       [](auto& b) { b.string("general.architecture", "mamba"); },
       {"general.architecture", "'llama'", "'mamba'"}},
      {"no architecture", without("general.architecture"), {"architecture", "no such key"}},
      {"experts", u32(l + "expert_count", 8), {"llama.expert_count", "found 8"}},
      {"window", u32(a + "sliding_window", 4096), {"sliding_window", "4096"}},
      {"hidden % heads", u32(a + "head_count", 3), {"embedding_length", "multiple of the 3", "4"}},
      {"heads % kv", u32(a + "head_count_kv", 3), {"2 heads", "3 KV heads"}},
      {"odd head", u32(a + "head_count", 4), {"even head size", "found 1"}},
      {"odd key_length", u32(a + "key_length", 3), {"even head size", "found 3"}},
      {"huge head", u32(a + "key_length", 1026), {"key_length", "from 1 to 1024", "found 1026"}},
      {"value_length", u32(a + "value_length", 4), {"value_length", "expected 2", "found 4"}},
      {"rope dims", u32(r + "dimension_count", 1), {"dimension_count", "expected 2", "found 1"}},
      {"negative", [=](auto& b) { b.set(l + "block_count", 5, raw(-1)); }, {"block_count", "-1"}},
      {"a string",
       [=](auto& b) { b.string(l + "block_count", "1"); },
       {"block_count", "an integer", "string"}},
      {"a float", f32(l + "block_count", 1.0f), {"block_count", "an integer", "f32"}},
      {"eps 0", f32(eps, 0.0f), {"epsilon", "above 0", "0.0"}},
      {"eps -1", f32(eps, -1.0f), {"epsilon", "above 0", "-1"}},
      {"eps NaN", f32(eps, NAN), {"epsilon", "nan"}},
      {"eps 1", f32(eps, 1.0f), {"epsilon", "up to 0.1"}},
      {"no eps", without(eps), {"epsilon", "no such key"}},
      {"rope base 0", f32(r + "freq_base", 0.0f), {"freq_base", "above 1"}},
      {"rope base inf", f32(r + "freq_base", INFINITY), {"freq_base", "inf"}},
      {"rope base an integer", u32(r + "freq_base", 10000), {"freq_base", "floating", "u32"}},
      {"yarn", [=](auto& b) { b.string(r + "scaling.type", "yarn"); }, {"scaling.type", "'yarn'"}},
      {"linear without factor",
       [=](auto& b) { b.string(r + "scaling.type", "linear"); },
       {"scaling.factor", "no such key"}},
      {"factor 0", f32(r + "scaling.factor", 0.0f), {"scaling.factor", "above 0"}},
      {"rope_freqs of another size",
       [](auto& b) { b.counting("rope_freqs.weight", {2}); },
       {"rope_freqs.weight", "shape 1", "found 2"}},
      {"rope_freqs 0",
       [](auto& b) { b.counting("rope_freqs.weight", {1}); },
       {"rope_freqs.weight", "0.001 or more"}},
      {"a factor that turns heads too fast",
       f32(r + "scaling.factor", 1e-4f),
       {"scaling.factor", "0.001"}},
      {"vocab_size", u32(l + "vocab_size", 6), {"vocab_size", "expected 5", "found 6"}},
      {"no tensor",
       [](auto& b) { b.drop("blk.0.ffn_up.weight"); },
       {"'blk.0.ffn_up.weight'", "found none"}},
      {"no embedding",
       [](auto& b) { b.drop("token_embd.weight"); },
       {"'token_embd.weight'", "found none"}},
      {"layer missing", u32(l + "block_count", 2), {"'blk.1.attn_norm.weight'", "found none"}},
      {"transposed",
       [](auto& b) {
         b.at("blk.0.ffn_down.weight").ne = {4, 8};
       },
       {"'blk.0.ffn_down.weight'", "8 x 4", "found 4 x 8"}},
      {"three dimensions",
       [](auto& b) {
         b.at("blk.0.ffn_down.weight").ne = {8, 4, 1};
       },
       {"8 x 4", "8 x 4 x 1"}},
      {"a scalar",
       [](auto& b) {
         b.at("blk.0.attn_norm.weight").ne = {};
         b.at("blk.0.attn_norm.weight").data.resize(4);
       },
       {"'blk.0.attn_norm.weight'", "shape 4", "a scalar"}},
      {"head of another shape",
       [](auto& b) {
         b.counting("output.weight", {4, 6});
       },
       {"'output.weight'", "4 x 5", "4 x 6"}},
      {"norm of F16",
       [](auto& b) {
         b.at("output_norm.weight").type = 1;
         b.at("output_norm.weight").data.resize(8);
       },
       {"'output_norm.weight'", "F32", "F16"}},
      {"matrix of I8",
       [](auto& b) {
         b.at("blk.0.attn_q.weight").type = 24;
         b.at("blk.0.attn_q.weight").data.resize(16);
       },
       {"'blk.0.attn_q.weight'", "Q4_1", "found I8"}},
      {"NaN in a norm",
       [](auto& b) { b.at("blk.0.ffn_norm.weight").data.replace(8, 4, raw(NAN)); },
       {"'blk.0.ffn_norm.weight'", "finite", "nan at 2"}},
      {"infinity in a norm",
       [](auto& b) { b.at("output_norm.weight").data.replace(0, 4, raw(INFINITY)); },
       {"'output_norm.weight'", "finite", "inf at 0"}},
      {"bias",
       [](auto& b) { b.counting("blk.0.attn_q.bias", {4}); },
       {"'blk.0.attn_q.bias'", "biases are not supported"}},
  };
  for (const char* key :
       {"context_length", "embedding_length", "block_count", "feed_forward_length",
        "attention.head_count", "attention.head_count_kv"}) {
    cases.push_back({key, u32(l + key, 0), {key, "from 1", "found 0"}});
    cases.push_back({key, u32(l + key, ~0u), {key, "from 1", "4294967295"}});
    if (std::string(key) != "attention.head_count_kv") {
      cases.push_back({key, without(l + key), {key, "no such key"}});
    }
  }
  for (const BadModel& bad : cases) {
    GgufBuilder b = tiny_llama();
    bad.break_it(b);
    EXPECT_EQ(complaint(error_of([&] { load(b); }), bad.words), "") << bad.what;
  }
}

// llama2.c.

struct Llama2c {
  std::vector<int32_t> header = {8, 12, 2, 2, 1, 5, 16};  // heads of 4
  std::string bytes() const {
    std::string out;
    for (const int32_t h : header) out += raw(h);
    const int dim = 8, hidden = 12, layers = 2, kv = 4, vocab = 5, seq = 16, head = 4;
    const int floats = vocab * dim +
                       layers * (2 * dim + 2 * dim * dim + 2 * dim * kv + 3 * dim * hidden) + dim +
                       seq * head;
    for (int i = 0; i < floats; ++i) out += raw(static_cast<float>(i));
    return out;
  }
};

std::string tokenizer_bin() {
  std::string out = raw<int32_t>(5);
  const std::vector<std::string> tokens = {"<unk>", "\n<s>\n", "\n</s>\n", "<0x00>", " a"};
  for (size_t i = 0; i < tokens.size(); ++i) {
    out += raw(-static_cast<float>(i)) + raw(static_cast<int32_t>(tokens[i].size())) + tokens[i];
  }
  return out;
}

// A folder with these files, gone at the end of the scope.
class TempFolder {
 public:
  explicit TempFolder(const std::vector<std::pair<std::string, std::string>>& files) {
    std::string name = "/tmp/chimera_test_XXXXXX";
    path_ = mkdtemp(name.data());
    for (const auto& [file, bytes] : files) {
      std::ofstream(path_ + "/" + file, std::ios::binary) << bytes;
    }
  }
  ~TempFolder() { std::filesystem::remove_all(path_); }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

TEST(Llama2cTest, ReadsModelAndTokenizer) {
  const TempFolder folder({{"any.name", Llama2c().bytes()}, {"tokenizer.bin", tokenizer_bin()}});
  const ModelFile m = load_model(folder.path() + "/any.name");
  EXPECT_EQ(m.format, "llama2.c");
  EXPECT_EQ(m.tensors.config.head_dim, 4);
  EXPECT_TRUE(m.tensors.head.empty());
  const LlamaLayerTensors& layer = m.tensors.layers.at(1);
  // Tensor after tensor, each for all layers: 5 * 8 floats of embedding come first.
  EXPECT_EQ(row_of(layer.attn_norm, 0)[0], 40.0f + 8);
  EXPECT_EQ(row_of(layer.wv, 0)[0], 40.0f + 16 + 2 * 64 + 2 * 32 + 32);
  EXPECT_EQ(row_of(layer.wv, 3)[7], 40.0f + 16 + 2 * 64 + 2 * 32 + 2 * 32 - 1);
  // The second row of a head in the engine's order is the third in the file.
  EXPECT_EQ(row_of(m.tensors.layers[0].wq, 1)[0], 40.0f + 16 + 2 * 8);
  EXPECT_EQ(layer.wk.interleaved_head_dim, 4);
  EXPECT_EQ(layer.wv.interleaved_head_dim, 0);
  EXPECT_EQ(m.vocabulary.tokens, (std::vector<std::string>{"<unk>", "<s>", "</s>", "<0x00>",
                                                           "\xe2\x96\x81"
                                                           "a"}));
  using enum TokenType;
  EXPECT_EQ(m.vocabulary.types,
            (std::vector<TokenType>{kUnknown, kControl, kControl, kByte, kNormal}));
  EXPECT_EQ(m.vocabulary.scores[4], -4.0f);
  EXPECT_EQ(m.vocabulary.bos, 1);
  EXPECT_EQ(m.vocabulary.eos, 1);
  EXPECT_TRUE(m.vocabulary.add_bos);
}

TEST(Llama2cTest, ReadsAClassifierOfItsOwn) {
  Llama2c model;
  model.header[5] = -5;
  const std::vector<std::byte> bytes = to_bytes(model.bytes() + std::string(4 * 5 * 8, '\0'));
  const LlamaTensors t = read_llama2c(bytes, "m.bin");
  EXPECT_EQ(t.config.vocab_size, 5);
  ASSERT_FALSE(t.head.empty());
  EXPECT_EQ(t.head.data + t.head.bytes(), bytes.data() + bytes.size());
  EXPECT_EQ(complaint(error_of([&] { read_llama2c(to_bytes(model.bytes()), "m.bin"); }),
                      {"m.bin", "bytes"}),
            "");
}

TEST(Llama2cTest, RefusesHeadersThatMakeNoSense) {
  const char* names[] = {"dim",        "hidden_dim", "n_layers", "n_heads",
                         "n_kv_heads", "vocab_size", "seq_len"};
  for (size_t i = 0; i < 7; ++i) {
    for (const int32_t value : {0, -1, 1 << 30, std::numeric_limits<int32_t>::min()}) {
      Llama2c model;
      model.header[i] = value;
      const bool flag =
          i == 5 && value == -1;  // one token and a classifier: only the size is wrong
      EXPECT_EQ(complaint(error_of([&] { read_llama2c(to_bytes(model.bytes()), "m.bin"); }),
                          {"m.bin", flag ? "bytes" : names[i]}),
                "");
    }
  }
  Llama2c heads;
  heads.header[3] = 3;
  EXPECT_EQ(complaint(error_of([&] { read_llama2c(to_bytes(heads.bytes()), "m.bin"); }),
                      {"multiple of the 3 heads"}),
            "");
  const std::string whole = Llama2c().bytes();
  for (size_t size = 0; size < whole.size(); size += size < 40 ? 1 : 997) {
    EXPECT_EQ(complaint(error_of([&] { read_llama2c(to_bytes(whole.substr(0, size)), "m.bin"); }),
                        {"m.bin", "bytes"}),
              "");
  }
  EXPECT_EQ(complaint(error_of([&] { read_llama2c(to_bytes(whole + "x"), "m.bin"); }), {"bytes"}),
            "");
  std::string nan = whole;
  nan.replace(28 + 4 * (40 + 8), 4, raw(NAN));
  EXPECT_EQ(complaint(error_of([&] { read_llama2c(to_bytes(nan), "m.bin"); }),
                      {"'layers.1.att_norm'", "finite"}),
            "");
}

TEST(Llama2cTest, RefusesTokenizersThatDoNotFit) {
  const std::string whole = tokenizer_bin();
  const auto read = [](const std::string& bytes, int vocab) {
    const std::vector<std::byte> exact = to_bytes(bytes);
    return error_of([&] { read_llama2c_vocabulary(exact, "tok.bin", vocab); });
  };
  ASSERT_EQ(read(whole, 5), "");
  EXPECT_EQ(complaint(read(whole, 6), {"tok.bin: token 5", "6 tokens"}), "");
  EXPECT_EQ(complaint(read(whole, 4), {"tok.bin", "10 more bytes"}), "");
  EXPECT_EQ(complaint(read(whole, 2), {"2 tokens"}), "");
  for (size_t size = 0; size < whole.size(); ++size) {
    EXPECT_EQ(complaint(read(whole.substr(0, size), 5), {"tok.bin: token"}), "") << size;
  }
  for (const int32_t length : {0, -1, 1 << 30, std::numeric_limits<int32_t>::min()}) {
    std::string bad = whole;
    bad.replace(8, 4, raw(length));
    EXPECT_EQ(complaint(read(bad, 5), {"token 0", "length", std::to_string(length)}), "");
  }
  std::string nan = whole;
  nan.replace(4, 4, raw(NAN));
  EXPECT_EQ(complaint(read(nan, 5), {"token 0", "finite", "nan"}), "");

  const TempFolder alone({{"m.bin", Llama2c().bytes()}});
  EXPECT_EQ(complaint(error_of([&] { load_model(alone.path() + "/m.bin"); }),
                      {"/m.bin", "tok5.bin", "tokenizer.model"}),
            "");
}

TEST(SentencePieceTest, RefusesDamage) {
  const std::string path = kModels + "stories260K/tok512.model";
  SKIP_WITHOUT(path);
  const std::string whole = read_file(path);
  const auto read = [](const std::string& bytes) {
    const std::vector<std::byte> exact = to_bytes(bytes);
    return error_of([&] { read_sentencepiece(exact, "t.model"); });
  };
  ASSERT_EQ(read(whole), "");
  std::string unigram = whole;
  const size_t model_type = whole.find("\x18\x02\x20\x80\x04");  // and vocab_size 512 after it
  ASSERT_NE(model_type, std::string::npos);
  unigram[model_type + 1] = 1;
  EXPECT_EQ(complaint(read(unigram), {"BPE", "type 1"}), "");
  // A cut between two fields after the normalizer_spec leaves a whole file.
  const size_t optional_end = 40;
  for (size_t size = 0; size < whole.size() - optional_end; ++size) {
    ASSERT_EQ(complaint(read(whole.substr(0, size)), {"t.model"}), "") << size;
  }
  std::mt19937 random(1);
  for (int i = 0; i < 3000; ++i) {
    std::string bytes = whole;
    bytes[random() % bytes.size()] = static_cast<char>(random());
    const std::string message = read(bytes);
    if (!message.empty()) {
      ASSERT_EQ(complaint(message, {"t.model"}), "");
    }
  }
  EXPECT_EQ(complaint(read("\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"), {"10 bytes"}), "");
}

// load_model.

TEST(LoadTest, RecognisesContentNotNames) {
  const TempFile gguf(tiny_llama().bytes(), ".bin");
  EXPECT_EQ(load_model(gguf.path()).format, "GGUF v3");
  const std::string header = "{\"w\":{\"dtype\":\"F32\"}}";
  const std::string safetensors = raw<uint64_t>(header.size()) + header;
  const std::vector<std::pair<std::string, std::vector<std::string>>> refused = {
      {std::string("PK\x03\x04rest of a zip archive that is long enough", 46), {"zip", "pickles"}},
      {std::string("\x80\x02\x8a\x0al\xfc\x9c\x46\xf9 and a long enough rest of it"),
       {"pickle", "GGUF or safetensors"}},
      {std::string("\x80\x04\x95 and a long enough rest of the pickle"), {"pickle"}},
      {safetensors, {"safetensors", "not supported yet", "GGUF"}},
      // A header of 66,176 bytes begins as a pickle does.
      {raw<uint64_t>(0x10280) + header + std::string(0x10280, ' '), {"not supported yet"}},
      {"24ka" + std::string(256, '\0'), {"version 0"}},
      {"tjgg" + std::string(256, '\0'), {"before GGUF"}},
      {"Once upon a time there was a text file", {"GGUF or llama2.c", "neither"}},
      {"x", {"neither"}},
      {std::string(1000, '\0'), {"neither"}},
      {"FUGG" + std::string(100, '\0'), {"little-endian"}},
  };
  for (const auto& [bytes, words] : refused) {
    const TempFile file(bytes, ".gguf");
    const std::string message = error_of([&] { load_model(file.path()); });
    EXPECT_EQ(complaint(message, words), "");
    EXPECT_TRUE(message.starts_with(file.path() + ": ")) << message;
  }
  const TempFile cut(Llama2c().bytes().substr(0, 1000), ".bin");
  EXPECT_EQ(complaint(error_of([&] { load_model(cut.path()); }), {"bytes", "found 1000"}), "");
}

TEST(LoadTest, TokenizerMustNotBeLargerThanTheEmbedding) {  // bad_inputs 42
  GgufBuilder b = tiny_llama();
  b.strings("tokenizer.ggml.tokens", {"<unk>", "<s>", "</s>", "a", "b", "c"});
  b.f32s("tokenizer.ggml.scores", {0, 0, 0, -1, -2, -3});
  b.i32s("tokenizer.ggml.token_type", {2, 3, 3, 1, 1, 1});
  const TempFile larger(b.bytes());
  EXPECT_EQ(complaint(error_of([&] { load_model(larger.path()); }), {"tokenizer", "5 tokens", "6"}),
            "");
  b.strings("tokenizer.ggml.tokens", {"<unk>", "<s>", "</s>", "a"});
  b.f32s("tokenizer.ggml.scores", {0, 0, 0, -1}).i32s("tokenizer.ggml.token_type", {2, 3, 3, 1});
  const TempFile smaller(b.bytes());
  const ModelFile m = load_model(smaller.path());
  ASSERT_EQ(m.warnings.size(), 1u);
  EXPECT_EQ(complaint(m.warnings[0], {"4 tokens", "5 rows"}), "");
  const Tokenizer tokenizer(m.vocabulary);  // the model may choose that row
  ASSERT_EQ(tokenizer.size(), 5);
  EXPECT_EQ(tokenizer.decode(std::vector<int32_t>{3, 4, 3}), "aa");
}

TEST(LoadTest, ViewsSurviveMoves) {
  static_assert(std::is_nothrow_move_constructible_v<MappedFile>);
  const TempFile file(tiny_llama().bytes());
  auto first = std::make_unique<ModelFile>(load_model(file.path()));
  const ModelFile second = std::move(*first);
  first.reset();
  EXPECT_EQ(row_of(second.tensors.layers[0].w_down, 3)[7], 31.0f);
}

// Real files.

TEST(RealModelTest, Stories260K) {
  const std::string path = kModels + "stories260K/stories260K.bin";
  SKIP_WITHOUT(path);
  const ModelFile m = load_model(path);
  const LlamaConfig& c = m.tensors.config;
  EXPECT_EQ(c.vocab_size, 512);
  EXPECT_EQ(c.hidden_size, 64);
  EXPECT_EQ(c.n_layers, 5);
  EXPECT_EQ(c.n_heads, 8);
  EXPECT_EQ(c.n_kv_heads, 4);
  EXPECT_EQ(c.head_dim, 8);
  EXPECT_EQ(c.ffn_size, 172);
  EXPECT_EQ(c.max_context, 512);
  EXPECT_EQ(m.tensors.layers[4].w_down.cols, 172);
  // After the last norm only the angles are left: 512 positions of 8.
  const std::span<const std::byte> bytes = m.file.bytes();
  const TensorView& norm = m.tensors.output_norm;
  EXPECT_EQ(norm.data + norm.bytes() + 512 * 8 * 4, bytes.data() + bytes.size());
  EXPECT_EQ(m.vocabulary.tokens[259], "\xe2\x96\x81t");
  EXPECT_EQ(m.vocabulary.types[258], TokenType::kByte);
  EXPECT_EQ(m.vocabulary.types[259], TokenType::kNormal);
  EXPECT_EQ(m.vocabulary.scores[260], -1.0f);
}

void expect_same_tokens(const Vocabulary& a, const Vocabulary& b) {
  EXPECT_EQ(a.model, b.model);
  EXPECT_EQ(a.tokens, b.tokens);
  EXPECT_EQ(a.scores, b.scores);
  EXPECT_EQ(a.types, b.types);
  EXPECT_EQ(a.unk, b.unk);
  EXPECT_EQ(a.bos, b.bos);
  EXPECT_EQ(a.eos, b.eos);
  EXPECT_EQ(a.add_bos, b.add_bos);
  EXPECT_EQ(a.add_space_prefix, b.add_space_prefix);
}

TEST(RealModelTest, BothTokenizersOfStories260KAreTheSame) {
  const std::string folder = kModels + "stories260K/";
  SKIP_WITHOUT(folder);
  const std::string model = read_file(folder + "stories260K.bin");
  const TempFolder with_bin({{"m", model}, {"tok512.bin", read_file(folder + "tok512.bin")}});
  const TempFolder with_model({{"m", model}, {"tok512.model", read_file(folder + "tok512.model")}});
  expect_same_tokens(load_model(with_bin.path() + "/m").vocabulary,
                     load_model(with_model.path() + "/m").vocabulary);
}

TEST(RealModelTest, SentencePieceAndGgufOfLlama2AreTheSame) {
  const std::string path = kTokenizers + "llama2/tokenizer.model";
  SKIP_WITHOUT(path);
  const std::vector<std::byte> bytes = to_bytes(read_file(path));
  expect_same_tokens(read_sentencepiece(bytes, path),
                     load_gguf_vocabulary(kTokenizers + "ggml-vocab-llama-spm.gguf"));
}

TEST(RealModelTest, VocabularyFiles) {
  SKIP_WITHOUT(kTokenizers);
  const Vocabulary gpt2 = load_gguf_vocabulary(kTokenizers + "ggml-vocab-gpt-2.gguf");
  EXPECT_EQ(gpt2.pre, PreTokenizer::kGpt2);
  EXPECT_EQ(gpt2.tokens.size(), 50257u);
  EXPECT_EQ(gpt2.merges.size(), 50000u);
  EXPECT_EQ(gpt2.eos, 50256);
  EXPECT_FALSE(gpt2.add_bos);
  const Vocabulary llama3 = load_gguf_vocabulary(kTokenizers + "ggml-vocab-llama-bpe.gguf");
  EXPECT_EQ(llama3.pre, PreTokenizer::kLlama3);
  EXPECT_EQ(llama3.tokens.size(), 128256u);
  EXPECT_EQ(llama3.bos, 128000);
  EXPECT_TRUE(llama3.add_bos);  // the file does not say so
}

TEST(RealModelTest, Llama2TinyRandom) {
  const std::string path = kModels + "llama-2-tiny-random/llama-2-tiny-random.gguf";
  SKIP_WITHOUT(path);
  const ModelFile m = load_model(path);
  EXPECT_EQ(m.format, "GGUF v3");
  EXPECT_EQ(m.tensors.name, "LLaMA v2");
  EXPECT_EQ(m.tensors.config.vocab_size, 32000);
  EXPECT_EQ(m.tensors.config.head_dim, 4);
  EXPECT_EQ(m.tensors.config.n_layers, 1);
  EXPECT_EQ(m.tensors.layers[0].wq.type, DType::kF16);
  EXPECT_EQ(m.tensors.head.rows, 32000);
  EXPECT_EQ(m.vocabulary.tokens.size(), 32000u);
}

TEST(RealModelTest, TinyQuantsInElevenTypes) {
  const std::string folder = kModels + "tiny-quants/";
  SKIP_WITHOUT(folder);
  const ModelFile exact = load_model(folder + "tiny-f32.gguf");
  const std::pair<const char*, DType> files[kDTypeCount] = {
      {"f32", DType::kF32},   {"f16", DType::kF16},   {"bf16", DType::kBF16},
      {"q8_0", DType::kQ8_0}, {"q4_0", DType::kQ4_0}, {"q4_1", DType::kQ4_1},
      {"q5_0", DType::kQ5_0}, {"q5_1", DType::kQ5_1}, {"q4_k", DType::kQ4_K},
      {"q5_k", DType::kQ5_K}, {"q6_k", DType::kQ6_K}};
  for (const auto& [name, type] : files) {
    const ModelFile m = load_model(folder + "tiny-" + name + ".gguf");
    EXPECT_EQ(m.tensors.config.head_dim, 64) << name;
    EXPECT_TRUE(m.warnings.empty()) << name;
    ASSERT_EQ(m.tensors.layers.size(), 2u);
    const LlamaLayerTensors& layer = m.tensors.layers[1];
    const LlamaLayerTensors& exact_layer = exact.tensors.layers[1];
    const std::pair<const TensorView*, const TensorView*> pairs[] = {
        {&layer.wq, &exact_layer.wq},          {&layer.wk, &exact_layer.wk},
        {&layer.wv, &exact_layer.wv},          {&layer.wo, &exact_layer.wo},
        {&layer.w_gate, &exact_layer.w_gate},  {&layer.w_up, &exact_layer.w_up},
        {&layer.w_down, &exact_layer.w_down},  {&m.tensors.embedding, &exact.tensors.embedding},
        {&m.tensors.head, &exact.tensors.head}};
    for (const auto& [view, exact_view] : pairs) {
      EXPECT_EQ(view->type, type) << name << " " << view->name;
      ASSERT_EQ(view->rows, exact_view->rows);
      ASSERT_EQ(view->cols, exact_view->cols);
      // Quantised from the same weights: no two of these rows are alike otherwise.
      double error = 0, power = 0;
      for (const int64_t r : {int64_t{0}, view->rows - 1}) {
        const std::vector<float> a = row_of(*view, r), b = row_of(*exact_view, r);
        for (size_t i = 0; i < a.size(); ++i) {
          error += (a[i] - b[i]) * (a[i] - b[i]);
          power += b[i] * b[i];
        }
      }
      EXPECT_LT(error, 0.02 * power) << name << " " << view->name;
    }
  }
}

TEST(RealModelTest, SmolLm2) {
  SKIP_WITHOUT(kSmolLm2);
  const ModelFile m = load_model(kSmolLm2);
  const LlamaConfig& c = m.tensors.config;
  EXPECT_EQ(c.vocab_size, 49152);
  EXPECT_EQ(c.hidden_size, 576);
  EXPECT_EQ(c.n_layers, 30);
  EXPECT_EQ(c.n_heads, 9);
  EXPECT_EQ(c.n_kv_heads, 3);
  EXPECT_EQ(c.head_dim, 64);
  EXPECT_EQ(c.ffn_size, 1536);
  EXPECT_EQ(c.max_context, 8192);
  EXPECT_EQ(c.rope_base, 100000.0);
  EXPECT_EQ(m.tensors.embedding.type, DType::kQ8_0);
  EXPECT_EQ(m.tensors.layers[29].w_down.type, DType::kQ4_1);
  EXPECT_EQ(m.tensors.layers[29].wk.rows, 192);
  EXPECT_TRUE(m.tensors.head.empty());
  EXPECT_TRUE(m.warnings.empty());
  EXPECT_EQ(m.vocabulary.pre, PreTokenizer::kSmolLm);
  EXPECT_EQ(m.vocabulary.tokens[1], "<|im_start|>");
  EXPECT_EQ(m.vocabulary.types[2], TokenType::kControl);
  EXPECT_EQ(m.vocabulary.merges.size(), 48900u);
  EXPECT_EQ(m.vocabulary.eos, 2);
  EXPECT_FALSE(m.vocabulary.add_bos);
  EXPECT_TRUE(m.vocabulary.chat_template.starts_with("{% for message in messages %}"));
}

}  // namespace
}  // namespace chimera
