#include "loader/gguf.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <utility>

#include "engine/error.h"

namespace chimera {
namespace {

static_assert(std::endian::native == std::endian::little, "GGUF values are read as stored");
static_assert(sizeof(size_t) == 8, "sizes of GGUF files are 64-bit");

constexpr char kDamaged[] = "the file is truncated or damaged: download it again";

// Far above any real file; they bound what a damaged one can make us do.
constexpr uint64_t kLongestKey = 65535;  // the specification's own limit
constexpr uint64_t kLongestString = uint64_t{1} << 30;
constexpr uint64_t kMostElements = uint64_t{1} << 30;
constexpr uint64_t kLongestTensorName = 63;
constexpr uint64_t kSmallestKeyEntry = 8 + 4 + 1;         // empty key, type, one byte
constexpr uint64_t kSmallestTensorEntry = 8 + 4 + 4 + 8;  // empty name, n_dims 0, type, offset
constexpr uint64_t kLargestAlignment = uint64_t{1} << 20;
constexpr uint64_t kDefaultAlignment = 32;

// Index: GgufType. Bytes 0: no fixed size.
struct ValueTypeInfo {
  const char* name;
  uint64_t bytes;
};
constexpr ValueTypeInfo kValueTypes[] = {
    {"u8", 1},   {"i8", 1},     {"u16", 2},   {"i16", 2}, {"u32", 4}, {"i32", 4}, {"f32", 4},
    {"bool", 1}, {"string", 0}, {"array", 0}, {"u64", 8}, {"i64", 8}, {"f64", 8},
};

const ValueTypeInfo& info(GgufType type) {
  return kValueTypes[static_cast<size_t>(type)];
}

std::string type_text(const GgufValue& value) {
  if (value.type != GgufType::kArray) return info(value.type).name;
  return "an array of " + std::to_string(value.count) + " " + info(value.element).name;
}

// Every tensor type whose size is known: tensors of types that Chimera does not compute with still
// take their place in the file.
struct TensorTypeInfo {
  uint32_t id;
  const char* name;
  int64_t block_weights;
  int64_t block_bytes;
  std::optional<DType> type = {};
};
constexpr TensorTypeInfo kTensorTypes[] = {
    {0, "F32", 1, 4, DType::kF32},
    {1, "F16", 1, 2, DType::kF16},
    {2, "Q4_0", 32, 18, DType::kQ4_0},
    {3, "Q4_1", 32, 20, DType::kQ4_1},
    {6, "Q5_0", 32, 22, DType::kQ5_0},
    {7, "Q5_1", 32, 24, DType::kQ5_1},
    {8, "Q8_0", 32, 34, DType::kQ8_0},
    {9, "Q8_1", 32, 36},
    {10, "Q2_K", 256, 84},
    {11, "Q3_K", 256, 110},
    {12, "Q4_K", 256, 144, DType::kQ4_K},
    {13, "Q5_K", 256, 176, DType::kQ5_K},
    {14, "Q6_K", 256, 210, DType::kQ6_K},
    {15, "Q8_K", 256, 292},
    {16, "IQ2_XXS", 256, 66},
    {17, "IQ2_XS", 256, 74},
    {18, "IQ3_XXS", 256, 98},
    {19, "IQ1_S", 256, 50},
    {20, "IQ4_NL", 32, 18},
    {21, "IQ3_S", 256, 110},
    {22, "IQ2_S", 256, 82},
    {23, "IQ4_XS", 256, 136},
    {24, "I8", 1, 1},
    {25, "I16", 1, 2},
    {26, "I32", 1, 4},
    {27, "I64", 1, 8},
    {28, "F64", 1, 8},
    {29, "IQ1_M", 256, 56},
    {30, "BF16", 1, 2, DType::kBF16},
    {34, "TQ1_0", 256, 54},
    {35, "TQ2_0", 256, 66},
    {39, "MXFP4", 32, 17},
};

const TensorTypeInfo* find_tensor_type(uint32_t id) {
  const auto* found = std::ranges::find(kTensorTypes, id, &TensorTypeInfo::id);
  return found == std::end(kTensorTypes) ? nullptr : found;
}

template <class T>
T load(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof(T));
  return value;
}

// Visits the strings of an array that the parser has checked.
template <class Visit>
void for_each_string(const GgufValue& array, Visit visit) {
  const std::byte* at = array.data;
  for (uint64_t i = 0; i < array.count; ++i) {
    const auto length = load<uint64_t>(at);
    visit(std::string_view(reinterpret_cast<const char*>(at + 8), length));
    at += 8 + length;
  }
}

// A position in the file that refuses to pass its end, and what is being read there, for messages.
class Cursor {
 public:
  Cursor(std::span<const std::byte> bytes, const std::string& file) : bytes_(bytes), file_(file) {}

