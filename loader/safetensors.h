// Safetensors: u64 length of the header | a JSON object | the tensors' bytes, little-endian.
//
//   {"w1": {"dtype": "BF16", "shape": [576, 1728], "data_offsets": [0, 1990656]},
//    "__metadata__": {"format": "pt"}}
//
// https://github.com/huggingface/safetensors. Read strictly: the tensors' bytes must follow each
// other without overlap or hole, from the first byte of the data to the last.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

namespace chimera {

enum class SafeType : uint8_t { kF32, kF16, kBF16, kI32 };
const char* name(SafeType type);

struct SafeTensor {
  SafeType type = SafeType::kF32;
  std::vector<int64_t> shape;
  const std::byte* data = nullptr;  // any alignment
  size_t bytes = 0;

  int64_t count() const;
  std::string shape_text() const;  // "[576, 1728]"
  // The values as f32. Requires a floating type.
  std::vector<float> floats() const;
};

struct SafeTensors {
  std::map<std::string, SafeTensor> tensors;
  std::map<std::string, std::string> metadata;
};

// Views of `bytes`, which must outlive them. Throws Error, which names the file `name`.
SafeTensors parse_safetensors(std::span<const std::byte> bytes, const std::string& name);

// What PyTorch saves instead is refused: pickles run code as they are read. Throws Error if `bytes`
// are one, or a zip archive of such.
void refuse_pickle(std::span<const std::byte> bytes, const std::string& name,
                   const std::string& expected, const std::string& instead);

// A tensor to be written: f32 values as F32 or BF16 (rounded to nearest even), or i32.
struct SafeOutput {
  std::string name;
  std::vector<int64_t> shape;
  SafeType type = SafeType::kF32;
  const void* values = nullptr;  // float for F32 and BF16, int32_t for I32
};

// Writes all of it to a file beside `path`, then renames: there is never half a file of that name.
void write_safetensors(const std::string& path, const std::vector<SafeOutput>& tensors,
                       const std::map<std::string, std::string>& metadata);

}  // namespace chimera
