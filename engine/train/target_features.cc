#include "engine/train/target_features.h"

#include <algorithm>

#include "engine/cpu/kernels.h"
#include "engine/error.h"

namespace chimera::training {
namespace {

constexpr int kRows = 128;  // of a pass

// The most probable tokens of softmax(logits), most probable first.
void soft_target(const float* logits, int64_t vocab, const std::vector<int32_t>& index_of,
                 std::vector<float>* scratch, SoftTarget* target) {
  static const cpu::Kernels& kernels = cpu::select_kernels();
  scratch->resize(static_cast<size_t>(vocab));
  const float largest = logits[kernels.sampling.argmax(logits, vocab)];
  kernels.sampling.exp_scaled(logits, vocab, largest, 1.0f, scratch->data());
  float part[8] = {};
  int64_t i = 0;
  for (; i + 8 <= vocab; i += 8) {
    for (int j = 0; j < 8; ++j) part[j] += (*scratch)[static_cast<size_t>(i + j)];
  }
  float sum = 0;
  for (; i < vocab; ++i) sum += (*scratch)[static_cast<size_t>(i)];
  for (const float p : part) sum += p;

  // The best so far, as a heap with the least probable on top.
  struct Candidate {
    float logit;
    int32_t token;
    bool operator<(const Candidate& o) const {
      return logit > o.logit || (logit == o.logit && token < o.token);
    }
  };
  Candidate best[SoftTarget::kMost];
  int n = 0;
  for (int64_t t = 0; t < vocab; ++t) {
    if (n == SoftTarget::kMost && !(logits[t] > best[0].logit)) continue;
    if (n == SoftTarget::kMost) std::pop_heap(best, best + n--);
    best[n++] = {logits[t], static_cast<int32_t>(t)};
    std::push_heap(best, best + n);
  }
  std::sort_heap(best, best + n);
  for (int j = 0; j < SoftTarget::kMost; ++j) {
    target->index[j] = j < n ? index_of[static_cast<size_t>(best[j].token)] : -1;
    target->probability[j] = j < n ? (*scratch)[static_cast<size_t>(best[j].token)] / sum : 0.0f;
  }
}

}  // namespace

TargetFeatures::TargetFeatures(const Llama& target, std::span<const int32_t> vocabulary,
                               int context, int threads)
    : session_(target, {.context = context, .max_nodes = kRows - 1, .prefill_rows = kRows}),
      pool_(threads),
      index_of_(static_cast<size_t>(target.config().vocab_size), -1),
      probability_(static_cast<size_t>(pool_.size())) {
  for (size_t i = 0; i < vocabulary.size(); ++i) {
    index_of_[static_cast<size_t>(vocabulary[i])] = static_cast<int32_t>(i);
  }
}

TrainingText TargetFeatures::read(std::span<const int32_t> tokens, int first_start) {
  const LlamaConfig& config = session_.model().config();
  const auto d = static_cast<size_t>(config.hidden_size);
  TrainingText text;
  text.tokens.assign(tokens.begin(), tokens.end());
  text.first_start = first_start;
  if (text.n_starts() < 1) throw Error("text", "something to predict", "nothing");
  session_.start(0, tokens, {});  // checks length and ids
  text.states.resize(static_cast<size_t>(text.n_positions()) * d);
  text.targets.resize(static_cast<size_t>(text.n_starts()));
  for (int64_t at = 0; at < text.n_positions(); at += kRows) {
    const auto rows = static_cast<int>(std::min<int64_t>(kRows, text.n_positions() - at));
    Step& step = session_.edit_step();
    step.clear();
    step.begin_sequence(0);
    for (int r = 0; r < rows; ++r) {
      step.add_row(tokens[static_cast<size_t>(at + r)], r - 1, at + r > first_start);
    }
    session_.forward();
    std::copy_n(session_.states(), static_cast<size_t>(rows) * d,
                text.states.begin() + at * static_cast<int64_t>(d));
    const int n_logits = step.n_logits;
    const int64_t first = at + rows - n_logits - first_start - 1;  // row of text.targets
    pool_.run([&](int thread) {
      for (int i = thread; i < n_logits; i += pool_.size()) {
        soft_target(session_.logits() + int64_t{i} * config.vocab_size, config.vocab_size,
                    index_of_, &probability_[static_cast<size_t>(thread)],
                    &text.targets[static_cast<size_t>(first + i)]);
      }
    });
    session_.accept_and_keep();
  }
  return text;
}

}  // namespace chimera::training
