// chimera train average: the mean of several drafts' weights. Runs that started from one another
// (or from one draft) end in the same basin, each at another point of its rim; the middle is better
// than any of them and costs nothing. (Wortsman et al., "Model soups", arXiv 2203.05482; Izmailov
// et al., arXiv 1803.05407.)
#include "engine/error.h"
#include "engine/train/parameters.h"
#include "loader/draft_file.h"
#include "loader/output_file.h"
#include "tools/flags.h"
#include "tools/output.h"
#include "tools/train/train.h"

namespace chimera {
namespace {

// What must agree for weights to mean the same.
void check_same(const DraftTensors& a, const DraftTensors& b, const std::string& name) {
  const auto refuse = [&](const char* what) {
    throw Error(name, std::string("the ") + what + " of the first draft", "another",
                "average drafts that were trained from one another (fit --init)");
  };
  if (a.target_fingerprint != b.target_fingerprint) refuse("target");
  if (a.vocabulary != b.vocabulary) refuse("vocabulary");
  const DraftConfig &x = a.config, &y = b.config;
  if (x.hidden_size != y.hidden_size || x.n_heads != y.n_heads || x.n_kv_heads != y.n_kv_heads ||
      x.head_dim != y.head_dim || x.ffn_size != y.ffn_size || x.n_steps != y.n_steps ||
      x.head_rank != y.head_rank || x.rope_kv_heads != y.rope_kv_heads ||
      x.rope_base != y.rope_base || x.skip != y.skip || x.trigram != y.trigram ||
      x.slot_features != y.slot_features)
    refuse("configuration");
}

// How a draft was made; what is no JSON stays text.
nlohmann::ordered_json record_of(const DraftTensors& draft) {
  const auto json = nlohmann::ordered_json::parse(draft.training, nullptr, false);
  return json.is_discarded() ? nlohmann::ordered_json(draft.training) : json;
}

}  // namespace

int train_average(const std::vector<std::string>& args) {
  std::vector<std::string> paths;
  std::optional<std::string> output;
  const Command command{
      "train average",
      "--drafts DRAFT,DRAFT... -o DRAFT",
      "Writes the mean of the weights of several drafts. Those that `chimera train fit --init` "
      "made\n"
      "from one another are better together than the best of them. Their probabilities have to be\n"
      "measured again: chimera train eval --calibrate.\n",
      {{0, "drafts", "FILES", "the drafts, separated by commas", files(&paths)},
       {'o', "output", "DRAFT", "the draft to write", file(&output)}}};
  if (!parse(command, args)) return 0;
  if (paths.size() < 2 || !output)
    throw UsageError("train average", "--drafts DRAFT,DRAFT... and -o DRAFT",
                     output ? "fewer than two drafts" : "no -o",
                     "see chimera train average --help");
  expect_other_file(*output, paths);
  expect_writable(*output);

  DraftTensors mean = load_draft(paths[0]);
  std::vector<float> sum = training::pack_parameters(mean);
  auto history = nlohmann::ordered_json::array({record_of(mean)});
  for (size_t i = 1; i < paths.size(); ++i) {
    const DraftTensors draft = load_draft(paths[i]);
    check_same(mean, draft, printable(paths[i], 4096));
    const std::vector<float> values = training::pack_parameters(draft);
    for (size_t j = 0; j < sum.size(); ++j) sum[j] += values[j];
    history.push_back(record_of(draft));
  }
  for (float& value : sum) value /= static_cast<float>(paths.size());
  training::unpack_parameters(sum, &mean);
  mean.training = nlohmann::ordered_json{{"mean_of", history}}.dump();
  mean.config.greedy = mean.config.sampled = {};
  save_draft(mean, *output);
  note("the mean of " + std::to_string(paths.size()) + " drafts: " + printable(*output, 4096));
  return 0;
}

}  // namespace chimera
