// The trainer's ops on the GPU against those of the CPU: each op at odd sizes, a whole gradient, a
// step of the optimiser; and that a run can be repeated bit for bit.
//
// Products of small integers have one result in any order, so they are compared bit for bit, and so
// is what only moves or scales numbers. The rest differs from the CPU in the order of f32 sums and
// in exp, both by an ulp or two of what is summed: 1e-5 of the largest element is 80 of them. The
// GPU's tensor core truncates where it adds, once for each 16 k and product of parts, so there it
// is four times that. (What bf16 would make of it is some hundred times more.)
#include "cuda/train_ops.cuh"
#include "engine/train/batch_gradient.h"
#include "engine/train/cpu_ops.h"
#include "engine/train/optimizer.h"
#include "tests/cuda_support.h"

namespace chimera::cuda {
inline namespace CHIMERA_CUDA_BODY {
namespace test {
namespace {

using training::CpuOps;
using training::DraftGradient;
using training::OptimizerState;
using training::ParameterLayout;
using training::Precision;
using training::Score;
using training::TrainingText;
using Ops = training::Ops<float>;
template <typename U>
using Memory = training::Buffer<U>;

constexpr float kTolerance = kOnDevice ? 4e-5f : 1e-5f;

::testing::AssertionResult near(const std::vector<float>& a, const std::vector<float>& expected,
                                float tolerance = kTolerance) {
  float largest = 1e-6f;
  for (const float x : expected) largest = std::max(largest, std::fabs(x));
  if (a.size() != expected.size()) return ::testing::AssertionFailure() << "another size";
  for (size_t i = 0; i < a.size(); ++i)
    if (!(std::fabs(a[i] - expected[i]) <= tolerance * largest))
      return ::testing::AssertionFailure() << "at " << i << " of " << a.size() << ": " << a[i]
                                           << ", expected " << expected[i] << ", up to " << largest;
  return ::testing::AssertionSuccess();
}
::testing::AssertionResult same(const std::vector<float>& a, const std::vector<float>& expected) {
  if (a.size() != expected.size()) return ::testing::AssertionFailure() << "another size";
  return same_bits(a.data(), expected.data(), a.size());
}

// An op, on the CPU and on the GPU, on the same random arrays; under the emulator once more with
// the threads in another order, which must change nothing.
class Both {
 public:
  explicit Both(bool use_cublas = false, Precision precision = Precision::kF32)
      : gpu_(precision, use_cublas) {}

  // The results: what the first `outputs` arrays hold afterwards, on the CPU, then on the GPU.
  // op(ops, arrays)
  template <typename F>
  std::vector<std::vector<float>> run(const std::vector<std::vector<float>>& arrays, size_t outputs,
                                      const F& op) {
    std::vector<std::vector<float>> results;
    run_on(&cpu_, arrays, outputs, op, &results);
    run_on(&gpu_, arrays, outputs, op, &results);
    if (kOnDevice) return results;
    std::vector<std::vector<float>> again;
    set_descending(true);
    run_on(&gpu_, arrays, outputs, op, &again);
    set_descending(false);
    for (size_t i = 0; i < outputs; ++i)
      EXPECT_TRUE(same(again[i], results[outputs + i])) << "array " << i << " depends on the order";
    return results;
  }
  template <typename F>
  void expect_near(const std::vector<std::vector<float>>& arrays, size_t outputs, const F& op) {
    const auto r = run(arrays, outputs, op);
    for (size_t i = 0; i < outputs; ++i) EXPECT_TRUE(near(r[outputs + i], r[i])) << "array " << i;
  }
  template <typename F>
  void expect_same(const std::vector<std::vector<float>>& arrays, size_t outputs, const F& op) {
    const auto r = run(arrays, outputs, op);
    for (size_t i = 0; i < outputs; ++i) EXPECT_TRUE(same(r[outputs + i], r[i])) << "array " << i;
  }

 private:
  template <typename F>
  static void run_on(Ops* ops, const std::vector<std::vector<float>>& arrays, size_t outputs,
                     const F& op, std::vector<std::vector<float>>* results) {
    std::vector<Memory<float>> memory(arrays.size());
    std::vector<float*> pointers;
    for (size_t i = 0; i < arrays.size(); ++i) {
      ops->put(arrays[i], &memory[i]);
      pointers.push_back(memory[i].data());
    }
    op(*ops, pointers);
    for (size_t i = 0; i < outputs; ++i) results->push_back(ops->get(memory[i]));
  }

  CpuOps<float> cpu_{1};
  CudaTrainingOps gpu_;
};

using Arrays = std::vector<float*>;

// cuBLAS too, where the kernels run on a GPU and it is installed.
std::vector<bool> product_bodies() {
  return kOnDevice ? std::vector<bool>{false, true} : std::vector<bool>{false};
}

TEST(CudaTrain, Products) {
  std::mt19937 random(1);
  for (const bool cublas : product_bodies()) {
    for (const Precision precision : {Precision::kBF16, Precision::kF32}) {
      Both both(cublas, precision);
      constexpr int64_t kShapes[][3] = {{1, 1, 1},    {3, 70, 5},   {65, 2, 33},
                                        {40, 33, 71}, {2, 3, 1100}, {1100, 3, 2}};
      for (const auto& [rows, out, in] : kShapes) {
        SCOPED_TRACE(std::to_string(rows) + " x " + std::to_string(out) + " x " +
                     std::to_string(in) + (cublas ? ", cuBLAS" : ""));
        const auto integers = [&](int64_t n) {
          return random_input(random, static_cast<size_t>(n), true);
        };
        const auto y = integers(rows * out), x = integers(rows * in), w = integers(out * in);
        for (const bool accumulate : {false, true})
          both.expect_same({y, x, w}, 1, [&](Ops& ops, const Arrays& a) {
            ops.product(rows, out, in, a[1], a[2], a[0], accumulate);
          });
        both.expect_same({x, y, w}, 1, [&](Ops& ops, const Arrays& a) {
          ops.grad_input(rows, out, in, a[1], a[2], a[0]);
        });
        both.expect_same({w, y, x}, 1, [&](Ops& ops, const Arrays& a) {
          ops.grad_weight(rows, out, in, a[1], a[2], a[0]);
        });
      }
    }
  }
}

// Operands that are not integers: f32 keeps their 24 bits, bf16 rounds them to 8, to nearest.
TEST(CudaTrain, ProductsRoundAsTheirPrecisionSays) {
  std::mt19937 random(2);
  const int64_t rows = 5, out = 9, in = 50;
  const auto x = random_input(random, static_cast<size_t>(rows * in), false),
             w = random_input(random, static_cast<size_t>(out * in), false);
  const auto rounded = [](std::vector<float> v) {
    for (float& f : v) f = bf16_to_f32(f32_to_bf16(f));
    return v;
  };
  const auto product = [&](Ops& ops, const Arrays& a) {
    ops.product(rows, out, in, a[1], a[2], a[0], false);
  };
  const std::vector<float> y(static_cast<size_t>(rows * out));
  for (const bool cublas : product_bodies()) {
    Both f32(cublas), bf16(cublas, Precision::kBF16);
    const auto exact = f32.run({y, x, w}, 1, product),
               coarse = bf16.run({y, rounded(x), rounded(w)}, 1, product);
    EXPECT_TRUE(near(exact[1], exact[0]));
    // (cuBLAS may round: it does what is fastest.)
    EXPECT_TRUE(near(bf16.run({y, x, w}, 1, product)[1], coarse[0], cublas ? 1e-2f : kTolerance));
    EXPECT_FALSE(near(coarse[0], exact[0], 1e-4f)) << "the two must differ";
  }
}

TEST(CudaTrain, Rows) {
  std::mt19937 random(3);
  Both both;
  for (const int64_t n : {1, 5, 130, 257}) {
    for (const int64_t rows : {1, 3, 21}) {
      SCOPED_TRACE(std::to_string(rows) + " x " + std::to_string(n));
      const auto normal = [&](int64_t size) {
        return random_input(random, static_cast<size_t>(size), false);
      };
      const auto x = normal(rows * n), dy = normal(rows * n), y = normal(rows * n),
                 wide = normal(rows * 2 * n), weight = normal(n), per_row = normal(rows);
      both.expect_near({y, per_row, x}, 2, [&](Ops& ops, const Arrays& a) {
        ops.rms(rows, n, 1e-5f, a[2], a[0], a[1]);
      });
      for (const bool accumulate : {false, true})
        both.expect_near({x, y, per_row, dy}, 1, [&](Ops& ops, const Arrays& a) {
          ops.rms_grad(rows, n, a[1], a[2], a[3], a[0], accumulate);
        });
      both.expect_same({y, x, weight}, 1,
                       [&](Ops& ops, const Arrays& a) { ops.scale(rows, n, a[1], a[2], a[0]); });
      for (const size_t dx : {0u, 4u})  // dx may be dy
        both.expect_near({y, weight, x, weight, dy}, 5, [&](Ops& ops, const Arrays& a) {
          ops.scale_grad(rows, n, a[2], a[3], a[4], a[dx], a[1]);
        });
      both.expect_same({y, wide, weight}, 1,
                       [&](Ops& ops, const Arrays& a) { ops.residual(rows, n, a[1], a[2], a[0]); });
      both.expect_near({weight, x, wide, dy}, 2, [&](Ops& ops, const Arrays& a) {
        ops.residual_grad(rows, n, a[2], a[3], a[0], a[1]);
      });
      both.expect_near({y, x}, 1,
                       [&](Ops& ops, const Arrays& a) { ops.silu(rows * n, a[1], a[0]); });
      for (const size_t dx : {0u, 2u})
        both.expect_near({y, x, dy}, 3, [&](Ops& ops, const Arrays& a) {
          ops.silu_grad(rows * n, a[1], a[2], a[dx]);
        });
      both.expect_near({y, wide}, 1,
                       [&](Ops& ops, const Arrays& a) { ops.swiglu(rows, n, a[1], a[0]); });
      both.expect_near({wide, wide, dy}, 1, [&](Ops& ops, const Arrays& a) {
        ops.swiglu_grad(rows, n, a[1], a[2], a[0]);
      });
    }
  }
  // More rows than a column's thread of scale_grad() takes in one run of sixteen, and than sums.
  const int64_t rows = 1100, n = 3;
  const auto x = random_input(random, static_cast<size_t>(rows * n), true),
             dy = random_input(random, static_cast<size_t>(rows * n), true),
             w = random_input(random, 3, true),
             cat = random_input(random, static_cast<size_t>(rows * 2 * n), true);
  both.expect_same({w, x, x, w, dy}, 2, [&](Ops& ops, const Arrays& a) {
    ops.scale_grad(rows, n, a[2], a[3], a[4], a[1], a[0]);
  });
  both.expect_same({w, x, cat, dy}, 2, [&](Ops& ops, const Arrays& a) {
    ops.residual_grad(rows, n, a[2], a[3], a[0], a[1]);
  });
}

Memory<int32_t> indexed(Ops& ops, const std::vector<int32_t>& index) {
  Memory<int32_t> memory;
  ops.put(index, &memory);
  return memory;
}

TEST(CudaTrain, MovingRows) {
  std::mt19937 random(4);
  Both both;
  const std::vector<int32_t> any = {4, 0, 2, 2, 5, 1, 4}, ascending = {0, 1, 1, 1, 3, 5, 5};
  const int64_t rows = 7, table = 6;
  for (const int64_t n : {1, 130}) {
    const auto x = random_input(random, static_cast<size_t>(table * n), false),
               b = random_input(random, static_cast<size_t>(rows * n), false),
               wide = random_input(random, static_cast<size_t>(rows * 2 * n), false),
               y = random_input(random, static_cast<size_t>(rows * n), false);
    for (const bool null : {false, true}) {
      const auto at = [&](const Memory<int32_t>& index) { return null ? nullptr : index.data(); };
      both.expect_same({y, null ? b : x}, 1, [&](Ops& ops, const Arrays& a) {
        ops.gather_rows(rows, n, a[1], at(indexed(ops, any)), a[0]);
      });
      both.expect_same({wide, b, x}, 1, [&](Ops& ops, const Arrays& a) {
        const auto index = indexed(ops, any);
        ops.concat(rows, n, a[1], nullptr, a[2], index.data(), a[0]);
        if (null) ops.concat(rows, n, a[2], index.data(), a[1], nullptr, a[0]);
      });
      both.expect_same({y, wide}, 1, [&](Ops& ops, const Arrays& a) {
        ops.add_rows(rows, n, a[1] + n, 2 * n, at(indexed(ops, ascending)), a[0]);
      });
    }
    both.expect_near({y, x}, 1, [&](Ops& ops, const Arrays& a) {
      ops.embed(rows, n, 1e-7f, a[1], indexed(ops, any).data(), a[0]);
    });
    both.expect_same({y}, 1, [&](Ops& ops, const Arrays& a) { ops.zero(rows * n - 1, a[0]); });
  }
  const std::vector<int32_t> positions = {0, 1, 2, 77, 1023, 5, 6};
  for (const int dim : {2, 6, 64}) {
    const auto x = random_input(random, static_cast<size_t>(rows * 3 * dim), false);
    for (const int direction : {1, -1})
      both.expect_near({x}, 1, [&](Ops& ops, const Arrays& a) {
        ops.rotate(rows, 3 * dim, 2, dim, indexed(ops, positions).data(), 10000, direction,
                   direction == 1 ? 1.0f : 0.3f, a[0]);
      });
  }
}

TEST(CudaTrain, CrossEntropy) {
  std::mt19937 random(5);
  Both both;
  for (const int64_t vocab : {3, 40, 300}) {
    const int64_t rows = 9, n = 7;
    auto u = random_input(random, static_cast<size_t>(rows * n), false),
         head = random_input(random, static_cast<size_t>(vocab * n), false),
         weight = random_input(random, static_cast<size_t>(rows), false);
    std::vector<training::SoftTarget> targets(4);
    for (size_t i = 0; i < targets.size(); ++i) {
      for (int j = 0; j < 32; ++j) {
        const bool there = j < vocab && (i != 1 || j % 2 == 0);
        targets[i].token[j] = there ? static_cast<int32_t>((j + static_cast<int>(i)) % vocab) : -1;
        targets[i].probability[j] = 0.5f / static_cast<float>(j + 2);
      }
    }
    targets[2].token[0] = -1;  // the likeliest is outside
    // The last row agrees with its target's first token, whose row of the head is the longest.
    for (size_t i = 0; i < 7; ++i) u[8 * 7 + i] = head[i] *= 10;
    const std::vector<int32_t> target_of = {0, 1, 2, 3, -1, 1, 2, -1, 0};
    std::vector<std::vector<int32_t>> correct;
    for (const bool want_grad : {true, false}) {
      both.expect_near({u, weight, u, head, weight}, want_grad ? 2u : 0u,
                       [&](Ops& ops, const Arrays& a) {
                         Memory<training::SoftTarget> t;
                         Memory<int32_t> of, c;
                         ops.put(targets, &t);
                         ops.put(target_of, &of);
                         ops.need(&c, rows);
                         ops.cross_entropy(rows, n, vocab, a[2], a[3], t.data(), of.data(), a[4],
                                           want_grad, a[0], a[1], c.data());
                         correct.push_back(ops.get(c));
                       });
    }
    for (const auto& c : correct) EXPECT_EQ(c, correct[0]);
    EXPECT_EQ(correct[0][8], 1);
    EXPECT_EQ(correct[0][4], -1);
  }
}

TEST(CudaTrain, Attention) {
  std::mt19937 random(6);
  struct Case {
    training::AttentionShape shape;
    int steps;
    std::vector<std::array<int, 3>> texts;  // positions, first start, branches
  };
  // The largest first: the others then find its numbers in the ops' memory, which must not matter.
  const Case cases[] = {{{2, 2, 34}, 2, {{75, 3, 0}}},
                        {{2, 1, 6}, 3, {{40, 3, 9}, {5, 2, 1}}},
                        {{4, 2, 6}, 4, {{8, 2, 0}, {3, 1, 0}, {6, 0, 0}}},
                        {{3, 1, 8}, 8, {{5, 1, 2}}}};
  Both both;
  for (const Case& c : cases) {
    std::vector<AttentionText> texts;
    int64_t p = 0, asks = 0, n = 0;
    for (const auto& [positions, first, branches] : c.texts) {
      const int starts = positions - 1 - first;
      texts.push_back({p, positions - 1, asks, starts + branches * c.steps, n, starts + branches});
      p += positions;
      asks += texts.back().n_queries;
      n += texts.back().n_rows;
    }
    std::vector<int32_t> query, seen;
    for (int k = 0; k < c.steps; ++k) {
      for (size_t i = 0; i < texts.size(); ++i) {
        const auto& [positions, first, branches] = c.texts[i];
        const int starts = positions - 1 - first;
        const auto at = static_cast<int32_t>(texts[i].first_query);
        for (int s = 0; s < starts; ++s) query.push_back(at + std::min(s + k, starts - 1));
        for (int b = 0; b < branches; ++b) query.push_back(at + starts + b * c.steps + k);
        if (k > 0) continue;
        for (int s = 0; s < starts; ++s) seen.push_back(first + 1 + s);
        for (int b = 0; b < branches; ++b) seen.push_back(first + 1 + b % starts);
      }
    }
    const int64_t q = c.shape.n_heads * c.shape.head_dim,
                  kv = c.shape.n_kv_heads * c.shape.head_dim;
    const auto normal = [&](int64_t size) {
      return random_input(random, static_cast<size_t>(size), false, 0.5f);
    };
    const auto out = normal(c.steps * n * q), own = normal(c.steps * n * kv);
    // Outputs: out, dq, dk, dv, own dk, own dv
    both.expect_near(
        {out, normal(asks * q), normal(p * kv), normal(p * kv), own, own, normal(asks * q),
         normal(p * kv), normal(p * kv), normal(c.steps * n * kv), normal(c.steps * n * kv), out},
        6, [&](Ops& ops, const Arrays& a) {
          Ops::Attention at{};
          at.shape = c.shape;
          at.texts = texts;
          Memory<int32_t> query_memory, seen_memory;
          ops.put(query, &query_memory);
          ops.put(seen, &seen_memory);
          at.query = query_memory.data(), at.seen = seen_memory.data(), at.n_rows = n;
          at.q = a[6], at.k = a[7], at.v = a[8];
          at.dq = a[1], at.dk = a[2], at.dv = a[3];
          ops.attention_begin(at);
          for (int k = 0; k < c.steps; ++k) {
            const int64_t slot = k * n * kv;
            at.own_k[k] = a[9] + slot, at.own_v[k] = a[10] + slot;
            at.own_dk[k] = a[4] + slot, at.own_dv[k] = a[5] + slot;
            ops.attention_step(at, k, a[0] + k * n * q);
          }
          for (int k = c.steps - 1; k >= 0; --k)
            ops.attention_step_grad(at, k, a[0] + k * n * q, a[11] + k * n * q);
          ops.attention_end_grad(at);
        });
  }
}

TEST(CudaTrain, Optimiser) {
  std::mt19937 random(7);
  Both both;
  for (const int64_t n : {1, 513, 3000}) {
    const auto normal = [&] { return random_input(random, static_cast<size_t>(n), false); };
    auto second = normal();
    for (float& x : second) x *= x;
    for (const float b : {0.0f, 0.7f})
      both.expect_same({normal(), normal()}, 1,
                       [&](Ops& ops, const Arrays& a) { ops.axpby(n, -0.3f, a[1], b, a[0]); });
    both.expect_same({normal(), normal(), normal()}, 2,
                     [&](Ops& ops, const Arrays& a) { ops.momentum(n, 0.95f, a[2], a[0], a[1]); });
    both.expect_near({normal(), normal(), second, normal()}, 3, [&](Ops& ops, const Arrays& a) {
      ops.adam(n, {0.9f, 0.95f, 0.1f, 1.5f, 1e-8f}, a[3], a[1], a[2], a[0]);
    });
    both.expect_near({normal()}, 1, [&](Ops& ops, const Arrays& a) { ops.normalize(n, a[0]); });
    std::vector<double> sums;
    both.run({normal()}, 0, [&](Ops& ops, const Arrays& a) {
      const int64_t ends[] = {n / 3, n};
      sums.push_back(ops.sum_of_squares(ends, a[0]));
    });
    EXPECT_NEAR(sums[1], sums[0], 1e-12 * sums[0]);
  }
  // Not a number axpby() does not read.
  const std::vector<float> nan(5, NAN), ones(5, 1.0f);
  both.expect_same({nan, ones}, 1,
                   [](Ops& ops, const Arrays& a) { ops.axpby(5, 2.0f, a[1], 0.0f, a[0]); });
}

// ---- All of it ---------------------------------------------------------------------------------

DraftConfig tiny_config() {
  DraftConfig c;
  c.hidden_size = 10;
  c.n_heads = 4, c.n_kv_heads = 2, c.head_dim = 6;
  c.ffn_size = 5;
  c.n_steps = 3;  // the fourth step uses the third head
  c.head_rank = 2;
  return c;
}

struct Tiny {
  DraftConfig config = tiny_config();
  ParameterLayout layout{config};
  int vocab = 37;
  std::vector<float> embedding, head, parameters;
  std::vector<int32_t> vocabulary = std::vector<int32_t>(20);
  std::vector<TrainingText> texts;
  std::vector<const TrainingText*> batch;
  explicit Tiny(const DraftConfig& c = tiny_config(), bool branches = false) : config(c) {
    std::mt19937 random(8);
    const auto d = static_cast<size_t>(config.hidden_size);
    embedding = random_input(random, static_cast<size_t>(vocab) * d, false);
    head = random_input(random, static_cast<size_t>(vocab) * d, false, 0.5f);
    parameters = random_input(random, layout.total, false, 0.4f);
    std::iota(vocabulary.begin(), vocabulary.end(), 7);
    for (const auto& [length, first] : {std::pair{9, 2}, {4, 1}, {7, 0}}) {
      TrainingText t;
      for (int i = 0; i < length; ++i)
        t.tokens.push_back(static_cast<int32_t>(random() % static_cast<unsigned>(vocab)));
      t.first_start = first;
      t.states = random_input(random, static_cast<size_t>(length - 1) * d, false);
      const auto answers = [&random](int64_t n) {
        std::vector<training::SoftTarget> targets(static_cast<size_t>(n));
        for (training::SoftTarget& target : targets) {
          std::fill_n(target.token, training::SoftTarget::kMost, -1);
          for (int j = 0; j < 3; ++j) {
            target.token[j] = static_cast<int32_t>(random() % 12) * 3 + j;
            target.probability[j] = 0.5f / static_cast<float>(j + 1);
          }
        }
        return targets;
      };
      t.targets = answers(t.n_starts());
      if (branches && first != 1)
        t.branches = {{first, {8, 9}, answers(2)}, {first + 2, {t.tokens[4], 3, 5}, answers(1)}};
      texts.push_back(std::move(t));
    }
    for (const TrainingText& t : texts) batch.push_back(&t);
  }
};

struct Result {
  Score score;
  std::vector<float> gradient, values, averaged;
  double norm;
};
// A gradient, and two steps of the optimiser.
Result train(Ops* ops, const Tiny& tiny) {
  Memory<float> embedding, head, gradient;
  ops->put(tiny.embedding, &embedding);
  ops->put(tiny.head, &head);
  ops->need(&gradient, static_cast<int64_t>(tiny.layout.total));
  DraftGradient<float> model(ops, tiny.config, embedding.data(), head.data(), tiny.vocab,
                             tiny.vocabulary, 2);
  OptimizerState state = training::start_optimizer(ops, tiny.parameters);
  training::Optimizer optimizer({}, tiny.layout, ops);
  Result r;
  for (int step = 0; step < 2; ++step) {
    r.score = model.run(state.values.data(), tiny.batch, 4, 0.8, gradient.data());
    if (step == 0) r.gradient = ops->get(gradient);
    r.norm = optimizer.step(2e-3, gradient.data(), &state);
  }
  r.values = ops->get(state.values);
  r.averaged = ops->get(state.averaged);
  return r;
}

#if !defined(__CUDACC__)
// Under the emulator the host could read the device's memory, where it would die on a GPU: here it
// dies as well.
TEST(CudaTrain, TheHostLeavesTheDevicesMemoryAlone) {
  const emulator::GuardedMemory guarded(size_t{64} << 20);
  CudaTrainingOps ops(Precision::kF32);
  Memory<float> one;
  ops.put(std::vector<float>{1}, &one);
  EXPECT_EQ(ops.get(one), std::vector<float>{1});
  EXPECT_DEATH(*one.data() = 2, "");
  train(&ops, Tiny());
}
#endif

void expect_the_cpus_steps(const Tiny& tiny) {
  CpuOps<float> cpu(1);
  const Result expected = train(&cpu, tiny);
  for (const bool cublas : product_bodies()) {
    CudaTrainingOps gpu(Precision::kF32, cublas);
    const Result r = train(&gpu, tiny);
    for (const training::Parameter& p : tiny.layout.all) {
      const auto part = [&p](const std::vector<float>& v) {
        return std::vector<float>(v.begin() + static_cast<std::ptrdiff_t>(p.offset),
                                  v.begin() + static_cast<std::ptrdiff_t>(p.offset + p.size()));
      };
      EXPECT_TRUE(near(part(r.gradient), part(expected.gradient), 5 * kTolerance)) << p.name;
    }
    // Newton and Schulz enlarge what differs in small singular values some 3.4^5 = 480 times; a
    // step is 2e-3 of that.
    EXPECT_TRUE(near(r.values, expected.values, kTolerance));
    EXPECT_FALSE(near(expected.values, tiny.parameters, 1e-4f)) << "it must have moved";
    EXPECT_TRUE(near(r.averaged, expected.averaged, kTolerance));
    EXPECT_NEAR(r.norm, expected.norm, 1e-4 * expected.norm);
    for (size_t k = 0; k < 4; ++k) {
      EXPECT_EQ(r.score.step[k].rows, expected.score.step[k].rows);
      EXPECT_EQ(r.score.step[k].correct, expected.score.step[k].correct);
      EXPECT_NEAR(r.score.step[k].loss, expected.score.step[k].loss,
                  1e-4 * expected.score.step[k].loss);
    }
  }
}

TEST(CudaTrain, GradientAndStepsAreTheCpus) {
  expect_the_cpus_steps(Tiny());
}
TEST(CudaTrain, WithBranchesToo) {
  expect_the_cpus_steps(Tiny(tiny_config(), /*branches=*/true));
}
TEST(CudaTrain, InThePaperFormToo) {
  DraftConfig c = tiny_config();
  c.skip = c.slot_features = false;
  expect_the_cpus_steps(Tiny(c));
}
TEST(CudaTrain, WithTheLastTokenAloneToo) {
  DraftConfig c = tiny_config();
  c.trigram = false;
  expect_the_cpus_steps(Tiny(c));
}

// In bf16, as training runs; on the emulator with threads in another order as well, which moves the
// result of most races.
TEST(CudaTrain, ARunCanBeRepeatedBitForBit) {
  const Tiny tiny(tiny_config(), /*branches=*/true);
  for (const bool cublas : product_bodies()) {
    Result first;
    for (const bool again : {false, true}) {
      set_descending(again);
      CudaTrainingOps ops(Precision::kBF16, cublas);
      const Result r = train(&ops, tiny);
      if (!again) first = r;
      EXPECT_TRUE(same(r.gradient, first.gradient));
      EXPECT_TRUE(same(r.values, first.values));
      EXPECT_EQ(r.norm, first.norm);
      EXPECT_EQ(r.score.weighted_loss(0.8), first.score.weighted_loss(0.8));
    }
    set_descending(false);
  }
}

}  // namespace
}  // namespace test
}  // namespace CHIMERA_CUDA_BODY
}  // namespace chimera::cuda