  uint64_t offset() const { return offset_; }
  uint64_t left() const { return bytes_.size() - offset_; }
  const std::byte* at() const { return bytes_.data() + offset_; }

  // What the following reads belong to: "key" or "tensor", its number in the file, its name once
  // known.
  void enter(const char* kind, uint64_t index) {
    kind_ = kind;
    index_ = index;
    item_ = {};
  }
  void set_name(std::string_view name) { item_ = name; }

  [[noreturn]] void fail(const std::string& expected, const std::string& found,
                         const std::string& hint = kDamaged) const {
    std::string where = file_ + ": " + kind_;
    if (!item_.empty()) {
      where += " " + in_quotes(item_);
    } else if (index_ != kNoIndex) {
      where += " " + std::to_string(index_);
    }
    throw Error(where + " at byte " + std::to_string(offset_), expected, found, hint);
  }

  const std::byte* take(uint64_t count) {
    if (count > left()) {
      fail(std::to_string(count) + " more bytes",
           "the end of the file after " + std::to_string(left()));
    }
    const std::byte* start = at();
    offset_ += count;
    return start;
  }

  template <class T>
  T read() {
    return load<T>(take(sizeof(T)));
  }

  std::string_view read_string(const char* what, uint64_t limit) {
    const auto length = read<uint64_t>();
    if (length > limit || length > left()) {
      fail(std::string(what) + " of at most " + std::to_string(std::min(limit, left())) + " bytes",
           "a length of " + std::to_string(length));
    }
    return {reinterpret_cast<const char*>(take(length)), length};
  }

 private:
  static constexpr uint64_t kNoIndex = std::numeric_limits<uint64_t>::max();

