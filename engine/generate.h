// Decoding a text: prompt in, tokens out as they come, figures at the end.
#pragma once

#include <functional>
#include <span>
#include <vector>

#include "engine/session.h"

namespace chimera {

enum class Stop : uint8_t { kEos, kLength, kCancelled };
const char* stop_name(Stop stop);  // "eos", "length", "cancelled"

struct GenerateOptions {
  int max_tokens = -1;  // -1: until the context is full
  std::vector<int32_t> eos;
  Sampling sampling;
  std::function<bool()> cancelled = nullptr;  // asked before every step, the prompt's too
};

struct Generation {
  std::vector<int32_t> ids;  // generated; an end-of-text token is the last one, if there was one
  Stop stop = Stop::kLength;
  int prompt_tokens = 0;
  int steps = 0;              // passes after the prompt's
  int step_tokens = 0;        // tokens that these passes gave (the prompt's gave one more)
  int drafted = 0;            // candidates verified in them
  double prompt_seconds = 0;  // until the first token
  double step_seconds = 0;    // of the passes after the prompt's

  double tokens_per_step() const {
    return steps > 0 ? static_cast<double>(step_tokens) / steps : 0;
  }
  double tokens_per_second() const { return step_seconds > 0 ? step_tokens / step_seconds : 0; }
  double prompt_tokens_per_second() const {
    return prompt_seconds > 0 ? prompt_tokens / prompt_seconds : 0;
  }
};

// Decodes sequence 0 of the session from a new prompt. The text ends where plain decoding would end
// it: at the first end-of-text token or after max_tokens, inside an accepted path too. token(id) is
// called for every generated token. drafter: nullptr for plain decoding.
Generation generate(Session& session, Drafter* drafter, std::span<const int32_t> prompt,
                    const GenerateOptions& options,
                    const std::function<void(int32_t)>& token = nullptr);

}  // namespace chimera
