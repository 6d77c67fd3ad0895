// chimera train merge: joins the shards of train data into one, ordered by the prompts' numbers.
#include <map>
#include <set>
#include <sstream>

#include "engine/error.h"
#include "loader/output_file.h"
#include "tools/flags.h"
#include "tools/output.h"
#include "tools/train/shard.h"
#include "tools/train/train.h"

namespace chimera {
namespace {

using nlohmann::ordered_json;

struct Shards {
  ordered_json header;                    // of the first, without its "shard"
  std::string first;                      // its name
  std::map<size_t, std::string> answers;  // lines by the prompt's number
  std::set<std::string> parts;            // "0/4", "2/4"
};

void read(const std::string& path, Shards* shards) {
  const std::string name = printable(path, 4096);
  ShardReader reader(path);
  ordered_json header = reader.header();
  if (!header.contains("shard") || !header["shard"].is_string())
    throw Error(name, "a shard that says which one of them it is", "another header");
  const std::string part = header["shard"];
  header.erase("shard");
  if (shards->first.empty()) {
    shards->first = name;
    shards->header = header;
  }
  expect_same_settings(
      name, shards->header, header,
      "merge shards of one model and the same settings only, here those of " + shards->first);
  std::istringstream joined(part);  // by an earlier merge: "0/4+1/4"
  for (std::string one; std::getline(joined, one, '+');)
    if (!shards->parts.insert(one).second)
      throw Error(name, "each shard once", "shard " + printable(one) + " again");

  while (reader.next())
    if (!shards->answers.emplace(reader.prompt(), reader.line()).second)
      throw Error(reader.where(), "each prompt once",
                  "prompt " + std::to_string(reader.prompt()) + " again");
  if (reader.cut_short())
    note("warning: " + reader.where() + ", the last, is cut short and left out");
}

// "0/1" if all the parts of one division are there, else their names joined.
std::string joined(const std::set<std::string>& parts) {
  std::string names;
  size_t n = 0;
  bool whole = true;
  for (const std::string& part : parts) {
    names += (names.empty() ? "" : "+") + part;
    size_t i = 0, of = 0;
    whole = whole && std::sscanf(part.c_str(), "%zu/%zu", &i, &of) == 2 && (n == 0 || n == of);
    n = of;
  }
  if (whole && parts.size() == n) return "0/1";
  if (whole)
    note("note: " + std::to_string(n - parts.size()) + " of " +
         count_text(static_cast<int64_t>(n), "shard") + " not given");
  return names;
}

}  // namespace

int train_merge(const std::vector<std::string>& args) {
  std::vector<std::string> paths;
  std::optional<std::string> output;
  const Command command{
      "train merge",
      "--data SHARD,SHARD... -o SHARD",
      "Joins the shards that `chimera train data --shard I/N` made, ordered by prompt, into one "
      "as\n"
      "if a single run had made it. Their features (SHARD.features) are not joined:\n"
      "`chimera train fit` takes several shards as well, and reads those.\n",
      {{0, "data", "FILES", "the shards, separated by commas", files(&paths)},
       {'o', "output", "FILE", "the shard to write", file(&output)}}};
  if (!parse(command, args)) return 0;
  expect_given("train merge",
               {{"--data SHARD,SHARD...", !paths.empty()}, {"-o SHARD", output.has_value()}});
  expect_other_file(*output, paths);
  expect_writable(*output);
  Shards shards;
  for (const std::string& path : paths) read(path, &shards);

  ordered_json header;
  for (const auto& [key, value] : shards.header.items()) {
    if (key == "chat") header["shard"] = joined(shards.parts);  // where train data has it
    header[key] = value;
  }
  if (!header.contains("shard")) header["shard"] = joined(shards.parts);
  OutputFile file(*output);
  file.write(header.dump() + "\n");
  for (const auto& [prompt, line] : shards.answers) {
    file.write(line);
    file.write("\n");
  }
  file.commit();
  note(count_text(static_cast<int64_t>(shards.answers.size()), "answer") + " of " +
       count_text(static_cast<int64_t>(paths.size()), "shard"));
  return 0;
}

}  // namespace chimera
