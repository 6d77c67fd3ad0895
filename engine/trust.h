// What a drafter's probabilities are worth in the text at hand; host and device count alike.
#pragma once

namespace chimera {

// Probabilities were measured on other texts. In this one candidates are worth what came of them
// lately: tokens accepted for each one promised. Where that is so little that none are tried, it is
// forgotten step by step, and some are tried again.
struct Trust {
  static constexpr float kMemory = 0.98f, kPrior = 8.0f;
  float accepted = 0, promised = 0;

  constexpr float share() const {
    const float s = (accepted + kPrior) / (promised + kPrior);
    return s < 1.0f ? s : 1.0f;
  }
  constexpr void observe(int n_accepted) {
    accepted = kMemory * (accepted + static_cast<float>(n_accepted));
    promised *= kMemory;
  }
};

}  // namespace chimera
