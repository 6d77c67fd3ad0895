// What the target said about the texts of a shard (engine/train/target_features.h), kept beside the
// shard so that training reads it instead of running the target again. It can be deleted at any
// time: it holds nothing that cannot be computed anew.
//
//   header    "CHIMFEAT" | u32 version | i32 hidden size | char[16] fingerprint of the target
//   records   i64 text | i32 tokens L | i32 first_start | i32 token[L] | f16 state[L - 1][hidden]
//             | { i32 token[32], f32 probability[32] } [L - 2 - first_start]
//
// All little-endian, one record after the other; a last one that was cut short is dropped. Of two
// records for the same text the later one counts. Any number of runs may read a file; one at a time
// adds to it.
#pragma once

#include <cstdint>
#include <fstream>
#include <span>
#include <string>
#include <unordered_map>

#include "engine/train/draft_gradient.h"
#include "loader/descriptor.h"

namespace chimera {

class FeatureFile {
 public:
  // Opens a file for reading and adding, or makes it. Throws Error if it is of another target
  // (fingerprint: draft_file.h) or no such file.
  FeatureFile(const std::string& path, const std::string& fingerprint, int hidden_size);

  // The features of text number `text` of the shard, if they are there and for these tokens.
  bool read(int64_t text, std::span<const int32_t> tokens, int64_t first_start,
            training::TrainingText* features);
  // Throws Error if there is no room, or if another run adds to the file.
  void append(int64_t text, const training::TrainingText& features);

 private:
  void scan();                                 // finds the records from end_ on
  void lock();                                 // for adding, until the file is closed
  void write(const void* data, size_t bytes);  // at end_, on the disk at once

  std::string name_;
  int64_t hidden_;
  Descriptor descriptor_;  // of the same file as the stream
  bool locked_ = false;
  std::fstream file_;
  int64_t end_ = 0;
  std::unordered_map<int64_t, int64_t> at_;  // text -> offset of its record
  std::vector<char> buffer_;
};

}  // namespace chimera
