// chimera train merge: joins the shards of train data into one, ordered by the prompts' numbers.
#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>

#include "loader/output_file.h"
#include "loader/text.h"
#include "tools/flags.h"
#include "tools/output.h"
#include "tools/train/train.h"

namespace chimera {
namespace {

using nlohmann::ordered_json;

struct Shards {
  ordered_json header;                     // of the first, without its "shard"
  std::string first;                       // its name
  std::map<int64_t, std::string> answers;  // lines by the prompt's number
  std::set<std::string> parts;             // "0/4", "2/4"
};

void read(const std::string& path, Shards* shards) {
  const std::string name = printable(path, 4096);
  std::ifstream file(path, std::ios::binary);
  if (!file) throw Error(name, "a readable file", std::strerror(errno));
  std::string line;
  std::getline(file, line);
  ordered_json header = ordered_json::parse(line, nullptr, false);
  if (!header.is_object() || !header.contains("chimera_data") || !header.contains("shard") ||
      !header["shard"].is_string())
    throw Error(name, "a shard of chimera train data", "another file");
  const std::string part = header["shard"];
  header.erase("shard");
  if (shards->first.empty()) {
    shards->first = name;
    shards->header = header;
  }
  for (const auto& [key, value] : shards->header.items())
    if (!header.contains(key) || header[key] != value)
      throw Error(name + ": " + printable(key),
                  "what " + shards->first + " has, " + printable(value.dump()),
                  header.contains(key) ? printable(header[key].dump()) : "nothing",
                  "merge shards of one model and the same settings only");
  if (header.size() != shards->header.size())
    throw Error(name, "the settings of " + shards->first, "more of them",
                "merge shards of one model and the same settings only");
  if (!shards->parts.insert(part).second)
    throw Error(name, "each shard once", "shard " + printable(part) + " again");

  for (int64_t number = 2; std::getline(file, line); ++number) {
    const bool cut_short = file.eof();  // no newline after it: a run was stopped there
    const ordered_json record = ordered_json::parse(line, nullptr, false);
    const bool good = record.is_object() && record.contains("prompt") && record.contains("ids") &&
                      record["prompt"].is_number_unsigned();
    const std::string where = name + ": line " + std::to_string(number);
    if (cut_short) {
      note("warning: " + where + ", the last, is cut short and left out");
      break;
    }
    if (!good) throw Error(where, "an answer", chimera::quoted(line));
    const auto prompt = record["prompt"].get<int64_t>();
    if (!shards->answers.emplace(prompt, line).second)
      throw Error(where, "each prompt once", "prompt " + std::to_string(prompt) + " again");
  }
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
      {{0, "data", "FILES", "the shards, separated by commas", texts(&paths)},
       {'o', "output", "FILE", "the shard to write", text(&output)}}};
  if (!parse(command, args)) return 0;
  if (paths.empty() || !output)
    throw UsageError("train merge", "--data SHARD,SHARD... and -o SHARD", "one missing",
                     "see chimera train merge --help");
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
