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

TargetPass::TargetPass(const Llama& target, int context, int rows)
    : session(target, {.context = context, .max_nodes = rows - 1, .prefill_rows = rows}),
      likely_(target.backend().allocate(static_cast<size_t>(rows) * sizeof(LikelyTokens),
                                        chimera::Memory::kHost)),
      states_(target.backend().allocate(
          static_cast<size_t>(target.config().hidden_size) * static_cast<size_t>(rows) * 4,
          chimera::Memory::kHost)),
      key_(target.backend().new_key()) {}

TrainingText TargetPass::start(std::span<const int32_t> tokens, int64_t first_start) {
  TrainingText text;
  text.tokens.assign(tokens.begin(), tokens.end());
  text.first_start = first_start;
  if (text.n_starts() < 1) throw Error("text", "something to predict", "nothing");
  session.start(0, tokens, {});  // checks length and ids
  return text;
}

void TargetPass::add_text(const TrainingText& text, int64_t first, int64_t end, bool wants_logits) {
  Step& step = session.edit_step();
  step.clear();
  step.sequences[0].committed = static_cast<int32_t>(first);
  step.begin_sequence(0);
  for (int64_t at = first; at < end; ++at)
    step.add_row(text.tokens[static_cast<size_t>(at)], static_cast<int>(at - first) - 1,
                 wants_logits && at >= text.first_start);
}

void TargetPass::run() {
  const LlamaConfig& config = session.model().config();
  Backend& backend = session.model().backend();
  const Step& step = session.last_step();
  backend.submit(key_, [&] {
    session.forward();
    backend.likely_tokens(&step, session.logits(), config.vocab_size,
                          static_cast<LikelyTokens*>(likely_.get()));
    backend.copy_rows(&step,
                      {session.states(), config.hidden_size, static_cast<float*>(states_.get())});
  });
}

TargetFeatures::TargetFeatures(const Llama& target, int context) : pass_(target, context, kRows) {}

TrainingText TargetFeatures::read(std::span<const int32_t> tokens, int64_t first_start) {
  TrainingText text = pass_.start(tokens, first_start);
  const int64_t d = pass_.session.model().config().hidden_size;
  for (int64_t first = 0; first < text.n_positions(); first += kRows) {
    const int64_t end = std::min<int64_t>(first + kRows, text.n_positions());
    pass_.add_text(text, first, end);
    pass_.run();
    text.states.insert(text.states.end(), pass_.states(), pass_.states() + (end - first) * d);
    for (int64_t at = std::max(first, first_start + 1); at < end; ++at)
      text.targets.push_back(pass_.likely()[pass_.session.last_step().logits_index[at - first]]);
  }
  return text;
}

}  // namespace chimera::training
