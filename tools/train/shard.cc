#include "tools/train/shard.h"

#include <cerrno>
#include <cstring>
#include <filesystem>

#include "engine/error.h"
#include "loader/mapped_file.h"
#include "tools/output.h"

namespace chimera {

using nlohmann::ordered_json;

std::string hash_of(std::span<const Prompt> prompts) {
  std::string all;
  for (const Prompt& prompt : prompts) {
    for (const Message& m : prompt.messages) all += m.role + '\0' + m.content + '\0';
    all += '\n';
  }
  return hash_text(all);
}

void expect_same_settings(const std::string& where, const ordered_json& expected,
                          const ordered_json& found, const std::string& hint) {
  const auto value = [](const ordered_json& settings, const std::string& key) {
    return settings.contains(key) ? settings[key].dump() : "nothing";
  };
  for (const ordered_json* settings : {&expected, &found})
    for (const auto& [key, unused] : settings->items()) {
      const std::string wanted = value(expected, key), there = value(found, key);
      if (wanted != there)
        throw Error(where + ": " + printable(key), printable(wanted), printable(there), hint);
    }
}

ShardReader::ShardReader(const std::string& path) : name_(printable(path, 4096)) {
  const std::string special = special_file(path);
  if (!special.empty()) throw Error(name_, "a regular file", special);
  file_.open(path, std::ios::binary);
  if (!file_) throw Error(name_, "a readable file", std::strerror(errno));
  std::getline(file_, line_);
  bytes_ = line_.size() + 1;
  header_ = ordered_json::parse(line_, nullptr, false);
  if (file_.eof() || !header_.is_object() || !header_.contains("chimera_data"))
    throw Error(name_, "a shard of chimera train data", "another file");
}

bool ShardReader::next() {
  if (!std::getline(file_, line_)) return false;
  ++number_;
  if (file_.eof()) {
    cut_short_ = true;
    return false;
  }
  const ordered_json answer = ordered_json::parse(line_, nullptr, false);
  if (!answer.is_object() || !answer.contains("ids") || !answer.contains("prompt") ||
      !answer["prompt"].is_number_unsigned())
    throw Error(where(), "an answer with its prompt's number and ids", in_quotes(line_),
                "remove the line, or go back to a copy of the file");
  prompt_ = answer["prompt"].get<size_t>();
  bytes_ += line_.size() + 1;
  return true;
}

// A FIFO would wait for a writer, and forever.
static const std::string& no_special_file(const std::string& path) {
  const std::string special = special_file(path);
  if (!special.empty())
    throw Error(printable(path, 4096), "a file that can be read and written", special);
  return path;
}

ShardFile::ShardFile(const std::string& path, const ordered_json& header)
    : name_(printable(path, 4096)), descriptor_(no_special_file(path)) {
  descriptor_.lock();
  file_.open(path, std::ios::in | std::ios::out | std::ios::app | std::ios::binary);
  if (!file_) throw Error(name_, "a file that can be read and written", std::strerror(errno));
  const std::string first = header.dump();
  std::string found;
  std::getline(file_, found);
  const bool begun = !file_.eof() || !first.starts_with(found);  // its header is whole
  file_.clear();
  uint64_t good = 0;
  if (begun) {
    ShardReader reader(path);
    expect_same_settings(name_, header, reader.header(),
                         "a shard is of one model and one set of settings: name another --output, "
                         "or remove it");
    while (reader.next())
      if (!answered_.insert(reader.prompt()).second)
        throw Error(reader.where(), "each prompt once",
                    "prompt " + std::to_string(reader.prompt()) + " again", "remove the line");
    good = reader.bytes();
  }
  std::error_code error;
  std::filesystem::resize_file(path, good, error);
  if (error) throw Error(name_, "a file that can be cut to its last line", error.message());
  if (!begun) write(first);
}

void ShardFile::append(size_t prompt, const ordered_json& answer) {
  write(answer.dump());
  answered_.insert(prompt);
}

void ShardFile::write(const std::string& line) {
  file_ << line << "\n" << std::flush;
  if (!file_)
    throw Error(name_, "room to write", "none", "free some and run the same command again");
}

}  // namespace chimera
