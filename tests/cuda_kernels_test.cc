// The CUDA kernels besides the products: rows, attention, sampling and acceptance, against the
// CPU's scalar reference and the contract as plain loops.
#include "cuda/accept.cuh"
#include "cuda/attention.cuh"
#include "cuda/rows.cuh"
#include "engine/cpu/exp.h"
#include "tests/cuda_support.h"

namespace chimera::cuda::test {
namespace {

static_assert(kChunk == cpu::kChunk, "the attention of an F32 cache is the CPU's");

// A step of one sequence: `committed` positions, and rows with random parents (chain: each the
// last's child). Prompt rows before first_new were computed earlier.
void random_step(std::mt19937& random, Step* step, int committed, int rows, bool chain) {
  step->n_sequences = 1;
  step->sequences[0].committed = committed;
  step->clear();
  step->begin_sequence(0);
  for (int i = 0; i < rows; ++i)
    step->add_row(static_cast<int32_t>(random() % 7),
                  i == 0  ? -1
                  : chain ? i - 1
                          : static_cast<int>(random() % static_cast<unsigned>(i + 1)) - 1,
                  true);
}

TEST(CudaRows, NormEmbedCopy) {
  std::mt19937 random(1);
  for (const int64_t n : {1, 2, 15, 16, 17, 100, 576}) {
    Buffer<Step> step(1);
    random_step(random, step.get(), 3, 5, true);
    step[0].first_new = 2;
    const Buffer<float> x(random_input(random, static_cast<size_t>(5 * n), false)),
        w(random_input(random, static_cast<size_t>(n), false));
    Buffer<float> y(static_cast<size_t>(5 * n)), copied(static_cast<size_t>(5 * n));
    rms_norm(nullptr, {step.get(), x.get(), w.get(), 1e-5f, n, y.get()}, 7);
    copy_rows(nullptr, {step.get(), {x.get(), n, copied.get()}}, 7);
    finish();
    std::vector<float> expected(static_cast<size_t>(n));
    for (int64_t r = 0; r < 5; ++r) {
      cpu::kScalarKernels.rms_norm(x.get() + r * n, w.get(), 1e-5f, n, expected.data());
      if (r < 2) std::fill(expected.begin(), expected.end(), 0.0f);
      EXPECT_TRUE(same_bits(y.get() + r * n, expected.data(), expected.size()))
          << n << " row " << r;
      EXPECT_EQ(copied[static_cast<size_t>(r * n)], r < 2 ? 0.0f : x[static_cast<size_t>(r * n)]);
    }
  }
  for (const DType type : kAllTypes) {
    const RandomMatrix m = random_matrix(random, type, 20, 256, false);
    Buffer<std::byte> tape(static_cast<size_t>(tape_bytes(type, 20, 256)));
    pack_tape(m.view, tape.get());
    Buffer<Step> step(1);
    step[0].n_rows = 2;
    step[0].token[0] = 19;
    step[0].token[1] = 4;
    Buffer<float> out(512);
    embed(nullptr, {step.get(), type, tape.get(), 256, out.get()}, 2);
    finish();
    std::vector<float> expected(256);
    for (const int r : {0, 1}) {
      dequantize_row(type, m.view.row(step[0].token[r]), 256, expected.data());
      EXPECT_TRUE(same_bits(out.get() + r * 256, expected.data(), 256)) << dtype_info(type).name;
    }
  }
}

TEST(CudaRows, ExpIsTheCpus) {
  std::vector<float> x, e(1);
  for (int i = -9000; i < 9000; ++i) x.push_back(static_cast<float>(i) * 0.0101f);
  x.push_back(-INFINITY);
  for (const float v : x) {
    cpu::kScalarKernels.sampling.exp_scaled(&v, 1, 0.0f, 1.0f, e.data());
    const float mine = std::floor(exp_contract(v) * 0x1p34f) * 0x1p-34f;  // as exp_scaled() does
    EXPECT_TRUE(same_bits(&mine, e.data(), 1)) << v;
  }
}

// ---- Keys, values and attention ----

struct Cache {
  KvLayer layer;
  Buffer<std::byte> k, v;
  Cache(DType type, int kv_heads, int dim, int capacity)
      : layer{type,
              nullptr,
              nullptr,
              kv_heads,
              dim,
              round_up(dim, kKvTile),
              round_up(capacity, kKvTile)},
        k(static_cast<size_t>(layer.head_offset(1, 0)) * 4),
        v(static_cast<size_t>(layer.head_offset(1, 0)) * 4) {
    layer.k = k.get();
    layer.v = v.get();
  }
  float key(int head, int slot, int d) const {
    return load_kv(layer.type, k.get(), layer.head_offset(0, head) + layer.k_index(slot, d));
  }
  float value(int head, int slot, int d) const {
    return load_kv(layer.type, v.get(), layer.head_offset(0, head) + layer.v_index(slot, d));
  }
  void fill(std::mt19937& random, int slots) {
    std::normal_distribution<float> normal;
    for (int head = 0; head < layer.n_kv_heads; ++head)
      for (int slot = 0; slot < slots; ++slot)
        for (int d = 0; d < layer.head_dim; ++d) {
          store_kv(layer.type, k.get(), layer.head_offset(0, head) + layer.k_index(slot, d),
                   normal(random));
          store_kv(layer.type, v.get(), layer.head_offset(0, head) + layer.v_index(slot, d),
                   normal(random));
        }
  }
};

TEST(CudaRows, RopeAppendKeep) {
  std::mt19937 random(2);
  for (const DType type : {DType::kF16, DType::kF32})
    for (const int dim : {8, 16, 24, 64}) {
      const Heads heads{6, 3, dim, dim == 24 ? 2 : -1};
      const int half = dim / 2, width = 12 * dim, shift = dim == 24 ? 2 : 0;
      Buffer<Step> step(1);
      random_step(random, step.get(), 17, 9, false);
      const Buffer<float> cos(random_input(random, static_cast<size_t>(40 * half), false)),
          sin(random_input(random, static_cast<size_t>(40 * half), false));
      Buffer<float> qkv(random_input(random, static_cast<size_t>(9 * width), false));
      std::vector<float> expected(qkv.begin(), qkv.end());
      Cache cache(type, 3, dim, 40);
      rope_append(nullptr,
                  {step.get(), qkv.get(), heads, {cos.get(), sin.get(), shift}, 0.25f, cache.layer},
                  9);
      finish();
      for (int r = 0; r < 9; ++r)
        for (int h = 0; h < 9; ++h) {
          float* x = expected.data() + r * width + h * dim;
          const bool key = h >= 6, turns = heads.rope_kv_heads < 0 || (key ? h - 6 : h / 2) < 2;
          const int at = (step[0].position[r] + (key ? 0 : shift)) * half;
          if (turns)
            cpu::kScalarKernels.rotate(x, cos.get() + at, sin.get() + at, dim, key ? 1.0f : 0.25f);
          else
            for (int d = 0; d < dim; ++d) x[d] *= key ? 1.0f : 0.25f;
        }
      EXPECT_TRUE(same_bits(qkv.get(), expected.data(), expected.size())) << dim;
      const auto rounded = [type](float f) {
        return type == DType::kF16 ? f16_to_f32(f32_to_f16(f)) : f;
      };
      for (int r = 0; r < 9; ++r)
        for (int h = 0; h < 3; ++h)
          for (int d = 0; d < dim; ++d) {
            ASSERT_EQ(cache.key(h, step[0].slot[r], d),
                      rounded(expected[static_cast<size_t>(r * width + (6 + h) * dim + d)]));
            ASSERT_EQ(cache.value(h, step[0].slot[r], d),
                      rounded(expected[static_cast<size_t>(r * width + (9 + h) * dim + d)]));
          }
      // Keep a path of the tree.
      const auto before = [&](int r, int h, int d) {
        return std::pair{rounded(expected[static_cast<size_t>(r * width + (6 + h) * dim + d)]),
                         rounded(expected[static_cast<size_t>(r * width + (9 + h) * dim + d)])};
      };
      Buffer<float> states(random_input(random, 9 * 5, false));
      const std::vector<float> states_before(states.begin(), states.end());
      for (int r = 0; r < 9; ++r) step[0].kept_at[r] = -1;
      for (int r = 8; r >= 0; r = step[0].parent[r]) step[0].kept_at[r] = step[0].position[r];
      keep(nullptr, {step.get(), cache.layer, 0}, 1);
      keep_rows(nullptr, {step.get(), 5, states.get()}, 1);
      finish();
      int kept = 0;
      for (int r = 0; r < 9; ++r) {
        if (step[0].kept_at[r] < 0) continue;
        for (int h = 0; h < 3; ++h)
          for (int d = 0; d < dim; ++d) {
            const auto [k, v] = before(r, h, d);
            ASSERT_EQ(cache.key(h, step[0].kept_at[r], d), k);
            ASSERT_EQ(cache.value(h, step[0].kept_at[r], d), v);
          }
        EXPECT_TRUE(same_bits(states.get() + kept * 5, states_before.data() + r * 5, 5));
        ++kept;
      }
    }
}

// One query by the contract: its keys and values in logical order.
std::vector<float> attention_oracle(const Cache& c, const Step& step, int row, int kv_head,
                                    const float* q) {
  const bool f16 = c.layer.type == DType::kF16;
  const int dim = c.layer.head_dim, length = step.position[row] + 1,
            committed = step.sequences[0].committed;
  std::vector<int> slot(static_cast<size_t>(length));
  for (int i = 0; i < committed; ++i) slot[static_cast<size_t>(i)] = i;
  for (int node = row; node >= 0; node = step.parent[node])
    slot[static_cast<size_t>(step.position[node])] = step.slot[node];
  const int stride = cpu::partial_size(dim);
  std::vector<float> partials, out(static_cast<size_t>(dim));
  for (int begin = 0; begin < length; begin += kChunk) {
    const int n = std::min(kChunk, length - begin);
    std::vector<float> e(static_cast<size_t>(round_up(n, 16)));
    float largest = -INFINITY, lane[16] = {};
    for (int i = 0; i < n; ++i) {
      float score = 0;
      for (int d = 0; d < dim; d += f16 ? 16 : 1) {
        if (!f16) {
          score = std::fma(q[d], c.key(kv_head, slot[static_cast<size_t>(begin + i)], d), score);
          continue;
        }
        float a[16] = {}, b[16] = {};
        for (int j = 0; j < 16 && d + j < dim; ++j) {
          a[j] = c.key(kv_head, slot[static_cast<size_t>(begin + i)], d + j);
          b[j] = f16_to_f32(f32_to_f16(q[d + j]));
        }
        score = mma_element(score, a, b);
      }
      e[static_cast<size_t>(i)] = score;
      largest = std::max(largest, score);
    }
    for (int i = 0; i < n; ++i) {
      e[static_cast<size_t>(i)] = exp_contract(e[static_cast<size_t>(i)] - largest);
      lane[i % 16] += e[static_cast<size_t>(i)];
    }
    for (int w = 8; w > 0; w /= 2)
      for (int j = 0; j < w; ++j) lane[j] += lane[j + w];
    partials.push_back(largest);
    partials.push_back(lane[0]);
    for (int d = 0; d < dim; ++d) {
      float o = 0;
      for (int i = 0; i < n; i += f16 ? 16 : 1) {
        if (!f16) {
          o = std::fma(e[static_cast<size_t>(i)],
                       c.value(kv_head, slot[static_cast<size_t>(begin + i)], d), o);
          continue;
        }
        float a[16] = {}, b[16] = {};
        for (int j = 0; j < 16 && i + j < n; ++j) {
          a[j] = c.value(kv_head, slot[static_cast<size_t>(begin + i + j)], d);
          b[j] = f16_to_f32(f32_to_f16(e[static_cast<size_t>(i + j)]));
        }
        o = mma_element(o, a, b);
      }
      partials.push_back(o);
    }
  }
  cpu::kScalarKernels.combine(partials.data(), static_cast<int>(partials.size()) / stride, stride,
                              dim, dim, out.data());
  return out;
}

TEST(CudaAttention, TreesAndChainsAcrossChunks) {
  std::mt19937 random(3);
  struct Case {
    int heads, kv_heads, dim, committed, rows;
    bool chain;
  };
  for (const DType type : {DType::kF16, DType::kF32})
    for (const Case& c : {Case{1, 1, 8, 0, 1, true},
                          {3, 1, 16, 5, 3, false},
                          {4, 4, 32, 40, 37, false},
                          {6, 2, 24, 250, 11, false},
                          {2, 1, 64, 255, 20, false},
                          {9, 3, 64, 256, 1, true},
                          {4, 2, 16, 9, 70, true},
                          {2, 2, 48, 497, 18, false},
                          {40, 1, 16, 30, 3, false},
                          {2, 2, 128, 35, 60, false},
                          // More slots than tail_slots().
                          {2, 2, 16, 9, 120, false},
                          {1, 1, 144, 20, 50, false},
                          {1, 1, 256, 20, 20, false},
                          {2, 1, 512, 17, 9, false}}) {
      Buffer<Step> step(1);
      random_step(random, step.get(), c.committed, c.rows, c.chain);
      const int first_new = c.rows > 10 ? 4 : 0;
      step[0].first_new = first_new;
      Cache cache(type, c.kv_heads, c.dim, c.committed + c.rows + 1);
      cache.fill(random, c.committed + c.rows);
      const int width = (c.heads + 2 * c.kv_heads) * c.dim,
                chunks = (c.committed + c.rows) / kChunk + 1;
      const Buffer<float> qkv(random_input(random, static_cast<size_t>(c.rows * width), false));
      Buffer<float> partials(
          static_cast<size_t>(c.rows * c.heads * chunks * (2 + cache.layer.padded_dim))),
          out(static_cast<size_t>(c.rows * c.heads * c.dim));
      std::fill(partials.begin(), partials.end(), NAN);
      std::fill(out.begin(), out.end(), NAN);
      // What lies behind the live slots of the cache must not matter, nor what the step says of
      // rows that it does not have.
      for (int r = c.rows; r < Step::kMaxRows; ++r) step[0].slot[r] = c.committed + c.rows;
      const auto nan_tail = [&](void* base) {
        for (int h = 0; h < c.kv_heads; ++h)
          for (int s = c.committed + c.rows; s < cache.layer.padded_capacity; ++s)
            for (int d = 0; d < c.dim; ++d)
              store_kv(type, base,
                       cache.layer.head_offset(0, h) + (base == cache.k.get()
                                                            ? cache.layer.k_index(s, d)
                                                            : cache.layer.v_index(s, d)),
                       NAN);
      };
      nan_tail(cache.k.get());
      nan_tail(cache.v.get());
      set_descending(c.rows % 2 != 0);
      attention(nullptr,
                {step.get(),
                 qkv.get(),
                 {c.heads, c.kv_heads, c.dim},
                 cache.layer,
                 chunks,
                 partials.get(),
                 out.get()},
                c.rows - first_new, chunks, 1);
      finish();
      set_descending(false);
      for (int row = first_new; row < c.rows; ++row)
        for (int head = 0; head < c.heads; ++head) {
          const auto expected = attention_oracle(cache, step[0], row, head / (c.heads / c.kv_heads),
                                                 qkv.get() + row * width + head * c.dim);
          ASSERT_TRUE(same_sums(out.get() + (row * c.heads + head) * c.dim, expected.data(),
                                expected.size(), type == DType::kF32))
              << dtype_info(type).name << " " << c.heads << "/" << c.kv_heads << " x " << c.dim
              << " after " << c.committed << ", row " << row << " of " << c.rows << ", head "
              << head;
        }
    }
}

// ---- Sampling and acceptance ----

// The second row of two, so that the row starts at any address.
int32_t sample_on_device(const std::vector<float>& logits, const Sampling& sampling, int position) {
  const size_t vocab = logits.size();
  Buffer<float> l(2 * vocab);
  std::fill(l.begin(), l.end(), 1e9f);
  std::copy(logits.begin(), logits.end(), l.begin() + vocab);
  Buffer<uint64_t> best(2 * kSampleParts);
  std::fill(best.begin(), best.end(), ~uint64_t{0});
  Buffer<Step> step(1);
  step[0].n_sequences = 1;
  step[0].sequences[0].committed = position - 2;
  step[0].sequences[0].sampling = sampling;
  step[0].clear();
  step[0].begin_sequence(0);
  step[0].set_root(step[0].add_row(1, step[0].add_row(1, -1, true), true));
  accept(nullptr, {step.get(), l.get(), static_cast<int32_t>(vocab), best.get()}, 3, 1);
  finish();
  EXPECT_EQ(step[0].sequences[0].n_kept, 2);
  EXPECT_EQ(step[0].sequences[0].committed, position);
  EXPECT_EQ(step[0].kept_at[1], position - 1);
  return step[0].sequences[0].next;
}

TEST(CudaAccept, SamplesAsTheCpu) {
  std::mt19937 random(4);
  const SamplingOps& ops = cpu::kScalarKernels.sampling;
  int greedy_differs = 0;
  for (int trial = 0; trial < 480; ++trial) {
    const size_t vocab = std::vector<size_t>{1, 5, 100, 512, 3001}[static_cast<size_t>(trial) % 5];
    std::vector<float> logits = random_input(random, vocab, false, trial % 3 == 0 ? 0.3f : 4.0f);
    if (trial % 4 == 1)
      for (float& v : logits) v = std::round(v);  // many ties
    if (trial % 7 == 2) logits[random() % vocab] = NAN;
    if (trial % 7 == 3) logits[random() % vocab] = -INFINITY;
    Sampling s;
    s.temperature = std::vector<float>{0.0f, 0.7f, 1.0f, 1.5f}[random() % 4];
    s.top_k = std::vector<int>{0, 1, 2, 40}[random() % 4];
    s.top_p = std::vector<float>{1.0f, 0.9f, 0.5f, 0.01f}[random() % 4];
    s.min_p = std::vector<float>{0.0f, 0.05f, 0.5f, 1.0f}[random() % 4];
    s.seed = random();
    const int position = 2 + static_cast<int>(random() % 1000);
    std::vector<float> e(vocab), noise(vocab);
    std::vector<int32_t> order(vocab);
    const int32_t expected = sample(ops, logits.data(), static_cast<int32_t>(vocab), s, position,
                                    {e.data(), noise.data(), order.data()});
    greedy_differs += expected != ops.argmax(logits.data(), static_cast<int64_t>(vocab));
    set_descending(trial % 2 != 0);
    ASSERT_EQ(sample_on_device(logits, s, position), expected)
        << "trial " << trial << ": vocab " << vocab << ", T " << s.temperature << ", k " << s.top_k
        << ", p " << s.top_p << ", min-p " << s.min_p;
  }
  set_descending(false);
  EXPECT_GT(greedy_differs, 30) << "the trials must leave the largest logit now and then";
}

TEST(CudaAccept, ZeroHasNoSign) {
  EXPECT_EQ(sample_on_device({-1.0f, -0.0f, 0.0f}, {}, 3), 1);
  EXPECT_EQ(sample_on_device({NAN, -INFINITY, NAN}, {}, 3), 0);
}

TEST(CudaAccept, WalksTheTree) {
  // The tree of step.h; greedy, logits that say "dog" after row 0, "ran" after row 2, then
  // anything.
  Buffer<Step> step(1);
  Step& s = step[0];
  s.n_sequences = 3;
  s.sequences[0].committed = 7;
  s.sequences[2].committed = 4;
  s.clear();
  s.begin_sequence(2);  // a prompt, all kept
  s.add_row(1, -1, false);
  s.add_row(2, 0, false);
  s.begin_sequence(0);
  const int the = s.add_row(0, -1, true), cat = s.add_row(1, the, true),
            dog = s.add_row(2, the, true);
  s.add_row(3, cat, true);
  s.add_row(4, cat, true);
  const int ran = s.add_row(4, dog, true);
  s.set_root(the);
  Buffer<float> logits(6 * 8);
  logits[static_cast<size_t>(s.logits_index[the] * 8 + 2)] = 1;
  logits[static_cast<size_t>(s.logits_index[dog] * 8 + 4)] = 1;
  logits[static_cast<size_t>(s.logits_index[ran] * 8 + 6)] = 1;
  Buffer<uint64_t> best(6 * kSampleParts);
  accept(nullptr, {step.get(), logits.get(), 8, best.get()}, 6, 3);
  finish();
  EXPECT_EQ(std::vector<int>(s.kept_at, s.kept_at + 8),
            (std::vector<int>{4, 5, 7, -1, 8, -1, -1, 9}));
  EXPECT_EQ(s.sequences[0].next, 6);
  EXPECT_EQ(s.sequences[0].n_kept, 3);
  EXPECT_EQ(s.sequences[0].committed, 10);
  EXPECT_EQ(s.sequences[2].n_kept, 2);
  EXPECT_EQ(s.sequences[2].committed, 6);
  EXPECT_EQ(s.sequences[2].next, -1);
}

}  // namespace
}  // namespace chimera::cuda::test
