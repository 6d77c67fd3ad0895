#include "engine/generate.h"

#include <algorithm>

#include "engine/clock.h"

namespace chimera {

const char* stop_name(Stop stop) {
  switch (stop) {
    case Stop::kEos: return "eos";
    case Stop::kLength: return "length";
    case Stop::kCancelled: return "cancelled";
  }
  return "";
}

Generation generate(Session& session, Drafter* drafter, std::span<const int32_t> prompt,
                    const GenerateOptions& options, const std::function<void(int32_t)>& token) {
  const int64_t room = session.options().context - static_cast<int64_t>(prompt.size());
  const auto limit = static_cast<size_t>(std::max<int64_t>(
      0, options.max_tokens < 0 ? room : std::min<int64_t>(room, options.max_tokens)));

  Generation g;
  g.prompt_tokens = static_cast<int>(prompt.size());
  g.ids.reserve(limit);
  session.start(0, prompt, options.sampling);
  const Clock::time_point start = Clock::now();
  bool done = false;
  while (!done && g.ids.size() < limit) {
    if (options.cancelled && options.cancelled()) {
      g.stop = Stop::kCancelled;
      break;
    }
    const Clock::time_point step_start = Clock::now();
    session.step(drafter);
    const double step_seconds = seconds_since(step_start);  // before anything is printed
    if (session.emitted(0) == 0) continue;                  // inside the prompt
    const bool prompt_pass = g.ids.empty();
    if (prompt_pass) g.prompt_seconds = seconds_since(start);
    const size_t before = g.ids.size();
    for (const int32_t id : session.tokens(0).last(static_cast<size_t>(session.emitted(0)))) {
      g.ids.push_back(id);
      if (token) token(id);
      if (std::find(options.eos.begin(), options.eos.end(), id) != options.eos.end()) {
        g.stop = Stop::kEos;
        done = true;
      }
      if (done || g.ids.size() == limit) break;
    }
    if (!prompt_pass) {
      ++g.steps;
      g.step_tokens += static_cast<int>(g.ids.size() - before);
      g.drafted += session.drafted(0);
      g.step_seconds += step_seconds;
    }
    session.truncate(0, static_cast<int>(prompt.size() + g.ids.size()));
  }
  session.stop(0);
  return g;
}

}  // namespace chimera
