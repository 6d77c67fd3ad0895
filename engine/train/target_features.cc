#include "engine/train/target_features.h"

#include <algorithm>
#include <cmath>

#include "engine/error.h"
#include "engine/sampler.h"

namespace chimera::training {
namespace {

constexpr int kRows = 128;  // of a pass

// The most probable tokens of softmax(logits), most probable first.
void soft_target(const float* logits, int64_t vocab, SoftTarget* target) {
  const int n = sampling_ops().top_k(logits, vocab, SoftTarget::kMost, target->token);
  const float largest = logits[target->token[0]], sum = sampling_ops().sum_of_exp(logits, vocab, largest, 1);
  for (int j = 0; j < SoftTarget::kMost; ++j) {
    if (j >= n) target->token[j] = -1;
    target->probability[j] = j < n ? std::exp(logits[target->token[j]] - largest) / sum : 0.0f;
  }
}

}  // namespace

FeatureRecorder::FeatureRecorder(const LlamaConfig& target, int n_sequences)
    : hidden_(target.hidden_size), texts_(static_cast<size_t>(n_sequences)) {}

void FeatureRecorder::start(int sequence, int prompt_len) {
  TrainingText& text = texts_[static_cast<size_t>(sequence)];
  text = {};
  text.first_start = prompt_len - 1;
}

void FeatureRecorder::observe(const KeptRows& k) {
  TrainingText& text = texts_[static_cast<size_t>(k.sequence)];
  text.states.insert(text.states.end(), k.states, k.states + k.n_kept * hidden_);
  const Step::Sequence& s = k.step->sequences[k.sequence];
  for (int r = s.first_row; r < s.first_row + s.n_rows; ++r) {
    if (k.step->kept_at[r] <= text.first_start) continue;
    soft_target(k.logits + int64_t{k.step->logits_index[r]} * k.vocab, k.vocab,
                &text.targets.emplace_back());
  }
}

TrainingText FeatureRecorder::take(int sequence, std::span<const int32_t> tokens) {
  TrainingText text = std::move(texts_[static_cast<size_t>(sequence)]);
  text.tokens.assign(tokens.begin(), tokens.end());
  return text;
}

TargetFeatures::TargetFeatures(const Llama& target, int context, int threads)
    : session_(target, {.context = context, .max_nodes = kRows - 1, .prefill_rows = kRows}),
      pool_(threads) {}

TrainingText TargetFeatures::read(std::span<const int32_t> tokens, int64_t first_start) {
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
                    &text.targets[static_cast<size_t>(first + i)]);
      }
    });
    session_.accept_and_keep();
  }
  return text;
}

}  // namespace chimera::training