  std::span<const std::byte> bytes_;
  const std::string& file_;
  uint64_t offset_ = 0;
  const char* kind_ = "header";
  uint64_t index_ = kNoIndex;
  std::string_view item_;
};

uint32_t read_version(Cursor& in) {
  const std::byte* magic = in.take(4);
  const std::string_view text(reinterpret_cast<const char*>(magic), 4);
  if (text == "FUGG") {
    in.fail("a little-endian GGUF file", "a byte-swapped one", "convert the model again");
  }
  if (text != "GGUF") in.fail("the magic 'GGUF'", in_quotes(text), "is this a GGUF file?");
  const auto version = in.read<uint32_t>();
  if (version == 1) {
    in.fail("version 2 or 3", "version 1", "convert the model again with a current llama.cpp");
  }
  if (version != 0 && (version & 0xffff) == 0) {
    in.fail("a little-endian GGUF file", "a big-endian one", "convert the model again");
  }
  if (version != 2 && version != 3) {
    in.fail("version 2 or 3", "version " + std::to_string(version));
  }
  return version;
}

// A count of table entries, each of which takes at least `smallest` bytes of the file.
uint64_t read_count(Cursor& in, const char* what, uint64_t smallest) {
  const auto count = in.read<uint64_t>();
  const uint64_t most = in.left() / smallest;
  if (count > most) {
    in.fail("at most " + std::to_string(most) + " " + what + " in a file of this size",
            std::to_string(count));
  }
  return count;
}

GgufType read_value_type(Cursor& in) {
  const auto id = in.read<uint32_t>();
  if (id >= std::size(kValueTypes)) {
    in.fail("a value type from 0 to 12", "type " + std::to_string(id));
  }
  return static_cast<GgufType>(id);
}

std::string_view read_key(Cursor& in) {
  const std::string_view key = in.read_string("a key", kLongestKey);
  if (key.empty()) in.fail("a key", "an empty one");
  if (!std::ranges::all_of(key, [](char c) { return c >= 0x20 && c < 0x7f; })) {
    in.fail("a key of printable ASCII", in_quotes(key));
  }
  return key;
}

GgufValue read_value(Cursor& in) {
  GgufValue value;
  value.type = read_value_type(in);
  if (value.type == GgufType::kString) {
    value.data = in.at();
    in.read_string("a string", kLongestString);
    return value;
  }
  if (value.type != GgufType::kArray) {
    value.data = in.take(info(value.type).bytes);
    return value;
  }
  value.element = read_value_type(in);
  if (value.element == GgufType::kArray) {
    in.fail("an array of plain values", "an array of arrays", "nested arrays are not supported");
  }
  value.count = in.read<uint64_t>();
  const bool strings = value.element == GgufType::kString;
  const uint64_t smallest = strings ? 8 : info(value.element).bytes;
  const uint64_t most = std::min(kMostElements, in.left() / smallest);
  if (value.count > most) {
    in.fail("an array of at most " + std::to_string(most) + " elements",
            std::to_string(value.count));
  }
  value.data = in.at();
  if (strings) {
    for (uint64_t i = 0; i < value.count; ++i) in.read_string("a string", kLongestString);
  } else {
    in.take(value.count * smallest);
  }
  return value;
}

// Sets t.bytes from shape and type. Every product is checked before it is formed; the result is no
// larger than the file, so sums of it with offsets in the file cannot overflow.
void check_size(const Cursor& in, uint64_t file_size, const TensorTypeInfo& type, GgufTensor& t) {
  const std::string shape = t.shape_text();
  int64_t weights = 1;
  for (const int64_t n : t.ne) {
    if (n <= 0) in.fail("dimensions of at least 1", shape);
    if (__builtin_mul_overflow(weights, n, &weights)) {
      in.fail("a tensor that fits in the file", "the shape " + shape);
    }
  }
  if (t.ne[0] % type.block_weights != 0) {
    in.fail("rows that are a multiple of " + std::to_string(type.block_weights) + " weights (" +
                type.name + ")",
            std::to_string(t.ne[0]));
  }
  int64_t bytes = 0;
  if (__builtin_mul_overflow(weights / type.block_weights, type.block_bytes, &bytes) ||
      static_cast<uint64_t>(bytes) > file_size) {
    in.fail("a tensor that fits in the file of " + std::to_string(file_size) + " bytes",
            "the shape " + shape + " of " + type.name);
  }
  t.bytes = static_cast<size_t>(bytes);
}

struct TensorEntry {
  GgufTensor tensor;
  uint64_t offset;  // from the start of the tensor data
};

TensorEntry read_tensor(Cursor& in, uint64_t file_size) {
  GgufTensor t;
  t.name = in.read_string("a tensor name", kLongestTensorName);
  if (t.name.empty()) in.fail("a tensor name", "an empty one");
  in.set_name(t.name);
  const auto n_dims = in.read<uint32_t>();
  if (n_dims > 4) in.fail("at most 4 dimensions", std::to_string(n_dims));
  t.n_dims = static_cast<int>(n_dims);
  for (int i = 0; i < t.n_dims; ++i) t.ne[i] = in.read<int64_t>();
  t.type_id = in.read<uint32_t>();
  const TensorTypeInfo* type = find_tensor_type(t.type_id);
  if (type == nullptr) {
    in.fail("a known tensor type", "type " + std::to_string(static_cast<int32_t>(t.type_id)),
            "convert the model to one of F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, "
            "Q6_K");
  }
  t.type = type->type;
  check_size(in, file_size, *type, t);
  const auto offset = in.read<uint64_t>();
  return {t, offset};
}

uint64_t round_up(uint64_t value, uint64_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

}  // namespace

std::string GgufTensor::type_name() const {
  const TensorTypeInfo* known = find_tensor_type(type_id);
  return known != nullptr ? known->name : "type " + std::to_string(type_id);
}

std::string GgufTensor::shape_text() const {
  if (n_dims == 0) return "a scalar";
  std::string text = std::to_string(ne[0]);
  for (int i = 1; i < n_dims; ++i) text += " x " + std::to_string(ne[i]);
  return text;
}

GgufFile::GgufFile(std::span<const std::byte> bytes, std::string name) : name_(std::move(name)) {
  Cursor in(bytes, name_);
  version_ = read_version(in);
  const uint64_t n_tensors = read_count(in, "tensors", kSmallestTensorEntry);
  const uint64_t n_keys = read_count(in, "keys", kSmallestKeyEntry);

  for (uint64_t i = 0; i < n_keys; ++i) {
    in.enter("key", i);
    const std::string_view key = read_key(in);
    in.set_name(key);
    if (!metadata_.emplace(key, read_value(in)).second) in.fail("each key once", "it twice");
  }

  uint64_t alignment = kDefaultAlignment;
  if (const GgufValue* value = find_value("general.alignment")) {
    if (value->type != GgufType::kU32) throw_type("general.alignment", "u32", *value);
    alignment = load<uint32_t>(value->data);
    if (alignment < 8 || alignment > kLargestAlignment || !std::has_single_bit(alignment)) {
      throw Error(where("general.alignment"), "a power of two from 8 to 1048576",
                  std::to_string(alignment), kDamaged);
    }
  }
  if (find<int64_t>("split.count").value_or(1) > 1) {
    throw Error(where("split.count"), "a model in one file",
                "part of " + std::to_string(get<int64_t>("split.count")) + " files",
                "join them with llama.cpp's llama-gguf-split --merge");
  }

  std::vector<uint64_t> offsets;
  for (uint64_t i = 0; i < n_tensors; ++i) {
    in.enter("tensor", i);
    const TensorEntry entry = read_tensor(in, bytes.size());
    if (!tensor_index_.emplace(entry.tensor.name, i).second) {
      in.fail("each tensor once", "it twice");
    }
    tensors_.push_back(entry.tensor);
    offsets.push_back(entry.offset);
  }
  if (tensors_.empty()) return;

  // Tensors follow each other in the order of the table, each start aligned.
  const uint64_t data_start = round_up(in.offset(), alignment);
  const uint64_t data_size = data_start < bytes.size() ? bytes.size() - data_start : 0;
  uint64_t next = 0;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    GgufTensor& t = tensors_[i];
    const std::string at = name_ + ": tensor " + in_quotes(t.name);
    if (offsets[i] != next) {
      throw Error(at, "offset " + std::to_string(next) + " (after the tensor before it)",
                  std::to_string(offsets[i]), kDamaged);
    }
    if (next > data_size || t.bytes > data_size - next) {
      throw Error(at, std::to_string(t.bytes) + " bytes of data",
                  std::to_string(data_size - std::min(next, data_size)), kDamaged);
    }
    t.data = bytes.data() + data_start + next;
    next = round_up(next + t.bytes, alignment);
  }
}

