// What the target says about a text, for the draft to learn from: its states at every position and
// its likeliest next tokens where they are to be predicted.
//
// Two ways to the same states and tokens (a token's row has the same bits in any batch), and to
// probabilities that differ, on a device, by rounding: FeatureRecorder takes
// them from a session while it writes the text; TargetFeatures runs a finished text through the
// target again.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "engine/session.h"
#include "engine/train/draft_gradient.h"

namespace chimera::training {

// Watches the sequences of a session. (As a drafter that proposes nothing.)
class FeatureRecorder final : public Drafter {
 public:
  FeatureRecorder(const LlamaConfig& target, int n_sequences);

  std::string name() const override { return "none"; }
  void draft(const DraftContext& /*context*/, Step* /*step*/) override {}
  void observe(const KeptRows& kept) override;

  // The sequence is about to start a text with a prompt of this many tokens.
  void start(int sequence, int prompt_len);
  // What has been recorded of the text of a sequence. It has at least prompt_len + 2 tokens.
  TrainingText take(int sequence, std::span<const int32_t> tokens);

 private:
  int64_t hidden_;
  std::vector<TrainingText> texts_;  // by sequence
};

// A pass of the target over up to `rows` rows of one text, and what comes of it.
class TargetPass {
 public:
  TargetPass(const Llama& target, int context, int rows);

  // Another text, of which nothing is committed. Throws Error if there is nothing to predict, and
  // as Session::start().
  TrainingText start(std::span<const int32_t> tokens, int64_t first_start);
  // A new step: positions [first, end) of the text, whatever was committed from `first` on.
  // wants_logits: of positions from first_start on.
  void add_text(const TrainingText& text, int64_t first, int64_t end, bool wants_logits = true);
  void run();
  const float* states() const { return static_cast<float*>(states_.get()); }  // (rows, d)
  const LikelyTokens* likely() const { return static_cast<LikelyTokens*>(likely_.get()); }

  Session session;

 private:
  std::shared_ptr<void> likely_, states_;  // the host's
  uint64_t key_;
};

class TargetFeatures {
 public:
  // Texts up to `context` tokens.
  TargetFeatures(const Llama& target, int context);

  // Runs the text through the target, teacher-forced; first_start: the last position before the
  // root of the first rollout, which is the last token of a prompt. The text has more than
  // first_start + 2 tokens.
  TrainingText read(std::span<const int32_t> tokens, int64_t first_start);

 private:
  TargetPass pass_;
};

}  // namespace chimera::training
