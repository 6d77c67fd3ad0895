// GGUF, version 2 and 3: key-value metadata and a table of tensors, little-endian.
//
//   "GGUF" | u32 version | u64 tensors | u64 keys | keys | tensor table | padding | tensor data
//
// The format is described at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine/dtype.h"
#include "engine/error.h"
#include "tokenizer/vocabulary.h"

namespace chimera {

// The type of a metadata value, as the file numbers it.
enum class GgufType : uint32_t {
  kU8,
  kI8,
  kU16,
  kI16,
  kU32,
  kI32,
  kF32,
  kBool,
  kString,
  kArray,
  kU64,
  kI64,
  kF64
};

struct GgufValue {
  GgufType type = GgufType::kU8;
  GgufType element = GgufType::kU8;  // of an array
  uint64_t count = 1;                // elements of an array
  const std::byte* data = nullptr;   // the value, or the first element: any alignment
};

struct GgufTensor {
  std::string_view name;
  uint32_t type_id = 0;       // the file's number of its type
  std::optional<DType> type;  // nothing: a type that Chimera does not compute with
  int n_dims = 0;
  int64_t ne[4] = {1, 1, 1, 1};  // ne[0] runs fastest: the columns
  const std::byte* data = nullptr;
  size_t bytes = 0;

  std::string type_name() const;   // "Q4_1"
  std::string shape_text() const;  // "576 x 49152", ne[0] first, as other GGUF tools print it
};

// The parsed tables of a GGUF file. It holds views of `bytes`, which must outlive it.
class GgufFile {
 public:
  // Checks everything the tables say before it is used; afterwards every pointer of every value and
  // tensor is known to lie in `bytes`. Throws Error, which names the file `name`.
  // A file without tensors (a vocabulary) is legal; bytes after the last tensor are ignored.
  GgufFile(std::span<const std::byte> bytes, std::string name);

  const std::string& name() const { return name_; }
  uint32_t version() const { return version_; }
  const std::vector<GgufTensor>& tensors() const { return tensors_; }
  const GgufTensor* find_tensor(std::string_view name) const;  // nullptr: absent

  bool has(std::string_view key) const { return find_value(key) != nullptr; }

  // The value of `key`, or nothing where the file has no such key. T is int64_t (stored as any
  // integer type), double (any float type), bool, std::string, or a std::vector of std::string,
  // float (stored as f32) or int32_t (stored as i32).
  // Throws Error naming key, expected and found type if it is stored as anything else.
  template <class T>
  std::optional<T> find(std::string_view key) const;

  // The same for a key that must be there: throws Error if it is not.
  template <class T>
  T get(std::string_view key) const {
    std::optional<T> value = find<T>(key);
    if (!value) throw_missing(key);
    return *std::move(value);
  }

  // "file: key 'k'", to begin an error about a value.
  std::string where(std::string_view key) const;

 private:
  [[noreturn]] void throw_missing(std::string_view key) const;
  [[noreturn]] void throw_type(std::string_view key, const char* expected,
                               const GgufValue& found) const;
  const GgufValue* find_value(std::string_view key) const;

  std::string name_;
  uint32_t version_ = 0;
  std::map<std::string_view, GgufValue> metadata_;
  std::vector<GgufTensor> tensors_;
  std::map<std::string_view, size_t> tensor_index_;
};

template <>
std::optional<int64_t> GgufFile::find(std::string_view key) const;
template <>
std::optional<double> GgufFile::find(std::string_view key) const;
template <>
std::optional<bool> GgufFile::find(std::string_view key) const;
template <>
std::optional<std::string> GgufFile::find(std::string_view key) const;
template <>
std::optional<std::vector<std::string>> GgufFile::find(std::string_view key) const;
template <>
std::optional<std::vector<float>> GgufFile::find(std::string_view key) const;
template <>
std::optional<std::vector<int32_t>> GgufFile::find(std::string_view key) const;

// The tokenizer that the file carries; the result holds copies. Throws Error for a tokenizer model
// or pre-tokenizer that is not supported (by its name), for arrays of the wrong type or length, for
// scores that are not finite and for bos, eos or unk outside the vocabulary.
// Two tokens may have the same text: which of them encodes it is the tokenizer's decision.
Vocabulary read_gguf_vocabulary(const GgufFile& file);

// The same from a path: also of a file that has no tensors.
Vocabulary load_gguf_vocabulary(const std::string& path);

}  // namespace chimera
