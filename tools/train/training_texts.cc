#include "tools/train/training_texts.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>

#include "engine/error.h"
#include "engine/philox.h"
#include "tools/output.h"
#include "tools/prompts.h"
#include "tools/train/shard.h"

namespace chimera {
namespace {

constexpr size_t kMostHeldOut = 48;

std::string hash_of(const Text& t) {
  return hash_text({reinterpret_cast<const char*>(t.ids.data()), t.ids.size() * sizeof t.ids[0]});
}

// A shard that was made by hand need not say whose answers it holds.
void expect_answers_of(const TextsTarget& target, const std::string& header,
                       const std::string& where) {
  const nlohmann::json json = nlohmann::json::parse(header, nullptr, /*allow_exceptions=*/false);
  const auto value = [&](const char* key) {
    return json.is_object() && json.contains(key) && json[key].is_string()
               ? json[key].get<std::string>()
               : "";
  };
  const std::string found = value("fingerprint");
  if (found.empty() || found == target.fingerprint) return;
  const auto text = [](const std::string& name, const std::string& fingerprint) {
    return printable(name) + " (" + printable(fingerprint) + ")";
  };
  throw Error(where, "answers of " + text(target.name, target.fingerprint),
              "answers of " + text(value("model"), found),
              "give -m the model that wrote them, or make others with chimera train data");
}

// Lines that cannot be used are counted; the last one may be half written.
void read_shard(const std::string& path, size_t shard, const TextsTarget& target, int context,
                std::vector<Text>* texts) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw Error(printable(path, 4096), "a readable file", std::strerror(errno));
  int64_t line_number = 0, broken = 0, first_broken = 0, answer = 0;
  for (std::string line; std::getline(file, line); ++line_number) {
    if (line.empty()) continue;
    if (line.starts_with("{\"chimera_data\"")) {
      expect_answers_of(target, line, printable(path, 4096));
      continue;
    }
    Text text;
    text.shard = shard;
    text.number = answer++;
    bool good = line.size() <= kLongestLine;
    if (good) {
      const nlohmann::json json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
      good = json.is_object() && json.contains("ids") && json["ids"].is_array() &&
             json.contains("prompt_len") && json["prompt_len"].is_number_integer();
      if (good) {
        for (const auto& id : json["ids"]) {
          good = good && id.is_number_integer() && id >= 0 && id < target.vocab;
          if (good) text.ids.push_back(id.get<int32_t>());
        }
        good = good && json["prompt_len"] >= 1 && json["prompt_len"] <= text.ids.size();
        if (good) text.prompt_len = json["prompt_len"].get<int>();
      }
    }
    if (!good) {
      if (broken++ == 0) first_broken = line_number + 1;
      continue;
    }
    if (static_cast<int>(text.ids.size()) > context) text.ids.resize(static_cast<size_t>(context));
    if (text.n_starts() >= 1) texts->push_back(std::move(text));
  }
  if (broken > 0) {
    note("warning: " + printable(path, 4096) + ": " + count_text(broken, "line") +
         " without ids and prompt_len, the first is line " + std::to_string(first_broken) +
         (broken == 1 && first_broken == line_number ? " (the last: half written?)" : ""));
  }
}

}  // namespace

TrainingTexts::TrainingTexts(const std::vector<std::string>& paths, const TextsTarget& target,
                             int context, uint64_t seed)
    : seed_(seed) {
  for (size_t i = 0; i < paths.size(); ++i) read_shard(paths[i], i, target, context, &texts_);
  if (texts_.empty())
    throw Error("--data", "texts with answers", "none", "make some with chimera train data");
  const size_t n =
      std::min(kMostHeldOut, std::max<size_t>(texts_.size() / 100, texts_.size() > 1 ? 1 : 0));
  std::vector<std::pair<std::string, size_t>> by_hash;
  for (size_t i = 0; i < texts_.size(); ++i) by_hash.emplace_back(hash_of(texts_[i]), i);
  std::sort(by_hash.begin(), by_hash.end());
  for (size_t i = 0; i < n; ++i) {
    held_out_.push_back(std::move(texts_[by_hash[i].second]));
    texts_[by_hash[i].second].ids.clear();
  }
  std::erase_if(texts_, [](const Text& t) { return t.ids.empty(); });
}

std::string TrainingTexts::hash() const {
  std::string all;
  for (const Text& t : texts_) all += hash_of(t) + " " + std::to_string(t.prompt_len) + "\n";
  return hash_text(all);
}

const Text& TrainingTexts::next() {
  if (at_ == order_.size()) {
    at_ = 0;
    order_.resize(texts_.size());
    for (size_t i = 0; i < order_.size(); ++i) order_[i] = i;
    for (size_t i = order_.size(); i-- > 1;) {
      const double u = philox_uniform(seed_, drawn_++);
      std::swap(order_[i], order_[static_cast<size_t>(u * static_cast<double>(i + 1))]);
    }
  }
  return texts_[order_[at_++]];
}

void TrainingTexts::skip(int64_t n) {
  // A pass draws a number for each text but one, and leaves nothing else behind.
  const auto size = static_cast<int64_t>(texts_.size());
  drawn_ += static_cast<uint64_t>(n / size) * static_cast<uint64_t>(size - 1);
  for (n %= size; n > 0; --n) next();
}

TextFeatures::TextFeatures(const Llama& target, const std::string& fingerprint,
                           const std::vector<std::string>& shards, int context)
    : target_(target), context_(context) {
  for (const std::string& shard : shards)
    files_.push_back(std::make_unique<FeatureFile>(features_path(shard), fingerprint,
                                                   target.config().hidden_size));
}

training::TrainingText TextFeatures::read(const Text& t) {
  training::TrainingText features;
  FeatureFile& file = *files_[t.shard];
  if (file.read(t.number, t.ids, t.prompt_len - 1, &features)) return features;
  if (!compute_) compute_ = std::make_unique<training::TargetFeatures>(target_, context_);
  file.append(t.number, compute_->read(t.ids, t.prompt_len - 1));
  file.read(t.number, t.ids, t.prompt_len - 1, &features);  // rounded, as the next run will see it
  return features;
}

}  // namespace chimera
