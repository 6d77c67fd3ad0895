// Draft files: what is written is read back; what is not exactly a draft is refused in one line.
#include "loader/draft_file.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>

#include "engine/error.h"
#include "loader/safetensors.h"
#include "tests/support.h"

namespace chimera {
namespace {

class DraftFile : public testing::Test {
 protected:
  DraftFile() {
    DraftConfig& c = draft.config;
    c.hidden_size = 4;
    c.n_heads = 2, c.n_kv_heads = 1, c.head_dim = 2;
    c.ffn_size = 3, c.n_steps = 2, c.head_rank = 2;
    c.rope_base = 12345.5;
    float next = 0;
    const auto fill = [&](std::vector<float>* v, size_t n) {
      v->resize(n);
      for (float& x : *v) x = (next += 1.0f) < 200 ? next : (next = -200);  // exact in BF16
    };
    fill(&draft.w1, 48), fill(&draft.w2, 16), fill(&draft.w3, 16);
    fill(&draft.key_norm, 8), fill(&draft.value_norm, 8), fill(&draft.attn_norm, 4);
    fill(&draft.wq, 16), fill(&draft.wk, 16), fill(&draft.wv, 16), fill(&draft.wo, 16);
    fill(&draft.ffn_norm, 4), fill(&draft.gate_up, 24), fill(&draft.down, 12),
        fill(&draft.out_norm, 4);
    fill(&draft.head_scale, 2);
    draft.head_down.resize(2), draft.head_up.resize(2);
    for (int k = 0; k < 2; ++k)
      fill(&draft.head_down[static_cast<size_t>(k)], 16),
          fill(&draft.head_up[static_cast<size_t>(k)], 8);
    draft.vocabulary = {5, 3, 0, 70000};
    draft.target_name = "a \"model\"";
    draft.target_fingerprint = "0123456789abcdef";
    draft.training = "{\"positions\":1}";
    draft.licence = "MIT";
  }
  ~DraftFile() override { std::remove(path.c_str()); }

  void write(const std::string& bytes) { std::ofstream(path, std::ios::binary) << bytes; }
  // The header as JSON text, and anything after it.
  void write_file(const std::string& header, const std::string& data) {
    const uint64_t n = header.size();
    write(std::string(reinterpret_cast<const char*>(&n), 8) + header + data);
  }
  // load_draft must refuse the file in one line that contains `text`.
  void refused(const std::string& text) {
    try {
      load_draft(path);
      ADD_FAILURE() << "not refused: " << text;
    } catch (const Error& e) {
      const std::string what = e.what();
      EXPECT_NE(what.find(text), std::string::npos) << what;
      EXPECT_EQ(what.find('\n'), std::string::npos) << what;
      EXPECT_NE(what.find(path), std::string::npos) << what;
    }
  }
  std::string saved() {
    save_draft(draft, path);
    return test::read_text(path);
  }
  void replaced(const std::string& from, const std::string& to) {
    std::string bytes = saved();
    const size_t at = bytes.find(from);
    ASSERT_NE(at, std::string::npos) << from;
    ASSERT_EQ(from.size(), to.size());
    write(bytes.replace(at, from.size(), to));
  }

