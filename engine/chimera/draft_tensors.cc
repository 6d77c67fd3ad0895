#include "engine/chimera/draft_tensors.h"

#include "engine/error.h"

namespace chimera {

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
  for (const int32_t id : draft.vocabulary)
    if (id < 0 || id >= target.vocab_size)
      throw Error("draft: vocabulary",
                  "token ids below " + std::to_string(target.vocab_size) + " (the target's)",
                  std::to_string(id));
}

}  // namespace chimera
