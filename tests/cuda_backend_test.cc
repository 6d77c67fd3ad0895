// The whole CUDA backend: models run through its kernels, under the emulator on every machine, and
// on the device where there is one.
#include <cmath>
#include <cstring>

#include "engine/error.h"
#include "engine/train/target_features.h"
#include "tests/cuda_devices.h"
#include "tests/cuda_support.h"

namespace chimera::test {
namespace {

// Runs a text in steps of at most `chunk` rows, accepts them all, and returns the last row's
// logits.
std::vector<float> run_text(const Llama& model, const std::vector<int32_t>& text, int chunk,
                            DType kv_type, std::vector<float>* states = nullptr) {
  Session session(
      model,
      {.context = static_cast<int>(text.size()) + 1, .prefill_rows = chunk, .kv_type = kv_type});
  session.start(0, text, {});
  Step& step = session.edit_step();
  for (size_t at = 0; at < text.size();) {
    step.clear();
    step.begin_sequence(0);
    int row = -1;
    for (int i = 0; i < chunk && at < text.size(); ++i, ++at)
      row = step.add_row(text[at], row, at + 1 == text.size());
    session.forward();
    if (states != nullptr)
      states->assign(session.states() + row * int64_t{model.config().hidden_size},
                     session.states() + (row + 1) * int64_t{model.config().hidden_size});
    session.accept_and_keep();
  }
  return {session.logits(), session.logits() + model.config().vocab_size};
}

// Every node of a random tree, among all the others, against its text run in other steps.
void check_tree(const Llama& model, std::mt19937& random, int committed, int nodes, int every,
                int alone_chunk, DType kv_type) {
  const int vocab = model.config().vocab_size;
  const std::vector<int32_t> prefix = random_tokens(random, committed, vocab);
  Session session(model, {.context = committed + nodes + 1,
                          .max_nodes = nodes,
                          .prefill_rows = 37,
                          .kv_type = kv_type});
  session.start(0, std::vector<int32_t>{0}, {});
  Step& step = session.edit_step();
  for (size_t at = 0; at < prefix.size();) {
    step.clear();
    step.begin_sequence(0);
    int row = -1;
    for (int i = 0; i < 37 && at < prefix.size(); ++i) row = step.add_row(prefix[at++], row, false);
    session.forward();
    session.accept_and_keep();
  }
  step.clear();
  step.begin_sequence(0);
  for (int i = 0; i < nodes; ++i)
    step.add_row(
        static_cast<int32_t>(random() % static_cast<unsigned>(vocab)),
        i == 0 || random() % 8 == 0 ? -1 : static_cast<int>(random() % static_cast<unsigned>(i)),
        true);
  session.forward();
  for (int i = static_cast<int>(random() % static_cast<unsigned>(every)); i < nodes; i += every) {
    std::vector<int32_t> text = prefix, path;
    for (int n = i; n >= 0; n = step.parent[n]) path.push_back(step.token[n]);
    text.insert(text.end(), path.rbegin(), path.rend());
    const std::vector<float> alone = run_text(model, text, alone_chunk, kv_type);
    ASSERT_EQ(std::memcmp(session.logits() + i * int64_t{vocab}, alone.data(),
                          static_cast<size_t>(vocab) * 4),
              0)
        << "node " << i << " of " << nodes << " after " << committed;
  }
}

TEST(CudaBackend, F32IsTheCpuBitForBit) {
  SKIP_WITHOUT(tiny("f32"));
  const Loaded cpu = load(tiny("f32"), "scalar", 1);
  std::mt19937 random(1);
  const std::vector<int32_t> text = random_tokens(random, 21, 512);
  const std::vector<float> a = run_text(*cpu.model, text, 8, DType::kF32);
  for (const std::string& device : devices()) {
    const Loaded cuda = load_on(device, tiny("f32"));
    const std::vector<float> b = run_text(*cuda.model, text, 5, DType::kF32);
    for (size_t i = 0; i < a.size(); ++i) ASSERT_EQ(a[i], b[i]) << device << " " << i;
  }
}

TEST(CudaBackend, EveryTypeIsNearTheCpu) {
  SKIP_WITHOUT(tiny("f32"));
  for (const std::string& device : devices())
    for (const std::string type : kQuantTypes) {
      const Loaded cpu = load(tiny(type), isas().back(), 1), cuda = load_on(device, tiny(type));
      std::mt19937 random(2);
      const std::vector<int32_t> text = random_tokens(random, 9, 512);
      const std::vector<float> a = run_text(*cpu.model, text, 9, DType::kF16),
                               b = run_text(*cuda.model, text, 9, DType::kF16);
      double difference = 0, norm = 0;
      for (size_t i = 0; i < a.size(); ++i) {
        difference += (a[i] - b[i]) * (a[i] - b[i]);
        norm += a[i] * a[i];
      }
      // About twice what the roundings of activations make of this model (bf16 0.0054, q6_k 0.020):
      // they fall differently as soon as a sum has another order. What is wrong is off by 1.
      const double ratio = std::sqrt(difference / norm);
      EXPECT_LT(ratio, type == "f32" || type == "f16" ? 0.001
                       : type == "bf16"               ? 0.01
                                                      : 0.04)
          << device << " " << type;
    }
}

TEST(CudaBackend, NodesOfTreesEveryType) {
  SKIP_WITHOUT(tiny("f32"));
  std::mt19937 random(3);
  int i = 0;
  for (const std::string& device : devices())
    for (const std::string type : kQuantTypes) {
      const Loaded l = load_on(device, tiny(type));
      SCOPED_TRACE(device + " " + type);
      struct Shape {
        int committed, nodes;
      };
      const Shape shapes[] = {{0, 2}, {14, 9}, {33, 17}, {3, 40}};
      const Shape& s = shapes[i++ % 4];
      check_tree(*l.model, random, s.committed, s.nodes, std::max(2, s.nodes / 2), 7,
                 i % 3 == 0 ? DType::kF32 : DType::kF16);
      if (HasFatalFailure()) return;
    }
}

// Whole texts: with a tree of guesses and without one, replayed and op by op, at every temperature.
TEST(CudaBackend, TextsAreTheSame) {
  SKIP_WITHOUT(shared("models/stories260K/stories260K.bin"));
  for (const std::string& device : devices()) {
    const Loaded l = load_on(device, shared("models/stories260K/stories260K.bin")),
                 by_op = load_on(device, shared("models/stories260K/stories260K.bin"), true);
    // Once upon a time, once upon a: what comes next stood there before.
    const std::vector<int32_t> prompt = {1, 403, 407, 261, 378, 403, 407, 261};
    double tokens_per_step = 0;
    for (const float temperature : {0.0f, 0.7f, 1.0f}) {
      const GenerateOptions options{
          24,
          {2},
          {.temperature = temperature, .top_p = temperature == 1.0f ? 0.9f : 1.0f, .seed = 6}};
      Session plain(*by_op.model, {.context = 64}), tree(*l.model, {.context = 64, .max_nodes = 7});
      const auto ngram = make_ngram_drafter({.nodes = 7, .min_match = 1}, 1, 64);
      const Generation expected = generate(plain, nullptr, prompt, options),
                       g = generate(tree, ngram.get(), prompt, options);
      EXPECT_EQ(g.ids, expected.ids) << "T " << temperature;
      tokens_per_step = std::max(tokens_per_step, g.tokens_per_step());
    }
    EXPECT_GT(tokens_per_step, 1.05) << "something must be accepted for this to prove anything";
  }
}

// Steps replayed from graphs, whose grids are larger than the step: one for each bucket of rows.
TEST(CudaBackend, GraphsGiveTheSameBits) {
  SKIP_WITHOUT(tiny("q4_0"));
  for (const std::string& device : devices()) {
    const Loaded l = load_on(device, tiny("q4_0"));
    std::mt19937 random(6);
    const std::vector<int32_t> text = random_tokens(random, 40, 512);
    Session eager(*l.model, {.context = 64, .max_nodes = 15}),
        graph(*l.model, {.context = 64, .max_nodes = 15});
    const int sizes[] = {3, 1, 5, 2, 8, 11, 1, 4};
    size_t at = 0;
    int ran = 0;
    for (const int size : sizes) {
      std::vector<float> logits[2];
      for (Session* s : {&eager, &graph}) {
        Step& step = s->edit_step();
        if (at == 0) s->start(0, text, {});
        step.clear();
        step.begin_sequence(0);
        int row = -1;
        for (int i = 0; i < size; ++i)
          row = step.add_row(text[at + static_cast<size_t>(i)], row, true);
        const auto ops = [&] {
          ran += s == &graph;
          s->forward();
          s->accept_and_keep();
        };
        l.backend->submit(s == &eager ? 0 : 1, ops);
        ASSERT_EQ(step.sequences[0].committed, static_cast<int>(at) + size);
        logits[s == &graph].assign(s->logits(), s->logits() + size * 512);
      }
      ASSERT_EQ(std::memcmp(logits[0].data(), logits[1].data(), logits[0].size() * 4), 0)
          << size << " rows at " << at;
      at += static_cast<size_t>(size);
    }
    EXPECT_EQ(ran, 3) << "the first step of each bucket, and the one that was captured";
    EXPECT_THROW(l.backend->submit(2,
                                   [&] {
                                     l.backend->on_host([] {});
                                     throw Error("stop");
                                   }),
                 Error);
    l.backend->submit(3, [] {});
    EXPECT_THROW(l.backend->submit(3, [&] { l.backend->on_host([] {}); }), Error)
        << "no host inside a graph";
  }
}

// Small integers, whose sums are exact in any order: on the device too the product is the plain
// loop's.
TEST(CudaBackend, IntegerProductsAreExact) {
  std::mt19937 random(9);
  for (const std::string& device : devices()) {
    const auto backend = backend_on(device);
    constexpr int64_t kRows = 150, kCols = 768, kTokens = 40;
    for (const DType type : cuda::test::kAllTypes) {
      const auto m = cuda::test::random_matrix(random, type, kRows, kCols, true);
      const auto matrix = backend->prepare({&m.view, 1}, nullptr);
      backend->reserve(64, 64, kCols, {1, 1, 16}, 16);
      const std::vector<float> x = cuda::test::random_input(random, kTokens * kCols, true);
      const auto memory = backend->allocate(sizeof(Step) + (x.size() + kTokens * kRows) * 4);
      auto* step = static_cast<Step*>(memory.get());
      auto* input = reinterpret_cast<float*>(step + 1);
      float* y = input + x.size();
      backend->upload(input, x.data(), x.size() * 4);
      std::vector<float> weights(kRows * kCols);
      for (int64_t r = 0; r < kRows; ++r)
        dequantize_row(type, m.view.row(r), kCols, weights.data() + r * kCols);
      for (const int tokens : {1, 8, 40}) {
        step->n_rows = tokens;
        backend->linear(step, {.weights = matrix.get(), .x = input, .y = y});
        for (int64_t t = 0; t < tokens; ++t)
          for (int64_t r = 0; r < kRows; ++r) {
            double sum = 0;
            for (int64_t k = 0; k < kCols; ++k)
              sum += static_cast<double>(weights[static_cast<size_t>(r * kCols + k)]) *
                     static_cast<double>(x[static_cast<size_t>(t * kCols + k)]);
            ASSERT_EQ(static_cast<double>(y[t * kRows + r]), sum)
                << device << " " << dtype_info(type).name << " row " << r << " of token " << t;
          }
      }
    }
  }
}

// Scratch is for the matrices that were there when it was reserved: a later one that is cut into
// more runs, or has more rows, would write into what lies behind.
TEST(CudaBackend, ProductsNeedTheirScratchAndAStep) {
  std::mt19937 random(11);
  for (const std::string& device : devices()) {
    const auto backend = backend_on(device);
    const auto reserve = [&] { backend->reserve(8, 64, 1280, {1, 1, 16}, 16); };
    const auto step = backend->make_step(1);
    const auto memory = backend->allocate(size_t{2} * 8 * 1280 * 4);
    auto* x = static_cast<float*>(memory.get());
    step->n_rows = 1;
    const auto run = [&](const Matrix& m) {
      backend->linear(step.get(), {.weights = &m, .x = x, .y = x + 8 * 1280});
    };
    const auto small = cuda::test::random_matrix(random, DType::kF16, 40, 1280, true),
               large = cuda::test::random_matrix(random, DType::kF16, 140, 1280, true);
    const auto first = backend->prepare({&small.view, 1}, nullptr);
    reserve();
    run(*first);
    const auto second = backend->prepare({&large.view, 1}, nullptr);
    run(*first);
    EXPECT_THROW(run(*second), Error) << device;
    reserve();
    run(*second);
    // A product looks at the Step before the op ahead of it is done.
    step->clear();
    step->begin_sequence(0);
    step->set_root(step->add_row(1, -1, true));
    const auto list = [&](bool between) {
      backend->submit(0, [&] {
        backend->accept(step.get(), x, 40);
        if (between) backend->copy_rows(step.get(), {x, 4, x + 8});
        run(*second);
      });
    };
    EXPECT_THROW(list(false), Error) << device;
    list(true);
    backend->accept(step.get(), x, 40);
    run(*second);
  }
}

// What a draft learns from, taken on the device in passes that are graphs, is what the host finds
// in the logits of the passes that wrote the text.
TEST(CudaBackend, FeaturesAreThoseOfTheHost) {
  const std::string path = tiny("q8_0");
  SKIP_WITHOUT(path);
  for (const std::string& device : devices()) {
    const Loaded l = load_on(device, path);
    Session session(*l.model, {.context = 200, .n_sequences = 2});
    training::FeatureRecorder recorder(l.model->config(), 2);
    const std::vector<int32_t> prompts[] = {{1, 5, 9}, std::vector<int32_t>(150, 7)};
    for (int s = 0; s < 2; ++s) {
      session.start(s, prompts[s], {});
      recorder.start(s, static_cast<int>(prompts[s].size()));
    }
    while (session.tokens(1).size() < 180) session.step(&recorder);
    training::TargetFeatures features(*l.model, 200);
    for (int s = 0; s < 2; ++s) {
      const auto tokens = session.tokens(s);
      const training::TrainingText expected = recorder.take(s, tokens);
      for (int again = 0; again < 3; ++again) {
        const training::TrainingText text =
            features.read(tokens, static_cast<int64_t>(prompts[s].size()) - 1);
        EXPECT_EQ(text.states, expected.states) << device;
        ASSERT_EQ(text.targets.size(), expected.targets.size()) << device;
        for (size_t i = 0; i < text.targets.size(); ++i)
          for (int j = 0; j < LikelyTokens::kMost; ++j) {
            const float probability = expected.targets[i].probability[j];
            ASSERT_EQ(text.targets[i].token[j], expected.targets[i].token[j]) << device;
            ASSERT_NEAR(text.targets[i].probability[j], probability, 2e-6f * probability);
          }
      }
    }
  }
}

// Every op in its odder forms, with F32 weights and cache, on the CPU and here: the same bits.
TEST(CudaBackend, OpsAreTheCpus) {
  constexpr int kRows = 13, kDim = 24, kHeads = 4, kKvHeads = 2,
                kWidth = (kHeads + 2 * kKvHeads) * kDim, kHidden = 40, kVocab = 33;
  const auto run = [&](Backend& backend) {
    std::mt19937 random(10);
    const auto floats = [&](int64_t n) {
      const std::vector<float> values =
          cuda::test::random_input(random, static_cast<size_t>(n), false);
      auto memory = backend.allocate(static_cast<size_t>(n) * 4);
      backend.upload(memory.get(), values.data(), static_cast<size_t>(n) * 4);
      return memory;
    };
    const auto f = [](const std::shared_ptr<void>& p) { return static_cast<float*>(p.get()); };
    const auto a = cuda::test::random_matrix(random, DType::kF32, kWidth - 10, kHidden, false);
    const auto b = cuda::test::random_matrix(random, DType::kF32, 10, kHidden, false);
    const auto head = cuda::test::random_matrix(random, DType::kF32, kVocab, kHidden, false);
    const TensorView both[] = {a.view, b.view};
    const auto qkv_weights = backend.prepare(both, nullptr),
               head_weights = backend.prepare({&head.view, 1}, nullptr);
    const KvShape shape{DType::kF32, 2, kKvHeads, kDim, 2, 40};
    const auto kv_memory = backend.allocate(backend.kv_bytes(shape));
    const KvCache kv = backend.bind_kv(shape, kv_memory.get());
    const auto x = floats(kRows * kHidden), gate = floats(kRows * kHidden * 2),
               norm = floats(kHidden), cos = floats(40 * kDim / 2), sin = floats(40 * kDim / 2);
    const auto qkv = floats(kRows * (kWidth + 3)), attended = floats(kRows * kHeads * kDim),
               y = floats(kRows * kHidden), logits = floats(kRows * kVocab);
    const auto step_memory = backend.allocate(sizeof(Step));
    Step& step = *static_cast<Step*>(step_memory.get());
    const Heads heads{kHeads, kKvHeads, kDim, 1};
    backend.reserve(kRows, 40, kWidth, heads, kVocab);
    step.n_sequences = 2;
    step.sequences[1].committed = 3;
    step.clear();
    step.begin_sequence(0);
    for (int i = 0; i < 5; ++i) step.add_row(i, i - 1, i == 4);
    step.begin_sequence(1);
    const int root = step.add_row(7, -1, true);
    for (int i = 1; i < 8; ++i) step.add_row(i, root + i / 2, true);
    step.set_root(root);
    const RopeTable rope{f(cos), f(sin), 1};
    using Input = Linear::Input;
    for (const int first_new : {0, 4}) {
      step.first_new = first_new;
      backend.linear(&step, {.weights = qkv_weights.get(),
                             .x = f(x),
                             .y = f(qkv),
                             .y_stride = kWidth,
                             .input = Input::kRmsNorm,
                             .norm_weight = f(norm),
                             .eps = 1e-5f});
      backend.rope_append(&step, f(qkv), heads, rope, kv, 1);
      backend.attention(&step, f(qkv), heads, kv, 1, f(attended));
      backend.rms_norm(&step, f(x), f(norm), 1e-6f, kHidden, f(y));
      backend.copy_rows(&step, {f(y), kHidden, f(x)});
    }
    const auto from_memory = backend.allocate(kRows * sizeof(int32_t));
    for (int r = 0; r < kRows; ++r)
      static_cast<int32_t*>(from_memory.get())[r] = (5 * r + 2) % kRows;
    const auto gathered = floats(kRows * kHidden), joined = floats(2 * kRows * kHidden),
               sum = floats(kRows * kHidden);
    backend.copy_rows(&step, {.x = f(x),
                              .width = kHidden - 16,
                              .y = f(gathered) + 16,
                              .from = static_cast<int32_t*>(from_memory.get()),
                              .x_stride = kHidden,
                              .y_stride = kHidden});
    backend.join_rows(&step, f(norm), 0.7f, f(x), kHidden, f(joined), f(sum));
    // The second of two inputs that stand side by side.
    const auto beside = floats(kRows * kVocab);
    backend.linear(&step, {.weights = head_weights.get(),
                           .x = f(joined) + kHidden,
                           .y = f(beside),
                           .x_stride = 2 * kHidden});
    backend.linear(&step, {.weights = head_weights.get(),
                           .x = f(x),
                           .y = f(logits),
                           .input = Input::kSilu,
                           .rows = Rows::kLogits});
    backend.linear(&step, {.weights = head_weights.get(),
                           .x = f(gate),
                           .y = f(qkv),
                           .y_stride = kVocab + 4,
                           .input = Input::kSwiGlu,
                           .accumulate = true});
    backend.embed(&step, *head_weights, f(y));
    // Of 33 tokens, and of 11: three rows for each.
    std::vector<int32_t> likeliest;
    const auto likely_memory =
        backend.allocate(Step::kMaxRows * sizeof(LikelyTokens), Memory::kHost);
    const auto* likely = static_cast<LikelyTokens*>(likely_memory.get());
    for (const int vocab : {kVocab, kVocab / 3}) {
      backend.likely_tokens(&step, f(logits), vocab,
                            static_cast<LikelyTokens*>(likely_memory.get()));
      for (int i = 0; i < step.n_logits; ++i) {
        const LikelyTokens expected = likely_tokens(f(logits) + i * vocab, vocab);
        likeliest.insert(likeliest.end(), likely[i].token, likely[i].token + LikelyTokens::kMost);
        for (int j = 0; j < LikelyTokens::kMost; ++j)
          EXPECT_NEAR(likely[i].probability[j], expected.probability[j],
                      2e-6f * expected.probability[j]);
      }
    }
    backend.accept(&step, f(logits), kVocab);
    backend.keep(&step, kv);
    backend.keep_rows(&step, kHidden, f(y));
    std::vector<float> all;
    for (const auto& [memory, n] : {std::pair{x, kRows * kHidden},
                                    {qkv, kRows * (kWidth + 3)},
                                    {attended, kRows * kHeads * kDim},
                                    {y, kRows * kHidden},
                                    {gathered, kRows * kHidden},
                                    {joined, 2 * kRows * kHidden},
                                    {sum, kRows * kHidden},
                                    {beside, kRows * kVocab},
                                    {logits, kRows * kVocab}})
      all.insert(all.end(), f(memory), f(memory) + n);
    all.insert(all.end(), likeliest.begin(), likeliest.end());
    for (int r = 0; r < kRows; ++r) all.push_back(static_cast<float>(step.kept_at[r]));
    for (int i = 0; i < 2; ++i)
      all.insert(all.end(), {static_cast<float>(step.sequences[i].committed),
                             static_cast<float>(step.sequences[i].next)});
    return all;
  };
  const std::vector<float> expected = run(*backend_of("scalar", 1));
  for (const std::string& device : devices()) {
    const std::vector<float> got = run(*backend_on(device));
    ASSERT_EQ(got.size(), expected.size());
    EXPECT_TRUE(cuda::test::same_bits(got.data(), expected.data(), got.size())) << device;
  }
}

// A matrix that is large enough for several threads to pack it.
TEST(CudaBackend, PacksLargeMatrices) {
  std::mt19937 random(10);
  constexpr int64_t kRows = 1030, kCols = 2048;
  for (const std::string& device : devices())
    for (const DType type : {DType::kF32, DType::kQ4_K}) {
      const auto m = cuda::test::random_matrix(random, type, kRows, kCols, false);
      const auto backend = backend_on(device);
      const auto matrix = backend->prepare({&m.view, 1}, nullptr);
      const auto step = backend->make_step(1);
      const auto memory = backend->allocate(static_cast<size_t>(Step::kMaxRows * kCols) * 4);
      for (int row = 0; row < kRows; row += 7) step->token[step->n_rows++] = row;
      EXPECT_EQ(step->token[step->n_rows - 1], kRows - 1);
      backend->embed(step.get(), *matrix, static_cast<float*>(memory.get()));
      std::vector<float> expected(kCols);
      for (int i = 0; i < step->n_rows; ++i) {
        dequantize_row(type, m.view.row(step->token[i]), kCols, expected.data());
        ASSERT_TRUE(cuda::test::same_bits(static_cast<float*>(memory.get()) + i * kCols,
                                          expected.data(), kCols))
            << device << " " << dtype_info(type).name << " row " << step->token[i];
      }
    }
}

TEST(CudaBackend, ReplacesARow) {
  SKIP_WITHOUT(tiny("f32"));
  for (const std::string& device : devices()) {
    const auto backend = backend_on(device);
    std::mt19937 random(8);
    std::vector<float> values(40 * 64);
    for (float& v : values) v = static_cast<float>(random() % 100);
    for (const DType type : {DType::kF32, DType::kF16}) {
      std::vector<std::byte> file(values.size() * (type == DType::kF32 ? 4 : 2));
      const auto put = [&](size_t i) {
        const uint16_t h = f32_to_f16(values[i]);
        if (type == DType::kF32)
          std::memcpy(file.data() + 4 * i, &values[i], 4);
        else
          std::memcpy(file.data() + 2 * i, &h, 2);
      };
      for (size_t i = 0; i < values.size(); ++i) put(i);
      const TensorView view{"rows", type, 40, 64, file.data(), 0};
      const auto matrix = backend->prepare({&view, 1}, nullptr);
      for (const auto& [first, n] : {std::pair<int64_t, int64_t>{37, 1}, {5, 29}}) {
        for (int64_t i = first * 64; i < (first + n) * 64; ++i) {
          values[static_cast<size_t>(i)] += 1;
          put(static_cast<size_t>(i));
        }
        backend->replace_rows(*matrix, view, first, n);
      }
      const auto memory = backend->allocate(sizeof(Step) + 40 * 64 * 4);
      auto* step = static_cast<Step*>(memory.get());
      auto* out = reinterpret_cast<float*>(step + 1);
      step->n_rows = 40;
      for (int i = 0; i < 40; ++i) step->token[i] = i;
      backend->embed(step, *matrix, out);
      EXPECT_EQ(std::vector<float>(out, out + 40 * 64), values);
    }
  }
}

}  // namespace
}  // namespace chimera::test
