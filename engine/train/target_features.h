// What the target says about a text, for the draft to learn from: its states at every position and
// its likeliest next tokens where they are to be predicted.
#pragma once

#include <span>
#include <vector>

#include "engine/session.h"
#include "engine/train/draft_gradient.h"

namespace chimera::training {

class TargetFeatures {
 public:
  // vocabulary: the token ids that the draft chooses from. Texts up to `context` tokens.
  TargetFeatures(const Llama& target, std::span<const int32_t> vocabulary, int context,
                 int threads);

  int context() const { return session_.options().context; }
  // Runs the text through the target, teacher-forced; first_start: the last position before the
  // root of the first rollout, which is the last token of a prompt. The text has more than
  // first_start + 2 tokens.
  TrainingText read(std::span<const int32_t> tokens, int first_start);

 private:
  Session session_;
  cpu::ThreadPool pool_;
  std::vector<int32_t> index_of_;                // token -> index in the vocabulary, -1
  std::vector<std::vector<float>> probability_;  // scratch of a thread
};

}  // namespace chimera::training
