#include "engine/chimera/draft_tensors.h"

#include <algorithm>

#include "engine/error.h"

namespace chimera {

DraftCalibration::Reading DraftCalibration::at(int step) const {
  if (temperature.empty()) return {};
  const size_t i = std::min(static_cast<size_t>(step), temperature.size() - 1);
  return {temperature[i], coverage[i]};
}

DraftCalibration::Reading DraftConfig::calibration(int step, float sampling_temperature) const {
  const DraftCalibration::Reading g = greedy.at(step), s = sampled.at(step);
  const float share = std::min(sampling_temperature, 1.0f),
              above = std::max(sampling_temperature, 1.0f);
  return {g.temperature + (s.temperature - g.temperature) * share,
          (g.coverage + (s.coverage - g.coverage) * share) / (above * above)};
}

void check(const DraftTensors& draft, const LlamaConfig& target) {
  const DraftConfig& c = draft.config;
  if (c.hidden_size != target.hidden_size)
    throw Error("draft: hidden size", std::to_string(target.hidden_size) + " (the target's)",
                std::to_string(c.hidden_size));
  if (c.head_dim > kMaxHeadDim)
    throw Error("draft: head_dim", "at most " + std::to_string(kMaxHeadDim),
                std::to_string(c.head_dim));
  for (const auto& [name, size] : {std::pair{"hidden size", c.hidden_size},
                                   {"FFN size", c.ffn_size},
                                   {"rank of the heads", c.head_rank},
                                   {"size of all query heads", c.q_size()}})
    if (size % 32 != 0)
      throw Error(std::string("draft: ") + name, "a multiple of 32", std::to_string(size));
  if (!c.trigram && !c.skip)
    throw Error("draft: encoder", "a trigram's, the last token's (skip) or both", "neither");
  for (const DraftCalibration* calibration : {&c.greedy, &c.sampled})
    if (calibration->temperature.size() != calibration->coverage.size())
      throw Error(
          "draft: calibration",
          "as many coverages as temperatures, " + std::to_string(calibration->temperature.size()),
          std::to_string(calibration->coverage.size()));
  for (const int32_t id : draft.vocabulary)
    if (id < 0 || id >= target.vocab_size)
      throw Error("draft: vocabulary",
                  "token ids below " + std::to_string(target.vocab_size) + " (the target's)",
                  std::to_string(id));
}

}  // namespace chimera
