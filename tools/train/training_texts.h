// The texts of some shards (chimera train data), for chimera train fit: read, shuffled, and joined
// with what the target says about them.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "engine/train/target_features.h"
#include "loader/feature_file.h"

namespace chimera {

struct Text {
  std::vector<int32_t> ids;
  int prompt_len = 0;
  size_t shard = 0;
  int64_t number = 0;  // of the answer in the shard

  // Positions that a rollout can start from: the first is the prompt's last one.
  int64_t n_starts() const { return static_cast<int64_t>(ids.size()) - 1 - prompt_len; }
};

// The model that answered, and will be the draft's target.
struct TextsTarget {
  std::string name, fingerprint;  // draft_file.h
  int vocab = 0;
};

class TrainingTexts {
 public:
  // Texts are cut to `context` tokens. Some are held out: which ones depends on their tokens, not
  // on their order, in which short answers come first. Throws Error if there are none, and where a
  // shard's header says that another model answered.
  TrainingTexts(const std::vector<std::string>& paths, const TextsTarget& target, int context,
                uint64_t seed);

  const std::vector<Text>& texts() const { return texts_; }
  const std::vector<Text>& held_out() const { return held_out_; }
  // Of all that is learnt from texts(), their order included.
  std::string hash() const;

  // In the order of training: pass after pass, each in a random order of its own. The reference
  // stays valid.
  const Text& next();
  // Before the first next(): as if that had been called n times.
  void skip(int64_t n);

 private:
  uint64_t seed_, drawn_ = 0;
  std::vector<Text> texts_, held_out_;
  std::vector<size_t> order_;
  size_t at_ = 0;
};

// Features of texts, from the files beside the shards; what is not there yet is computed and added.
class TextFeatures {
 public:
  TextFeatures(const Llama& target, const std::string& fingerprint,
               const std::vector<std::string>& shards, int context);
  training::TrainingText read(const Text& text);

 private:
  const Llama& target_;
  int context_;
  std::vector<std::unique_ptr<FeatureFile>> files_;    // by shard
  std::unique_ptr<training::TargetFeatures> compute_;  // made when first needed
};

}  // namespace chimera