const GgufTensor* GgufFile::find_tensor(std::string_view name) const {
  const auto found = tensor_index_.find(name);
  return found == tensor_index_.end() ? nullptr : &tensors_[found->second];
}

const GgufValue* GgufFile::find_value(std::string_view key) const {
  const auto found = metadata_.find(key);
  return found == metadata_.end() ? nullptr : &found->second;
}

std::string GgufFile::where(std::string_view key) const {
  return name_ + ": key " + in_quotes(key);
}

void GgufFile::throw_missing(std::string_view key) const {
  throw Error(where(key), "a value", "no such key", "convert the model again");
}

void GgufFile::throw_type(std::string_view key, const char* expected,
                          const GgufValue& found) const {
  throw Error(where(key), expected, type_text(found), "convert the model again");
}

template <>
std::optional<int64_t> GgufFile::find(std::string_view key) const {
  const GgufValue* value = find_value(key);
  if (value == nullptr) return std::nullopt;
  switch (value->type) {
    case GgufType::kU8: return load<uint8_t>(value->data);
    case GgufType::kI8: return load<int8_t>(value->data);
    case GgufType::kU16: return load<uint16_t>(value->data);
    case GgufType::kI16: return load<int16_t>(value->data);
    case GgufType::kU32: return load<uint32_t>(value->data);
    case GgufType::kI32: return load<int32_t>(value->data);
    case GgufType::kI64: return load<int64_t>(value->data);
    case GgufType::kU64: {
      const auto number = load<uint64_t>(value->data);
      if (!std::in_range<int64_t>(number)) {
        throw Error(where(key), "a number below 2^63", std::to_string(number), kDamaged);
      }
      return static_cast<int64_t>(number);
    }
    default: throw_type(key, "an integer", *value);
  }
}

