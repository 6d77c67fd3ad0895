#include "engine/generate.h"

#include <algorithm>
#include <chrono>

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
                    const GenerateOptions& options, const std::function<bool(int32_t)>& token) {
  using Clock = std::chrono::steady_clock;
  const auto seconds_since = [](Clock::time_point t) {
    return std::chrono::duration<double>(Clock::now() - t).count();
  };
  const int64_t room = session.options().context - static_cast<int64_t>(prompt.size());
  const auto limit = static_cast<size_t>(std::max<int64_t>(
      0, options.max_tokens < 0 ? room : std::min<int64_t>(room, options.max_tokens)));

  Generation g;
  g.prompt_tokens = static_cast<int>(prompt.size());
  g.ids.reserve(limit);
  session.start(0, prompt, options.sampling);
  const Clock::time_point start = Clock::now();
  while (g.ids.size() < limit) {
    const Clock::time_point step_start = Clock::now();
    session.step(drafter);
    if (session.emitted(0) == 0) continue;  // inside the prompt
    const auto emitted = session.tokens(0).last(static_cast<size_t>(session.emitted(0)));
    size_t used = 0;
    bool done = false;
    if (g.ids.empty()) g.prompt_seconds = seconds_since(start);
    const bool prompt_pass = g.ids.empty();
    while (!done && used < emitted.size() && g.ids.size() < limit) {
      const int32_t id = emitted[used++];
      g.ids.push_back(id);
      const bool eos = std::find(options.eos.begin(), options.eos.end(), id) != options.eos.end();
      const bool go_on = !token || token(id);
      if (eos || !go_on) {
        g.stop = eos ? Stop::kEos : Stop::kCancelled;
        done = true;
      }
    }
    if (!prompt_pass) {
      ++g.steps;
      g.step_tokens += static_cast<int>(used);
      g.drafted += session.drafted(0);
      g.step_seconds += seconds_since(step_start);
    }
    session.truncate(0, static_cast<int>(prompt.size() + g.ids.size()));
    if (done) break;
  }
  session.stop(0);
  return g;
}

}  // namespace chimera
