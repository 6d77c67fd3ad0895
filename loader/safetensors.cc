#include "loader/safetensors.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>
#include <string_view>

#include "engine/dtype.h"
#include "engine/error.h"
#include "loader/output_file.h"

namespace chimera {
namespace {

static_assert(std::endian::native == std::endian::little, "values are read as stored");

constexpr uint64_t kLongestHeader = 100'000'000;  // the reference's limit
constexpr size_t kMostDimensions = 8;
constexpr int64_t kMostElements = int64_t{1} << 48;
constexpr char kDamaged[] = "the file is damaged: download or write it again";

struct TypeInfo {
  const char* name;
  size_t bytes;
};
constexpr TypeInfo kTypes[] = {{"F32", 4}, {"F16", 2}, {"BF16", 2}, {"I32", 4}};
const TypeInfo& info(SafeType type) {
  return kTypes[static_cast<size_t>(type)];
}

// The header's events: two levels of objects, and arrays of whole numbers inside a tensor's.
class HeaderReader : public nlohmann::json_sax<nlohmann::json> {
 public:
  struct Entry {
    std::string name;
    std::optional<std::string> dtype;
    std::optional<std::vector<int64_t>> shape, offsets;
  };

  explicit HeaderReader(std::string file) : file_(std::move(file)) {}
  std::vector<Entry> entries;
  std::map<std::string, std::string> metadata;

  bool null() override { return unexpected("null"); }
  bool boolean(bool) override { return unexpected("a boolean"); }
  bool number_integer(number_integer_t) override { return unexpected("a negative number"); }
  bool number_float(number_float_t, const string_t& s) override {
    return unexpected("the number " + printable(s, 40));
  }
  bool binary(binary_t&) override { return unexpected("binary data"); }
  bool number_unsigned(number_unsigned_t n) override {
    if (numbers_ == nullptr) return unexpected("a number");
    if (n > static_cast<uint64_t>(INT64_MAX)) return unexpected("a number above 2^63 - 1");
    numbers_->push_back(static_cast<int64_t>(n));
    return true;
  }
  bool string(string_t& s) override {
    if (in_metadata_ && depth_ == 2) {
      metadata[key_] = s;
    } else if (depth_ == 2 && key_ == "dtype" && numbers_ == nullptr) {
      entries.back().dtype = s;
    } else {
      return unexpected("a string");
    }
    return true;
  }
  bool start_object(size_t) override {
    if (numbers_ != nullptr || depth_ >= 2) return unexpected("an object");
    if (depth_ == 1) {
      in_metadata_ = key_ == "__metadata__";
      if (!in_metadata_) entries.push_back({key_, {}, {}, {}});
    }
    keys_.emplace_back();
    ++depth_;
    return true;
  }
  bool end_object() override {
    keys_.pop_back();
    --depth_;
    return true;
  }
  bool start_array(size_t) override {
    if (depth_ != 2 || in_metadata_ || numbers_ != nullptr) return unexpected("an array");
    auto& target = key_ == "shape" ? entries.back().shape : entries.back().offsets;
    if (key_ != "shape" && key_ != "data_offsets") return unexpected("an array");
    numbers_ = &target.emplace();
    return true;
  }
  bool end_array() override {
    numbers_ = nullptr;
    return true;
  }
  bool key(string_t& k) override {
    auto& keys = keys_.back();
    if (!keys.emplace(k, true).second) {
      throw Error(file_ + ": header", "each key once", in_quotes(k) + " twice", kDamaged);
    }
    key_ = k;
    return true;
  }
  bool parse_error(size_t position, const std::string&,
                   const nlohmann::detail::exception&) override {
    throw Error(file_ + ": header", "JSON", "something else at byte " + std::to_string(position),
                kDamaged);
  }

