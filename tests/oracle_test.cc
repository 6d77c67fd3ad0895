// The engine against the model's definition in double precision, and against results that we did
// not compute: exact logits of a tiny model in eleven weight types, llama2.c's text, Hugging Face's
// and llama.cpp's SmolLM2.
#include <cmath>
#include <nlohmann/json.hpp>
#include <sstream>

#include "tests/support.h"
#include "tokenizer/tokenizer.h"

namespace chimera::test {
namespace {

// Teacher-forced logits of every position of a text.
std::vector<float> logits_of(const Llama& model, const std::vector<int32_t>& ids, DType kv_type) {
  SessionOptions options;
  options.context = static_cast<int>(ids.size());
  options.max_nodes =
      static_cast<int>(std::min<size_t>(ids.size(), 128)) - 1;  // logits for that many rows
  options.kv_type = kv_type;
  Session session(model, options);
  const auto vocab = static_cast<size_t>(model.config().vocab_size);
  std::vector<float> all;
  session.start(0, ids, {});
  Step& step = session.edit_step();
  for (size_t begin = 0; begin < ids.size();) {
    step.clear();
    step.begin_sequence(0);
    int row = -1;
    for (int i = 0; i <= options.max_nodes && begin < ids.size(); ++i)
      row = step.add_row(ids[begin++], row, true);
    session.forward();
    all.insert(all.end(), session.logits(),
               session.logits() + static_cast<size_t>(step.n_rows) * vocab);
    session.accept_and_keep();
  }
  return all;
}

double rms_difference(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i)
    sum += std::pow(static_cast<double>(a[i]) - static_cast<double>(b[i]), 2);
  return std::sqrt(sum / static_cast<double>(a.size()));
}

// LLaMA as it is defined, on the rows as the file has them, whose pairs (2i, 2i + 1) are rotated.
using Vector = std::vector<double>;

struct Dense {
  explicit Dense(const TensorView& v) : cols(static_cast<size_t>(v.cols)) {
    values.resize(static_cast<size_t>(v.rows) * cols);
    for (int64_t r = 0; r < v.rows; ++r)
      dequantize_row(v.type, v.data + static_cast<size_t>(r) * row_bytes(v.type, v.cols), v.cols,
                     &values[static_cast<size_t>(r) * cols]);
  }
  Vector times(const Vector& x) const {
    Vector y(values.size() / cols);
    for (size_t r = 0; r < y.size(); ++r)
      for (size_t c = 0; c < cols; ++c) y[r] += static_cast<double>(values[r * cols + c]) * x[c];
    return y;
  }
  size_t cols;
  std::vector<float> values;
};

void add(Vector* x, const Vector& y) {
  for (size_t i = 0; i < x->size(); ++i) (*x)[i] += y[i];
}

Vector rms_norm(const Vector& x, const TensorView& weight, double eps) {
  double sum = 0;
  for (const double v : x) sum += v * v;
  const double scale = 1 / std::sqrt(sum / static_cast<double>(x.size()) + eps);
  const Dense w(weight);
  Vector y(x.size());
  for (size_t i = 0; i < x.size(); ++i) y[i] = x[i] * scale * static_cast<double>(w.values[i]);
  return y;
}

void rotate(Vector* x, size_t head_dim, size_t position, double base) {
  for (size_t i = 0; i < x->size(); i += 2) {
    const double exponent = static_cast<double>(i % head_dim) / static_cast<double>(head_dim);
    const double angle = static_cast<double>(position) * std::pow(base, -exponent);
    const double a = (*x)[i], b = (*x)[i + 1];
    (*x)[i] = a * std::cos(angle) - b * std::sin(angle);
    (*x)[i + 1] = a * std::sin(angle) + b * std::cos(angle);
  }
}

std::vector<float> defined_logits(const LlamaTensors& t, const std::vector<int32_t>& ids) {
  const LlamaConfig& c = t.config;
  const auto head_dim = static_cast<size_t>(c.head_dim), heads = static_cast<size_t>(c.n_heads),
             group = heads / static_cast<size_t>(c.n_kv_heads);
  const double eps = static_cast<double>(c.rms_eps);
  const Dense embedding(t.embedding);
  std::vector<Vector> hidden;  // by position
  for (const int32_t id : ids) {
    const auto row = embedding.values.begin() + id * c.hidden_size;
    hidden.emplace_back(row, row + c.hidden_size);
  }
  for (const LlamaLayerTensors& l : t.layers) {
    const Dense wq(l.wq), wk(l.wk), wv(l.wv), wo(l.wo), gate(l.w_gate), up(l.w_up), down(l.w_down);
    std::vector<Vector> keys, values;
    for (size_t p = 0; p < ids.size(); ++p) {
      Vector x = rms_norm(hidden[p], l.attn_norm, eps), q = wq.times(x), k = wk.times(x);
      rotate(&q, head_dim, p, c.rope_base);
      rotate(&k, head_dim, p, c.rope_base);
      keys.push_back(k);
      values.push_back(wv.times(x));
      Vector attended(q.size());
      for (size_t h = 0; h < heads; ++h) {
        const size_t at = h * head_dim, kv_at = h / group * head_dim;
        Vector weight(p + 1);
        double sum = 0;
        for (size_t i = 0; i <= p; ++i) {
          double dot = 0;
          for (size_t d = 0; d < head_dim; ++d) dot += q[at + d] * keys[i][kv_at + d];
          sum += weight[i] = std::exp(dot / std::sqrt(static_cast<double>(head_dim)));
        }
        for (size_t i = 0; i <= p; ++i)
          for (size_t d = 0; d < head_dim; ++d)
            attended[at + d] += weight[i] / sum * values[i][kv_at + d];
      }
      add(&hidden[p], wo.times(attended));
      x = rms_norm(hidden[p], l.ffn_norm, eps);
      Vector g = gate.times(x);
      const Vector u = up.times(x);
      for (size_t i = 0; i < g.size(); ++i) g[i] = g[i] / (1 + std::exp(-g[i])) * u[i];
      add(&hidden[p], down.times(g));
    }
  }
  const Dense head(t.output());
  std::vector<float> logits;
  for (const Vector& x : hidden)
    for (const double y : head.times(rms_norm(x, t.output_norm, eps)))
      logits.push_back(static_cast<float>(y));
  return logits;
}

// What is left is the rounding of sums, and of activations to bf16 or 8 bits: of logits of about 1,
// 1.2e-6, 0.007 and 0.02. A wrong angle at one of the positions fails
// every type.
TEST(Oracle, TheModelAsItIsDefined) {
  std::mt19937 random(5);
  const std::vector<int32_t> ids = random_tokens(random, 24, 512);
  for (const std::string type : kQuantTypes) {
    const Loaded l = load(tiny(type), isas().back(), 1);
    const std::vector<float> defined = defined_logits(l.file.tensors, ids);
    const double off = rms_difference(logits_of(*l.model, ids, DType::kF32), defined);
    const double size = rms_difference(defined, std::vector<float>(defined.size()));
    std::printf("%-5s %.7f of %.2f\n", type.c_str(), off, size);
    EXPECT_LE(off, type == "f32" || type == "f16" ? 3e-6 : type == "bf16" ? 0.01 : 0.03) << type;
    EXPECT_GT(size, 0.5) << type;
  }
}

// No further from the exact logits than llama.cpp is, for each weight type. Both round activations
// to 8 bits (or bf16) and are off by the same noise; two draws of it differ by up to 3% on these 24
// rows. Tried: halves rounded away from zero (no difference); the blocks' scales rounded to f16, as
// llama.cpp has them (q8_0 and q4_0 exactly as far as llama.cpp, q5_1 1.8% further); a
// least-squares scale, the better of two (3 to 7% nearer than llama.cpp here, but on SmolLM2 no
// nearer than before: rms of all logits 0.1316 against 0.1311, and 1.6% slower).
TEST(Oracle, ElevenWeightTypes) {
  const std::string folder = shared("models/tiny-quants/");
  SKIP_WITHOUT(folder);
  const std::vector<int32_t> ids = {1,  300, 17,  450, 88,  5, 5,  261, 499, 33, 402, 7,
                                    19, 350, 128, 64,  256, 3, 77, 480, 210, 9,  345, 101};
  for (const std::string type : kQuantTypes) {
    const auto exact = read_array<float>(folder + "exact-" + type + ".f32");
    const double theirs =
        rms_difference(read_array<float>(folder + "llamacpp-" + type + ".f32"), exact);
    for (const std::string& isa : isas()) {
      const Loaded l = load(folder + "tiny-" + type + ".gguf", isa, 1);
      const std::vector<float> ours = logits_of(*l.model, ids, DType::kF32);  // as llama.cpp ran it
      ASSERT_EQ(ours.size(), exact.size());
      EXPECT_LE(rms_difference(ours, exact), std::max(1.04 * theirs, 1e-6)) << type << " " << isa;
      std::printf("%-5s %-7s ours %.7f  llama.cpp %.7f\n", type.c_str(), isa.c_str(),
                  rms_difference(ours, exact), theirs);
    }
  }
}

TEST(Oracle, Stories260kTellsItsStory) {
  const std::string folder = shared("models/stories260K/");
  SKIP_WITHOUT(folder + "stories260K.bin");
  struct Case {
    const char *file, *prompt;
    int tokens;
  };
  for (const Case& c :
       {Case{"golden_greedy_200.txt", "", 200},
        Case{"golden_greedy_64_prompt_Once_upon_a_time.txt", "Once upon a time", 64}})
    for (const std::string& isa : isas()) {
      Loaded l = load(folder + "stories260K.bin", isa, 1);
      const Tokenizer tokenizer(l.file.vocabulary);
      std::vector<int32_t> ids = {tokenizer.bos()};
      for (const int32_t id : tokenizer.encode(c.prompt, false)) ids.push_back(id);
      Session session(*l.model, {.context = 256});
      GenerateOptions options;
      options.max_tokens = c.tokens + 1 - static_cast<int>(ids.size());
      const Generation g = generate(session, nullptr, ids, options);
      ids.insert(ids.end(), g.ids.begin(), g.ids.end());
      const std::string golden = read_text(folder + c.file);
      std::string text = tokenizer.decode(ids);
      EXPECT_EQ(golden.substr(0, text.size()), text) << isa;
      EXPECT_LE(golden.size(), text.size() + 8) << isa;
    }
}

// The three likeliest tokens at each position, from a forward pass in double that was written apart
// from this engine, with the rotated pairs where the file has them.
TEST(Oracle, RandomLlamaGguf) {
  const std::string path = shared("models/llama-2-tiny-random/llama-2-tiny-random.gguf");
  SKIP_WITHOUT(path);
  const std::pair<size_t, float> best[3][3] = {
      {{31102, 0.224708f}, {3594, 0.214365f}, {11774, 0.210646f}},
      {{9439, 0.222988f}, {20960, 0.221409f}, {29280, 0.213377f}},
      {{19356, 0.250370f}, {25431, 0.237886f}, {24347, 0.228018f}}};
  for (const std::string& isa : isas()) {
    const Loaded l = load(path, isa, 2);
    std::vector<float> logits = logits_of(*l.model, {1, 15043, 3186}, DType::kF32);
    ASSERT_EQ(logits.size(), 3u * 32000);
    for (size_t row = 0; row < 3; ++row)
      for (const auto& [id, logit] : best[row]) {
        const auto begin = logits.begin() + static_cast<std::ptrdiff_t>(row * 32000);
        const auto largest = std::max_element(begin, begin + 32000);
        EXPECT_EQ(static_cast<size_t>(largest - begin), id) << isa;
        EXPECT_NEAR(*largest, logit, 2e-6) << isa;
        *largest = -1;  // and the next one
      }
  }
}

double log_probability(const float* logits, int32_t id) {
  const double best = static_cast<double>(*std::max_element(logits, logits + 49152));
  double sum = 0;
  for (int v = 0; v < 49152; ++v) sum += std::exp(static_cast<double>(logits[v]) - best);
  return static_cast<double>(logits[id]) - best - std::log(sum);
}

class SmolLm2 : public ::testing::Test {
 protected:
  static const Llama& model() {
    static const Loaded l = load(kSmolLm2, isas().back(), 2);
    return *l.model;
  }
};

// The answer of the f32 model. With 4-bit weights the first token is a near tie (exact arithmetic
// on the Q4_1 weights puts the f32 model's 31.3 at 25.3); it must be among the best, the rest
// follows.
TEST_F(SmolLm2, AnswerOfTheF32Model) {
  const std::string path = shared("tokenizers/smollm2_golden/forward_135M_instruct.json");
  SKIP_WITHOUT(path);
  SKIP_WITHOUT(kSmolLm2);
  const auto golden = nlohmann::json::parse(read_text(path));
  auto ids = golden["prompt_ids"].get<std::vector<int32_t>>();
  const size_t prompt = ids.size();
  for (const int32_t id : golden["greedy_generated_ids"].get<std::vector<int32_t>>())
    ids.push_back(id);
  const std::vector<float> logits = logits_of(model(), ids, DType::kF16);
  for (size_t i = prompt; i < ids.size(); ++i) {
    const float* row = logits.data() + (i - 1) * 49152;
    const auto better = std::count_if(row, row + 49152, [&](float x) { return x > row[ids[i]]; });
    EXPECT_LE(better, i == prompt ? 4 : 0) << "token " << i - prompt;
  }
}

// llama.cpp on the same file, teacher-forced. Against exact arithmetic on the same weights, ours is
// off by 0.0202 in log-probability on average and llama.cpp by 0.0204 (1,388 tokens); so the two
// differ from each other by some 0.025, and near ties can fall either way.
void agree_with_llamacpp(const Llama& model, size_t limit) {
  std::istringstream lines(read_text(shared("smollm2_llamacpp/greedy.jsonl")));
  double off = 0;
  size_t tokens = 0, cases = 0;
  for (std::string line; std::getline(lines, line) && cases < limit; ++cases) {
    const auto c = nlohmann::json::parse(line);
    const auto prompt = c["prompt_ids"].get<std::vector<int32_t>>(),
               answer = c["ids"].get<std::vector<int32_t>>();
    const auto margin = c["margin"].get<std::vector<double>>(),
               logprob = c["logprob"].get<std::vector<double>>();
    std::vector<int32_t> ids = prompt;
    ids.insert(ids.end(), answer.begin(), answer.end());
    const std::vector<float> logits = logits_of(model, ids, DType::kF16);
    for (size_t i = 0; i < answer.size(); ++i) {
      const float* row = logits.data() + (prompt.size() - 1 + i) * 49152;
      const auto best = static_cast<int32_t>(std::max_element(row, row + 49152) - row);
      if (margin[i] > 0.5) {
        EXPECT_EQ(best, answer[i]) << c["name"] << " token " << i << ", margin " << margin[i];
      }
      const double ours = log_probability(row, answer[i]);
      EXPECT_NEAR(ours, logprob[i], 0.5) << c["name"] << " token " << i;
      off += std::fabs(ours - logprob[i]);
      ++tokens;
    }
  }
  std::printf("log-probabilities differ from llama.cpp's by %.4f on average over %zu tokens\n",
              off / static_cast<double>(tokens), tokens);
  EXPECT_LT(off / static_cast<double>(tokens), 0.03);
}
TEST_F(SmolLm2, AgreesWithLlamaCpp) {
  SKIP_WITHOUT(shared("smollm2_llamacpp/greedy.jsonl"));
  SKIP_WITHOUT(kSmolLm2);
  agree_with_llamacpp(model(), 6);
}

class SmolLm2Full : public SmolLm2 {};
TEST_F(SmolLm2Full, AgreesWithLlamaCpp) {
  SKIP_WITHOUT(shared("smollm2_llamacpp/greedy.jsonl"));
  SKIP_WITHOUT(kSmolLm2);
  agree_with_llamacpp(model(), 1000);
}

// What the comment above says, measured: exact is the same model with every weight dequantised to
// f32.
TEST_F(SmolLm2Full, AsNearToExactAsLlamaCpp) {
  SKIP_WITHOUT(shared("smollm2_llamacpp/greedy.jsonl"));
  SKIP_WITHOUT(kSmolLm2);
  ModelFile file = load_model(kSmolLm2);
  std::vector<std::vector<float>> expanded;
  const auto expand = [&](TensorView& v) {
    if (v.empty()) return;
    std::vector<float>& weights = expanded.emplace_back(static_cast<size_t>(v.rows * v.cols));
    for (int64_t r = 0; r < v.rows; ++r)
      dequantize_row(v.type, v.row(r), v.cols, weights.data() + r * v.cols);
    v = {v.name, DType::kF32, v.rows, v.cols, reinterpret_cast<const std::byte*>(weights.data()),
         0};
  };
  expand(file.tensors.embedding);
  for (LlamaLayerTensors& l : file.tensors.layers)
    for (TensorView* v : {&l.wq, &l.wk, &l.wv, &l.wo, &l.w_gate, &l.w_up, &l.w_down}) expand(*v);
  const auto backend = backend_of(isas().back(), 2);
  const Llama exact_model(*backend, file.tensors);

  std::istringstream lines(read_text(shared("smollm2_llamacpp/greedy.jsonl")));
  double ours = 0, theirs = 0;
  size_t tokens = 0;
  for (std::string line; std::getline(lines, line);) {
    const auto c = nlohmann::json::parse(line);
    auto ids = c["prompt_ids"].get<std::vector<int32_t>>();
    const size_t prompt = ids.size();
    const auto logprob = c["logprob"].get<std::vector<double>>();
    for (const int32_t id : c["ids"].get<std::vector<int32_t>>()) ids.push_back(id);
    const std::vector<float> a = logits_of(model(), ids, DType::kF16),
                             b = logits_of(exact_model, ids, DType::kF32);
    tokens += ids.size() - prompt;
    for (size_t i = prompt; i < ids.size(); ++i) {
      const double exact = log_probability(b.data() + (i - 1) * 49152, ids[i]);
      ours += std::fabs(log_probability(a.data() + (i - 1) * 49152, ids[i]) - exact);
      theirs += std::fabs(logprob[i - prompt] - exact);
    }
  }
  const auto n = static_cast<double>(tokens);
  std::printf("distance from exact log-probabilities, %zu tokens: ours %.4f, llama.cpp's %.4f\n",
              tokens, ours / n, theirs / n);
  EXPECT_LE(ours, 1.05 * theirs);
}

// llama-perplexity -c 512 on the first 65,536 bytes of Tiny Shakespeare: 38.3549; after 10
// chunks 39.5272.
TEST_F(SmolLm2Full, Perplexity) {
  SKIP_WITHOUT(shared("smollm2_llamacpp/text.txt"));
  SKIP_WITHOUT(kSmolLm2);
  const Tokenizer tokenizer(load_model(kSmolLm2).vocabulary);
  const std::vector<int32_t> ids =
      tokenizer.encode(read_text(shared("smollm2_llamacpp/text.txt")), false);
  double sum = 0;
  int scored = 0;
  for (int chunk = 0; chunk < 10; ++chunk) {
    const std::vector<int32_t> window(ids.begin() + chunk * 512, ids.begin() + (chunk + 1) * 512);
    const std::vector<float> logits = logits_of(model(), window, DType::kF16);
    for (size_t i = 256; i + 1 < 512; ++i, ++scored) {
      const float* row = logits.data() + i * 49152;
      sum -= log_probability(row, window[i + 1]);
    }
  }
  std::printf("perplexity after 10 chunks: %.4f (llama.cpp: 39.5272)\n", std::exp(sum / scored));
  EXPECT_NEAR(std::exp(sum / scored), 39.5272, 0.2);
}

}  // namespace
}  // namespace chimera::test
