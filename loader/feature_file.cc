#include "loader/feature_file.h"

#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "engine/dtype.h"
#include "engine/error.h"

namespace chimera {
namespace {

struct Header {
  char magic[8] = {'C', 'H', 'I', 'M', 'F', 'E', 'A', 'T'};
  uint32_t version = 1;
  int32_t hidden_size = 0;
  char fingerprint[16] = {};
};

struct Record {
  int64_t text;
  int32_t tokens, first_start;

  int64_t n_targets() const { return int64_t{tokens} - 2 - first_start; }
  int64_t bytes(int64_t hidden) const {
    return static_cast<int64_t>(sizeof(Record)) + 4 * int64_t{tokens} +
           2 * (int64_t{tokens} - 1) * hidden +
           n_targets() * static_cast<int64_t>(sizeof(training::SoftTarget));
  }
};

}  // namespace

FeatureFile::FeatureFile(const std::string& path, const std::string& fingerprint, int hidden_size)
    : name_(printable(path, 4096)), hidden_(hidden_size), descriptor_(path) {
  file_.open(path, std::ios::in | std::ios::out | std::ios::binary);
  if (!file_) throw Error(name_, "a file that can be written", std::strerror(errno));
  Header expected, found{};
  expected.hidden_size = hidden_size;
  std::memcpy(expected.fingerprint, fingerprint.data(),
              std::min(fingerprint.size(), sizeof expected.fingerprint));
  file_.read(reinterpret_cast<char*>(&found), sizeof found);
  if (std::memcmp(&found, &expected, static_cast<size_t>(file_.gcount())) != 0) {
    throw Error(name_, "features of this target", "another file",
                "remove it; the features are computed again");
  }
  // A new one, or one of a run that ended before its header was whole.
  if (!file_) write(&expected, sizeof expected);
  end_ = sizeof expected;
  scan();
}

void FeatureFile::scan() {
  const int64_t size = lseek(descriptor_.number(), 0, SEEK_END);
  for (;;) {
    Record record{};
    file_.seekg(end_);
    file_.read(reinterpret_cast<char*>(&record), sizeof record);
    if (!file_ || record.tokens < 2 || record.first_start < 0 || record.n_targets() < 0 ||
        end_ + record.bytes(hidden_) > size)
      break;
    at_[record.text] = end_;
    end_ += record.bytes(hidden_);
  }
  file_.clear();
}

void FeatureFile::lock() {
  descriptor_.lock();
  locked_ = true;
  scan();  // another may have added in the meantime
  // What is behind the last whole record must not be taken for one once there is less of it.
  if (ftruncate(descriptor_.number(), end_) != 0)
    throw Error(name_, "a file that can be cut to its last record", std::strerror(errno));
}

void FeatureFile::write(const void* data, size_t bytes) {
  file_.clear();
  file_.seekp(end_);
  file_.write(static_cast<const char*>(data), static_cast<std::streamsize>(bytes));
  file_.flush();
  if (!file_)
    throw Error(name_, "room to write", "none", "free some and run the same command again");
}

bool FeatureFile::read(int64_t text, std::span<const int32_t> tokens, int64_t first_start,
                       training::TrainingText* features) {
  const auto it = at_.find(text);
  if (it == at_.end()) return false;
  Record record;
  file_.seekg(it->second);
  file_.read(reinterpret_cast<char*>(&record), sizeof record);
  if (static_cast<size_t>(record.tokens) != tokens.size() || record.first_start != first_start)
    return false;
  buffer_.resize(static_cast<size_t>(record.bytes(hidden_)) - sizeof record);
  file_.read(buffer_.data(), static_cast<std::streamsize>(buffer_.size()));
  if (!file_)
    throw Error(name_, "a record of " + std::to_string(buffer_.size()) + " bytes", "less");
  const char* at = buffer_.data();
  if (std::memcmp(at, tokens.data(), tokens.size_bytes()) != 0) return false;
  at += tokens.size_bytes();
  features->tokens.assign(tokens.begin(), tokens.end());
  features->first_start = first_start;
  features->states.resize(static_cast<size_t>((int64_t{record.tokens} - 1) * hidden_));
  for (float& x : features->states) {
    uint16_t half;
    std::memcpy(&half, at, 2);
    x = f16_to_f32(half);
    at += 2;
  }
  features->targets.resize(static_cast<size_t>(record.n_targets()));
  std::memcpy(features->targets.data(), at,
              features->targets.size() * sizeof(training::SoftTarget));
  return true;
}

void FeatureFile::append(int64_t text, const training::TrainingText& features) {
  if (!locked_) lock();
  const Record record{text, static_cast<int32_t>(features.tokens.size()),
                      static_cast<int32_t>(features.first_start)};
  buffer_.resize(static_cast<size_t>(record.bytes(hidden_)));
  char* at = buffer_.data();
  const auto put = [&at](const void* data, size_t bytes) {
    std::memcpy(at, data, bytes);
    at += bytes;
  };
  put(&record, sizeof record);
  put(features.tokens.data(), features.tokens.size() * 4);
  for (const float x : features.states) {
    const uint16_t half = f32_to_f16(x);
    put(&half, 2);
  }
  put(features.targets.data(), features.targets.size() * sizeof(training::SoftTarget));
  write(buffer_.data(), buffer_.size());
  at_[text] = end_;
  end_ += record.bytes(hidden_);
}

}  // namespace chimera
