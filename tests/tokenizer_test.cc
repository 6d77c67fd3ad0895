#include "tokenizer/tokenizer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>

#include "engine/error.h"
#include "loader/gguf.h"
#include "loader/llama2c.h"
#include "tokenizer/merge_queue.h"
#include "tokenizer/pre_tokenizer.h"
#include "tokenizer/stream_decoder.h"
#include "tokenizer/unicode.h"

namespace chimera {
namespace {

using Ids = std::vector<int32_t>;

const std::string kData = "../shared/data/tokenizers/";
const std::string kGpt2 = kData + "ggml-vocab-gpt-2.gguf";
const std::string kLlama = kData + "ggml-vocab-llama-spm.gguf";
const std::string kLlama3 = kData + "ggml-vocab-llama-bpe.gguf";
const std::string kSmolLm2 = "models/SmolLM2-135M-Instruct.Q4_1.gguf";

#define SKIP_IF_ABSENT(path) \
  if (!std::filesystem::exists(path)) GTEST_SKIP() << "skipped: " << (path) << " is absent"

// Each vocabulary is loaded once for all tests.
const Tokenizer& tokenizer_of(const std::string& path) {
  static std::map<std::string, Tokenizer> loaded;
  const auto found = loaded.find(path);
  if (found != loaded.end()) return found->second;
  return loaded.emplace(path, Tokenizer(load_gguf_vocabulary(path))).first->second;
}

std::string read_text(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// llama.cpp's test vectors: texts with a separator line between, and a line of ids for each.
std::vector<std::string> read_texts(const std::string& path) {
  const std::string separator = "\n__ggml_vocab_test__\n";
  const std::string all = read_text(path);
  std::vector<std::string> texts;
  size_t begin = 0, end;
  while ((end = all.find(separator, begin)) != std::string::npos) {
    texts.push_back(all.substr(begin, end - begin));
    begin = end + separator.size();
  }
  texts.push_back(all.substr(begin));
  return texts;
}

std::vector<Ids> read_ids(const std::string& path) {
  std::vector<Ids> lines;
  std::istringstream file(read_text(path));
  for (std::string line; std::getline(file, line);) {
    std::istringstream numbers(line);
    lines.emplace_back(std::istream_iterator<int32_t>(numbers), std::istream_iterator<int32_t>());
  }
  return lines;
}

void expect_llama_cpp_ids(const std::string& vocabulary, const std::string& texts_path,
                          const std::string& ids_path) {
  const Tokenizer& tokenizer = tokenizer_of(vocabulary);
  const std::vector<std::string> texts = read_texts(texts_path);
  std::vector<Ids> ids = read_ids(ids_path);
  if (ids.size() == texts.size() - 1) ids.emplace_back();  // no newline after an empty last line
  ASSERT_EQ(texts.size(), 47u);
  ASSERT_EQ(ids.size(), 47u);
  for (size_t i = 0; i < texts.size(); ++i) {
    EXPECT_EQ(tokenizer.encode(texts[i], false), ids[i]) << "case " << i << ": " << texts[i];
    EXPECT_EQ(tokenizer.decode(ids[i]), texts[i]) << "case " << i;
  }
}

// Half ASCII, half any characters; from the ranges that SmolLM2, which lacks bytes F1 and F2, can
// hold, and without U+2581, which SentencePiece turns into a space.
std::string random_text(std::mt19937& random, size_t length) {
  const auto below = [&](uint32_t n) { return static_cast<uint32_t>(random() % n); };
  std::string text;
  while (length-- > 0) {
    uint32_t c;
    switch (below(6)) {
      case 0: c = 0x80 + below(0x780); break;
      case 1: c = 0x800 + below(0xF800); break;
      case 2: c = 0x10000 + below(0x30000); break;
      default: c = 0x20 + below(0x5F);
    }
    if ((c >= 0xD800 && c < 0xE000) || c == 0x2581) c = '\n';
    append_utf8(text, c);
  }
  return text;
}

std::string random_bytes(std::mt19937& random, size_t length) {
  std::string text(length, '\0');
  for (char& c : text) c = static_cast<char>(random());
  return text;
}

// 258 tokens and no words: all bytes as byte-level BPE writes them, "ab", and a control token.
Vocabulary tiny_byte_bpe() {
  Vocabulary v;
  v.model = TokenizerModel::kByteBpe;
  v.pre = PreTokenizer::kGpt2;
  int shifted = 0;
  for (int byte = 0; byte < 256; ++byte) {
    const bool printable = (byte > 32 && byte < 127) || (byte > 160 && byte != 173);
    std::string text;
    append_utf8(text, printable ? byte : 256 + shifted++);
    v.tokens.push_back(text);
  }
  v.tokens.push_back("ab");
  v.tokens.push_back("<|end|>");
  v.types.assign(258, TokenType::kNormal);
  v.types[257] = TokenType::kControl;
  v.merges = {"a b"};
  v.bos = v.eos = 257;
  return v;
}

// <unk> 0, <s> 1, </s> 2, the bytes 3 to 258, then `pieces`, the earlier the higher their score.
Vocabulary tiny_sentencepiece(const std::vector<std::string>& pieces) {
  Vocabulary v;
  v.model = TokenizerModel::kSentencePiece;
  v.tokens = {"<unk>", "<s>", "</s>"};
  v.types = {TokenType::kUnknown, TokenType::kControl, TokenType::kControl};
  v.scores = {0, 0, 0};
  for (int byte = 0; byte < 256; ++byte) {
    char text[7];
    std::snprintf(text, sizeof text, "<0x%02X>", byte);
    v.tokens.push_back(text);
    v.types.push_back(TokenType::kByte);
    v.scores.push_back(0);
  }
  for (const std::string& piece : pieces) {
    v.scores.push_back(259.0f - static_cast<float>(v.tokens.size()));
    v.tokens.push_back(piece);
    v.types.push_back(TokenType::kNormal);
  }
  v.unk = 0;
  v.bos = 1;
  v.eos = 2;
  return v;
}

// ---- UTF-8 and character classes ----------------------------------------------------------------

TEST(Unicode, FirstCharacter) {
  struct Case {
    std::string text;
    uint32_t code_point, length;
    Utf8 state;
  };
  const Case cases[] = {
      {"a", 'a', 1, Utf8::kValid},
      {std::string(1, '\0'), 0, 1, Utf8::kValid},
      {"\xC2\x80", 0x80, 2, Utf8::kValid},
      {"\xDF\xBF", 0x7FF, 2, Utf8::kValid},
      {"\xE0\xA0\x80", 0x800, 3, Utf8::kValid},
      {"\xEF\xBF\xBF", 0xFFFF, 3, Utf8::kValid},
      {"\xF0\x90\x80\x80", 0x10000, 4, Utf8::kValid},
      {"\xF4\x8F\xBF\xBF", 0x10FFFF, 4, Utf8::kValid},
      {"\x80", 0xFFFD, 1, Utf8::kIllFormed},
      {"\xC1\xBF", 0xFFFD, 1, Utf8::kIllFormed},          // overlong
      {"\xE0\x9F\xBF", 0xFFFD, 1, Utf8::kIllFormed},      // overlong
      {"\xF0\x8F\xBF\xBF", 0xFFFD, 1, Utf8::kIllFormed},  // overlong
      {"\xED\xA0\x80", 0xFFFD, 1, Utf8::kIllFormed},      // a surrogate
      {"\xF4\x90\x80\x80", 0xFFFD, 1, Utf8::kIllFormed},  // above U+10FFFF
      {"\xF5\x80\x80\x80", 0xFFFD, 1, Utf8::kIllFormed},
      {"\xE2\x82z", 0xFFFD, 2, Utf8::kIllFormed},
      {"\xF0\x9F\xA6z", 0xFFFD, 3, Utf8::kIllFormed},
      {"\xE2\x82", 0xFFFD, 2, Utf8::kTruncated},
      {"\xF0", 0xFFFD, 1, Utf8::kTruncated},
  };
  for (const Case& c : cases) {
    const Utf8Char found = first_utf8_char(c.text);
    EXPECT_EQ(found.code_point, c.code_point) << in_quotes(c.text);
    EXPECT_EQ(found.length, c.length) << in_quotes(c.text);
    EXPECT_EQ(found.state, c.state) << in_quotes(c.text);
  }
}

TEST(Unicode, AppendIsTheInverseOfFirstCharacter) {
  for (uint32_t c = 0; c < 0x110000; ++c) {
    if (c == 0xD800) c = 0xE000;
    std::string text;
    append_utf8(text, c);
    const Utf8Char found = first_utf8_char(text);
    ASSERT_EQ(found.code_point, c);
    ASSERT_EQ(found.length, text.size());
    ASSERT_EQ(found.state, Utf8::kValid);
  }
}

TEST(Unicode, Classes) {
  for (const uint32_t c : {0x41u, 0x7Au, 0xAAu, 0xE9u, 0x434u, 0x4E00u, 0xAC00u, 0x1F88u, 0x20000u})
    EXPECT_EQ(char_class(c), CharClass::kLetter) << std::hex << c;
  for (const uint32_t c : {0x30u, 0x39u, 0xB2u, 0xBDu, 0x660u, 0x2167u, 0x3007u, 0x1D7FFu})
    EXPECT_EQ(char_class(c), CharClass::kNumber) << std::hex << c;
  for (const uint32_t c :
       {0x09u, 0x0Au, 0x0Du, 0x20u, 0x85u, 0xA0u, 0x1680u, 0x2028u, 0x202Fu, 0x3000u})
    EXPECT_EQ(char_class(c), CharClass::kSpace) << std::hex << c;
  // U+001C is no white space to Unicode, though it is to Python; U+0301 is a combining mark.
  for (const uint32_t c :
       {0x00u, 0x1Cu, 0x21u, 0x40u, 0x5Bu, 0x200Bu, 0x301u, 0xFFFDu, 0x1F999u, 0x10FFFFu})
    EXPECT_EQ(char_class(c), CharClass::kOther) << std::hex << c;
}

// ---- Pre-tokenizers -----------------------------------------------------------------------------

using Words = std::vector<std::string_view>;

TEST(PreTokenizer, Gpt2) {
  const std::pair<std::string_view, Words> cases[] = {
      {"", {}},
      {"Hello world", {"Hello", " world"}},
      {"a  b", {"a", " ", " b"}},
      {"a   b", {"a", "  ", " b"}},
      {"a\n\nb", {"a", "\n", "\n", "b"}},
      {"a\n b", {"a", "\n", " b"}},
      {"a \nb", {"a", " ", "\n", "b"}},
      {"a  ", {"a", "  "}},
      {" ", {" "}},
      {"\t\tx", {"\t", "\t", "x"}},
      {"x2026 12", {"x", "2026", " 12"}},
      {"it's we'll I'd 'S", {"it", "'s", " we", "'ll", " I", "'d", " '", "S"}},
      {"they're'", {"they", "'re", "'"}},
      {" 's", {" '", "s"}},
      {"!'s", {"!'", "s"}},
      {"$19.99", {"$", "19", ".", "99"}},
      {"caf\u00E9\u00A0\u00BD", {"caf\u00E9", "\u00A0", "\u00BD"}},
      {"a\u3000\u3000b", {"a", "\u3000", "\u3000", "b"}},
      {"a\xFF\xE2\x82 b", {"a", "\xFF\xE2\x82", " b"}},
  };
  for (const auto& [text, words] : cases) {
    EXPECT_EQ(split_words(PreTokenizer::kGpt2, text), words) << in_quotes(text);
  }
}

TEST(PreTokenizer, SmolLmIsolatesDigitsFirst) {
  const std::pair<std::string_view, Words> cases[] = {
      {"", {}},
      {"in 2026.", {"in", " ", "2", "0", "2", "6", "."}},
      {"a  5", {"a", "  ", "5"}},
      {"a  5  b", {"a", "  ", "5", " ", " b"}},
      {"5's", {"5", "'s"}},
      {"\u00BD\u0661", {"\u00BD", "\u0661"}},
      {"7", {"7"}},
  };
  for (const auto& [text, words] : cases) {
    EXPECT_EQ(split_words(PreTokenizer::kSmolLm, text), words) << in_quotes(text);
  }
}

// What Python's regex module (2025) finds with the published expression.
TEST(PreTokenizer, Llama3) {
  const std::pair<std::string_view, Words> cases[] = {
      {"", {}},
      {"Don't I'LL we'VE it'd'x '",
       {"Don", "'t", " I", "'LL", " we", "'VE", " it", "'d", "'x", " '"}},
      {"'S'", {"'S", "'"}},
      {"a1234567b 12 3", {"a", "123", "456", "7", "b", " ", "12", " ", "3"}},
      {"$100,000.50!?\n\nEnd.", {"$", "100", ",", "000", ".", "50", "!?\n\n", "End", "."}},
      {"  \n  x\n\n y   ", {"  \n", " ", " x", "\n\n", " y", "   "}},
      {" \r\n\r\n", {" \r\n\r\n"}},
      {" ...\n\n  a", {" ...\n\n", " ", " a"}},
      {"#include <x>\n\n// c\r\n  z",
       {"#include", " <", "x", ">\n\n", "//", " c", "\r\n", " ", " z"}},
      {"\t\tfoo_bar  baz", {"\t", "\tfoo", "_bar", " ", " baz"}},
      {"x  1", {"x", " ", " ", "1"}},
      {"\u00A0x \u3000 y", {"\u00A0x", " \u3000", " y"}},
      {"\u65E5\u672C\u3001\u0645 \u0663\u0664\u0665\u0666",
       {"\u65E5\u672C", "\u3001\u0645", " ", "\u0663\u0664\u0665", "\u0666"}},
      {"e\u0301", {"e", "\u0301"}},
  };
  for (const auto& [text, words] : cases) {
    EXPECT_EQ(split_words(PreTokenizer::kLlama3, text), words) << in_quotes(text);
  }
}

TEST(PreTokenizer, WordsTogetherAreTheText) {
  std::mt19937 random(1);
  for (int i = 0; i < 2000; ++i) {
    const std::string text = i % 2 ? random_bytes(random, i % 50) : random_text(random, i % 50);
    for (const PreTokenizer kind :
         {PreTokenizer::kNone, PreTokenizer::kGpt2, PreTokenizer::kSmolLm, PreTokenizer::kLlama3}) {
      std::string joined;
      for (const std::string_view word : split_words(kind, text)) {
        EXPECT_FALSE(word.empty());
        joined += word;
      }
      ASSERT_EQ(joined, text);
    }
  }
}

// ---- The merge loop -----------------------------------------------------------------------------

// The definition, quadratic: merge the best pair, leftmost among equals, until none is left.
Ids merge_plainly(Ids ids, const std::function<Merge(int32_t, int32_t)>& find) {
  for (;;) {
    Merge best = kNoMerge;
    size_t at = 0;
    for (size_t i = 0; i + 1 < ids.size(); ++i) {
      const Merge merge = find(ids[i], ids[i + 1]);
      if (merge.id >= 0 && merge.rank < best.rank) {
        best = merge;
        at = i;
      }
    }
    if (best.id < 0) return ids;
    ids[at] = best.id;
    ids.erase(ids.begin() + static_cast<std::ptrdiff_t>(at) + 1);
  }
}

TEST(MergeQueue, MergesAsTheDefinitionDoes) {
  std::mt19937 random(2);
  for (int round = 0; round < 500; ++round) {
    // Random merges of three letters; few ranks, so that there are ties between different pairs.
    std::map<std::pair<int32_t, int32_t>, Merge> merges;
    for (int32_t id = 3; id < 20; ++id) {
      const std::pair<int32_t, int32_t> pair(random() % id, random() % id);
      merges.try_emplace(pair, Merge{static_cast<uint32_t>(random() % 6), id});
    }
    const auto find = [&](int32_t left, int32_t right) {
      const auto found = merges.find({left, right});
      return found == merges.end() ? kNoMerge : found->second;
    };
    Ids letters(random() % 40);
    MergeQueue queue;
    for (size_t i = 0; i < letters.size(); ++i) {
      letters[i] = static_cast<int32_t>(random() % 3);
      queue.add(letters[i], static_cast<uint32_t>(i), 1);
    }
    queue.run([&](const Symbol& left, const Symbol& right) { return find(left.id, right.id); });
    Ids merged;
    uint32_t end = 0;
    queue.for_each([&](const Symbol& symbol) {
      EXPECT_EQ(symbol.begin, end);
      end = symbol.begin + symbol.length;
      merged.push_back(symbol.id);
    });
    EXPECT_EQ(end, letters.size());
    ASSERT_EQ(merged, merge_plainly(letters, find)) << "round " << round;
  }
}

TEST(MergeQueue, LooksAtEachPairOnce) {
  // Everything merges with everything, so there are n - 1 merges: n - 1 pairs at first, and at most
  // two new ones for each merge.
  constexpr uint32_t kSymbols = 100000;
  MergeQueue queue;
  for (uint32_t i = 0; i < kSymbols; ++i) queue.add(0, i, 1);
  uint32_t looks = 0;
  queue.run([&](const Symbol& left, const Symbol& right) {
    ++looks;
    return Merge{(left.begin * 31 + right.begin * 17) % 1009, 0};
  });
  int left_over = 0;
  queue.for_each([&](const Symbol&) { ++left_over; });
  EXPECT_EQ(left_over, 1);
  EXPECT_LE(looks, 3 * kSymbols);
}

// ---- Against published ids ----------------------------------------------------------------------

TEST(Tokenizer, Gpt2LikeLlamaCpp) {
  SKIP_IF_ABSENT(kGpt2);
  expect_llama_cpp_ids(kGpt2, kGpt2 + ".inp", kGpt2 + ".out");
}

TEST(Tokenizer, LlamaLikeLlamaCpp) {
  SKIP_IF_ABSENT(kLlama);
  expect_llama_cpp_ids(kLlama, kLlama + ".inp", kLlama + ".out");
}

TEST(Tokenizer, Llama3LikeLlamaCpp) {
  SKIP_IF_ABSENT(kLlama3);
  expect_llama_cpp_ids(kLlama3, kLlama3 + ".inp", kLlama3 + ".out");
}

TEST(Tokenizer, SmolLmLikeLlamaCpp) {
  SKIP_IF_ABSENT(kSmolLm2);
  SKIP_IF_ABSENT(kGpt2);
  expect_llama_cpp_ids(kSmolLm2, kGpt2 + ".inp", kData + "ggml-vocab-smollm.gguf.out");
}

TEST(Tokenizer, SmolLm2LikeHuggingFace) {
  const std::string path = kData + "smollm2_golden/tokenizer_cases.json";
  SKIP_IF_ABSENT(kSmolLm2);
  SKIP_IF_ABSENT(path);
  const auto cases = nlohmann::json::parse(read_text(path))["cases"];
  ASSERT_GT(cases.size(), 20u);
  for (const auto& c : cases) {
    const auto text = c["text"].get<std::string>();
    EXPECT_EQ(tokenizer_of(kSmolLm2).encode(text, true), c["ids"].get<Ids>()) << text;
  }
}

TEST(Tokenizer, Llama2cLikeSentencePiece) {
  // Ids from the sentencepiece package (0.2) and tok512.model.
  const std::string checkpoint = "../shared/data/models/stories260K/stories260K.bin";
  SKIP_IF_ABSENT(checkpoint);
  const Tokenizer tokenizer(load_llama2c_vocabulary(checkpoint, 512));
  const std::pair<std::string, Ids> cases[] = {
      {"Once upon a time, there was a little girl named Lily.",
       {403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 421, 395, 317, 426}},
      {"Zoe's na\u00EFve \U0001F999\n",
       {410, 469, 414, 411, 439, 419, 297, 412, 198, 178, 360, 410, 243, 162, 169, 156, 13}},
      {"<s>hello</s>", {410, 504, 419, 505, 260, 306, 414, 504, 492, 419, 505}},
      {"<0x0A>", {410, 504, 477, 444, 477, 447, 505}},
  };
  for (const auto& [text, ids] : cases) {
    EXPECT_EQ(tokenizer.encode(text, false), ids) << text;
    EXPECT_EQ(tokenizer.decode(ids), text);
  }
}

// ---- What is said of a vocabulary ---------------------------------------------------------------

TEST(Tokenizer, Properties) {
  const Tokenizer bpe(tiny_byte_bpe());
  EXPECT_EQ(bpe.size(), 258);
  EXPECT_EQ(bpe.bos(), 257);
  EXPECT_EQ(bpe.eos(), 257);
  EXPECT_FALSE(bpe.add_bos());
  EXPECT_FALSE(bpe.adds_space_prefix());
  EXPECT_TRUE(bpe.is_control(257));
  EXPECT_FALSE(bpe.is_control(256));
  EXPECT_EQ(bpe.find("ab"), 256);
  EXPECT_EQ(bpe.find("abc"), -1);
  EXPECT_EQ(bpe.token_text(257), "<|end|>");
  EXPECT_EQ(bpe.token_bytes(257), "");
  EXPECT_EQ(bpe.token_text(' '), "\u0120");
  EXPECT_EQ(bpe.token_bytes(' '), " ");

  Vocabulary v = tiny_sentencepiece({"\u2581a"});
  v.add_bos = true;
  const Tokenizer spm(v);
  EXPECT_TRUE(spm.add_bos());
  EXPECT_TRUE(spm.adds_space_prefix());
  EXPECT_EQ(spm.encode("a", false), Ids{259});  // and no BOS
  EXPECT_EQ(spm.token_bytes(259), " a");
  EXPECT_EQ(spm.token_bytes(3 + 0xE2), "\xE2");
}

TEST(Tokenizer, IdsOutsideTheVocabularyAreErrors) {
  const Tokenizer tokenizer(tiny_byte_bpe());
  for (const int32_t id : {-1, 258, INT32_MAX, INT32_MIN}) {
    EXPECT_THROW(tokenizer.token_bytes(id), Error);
    EXPECT_THROW(tokenizer.token_text(id), Error);
    EXPECT_THROW(tokenizer.is_control(id), Error);
    EXPECT_THROW(tokenizer.decode(Ids{id}), Error);
    EXPECT_THROW(StreamDecoder(tokenizer).push(id), Error);
  }
}

TEST(Tokenizer, SurvivesAMove) {
  // Long enough for memory of its own, so that a view of the wrong copy shows.
  const std::string long_text = "a token that is no short string";
  Vocabulary v = tiny_byte_bpe();
  v.tokens.push_back(long_text);
  v.types.push_back(TokenType::kNormal);
  auto first = std::make_unique<Tokenizer>(v);
  const Tokenizer second = std::move(*first);
  first.reset();
  EXPECT_EQ(second.find(long_text), 258);
  EXPECT_EQ(second.encode("ab<|end|>", true), (Ids{256, 257}));
}

TEST(Tokenizer, AbsentTypesAreNormal) {
  Vocabulary v = tiny_byte_bpe();
  v.types.clear();
  const Tokenizer tokenizer(v);
  EXPECT_FALSE(tokenizer.is_control(257));
  EXPECT_EQ(tokenizer.encode("ab", true), Ids{256});
}

TEST(Tokenizer, FirstOfEqualTextsEncodes) {
  Vocabulary bpe = tiny_byte_bpe();
  bpe.tokens.push_back("ab");
  bpe.tokens.push_back("<|end|>");
  bpe.types.push_back(TokenType::kNormal);
  bpe.types.push_back(TokenType::kControl);
  const Tokenizer byte_bpe(bpe);
  EXPECT_EQ(byte_bpe.encode("ab<|end|>", true), (Ids{256, 257}));
  EXPECT_EQ(byte_bpe.decode(Ids{258, 256}), "abab");

  Vocabulary spm = tiny_sentencepiece({"x", "ab", "ab"});
  spm.add_space_prefix = false;
  spm.scores[261] = 5;  // even if a later one scores higher
  const Tokenizer sentencepiece(spm);
  EXPECT_EQ(sentencepiece.encode("ab", false), Ids{260});
  EXPECT_EQ(sentencepiece.find("ab"), 260);
}

TEST(Tokenizer, ALlama3WordThatIsATokenNeedsNoMerges) {
  Vocabulary v = tiny_byte_bpe();
  v.tokens.insert(v.tokens.end(), {"\u0120abc", "xyz"});
  v.types.insert(v.types.end(), {TokenType::kNormal, TokenType::kControl});
  EXPECT_EQ(Tokenizer(v).encode("ab abc", false), (Ids{256, ' ', 256, 'c'}));
  v.pre = PreTokenizer::kLlama3;
  EXPECT_EQ(Tokenizer(v).encode("ab abc abcd", false), (Ids{256, 258, ' ', 256, 'c', 'd'}));
  EXPECT_EQ(Tokenizer(v).encode("xyz", false), (Ids{'x', 'y', 'z'}));  // not the control token
}

TEST(Tokenizer, FirstOfEqualMergesCounts) {
  Vocabulary v = tiny_byte_bpe();
  v.tokens.push_back("bc");
  v.types.push_back(TokenType::kNormal);
  v.merges = {"a b", "b c", "a b"};
  EXPECT_EQ(Tokenizer(v).encode("abc", false), (Ids{256, 'c'}));
}

TEST(Tokenizer, BytesThatTheVocabularyLacksAreDropped) {
  Vocabulary v = tiny_byte_bpe();
  v.tokens[4] = "lacking";
  const Tokenizer tokenizer(v);
  EXPECT_EQ(tokenizer.encode("a\x04"
                             "b",
                             false),
            (Ids{'a', 'b'}));
  EXPECT_EQ(tokenizer.encode("\x04", false), Ids{});
}

TEST(Tokenizer, SentencePieceWithoutByteTokensGivesUnknown) {
  Vocabulary v;
  v.model = TokenizerModel::kSentencePiece;
  v.tokens = {"<unk>", "\u2581", "a"};
  v.types = {TokenType::kUnknown, TokenType::kNormal, TokenType::kNormal};
  v.scores = {0, 0, 0};
  v.unk = 0;
  const Tokenizer tokenizer(v);
  EXPECT_EQ(tokenizer.encode("a\u00E9"
                             "a",
                             false),
            (Ids{1, 2, 0, 2}));
  EXPECT_EQ(tokenizer.decode(Ids{1, 2, 0, 2}), "aa");
}

TEST(Tokenizer, SentencePieceMergesTheHighestScoreThenTheLeftmost) {
  Vocabulary v = tiny_sentencepiece({"bc", "ab", "aa"});
  v.add_space_prefix = false;
  v.tokens.insert(v.tokens.end(), {"a", "b", "c"});
  v.types.insert(v.types.end(), 3, TokenType::kNormal);
  v.scores.insert(v.scores.end(), {-9, -9, -9});
  const Tokenizer tokenizer(v);
  EXPECT_EQ(tokenizer.encode("abc", false), (Ids{262, 259}));
  EXPECT_EQ(tokenizer.encode("aaa", false), (Ids{261, 262}));
  v.scores[260] = v.scores[259];
  EXPECT_EQ(Tokenizer(v).encode("abc", false), (Ids{260, 264}));
}

TEST(Tokenizer, SentencePieceNeverGivesUnusedPieces) {
  Vocabulary v = tiny_sentencepiece({"a", "aa"});
  v.types[260] = TokenType::kUnused;
  v.add_space_prefix = false;
  EXPECT_EQ(Tokenizer(v).encode("aa", false), (Ids{259, 259}));
}

TEST(Tokenizer, SentencePiecePiecesMayReachAcrossSpaces) {
  // "a b" can only be found if words are not encoded one by one.
  Vocabulary v = tiny_sentencepiece({"a\u2581", "a\u2581b", "a", "b", "\u2581"});
  v.add_space_prefix = false;
  EXPECT_EQ(Tokenizer(v).encode("a b", false), Ids{260});
}

TEST(Tokenizer, SentencePieceSpaces) {
  const Tokenizer with(tiny_sentencepiece({"\u2581", "a"}));
  EXPECT_EQ(with.encode("", false), Ids{});
  EXPECT_EQ(with.encode("a", false), (Ids{259, 260}));
  EXPECT_EQ(with.encode(" a ", false), (Ids{259, 259, 260, 259}));
  EXPECT_EQ(with.encode("a\u2581", false), (Ids{259, 260, 259}));
  EXPECT_EQ(with.encode("a<s>a", true), (Ids{259, 260, 1, 259, 260}));  // each text is prefixed
  EXPECT_EQ(with.decode(Ids{259, 260}), "a");
  EXPECT_EQ(with.decode(Ids{1, 259, 259, 260, 259}), " a ");
  EXPECT_EQ(with.decode(Ids{260, 259}), "a ");

  Vocabulary v = tiny_sentencepiece({"\u2581", "a"});
  v.add_space_prefix = false;
  const Tokenizer without(v);
  EXPECT_EQ(without.encode(" a", false), (Ids{259, 260}));
  EXPECT_EQ(without.decode(Ids{259, 260}), " a");
}

// ---- Special tokens -----------------------------------------------------------------------------

TEST(Tokenizer, UserDefinedTokensAreCutOutFirst) {
  Vocabulary bpe = tiny_byte_bpe();
  for (const char* text : {"  ", "    ", "b\u00E9"}) {
    bpe.tokens.push_back(text);
    bpe.types.push_back(TokenType::kUserDefined);
  }
  const Tokenizer byte_bpe(bpe);
  for (const bool parse_special : {false, true}) {
    EXPECT_EQ(byte_bpe.encode("a     ab\u00E9", parse_special), (Ids{'a', 259, ' ', 'a', 260}));
  }
  EXPECT_EQ(byte_bpe.decode(Ids{258, 260}), "  b\u00E9");

  Vocabulary spm = tiny_sentencepiece({"a", "\u2581\u2581", "\u2581"});
  spm.types[260] = TokenType::kUserDefined;
  spm.add_space_prefix = false;
  const Tokenizer sentencepiece(spm);
  EXPECT_EQ(sentencepiece.encode("a   a", false), (Ids{259, 260, 261, 259}));
}

TEST(Tokenizer, EmptySpecialTokensMatchNothing) {
  Vocabulary v = tiny_byte_bpe();
  for (const TokenType type : {TokenType::kControl, TokenType::kUserDefined}) {
    v.tokens.push_back("");
    v.types.push_back(type);
  }
  EXPECT_EQ(Tokenizer(v).encode("ab<|end|>", true), (Ids{256, 257}));
}

TEST(Tokenizer, LongestSpecialTokenWins) {
  Vocabulary v = tiny_byte_bpe();
  for (const char* text : {"<|", "<|end|>>>"}) {
    v.tokens.push_back(text);
    v.types.push_back(TokenType::kControl);
  }
  const Tokenizer tokenizer(v);
  EXPECT_EQ(tokenizer.encode("<|end|>>>", true), Ids{259});
  EXPECT_EQ(tokenizer.encode("<|end|>>", true), (Ids{257, '>'}));
  EXPECT_EQ(tokenizer.encode("<|en", true), (Ids{258, 'e', 'n'}));
}

TEST(Tokenizer, NoTextBecomesAControlTokenByMerges) {
  // Vocabularies whose own merges would lead ordinary text to a control token.
  Vocabulary bpe = tiny_byte_bpe();
  bpe.types[256] = TokenType::kControl;
  bpe.types['q'] = TokenType::kControl;
  const Tokenizer byte_bpe(bpe);
  EXPECT_EQ(byte_bpe.encode("abq", false), (Ids{'a', 'b'}));
  EXPECT_EQ(byte_bpe.encode("abq", true), (Ids{256, 'q'}));

  Vocabulary v = tiny_sentencepiece({"<", "s", ">", "<s", "<u", "nk>", "<0x0", "A>"});
  v.add_space_prefix = false;
  const Tokenizer sentencepiece(v);
  EXPECT_EQ(sentencepiece.encode("<s>", false), (Ids{262, 261}));
  EXPECT_EQ(sentencepiece.encode("<s>", true), Ids{1});
  EXPECT_EQ(sentencepiece.encode("<unk>", true), Ids{0});
  for (const char* text : {"<unk>", "<0x0A>", "</s>"}) {
    const Ids ids = sentencepiece.encode(text, false);
    EXPECT_EQ(std::count_if(ids.begin(), ids.end(), [](int32_t id) { return id < 3; }), 0) << text;
    EXPECT_EQ(sentencepiece.decode(ids), text);
  }
}

TEST(Tokenizer, NoTextBecomesAControlTokenInRealVocabularies) {
  for (const std::string& path : {kGpt2, kLlama, kLlama3, kSmolLm2}) {
    SKIP_IF_ABSENT(path);
    const Tokenizer& tokenizer = tokenizer_of(path);
    int controls = 0;
    for (int32_t id = 0; id < tokenizer.size(); ++id) {
      if (!tokenizer.is_control(id)) continue;
      ++controls;
      const std::string text(tokenizer.token_text(id));
      EXPECT_EQ(tokenizer.encode(text, true), Ids{id}) << text;
      for (const std::string& user : {text, "x" + text + text + "y", " " + text + "\n"}) {
        const Ids ids = tokenizer.encode(user, false);
        for (const int32_t token : ids) EXPECT_FALSE(tokenizer.is_control(token)) << user;
        EXPECT_EQ(tokenizer.decode(ids), user);
      }
    }
    EXPECT_GT(controls, 0) << path;
  }
}

TEST(Tokenizer, ATableFindsTheFirstOfEqualTexts) {
  std::mt19937 random(5);
  std::vector<std::string> texts = {"", "a", "", std::string("\0b", 2), "a"};
  for (int i = 0; i < 3000; ++i) texts.push_back(random_bytes(random, random() % 3));
  const TokenTable table(texts);
  ASSERT_EQ(table.size(), static_cast<int32_t>(texts.size()));
  for (int32_t id = 0; id < table.size(); ++id) {
    const std::string& text = texts[static_cast<size_t>(id)];
    EXPECT_EQ(table[id], text);
    EXPECT_EQ(table.find(text), std::find(texts.begin(), texts.end(), text) - texts.begin());
  }
  EXPECT_EQ(table.find("longer than any"), -1);
  EXPECT_EQ(TokenTable().find("a"), -1);
  EXPECT_EQ(TokenTable(std::vector<std::string>(9, "x")).find("x"), 0);
}

// ---- Round trips --------------------------------------------------------------------------------

TEST(Tokenizer, RoundTripOfText) {
  for (const std::string& path : {kGpt2, kLlama, kLlama3, kSmolLm2}) {
    SKIP_IF_ABSENT(path);
    std::mt19937 random(3);
    for (int i = 0; i < 500; ++i) {
      const std::string text = random_text(random, i % 100);
      ASSERT_EQ(tokenizer_of(path).decode(tokenizer_of(path).encode(text, false)), text) << path;
    }
  }
}

TEST(Tokenizer, RoundTripOfAnyBytes) {
  const Tokenizer byte_bpe(tiny_byte_bpe());
  const Tokenizer sentencepiece(tiny_sentencepiece({"\u2581", "a", "e", "ae"}));
  std::mt19937 random(4);
  for (int i = 0; i < 1000; ++i) {
    const std::string text = random_bytes(random, i % 100);
    ASSERT_EQ(byte_bpe.decode(byte_bpe.encode(text, true)), text);
    ASSERT_EQ(sentencepiece.decode(sentencepiece.encode(text, false)), text);
  }
  for (const std::string& path : {kGpt2, kLlama}) {
    SKIP_IF_ABSENT(path);
    for (int i = 0; i < 300; ++i) {
      const std::string text = random_bytes(random, i % 100);
      ASSERT_EQ(tokenizer_of(path).decode(tokenizer_of(path).encode(text, false)), text) << path;
    }
  }
}

// One letter over and over, then random ones.
std::string long_word(size_t length) {
  std::mt19937 random(5);
  std::string word(length, 'a');
  for (size_t i = length / 2; i < length; ++i) word[i] = static_cast<char>('a' + random() % 26);
  return word;
}

TEST(Tokenizer, OneLongWord) {
  const std::string word = long_word(1 << 20);
  for (const std::string& path : {kGpt2, kLlama}) {
    SKIP_IF_ABSENT(path);
    const Ids ids = tokenizer_of(path).encode(word, false);
    EXPECT_LT(ids.size(), word.size() * 3 / 4);
    EXPECT_EQ(tokenizer_of(path).decode(ids), word);
  }
}

// ---- Decoding as tokens come --------------------------------------------------------------------

// The definition of what a stream prints, from the whole text.
std::string with_replacements(std::string_view bytes) {
  std::string text;
  while (!bytes.empty()) {
    const Utf8Char c = first_utf8_char(bytes);
    append_utf8(text, c.code_point);
    bytes.remove_prefix(c.length);
  }
  return text;
}

std::string stream(const Tokenizer& tokenizer, const Ids& ids) {
  StreamDecoder decoder(tokenizer);
  std::string printed;
  for (const int32_t id : ids) {
    const std::string piece = decoder.push(id);
    EXPECT_EQ(with_replacements(piece), piece);  // valid UTF-8 at every step
    printed += piece;
  }
  return printed + decoder.finish();
}

TEST(StreamDecoder, HoldsBackASplitEmoji) {
  const Tokenizer tokenizer(tiny_byte_bpe());
  StreamDecoder decoder(tokenizer);
  EXPECT_EQ(decoder.push('a'), "a");
  EXPECT_EQ(decoder.push(0xF0), "");
  EXPECT_EQ(decoder.push(0x9F), "");
  EXPECT_EQ(decoder.push(0xA6), "");
  EXPECT_EQ(decoder.push(257), "");  // a control token in between
  EXPECT_EQ(decoder.push(0x99), "\U0001F999");
  EXPECT_EQ(decoder.push(0xE2), "");
  EXPECT_EQ(decoder.push('b'),
            "\uFFFD"
            "b");
  EXPECT_EQ(decoder.push(0x80), "\uFFFD");
  EXPECT_EQ(decoder.finish(), "");
}

TEST(StreamDecoder, FinishReplacesWhatIsNotWhole) {
  const Tokenizer tokenizer(tiny_byte_bpe());
  StreamDecoder decoder(tokenizer);
  EXPECT_EQ(decoder.push(0xF0), "");
  EXPECT_EQ(decoder.push(0x9F), "");
  EXPECT_EQ(decoder.finish(), "\uFFFD");
  EXPECT_EQ(decoder.finish(), "");
  EXPECT_EQ(decoder.push('a'), "a");  // ready for another text
}

TEST(StreamDecoder, StripsTheLeadingSpaceOnlyAtTheStart) {
  const Tokenizer tokenizer(tiny_sentencepiece({"\u2581", "\u2581a"}));
  StreamDecoder decoder(tokenizer);
  EXPECT_EQ(decoder.push(1), "");  // <s>
  EXPECT_EQ(decoder.push(260), "a");
  EXPECT_EQ(decoder.push(260), " a");
  EXPECT_EQ(decoder.push(0), "");  // <unk>
  EXPECT_EQ(decoder.push(260), " a");
  EXPECT_EQ(decoder.finish(), "");
  EXPECT_EQ(decoder.push(259), "");
  EXPECT_EQ(decoder.push(259), " ");

  StreamDecoder continuation(tokenizer, /*at_text_start=*/false);
  EXPECT_EQ(continuation.push(260), " a");
}

TEST(StreamDecoder, PrintsWhatDecodeGives) {
  std::mt19937 random(6);
  for (const std::string& path : {kGpt2, kLlama, kLlama3, kSmolLm2}) {
    SKIP_IF_ABSENT(path);
    SKIP_IF_ABSENT(kGpt2);
    const Tokenizer& tokenizer = tokenizer_of(path);
    for (const std::string& text : read_texts(kGpt2 + ".inp")) {
      EXPECT_EQ(stream(tokenizer, tokenizer.encode(text, false)), text);
    }
    for (int i = 0; i < 300; ++i) {
      Ids ids(i % 30);
      // The first 300 tokens of each hold its single bytes: half of all, so that characters break.
      for (int32_t& id : ids) {
        id = static_cast<int32_t>(random() % (random() % 2 ? 300 : tokenizer.size()));
      }
      ASSERT_EQ(stream(tokenizer, ids), with_replacements(tokenizer.decode(ids)));
    }
  }
}

// ---- Bad vocabularies ---------------------------------------------------------------------------

struct BadVocabulary {
  const char* name;
  std::function<void(Vocabulary&)> spoil;
  const char* message;  // a part of it
};

void expect_refused(const Vocabulary& good, const std::vector<BadVocabulary>& cases) {
  EXPECT_NO_THROW(Tokenizer{good});
  for (const BadVocabulary& bad : cases) {
    Vocabulary v = good;
    bad.spoil(v);
    try {
      Tokenizer tokenizer(v);
      ADD_FAILURE() << bad.name << ": accepted";
    } catch (const Error& error) {
      const std::string message = error.what();
      EXPECT_NE(message.find(bad.message), std::string::npos) << bad.name << ": " << message;
      EXPECT_EQ(message.find('\n'), std::string::npos) << bad.name;
      EXPECT_LT(message.size(), 200u) << bad.name;
    }
  }
}

const std::vector<BadVocabulary> kBadOfAnyKind = {
    {"no tokens", [](Vocabulary& v) { v.tokens.clear(); },
     "expected 1 to 2147483647 tokens, found 0"},
    {"bos too high", [](Vocabulary& v) { v.bos = static_cast<int32_t>(v.tokens.size()); },
     "bos: expected"},
    {"eos below -1", [](Vocabulary& v) { v.eos = -2; }, "eos: expected"},
    {"unk far too high", [](Vocabulary& v) { v.unk = INT32_MAX; }, "unk: expected"},
    {"add_bos without bos", [](Vocabulary& v) { v.add_bos = true, v.bos = -1; }, "bos: expected"},
    {"fewer types", [](Vocabulary& v) { v.types.pop_back(); }, "token types: expected"},
    {"more types", [](Vocabulary& v) { v.types.push_back(TokenType::kNormal); },
     "token types: expected"},
    {"type 0", [](Vocabulary& v) { v.types[7] = static_cast<TokenType>(0); }, "type of token 7"},
    {"type 7", [](Vocabulary& v) { v.types[7] = static_cast<TokenType>(7); }, "found 7"},
    {"huge token", [](Vocabulary& v) { v.tokens[9].assign(65537, 'x'); }, "token 9: expected"},
    {"huge special token",
     [](Vocabulary& v) {
       v.types.assign(v.tokens.size(), TokenType::kNormal);
       v.types[9] = TokenType::kUserDefined;
       v.tokens[9].assign(513, 'x');
     },
     "token 9: expected at most 512 bytes, as it is a control or user-defined one, found 513"},
};

TEST(Tokenizer, RefusesBadByteBpe) {
  expect_refused(tiny_byte_bpe(), kBadOfAnyKind);
  expect_refused(
      tiny_byte_bpe(),
      {
          {"no pre-tokenizer", [](Vocabulary& v) { v.pre = PreTokenizer::kNone; }, "pre-tokenizer"},
          {"no merges", [](Vocabulary& v) { v.merges.clear(); }, "expected merges"},
          {"no space", [](Vocabulary& v) { v.merges = {"ab"}; }, "merge 0: expected two tokens"},
          {"two spaces",
           [](Vocabulary& v) {
             v.merges = {"a b", "a b c"};
           },
           "merge 1"},
          {"two spaces, a token with one",
           [](Vocabulary& v) {
             v.tokens.insert(v.tokens.end(), {"b c", "ab c"});
             v.types.insert(v.types.end(), 2, TokenType::kNormal);
             v.merges = {"a b c"};
           },
           "merge 0: expected two tokens with one space"},
          {"empty line", [](Vocabulary& v) { v.merges = {""}; }, "found ''"},
          {"empty left", [](Vocabulary& v) { v.merges = {" ab"}; }, "merge 0"},
          {"empty right", [](Vocabulary& v) { v.merges = {"ab "}; }, "merge 0"},
          {"unknown part", [](Vocabulary& v) { v.merges = {"zz b"}; }, "found 'zz b'"},
          {"unknown result", [](Vocabulary& v) { v.merges = {"a c"}; }, "union is a token"},
          {"newline", [](Vocabulary& v) { v.merges = {"a\nb"}; }, "'a\\x0ab'"},
      });
}

TEST(Tokenizer, RefusesBadSentencePiece) {
  const auto set_byte = [](const char* text) {
    return [text](Vocabulary& v) { v.tokens[13] = text; };
  };
  expect_refused(tiny_sentencepiece({"a"}), kBadOfAnyKind);
  expect_refused(
      tiny_sentencepiece({"a"}),
      {
          {"no scores", [](Vocabulary& v) { v.scores.clear(); }, "scores: expected 260"},
          {"fewer scores", [](Vocabulary& v) { v.scores.pop_back(); }, "found 259"},
          {"NaN", [](Vocabulary& v) { v.scores[5] = NAN; }, "score of token 5"},
          {"infinite", [](Vocabulary& v) { v.scores[6] = -INFINITY; }, "score of token 6"},
          {"negative byte", set_byte("<0x-1>"), "found '<0x-1>'"},
          {"no digits", set_byte("<0xZZ>"), "byte token"},
          {"one digit", set_byte("<0x1>"), "byte token"},
          {"three digits", set_byte("<0x123>"), "byte token"},
          {"empty byte token", set_byte(""), "byte token"},
          {"a byte twice", set_byte("<0x00>"), "expected 256 byte tokens, found 255"},
          {"a byte missing", [](Vocabulary& v) { v.types[13] = TokenType::kNormal; }, "found 255"},
          {"neither bytes nor unk",
           [](Vocabulary& v) {
             v.types.assign(v.types.size(), TokenType::kNormal);
             v.unk = -1;
           },
           "byte tokens or an unknown token"},
      });
}

TEST(Tokenizer, ScoresOfAByteBpeVocabularyDoNotMatter) {
  Vocabulary v = tiny_byte_bpe();
  v.scores = {NAN, 1};
  EXPECT_NO_THROW(Tokenizer{v});
}

// ---- Long sweeps --------------------------------------------------------------------------------

TEST(TokenizerFull, EveryCharacterComesBack) {
  for (const std::string& path : {kGpt2, kLlama}) {
    SKIP_IF_ABSENT(path);
    const Tokenizer& tokenizer = tokenizer_of(path);
    for (uint32_t c = 0; c < 0x110000; ++c) {
      if (c == 0xD800) c = 0xE000;
      if (c == 0x2581) continue;
      std::string text = "a";
      append_utf8(text, c);
      text += " b";
      const Ids ids = tokenizer.encode(text, false);
      ASSERT_EQ(tokenizer.decode(ids), text);
      ASSERT_EQ(stream(tokenizer, ids), text);
    }
  }
}

TEST(TokenizerFull, WordOf8Megabytes) {
  const std::string word = long_word(8 << 20);
  for (const std::string& path : {kGpt2, kLlama}) {
    SKIP_IF_ABSENT(path);
    const Ids ids = tokenizer_of(path).encode(word, false);
    EXPECT_EQ(tokenizer_of(path).decode(ids), word);
  }
}

}  // namespace
}  // namespace chimera
