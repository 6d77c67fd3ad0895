#include "engine/train/target_features.h"

#include <algorithm>

#include "engine/error.h"
#include "engine/sampler.h"

namespace chimera::training {
namespace {
constexpr int kRows = 128;  // of a pass
}

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
    text.targets.push_back(
        likely_tokens(k.logits + int64_t{k.step->logits_index[r]} * k.vocab, k.vocab));
  }
}

TrainingText FeatureRecorder::take(int sequence, std::span<const int32_t> tokens) {
  TrainingText text = std::move(texts_[static_cast<size_t>(sequence)]);
  text.tokens.assign(tokens.begin(), tokens.end());
  return text;
}

TargetFeatures::TargetFeatures(const Llama& target, int context)
    : session_(target, {.context = context, .max_nodes = kRows - 1, .prefill_rows = kRows}),
      likely_memory_(
          target.backend().allocate(kRows * sizeof(LikelyTokens), chimera::Memory::kHost)),
      states_memory_(target.backend().allocate(
          static_cast<size_t>(target.config().hidden_size) * kRows * 4, chimera::Memory::kHost)),
      key_(target.backend().new_key()) {}

TrainingText TargetFeatures::read(std::span<const int32_t> tokens, int64_t first_start) {
  const LlamaConfig& config = session_.model().config();
  Backend& backend = session_.model().backend();
  auto* likely = static_cast<LikelyTokens*>(likely_memory_.get());
  auto* states = static_cast<float*>(states_memory_.get());
  TrainingText text;
  text.tokens.assign(tokens.begin(), tokens.end());
  text.first_start = first_start;
  if (text.n_starts() < 1) throw Error("text", "something to predict", "nothing");
  session_.start(0, tokens, {});  // checks length and ids
  for (int64_t at = 0; at < text.n_positions(); at += kRows) {
    const auto rows = static_cast<int>(std::min<int64_t>(kRows, text.n_positions() - at));
    Step& step = session_.edit_step();
    step.clear();
    step.begin_sequence(0);
    for (int r = 0; r < rows; ++r) {
      step.add_row(tokens[static_cast<size_t>(at + r)], r - 1, at + r > first_start);
    }
    const int n_logits = step.n_logits;
    backend.submit(key_, [&] {
      session_.forward();
      backend.likely_tokens(&step, session_.logits(), config.vocab_size, likely);
      backend.copy_rows(&step, {session_.states(), config.hidden_size, states});
      session_.accept_and_keep();
    });
    text.states.insert(text.states.end(), states, states + int64_t{rows} * config.hidden_size);
    text.targets.insert(text.targets.end(), likely, likely + n_logits);
  }
  return text;
}

}  // namespace chimera::training
