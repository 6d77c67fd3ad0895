#include "engine/train/target_features.h"

#include <algorithm>

#include "engine/cpu/kernels.h"
#include "engine/error.h"

namespace chimera::training {
namespace {

constexpr int kRows = 128;  // of a pass

// The most probable tokens of softmax(logits), most probable first. scratch: (vocab).
void soft_target(const float* logits, int64_t vocab, float* scratch, SoftTarget* target) {
  static const cpu::Kernels& kernels = cpu::select_kernels();
  const float largest = logits[kernels.sampling.argmax(logits, vocab)];
  kernels.sampling.exp_scaled(logits, vocab, largest, 1.0f, scratch);
  float part[8] = {};
  int64_t i = 0;
  for (; i + 8 <= vocab; i += 8) {
    for (int j = 0; j < 8; ++j) part[j] += scratch[i + j];
  }
  float sum = 0;
  for (; i < vocab; ++i) sum += scratch[i];
  for (const float p : part) sum += p;

  // The best so far, as a heap with the least probable on top. Nearly all tokens are far below it:
  // a piece is looked at only if its largest logit is not.
  struct Candidate {
    float logit;
    int32_t token;
    bool operator<(const Candidate& o) const {
      return logit > o.logit || (logit == o.logit && token < o.token);
    }
  };
  constexpr int64_t kPiece = 32;
  Candidate best[SoftTarget::kMost];
  int n = 0;
  for (int64_t first = 0; first < vocab; first += kPiece) {
    const int64_t end = std::min(first + kPiece, vocab);
    if (n == SoftTarget::kMost && end == first + kPiece) {
      float most[4] = {logits[first], logits[first], logits[first], logits[first]};
      for (int64_t t = first; t < end; t += 4) {
        for (int j = 0; j < 4; ++j) most[j] = most[j] < logits[t + j] ? logits[t + j] : most[j];
      }
      if (!(std::max(std::max(most[0], most[1]), std::max(most[2], most[3])) > best[0].logit))
        continue;
    }
    for (int64_t t = first; t < end; ++t) {
      if (n == SoftTarget::kMost && !(logits[t] > best[0].logit)) continue;
      if (n == SoftTarget::kMost) std::pop_heap(best, best + n--);
      best[n++] = {logits[t], static_cast<int32_t>(t)};
      std::push_heap(best, best + n);
    }
  }
  std::sort_heap(best, best + n);
  for (int j = 0; j < SoftTarget::kMost; ++j) {
    target->token[j] = j < n ? best[j].token : -1;
    target->probability[j] = j < n ? scratch[best[j].token] / sum : 0.0f;
  }
}

}  // namespace

FeatureRecorder::FeatureRecorder(const LlamaConfig& target, int n_sequences)
    : hidden_(target.hidden_size),
      texts_(static_cast<size_t>(n_sequences)),
      probability_(static_cast<size_t>(target.vocab_size)) {}

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
    soft_target(k.logits + int64_t{k.step->logits_index[r]} * k.vocab, k.vocab, probability_.data(),
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
      pool_(threads),
      probability_(static_cast<size_t>(pool_.size()),
                   std::vector<float>(static_cast<size_t>(target.config().vocab_size))) {}

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
                    probability_[static_cast<size_t>(thread)].data(),
                    &text.targets[static_cast<size_t>(first + i)]);
      }
    });
    session_.accept_and_keep();
  }
  return text;
}

}  // namespace chimera::training