template <>
std::optional<double> GgufFile::find(std::string_view key) const {
  const GgufValue* value = find_value(key);
  if (value == nullptr) return std::nullopt;
  if (value->type == GgufType::kF32) return load<float>(value->data);
  if (value->type == GgufType::kF64) return load<double>(value->data);
  throw_type(key, "a floating-point number", *value);
}

template <>
std::optional<bool> GgufFile::find(std::string_view key) const {
  const GgufValue* value = find_value(key);
  if (value == nullptr) return std::nullopt;
  if (value->type != GgufType::kBool) throw_type(key, "a bool", *value);
  const auto byte = load<uint8_t>(value->data);
  if (byte > 1) throw Error(where(key), "a bool of 0 or 1", std::to_string(byte), kDamaged);
  return byte == 1;
}

template <>
std::optional<std::string> GgufFile::find(std::string_view key) const {
  const GgufValue* value = find_value(key);
  if (value == nullptr) return std::nullopt;
  if (value->type != GgufType::kString) throw_type(key, "a string", *value);
  std::string text;
  for_each_string(*value, [&](std::string_view s) { text = s; });
  return text;
}

template <>
std::optional<std::vector<std::string>> GgufFile::find(std::string_view key) const {
  const GgufValue* value = find_value(key);
  if (value == nullptr) return std::nullopt;
  if (value->type != GgufType::kArray || value->element != GgufType::kString) {
    throw_type(key, "an array of strings", *value);
  }
  std::vector<std::string> strings;
  strings.reserve(value->count);
  for_each_string(*value, [&](std::string_view s) { strings.emplace_back(s); });
  return strings;
}

template <>
std::optional<std::vector<float>> GgufFile::find(std::string_view key) const {
  const GgufValue* value = find_value(key);
  if (value == nullptr) return std::nullopt;
  if (value->type != GgufType::kArray || value->element != GgufType::kF32) {
    throw_type(key, "an array of f32", *value);
  }
  std::vector<float> numbers(value->count);
  if (!numbers.empty()) std::memcpy(numbers.data(), value->data, numbers.size() * sizeof(float));
  return numbers;
}

template <>
std::optional<std::vector<int32_t>> GgufFile::find(std::string_view key) const {
  const GgufValue* value = find_value(key);
  if (value == nullptr) return std::nullopt;
  if (value->type != GgufType::kArray || value->element != GgufType::kI32) {
    throw_type(key, "an array of i32", *value);
  }
  std::vector<int32_t> numbers(value->count);
  if (!numbers.empty()) std::memcpy(numbers.data(), value->data, numbers.size() * sizeof(int32_t));
  return numbers;
}

}  // namespace chimera