 private:
  bool unexpected(const std::string& what) {
    throw Error(file_ + ": header: " + (depth_ == 0 ? "top" : in_quotes(key_)),
                depth_ == 0                   ? "an object"
                : in_metadata_ && depth_ == 2 ? "a string"
                                              : "tensors with dtype, shape and data_offsets",
                what, kDamaged);
  }

  std::string file_, key_;
  int depth_ = 0;
  bool in_metadata_ = false;
  std::vector<int64_t>* numbers_ = nullptr;
  std::vector<std::map<std::string, bool>> keys_;
};

SafeType parse_type(const std::string& text, const std::string& where) {
  for (size_t i = 0; i < std::size(kTypes); ++i) {
    if (text == kTypes[i].name) return static_cast<SafeType>(i);
  }
  throw Error(where, "dtype F32, F16, BF16 or I32", in_quotes(text),
              "convert the file to one of these");
}

}  // namespace

const char* name(SafeType type) {
  return info(type).name;
}

int64_t SafeTensor::count() const {
  int64_t n = 1;
  for (const int64_t s : shape) n *= s;
  return n;
}

std::string SafeTensor::shape_text() const {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

std::vector<float> SafeTensor::floats() const {
  std::vector<float> values(static_cast<size_t>(count()));
  if (type == SafeType::kF32) {
    if (!values.empty()) std::memcpy(values.data(), data, bytes);
    return values;
  }
  for (size_t i = 0; i < values.size(); ++i) {
    uint16_t half;
    std::memcpy(&half, data + 2 * i, 2);
    values[i] = type == SafeType::kF16 ? f16_to_f32(half) : bf16_to_f32(half);
  }
  return values;
}

// A pickle begins with 0x80, its protocol (2 to 5) and an opcode, none of which is 0. (A llama2.c
// header may begin with the first two, dim 640 is 80 02 00 00; and so may a safetensors file, whose
// ninth byte is '{'.)
void refuse_pickle(std::span<const std::byte> bytes, const std::string& name,
                   const std::string& expected, const std::string& instead) {
  const std::string_view start(reinterpret_cast<const char*>(bytes.data()),
                               std::min<size_t>(bytes.size(), 9));
  const bool zip = start.starts_with("PK\x03\x04"),
             pickle = start.size() > 2 && start[0] == '\x80' && start[1] >= 2 && start[1] <= 5 &&
                      start[2] != '\0' && (start.size() < 9 || start[8] != '{');
  if (zip || pickle)
    throw Error(name, expected, zip ? "a zip archive (PyTorch?)" : "a Python pickle",
                "loading pickles runs the code in them: use " + instead);
}

SafeTensors parse_safetensors(std::span<const std::byte> bytes, const std::string& file) {
  if (bytes.size() < 8)
    throw Error(file, "a safetensors file", std::to_string(bytes.size()) + " bytes", kDamaged);
  uint64_t header_bytes;
  std::memcpy(&header_bytes, bytes.data(), 8);
  if (header_bytes > kLongestHeader) {
    throw Error(file + ": header", "at most " + std::to_string(kLongestHeader) + " bytes",
                std::to_string(header_bytes), "this is no safetensors file, or it is damaged");
  }
  if (header_bytes > bytes.size() - 8) {
    throw Error(file + ": header", std::to_string(header_bytes) + " bytes",
                std::to_string(bytes.size() - 8), kDamaged);
  }
  const char* header = reinterpret_cast<const char*>(bytes.data()) + 8;
  if (header_bytes == 0 || header[0] != '{') {
    throw Error(file + ": header", "an object",
                header_bytes == 0 ? "nothing" : in_quotes(std::string(1, header[0])), kDamaged);
  }
  HeaderReader reader(file);
  nlohmann::json::sax_parse(header, header + header_bytes, &reader);

  SafeTensors result;
  result.metadata = std::move(reader.metadata);
  const std::span<const std::byte> data = bytes.subspan(8 + header_bytes);
  struct Place {
    int64_t begin, end;
    std::string where;
  };
  std::vector<Place> places;
  for (HeaderReader::Entry& e : reader.entries) {
    const std::string where = file + ": tensor " + in_quotes(e.name);
    if (!e.dtype || !e.shape || !e.offsets) {
      throw Error(where, "dtype, shape and data_offsets",
                  !e.dtype   ? "no dtype"
                  : !e.shape ? "no shape"
                             : "no data_offsets",
                  kDamaged);
    }
    SafeTensor t;
    t.type = parse_type(*e.dtype, where);
    t.shape = *e.shape;
    if (t.shape.size() > kMostDimensions)
      throw Error(where, "at most 8 dimensions", std::to_string(t.shape.size()), kDamaged);
    int64_t count = 1;
    for (const int64_t s : t.shape) {
      if (s != 0 && count > kMostElements / s)
        throw Error(where, "a shape of at most 2^48 elements", t.shape_text(), kDamaged);
      count *= s;
    }
    if (e.offsets->size() != 2)
      throw Error(where, "two data_offsets", std::to_string(e.offsets->size()), kDamaged);
    const int64_t begin = (*e.offsets)[0], end = (*e.offsets)[1];
    if (end < begin)
      throw Error(where, "data_offsets in order",
                  std::to_string(begin) + ", " + std::to_string(end), kDamaged);
    t.bytes = static_cast<size_t>(count) * info(t.type).bytes;
    if (static_cast<uint64_t>(end - begin) != t.bytes) {
      throw Error(where, std::to_string(t.bytes) + " bytes for " + *e.dtype + " " + t.shape_text(),
                  std::to_string(end - begin), kDamaged);
    }
    if (static_cast<uint64_t>(end) > data.size()) {
      throw Error(where, "data up to byte " + std::to_string(end),
                  std::to_string(data.size()) + " bytes of data", kDamaged);
    }
    t.data = data.data() + begin;
    places.push_back({begin, end, where});
    result.tensors.emplace(e.name, std::move(t));
  }
  std::sort(places.begin(), places.end(), [](const Place& a, const Place& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
  });
  int64_t at = 0;
  for (const Place& p : places) {
    if (p.begin != at) {
      throw Error(p.where,
                  "data from byte " + std::to_string(at) + ", where the tensor before it ends",
                  std::to_string(p.begin), kDamaged);
    }
    at = p.end;
  }
  if (static_cast<uint64_t>(at) != data.size()) {
    throw Error(file, std::to_string(at) + " bytes of tensors", std::to_string(data.size()),
                kDamaged);
  }
  return result;
}

void write_safetensors(const std::string& path, const std::vector<SafeOutput>& tensors,
                       const std::map<std::string, std::string>& metadata) {
  nlohmann::ordered_json header;
  if (!metadata.empty()) header["__metadata__"] = metadata;
  uint64_t at = 0;
  std::vector<uint64_t> counts;
  for (const SafeOutput& t : tensors) {
    uint64_t count = 1;
    for (const int64_t s : t.shape) count *= static_cast<uint64_t>(s);
    const uint64_t end = at + count * info(t.type).bytes;
    header[t.name] = {
        {"dtype", info(t.type).name}, {"shape", t.shape}, {"data_offsets", {at, end}}};
    counts.push_back(count);
    at = end;
  }
  std::string text = header.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  text.resize((text.size() + 7) / 8 * 8, ' ');

  OutputFile file(path);
  const uint64_t header_bytes = text.size();
  file.write(&header_bytes, 8);
  file.write(text);
  std::vector<uint16_t> rounded;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const SafeOutput& t = tensors[i];
    if (t.type != SafeType::kBF16) {
      file.write(t.values, counts[i] * 4);
      continue;
    }
    rounded.resize(counts[i]);
    for (size_t j = 0; j < counts[i]; ++j)
      rounded[j] = f32_to_bf16(static_cast<const float*>(t.values)[j]);
    file.write(rounded.data(), counts[i] * 2);
  }
  file.commit();
}

}  // namespace chimera
