// Shards, the files of chimera train data: what data, merge and fit share. data.cc describes their
// lines.
#pragma once

#include <cstdint>
#include <fstream>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <unordered_set>

#include "loader/descriptor.h"
#include "tools/prompts.h"

namespace chimera {

// Where the features of a shard's texts are kept (feature_file.h).
inline std::string features_path(const std::string& shard) {
  return shard + ".features";
}

// What tells one file of prompts from another, in a shard's header.
std::string hash_of(std::span<const Prompt> prompts);

// Settings that have to agree for a run to go on, or for the parts of one to be joined. Throws
// Error, which names the first that does not.
void expect_same_settings(const std::string& where, const nlohmann::ordered_json& expected,
                          const nlohmann::ordered_json& found, const std::string& hint);

// Goes through the answers of a shard. The last line, where it lacks a newline, is what a stopped
// run had not finished: it is no answer. Throws Error, which names the line, for any other that is
// none, and for a file that is no shard.
class ShardReader {
 public:
  explicit ShardReader(const std::string& path);
  const nlohmann::ordered_json& header() const { return header_; }
  bool next();

  // Of the last answer read:
  size_t prompt() const { return prompt_; }
  const std::string& line() const { return line_; }
  std::string where() const { return name_ + ": line " + std::to_string(number_); }

  uint64_t bytes() const { return bytes_; }      // of the lines read, without one that is cut short
  bool cut_short() const { return cut_short_; }  // there is one, at where()

 private:
  std::string name_, line_;
  std::ifstream file_;
  nlohmann::ordered_json header_;
  int64_t number_ = 1;
  uint64_t bytes_ = 0;
  size_t prompt_ = 0;
  bool cut_short_ = false;
};

// A shard that is written, by one process at a time: what an earlier run left, which must have the
// same header, goes on.
class ShardFile {
 public:
  ShardFile(const std::string& path, const nlohmann::ordered_json& header);
  bool answered(size_t prompt) const { return answered_.count(prompt) > 0; }
  size_t answers() const { return answered_.size(); }
  void append(size_t prompt, const nlohmann::ordered_json& answer);  // on the disk at once

 private:
  void write(const std::string& line);

  std::string name_;
  Descriptor descriptor_;  // of the same file as the stream
  std::fstream file_;
  std::unordered_set<size_t> answered_;
};

}  // namespace chimera