  DraftTensors draft;
  std::string path = (std::filesystem::temp_directory_path() /
                      ("chimera_draft_" + std::to_string(getpid()) + ".safetensors"))
                         .string();
};

TEST_F(DraftFile, IsReadBackAsWritten) {
  save_draft(draft, path);
  const DraftTensors t = load_draft(path);
  EXPECT_EQ(t.w1, draft.w1);
  EXPECT_EQ(t.w3, draft.w3);
  EXPECT_EQ(t.gate_up, draft.gate_up);
  EXPECT_EQ(t.head_scale, draft.head_scale);
  EXPECT_EQ(t.head_down, draft.head_down);
  EXPECT_EQ(t.head_up, draft.head_up);
  EXPECT_EQ(t.vocabulary, draft.vocabulary);
  EXPECT_EQ(t.target_name, draft.target_name);
  EXPECT_EQ(t.target_fingerprint, draft.target_fingerprint);
  EXPECT_EQ(t.training, draft.training);
  EXPECT_EQ(t.licence, draft.licence);
  EXPECT_EQ(t.config.rope_base, 12345.5);
  EXPECT_EQ(t.config.ffn_size, 3);
  EXPECT_TRUE(t.config.skip);
  const std::string first = test::read_text(path);
  save_draft(t, path);
  EXPECT_EQ(test::read_text(path), first);
}

TEST_F(DraftFile, Calibration) {
  draft.config.sampled = {{0.9f, 1.125f}, {0.75f, 0.5f}};
  save_draft(draft, path);
  const DraftTensors t = load_draft(path);
  EXPECT_TRUE(t.config.greedy.temperature.empty());
  EXPECT_EQ(t.config.sampled.temperature, draft.config.sampled.temperature);
  EXPECT_EQ(t.config.sampled.coverage, draft.config.sampled.coverage);
  for (const auto& [from, to, message] : std::vector<std::array<std::string, 3>>{
           {"1.125", "0.001", "sampled: temperature: expected 1 to 32 numbers from 0.01 to 100"},
           {"0.75,", "1.75,", "sampled: coverage: expected 1 to 32 numbers from 0.01 to 1"},
           {"[0.75,0.5]", "[0.75    ]", "temperature and coverage of the same length"},
           {"[0.75,0.5]", "[        ]", "1 to 32 numbers"},
           {"coverage", "coverago", "coverage"}}) {
    replaced(from, to);
    refused(message);
  }
}

TEST_F(DraftFile, OfThePaperForm) {
  draft.config.skip = draft.config.slot_features = false, draft.config.head_rank = 0;
  draft.w3.clear();
  for (auto* heads : {&draft.head_down, &draft.head_up})
    for (auto& v : *heads) v.clear();
  draft.key_norm.resize(4), draft.value_norm.resize(4), draft.wk.resize(8), draft.wv.resize(8);
  save_draft(draft, path);
  const DraftTensors t = load_draft(path);
  EXPECT_TRUE(t.config.trigram);
  EXPECT_FALSE(t.config.skip);
  EXPECT_FALSE(t.config.slot_features);
  EXPECT_EQ(t.w1, draft.w1);
  EXPECT_TRUE(t.w3.empty());
  EXPECT_EQ(t.key_norm, draft.key_norm);
  EXPECT_EQ(t.wv, draft.wv);
  EXPECT_EQ(t.head_up.size(), 2u);
  replaced("\\\"slot_features\\\":false", "\\\"slot_features\\\":12345");
  refused("slot_features: expected true or false, found 12345");
  replaced("\\\"slot_features\\\":false", "\\\"slot_features\\\":true ");
  refused("key_norm");
}

TEST_F(DraftFile, OfTheLastTokenAlone) {
  draft.config.trigram = false;
  draft.w1.clear(), draft.w2.clear();
  save_draft(draft, path);
  const DraftTensors t = load_draft(path);
  EXPECT_FALSE(t.config.trigram);
  EXPECT_TRUE(t.config.skip);
  EXPECT_TRUE(t.config.slot_features);
  EXPECT_TRUE(t.w1.empty());
  EXPECT_TRUE(t.w2.empty());
  EXPECT_EQ(t.w3, draft.w3);
  replaced("\\\"trigram\\\":false", "\\\"trigram\\\":true ");
  refused("'w1'");
}

// What every file was before there were others: without a word about it.
TEST_F(DraftFile, OfTheUsualFormSaysNothingOfIt) {
  const std::string bytes = saved();
  for (const char* key : {"trigram", "slot_features"})
    EXPECT_EQ(bytes.find(key), std::string::npos) << key;
  const DraftTensors t = load_draft(path);
  EXPECT_TRUE(t.config.trigram);
  EXPECT_TRUE(t.config.slot_features);
}

TEST_F(DraftFile, IsNotLeftHalfWritten) {
  const std::string before = saved();
  draft.w1.pop_back();
  EXPECT_THROW(save_draft(draft, path), Error);
  EXPECT_EQ(test::read_text(path), before);
  EXPECT_THROW(save_draft(load_draft(path), "/nowhere/draft.safetensors"), Error);
}

TEST_F(DraftFile, ThatIsNoSafetensors) {
  write("1234567"), refused("7 bytes");
  write(std::string(8, '\xff') + "{}"), refused("at most 100000000 bytes");
  write_file("", ""), refused("an object");
  write_file("[1]", ""), refused("an object");
  write_file(" {}", ""), refused("an object");
  write(std::string("\x20\0\0\0\0\0\0\0{}", 10)), refused("expected 32 bytes, found 2");
  write_file("{\"a\":", ""), refused("expected JSON");
  write_file("{} x", ""), refused("expected JSON");
  write_file("{\"\xff\":{}}", ""), refused("expected JSON");
  write("PK\x03\x04 and so on"), refused("use a safetensors file");
  write("\x80\x02}q\x01 and so on"), refused("a Python pickle");
}

TEST_F(DraftFile, WithAHeaderThatLies) {
  const auto tensor = [](const std::string& text) { return "{\"w1\":{" + text + "}}"; };
  const std::string four(16, '\0');
  write_file(tensor(R"("dtype":"F24","shape":[4],"data_offsets":[0,16])"), four), refused("'F24'");
  write_file(tensor(R"("dtype":"F32","shape":[-4],"data_offsets":[0,16])"), four),
      refused("a negative number");
  write_file(tensor(R"("dtype":"F32","shape":[4.0],"data_offsets":[0,16])"), four), refused("4.0");
  write_file(tensor(R"("dtype":"F32","shape":["4"],"data_offsets":[0,16])"), four),
      refused("a string");
  write_file(tensor(R"("dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,16])"), four),
      refused("above 2^63");
  write_file(tensor(R"("dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,16])"), four),
      refused("1844674407370955");
  write_file(tensor(R"("dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,16])"),
             four),
      refused("2^48");
  write_file(tensor(R"("dtype":"F32","shape":[4],"data_offsets":[16,0])"), four),
      refused("in order");
  write_file(tensor(R"("dtype":"F32","shape":[4],"data_offsets":[0,12])"), four),
      refused("expected 16 bytes");
  write_file(tensor(R"("dtype":"F32","shape":[4],"data_offsets":[0,16,16])"), four),
      refused("two data_offsets");
  write_file(tensor(R"("dtype":"F32","shape":[4])"), four), refused("no data_offsets");
  write_file(tensor(R"("dtype":"F32","shape":[[4]],"data_offsets":[0,16])"), four),
      refused("an array");
  write_file(tensor(R"("dtype":"F32","shape":{},"data_offsets":[0,16])"), four),
      refused("an object");
  write_file(tensor(R"("dtype":"F32","dtype":"F32","shape":[4],"data_offsets":[0,16])"), four),
      refused("'dtype' twice");
  write_file(tensor(R"("dtype":"F32","shape":[8],"data_offsets":[0,32])"), four),
      refused("data up to byte 32");
  write_file(tensor(R"("dtype":"F32","shape":[4],"data_offsets":[0,16])"), four + "x"),
      refused("expected 16 bytes of tensors, found 17");
  const std::string f2 = R"({"dtype":"F32","shape":[2],"data_offsets":)";
  write_file(R"({"a":)" + f2 + R"([0,8]},"a":)" + f2 + "[8,16]}}", four), refused("'a' twice");
  write_file(R"({"a":)" + f2 + R"([0,8]},"b":)" + f2 + "[4,12]}}", four),
      refused("where the tensor before it ends");
  write_file(R"({"a":)" + f2 + "[8,16]}}", four), refused("from byte 0");
  write_file(R"({"__metadata__":{"a":1}})", ""), refused("a string");
  write_file(R"({"__metadata__":{"a":{}}})", ""), refused("an object");
  write_file(R"({"a":null})", ""), refused("null");
}

TEST_F(DraftFile, ThatIsNoDraftOrOfAnotherShape) {
  write_file(R"({"__metadata__":{"format":"pt"}})", ""), refused("'chimera_draft'");
  replaced("\"chimera_draft\":\"1\"", "\"chimera_draft\":\"2\""), refused("version 1");
  replaced("\\\"n_heads\\\":2", "\\\"n_heads\\\":0"), refused("n_heads");
  replaced("\\\"n_heads\\\":2", "\\\"n_headz\\\":2"), refused("n_heads");
  replaced("\\\"head_dim\\\":2", "\\\"head_dim\\\":3"), refused("even size");
  replaced("\\\"ffn_size\\\":3", "\\\"ffn_size\\\":4"), refused("gate_up");
  replaced("\\\"skip\\\":true", "\\\"skip\\\":1234"), refused("skip");
  replaced("12345.5", "-1.0e09"), refused("rope_base");
  replaced("\"wo\":", "\"w9\":"), refused("'wo'");
  draft.vocabulary = {1, 2, 1};
  saved(), refused("1 twice");
  draft.vocabulary = {1, -2};
  saved(), refused("-2");
  draft.vocabulary = {};
  saved(), refused("I32 [1 or more]");
  draft.vocabulary = {1};
  draft.wo[3] = INFINITY;
  saved(), refused("finite");
}

TEST(Draft, IsCheckedAgainstItsTarget) {
  LlamaConfig target;
  target.hidden_size = 64;
  target.vocab_size = 100;
  DraftTensors good;
  good.config.hidden_size = good.config.ffn_size = 64;
  good.config.n_heads = 2, good.config.head_dim = 32;
  good.vocabulary = {0, 99};
  check(good, target);
  const auto complaint = [&](const auto& change) -> std::string {
    DraftTensors bad = good;
    change(bad);
    try {
      check(bad, target);
    } catch (const Error& e) {
      return e.what();
    }
    return "no complaint";
  };
  const auto says = [](const std::string& what, const std::string& text) {
    return what.find(text) != std::string::npos;
  };
  const auto outside = [&](int32_t id) {
    return complaint([=](DraftTensors& t) { t.vocabulary.push_back(id); });
  };
  EXPECT_PRED2(says, outside(100), "below 100");
  EXPECT_PRED2(says, outside(-1), "found -1");
  EXPECT_PRED2(says, complaint([](auto& t) { t.config.hidden_size = 32; }), "64 (the target's)");
  EXPECT_PRED2(says, complaint([](auto& t) { t.config.ffn_size = 48; }), "FFN size");
  EXPECT_PRED2(says, complaint([](auto& t) { t.config.head_rank = 4; }), "rank of the heads");
  EXPECT_PRED2(says, complaint([](auto& t) { t.config.trigram = t.config.skip = false; }),
               "or both, found neither");
  EXPECT_PRED2(says, complaint([](auto& t) { t.config.greedy = {{1, 1}, {1}}; }), "coverages");
  EXPECT_PRED2(says, complaint([](auto& t) { t.config.n_heads = 3, t.config.head_dim = 34; }),
               "query heads");
}

TEST(Fingerprint, KnowsModelsApart) {
  const ModelFile a = load_model(test::tiny("f32")), b = load_model(test::tiny("q4_0"));
  EXPECT_EQ(fingerprint(a.tensors, a.vocabulary).size(), 16u);
  EXPECT_EQ(fingerprint(a.tensors, a.vocabulary), fingerprint(a.tensors, a.vocabulary));
  EXPECT_NE(fingerprint(a.tensors, a.vocabulary), fingerprint(b.tensors, b.vocabulary));
  Vocabulary other = a.vocabulary;
  other.tokens[3] += "x";
  EXPECT_NE(fingerprint(a.tensors, a.vocabulary), fingerprint(a.tensors, other));
  LlamaTensors base = a.tensors;
  base.config.rope_base += 1;
  EXPECT_NE(fingerprint(a.tensors, a.vocabulary), fingerprint(base, a.vocabulary));
}

}  // namespace
}  // namespace chimera
