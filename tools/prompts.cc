#include "tools/prompts.h"

#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>
#include <string_view>

#include "engine/error.h"
#include "loader/mapped_file.h"
#include "tokenizer/unicode.h"
#include "tools/output.h"

namespace chimera {
namespace {

using nlohmann::json;

constexpr int kDeepest = 32;

bool is_blank(std::string_view text) {
  return text.find_first_not_of(" \t\r") == std::string_view::npos;
}

json parse_object(const std::string& where, std::string_view line) {
  std::set<std::string> keys;
  const auto check = [&](int depth, json::parse_event_t event, json& parsed) {
    if (depth > kDeepest) {
      throw Error(where, "JSON at most " + std::to_string(kDeepest) + " levels deep", "more");
    }
    if (depth == 1 && event == json::parse_event_t::key &&
        !keys.insert(parsed.get<std::string>()).second) {
      throw Error(where, "every field once", in_quotes(parsed.get<std::string>()) + " twice");
    }
    return true;
  };
  json object;
  try {
    object = json::parse(line, check);
  } catch (const json::parse_error& e) {
    throw Error(where, "a JSON object", "no valid JSON at byte " + std::to_string(e.byte),
                "one object a line, or plain text in a file not named .jsonl");
  } catch (const json::exception&) {  // a number that no double holds
    throw Error(where, "a JSON object", "a number out of range");
  }
  if (!object.is_object())
    throw Error(where, "a JSON object", "JSON of type " + std::string(object.type_name()));
  return object;
}

std::string string_field(const std::string& where, const json& object, const char* key) {
  const auto found = object.find(key);
  const std::string field = where + ": \"" + key + "\"";
  if (found == object.end()) throw Error(field, "a string", "no such field");
  if (!found->is_string()) throw Error(field, "a string", found->type_name());
  return found->get<std::string>();
}

using Messages = std::vector<Message>;

Messages user(std::string text) {
  return {{"user", std::move(text)}};
}

Messages read_messages(const std::string& where, const json& messages) {
  if (!messages.is_array()) throw Error(where, "a list of messages", messages.type_name());
  Messages prompt;
  for (size_t i = 0; i < messages.size(); ++i) {
    const std::string message = where + ": message " + std::to_string(i + 1);
    if (!messages[i].is_object()) throw Error(message, "an object", messages[i].type_name());
    prompt.push_back({string_field(message, messages[i], "role"),
                      string_field(message, messages[i], "content")});
  }
  // The answer is ours to give.
  while (!prompt.empty() && prompt.back().role == "assistant") prompt.pop_back();
  if (prompt.empty()) throw Error(where, "a message to answer", "none");
  return prompt;
}

bool is_wanted(const json& object, const LineFilter& filter) {
  const auto found = object.find(filter.field);
  if (found == object.end()) return false;
  const std::string value = found->is_string() ? found->get<std::string>() : found->dump();
  return std::find(filter.values.begin(), filter.values.end(), value) != filter.values.end();
}

// Without a message: left out.
Messages read_json_line(const std::string& where, std::string_view line, const LineFilter& filter) {
  const json object = parse_object(where, line);
  if (!filter.text.empty() && !is_wanted(object, filter)) return {};
  if (const auto turns = object.find("turns"); turns != object.end()) {
    if (!turns->is_array() || turns->empty() || !turns->front().is_string()) {
      throw Error(where + ": \"turns\"", "a list of strings",
                  in_quotes(turns->dump().substr(0, 40)));
    }
    return user(turns->front().get<std::string>());
  }
  for (const char* key : {"prompt", "text"}) {
    if (object.contains(key)) return user(string_field(where, object, key));
  }
  if (const auto messages = object.find("messages"); messages != object.end()) {
    return read_messages(where + ": \"messages\"", *messages);
  }
  throw Error(where, "\"turns\", \"prompt\", \"text\" or \"messages\"", "none of them");
}

Messages read_line(const std::string& where, std::string_view line, bool jsonl,
                   const LineFilter& filter) {
  if (line.size() > kLongestLine)
    throw Error(where, "at most 16 MB", std::to_string(line.size()) + " bytes");
  check_utf8(where, line);
  return jsonl ? read_json_line(where, line, filter) : user(std::string(line));
}

// Once: the stages of chimera train all read the file.
void note_once(const std::string& line) {
  static std::set<std::string> said;
  if (said.insert(line).second) note(line);
}

// One line, however many are broken.
void note_broken(const std::string& file, const std::vector<int>& lines, const std::string& what) {
  constexpr size_t kNamed = 20;
  std::string numbers;
  for (size_t i = 0; i < std::min(kNamed, lines.size()); ++i)
    numbers += (i > 0 ? ", " : "") + std::to_string(lines[i]);
  note_once(
      "warning: " + file + ": " + count_text(static_cast<int64_t>(lines.size()), "broken line") +
      " left out: " + numbers + (lines.size() > kNamed ? ", ..." : "") + "; the first: " + what);
}

// What somebody writes into a pipe, as in --prompts <(...). Nothing where nobody does: opened and
// read without O_NONBLOCK it would wait for ever.
std::string read_pipe(const std::string& path, const std::string& name) {
  const int fd = open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC);
  std::string text;
  char buffer[1 << 16];
  ssize_t n = -1;
  while (fd >= 0) {
    n = read(fd, buffer, sizeof buffer);
    if (n > 0)
      text.append(buffer, static_cast<size_t>(n));
    else if (n == 0 || (errno != EAGAIN && errno != EINTR))
      break;
    else {
      pollfd ready{fd, POLLIN, 0};
      poll(&ready, 1, -1);
    }
  }
  const int error = errno;
  if (fd >= 0) close(fd);
  if (n < 0) throw Error(name, "a readable file", std::strerror(error));
  if (text.empty()) throw Error(name, "a file with prompts", "a FIFO that nobody writes to");
  return text;
}

void expect_uncompressed(const std::string& name, std::string_view text) {
  using namespace std::literals;
  constexpr std::string_view kArchives[][3] = {{"\xFD\x37zXZ\0"sv, "an xz file", "xz -dk"},
                                               {"\x1F\x8B", "a gzip file", "gunzip -k"},
                                               {"\x28\xB5\x2F\xFD", "a zstd file", "zstd -d"},
                                               {"BZh", "a bzip2 file", "bunzip2 -k"},
                                               {"PK\x03\x04", "a zip archive", "unzip"}};
  for (const auto& [magic, what, tool] : kArchives) {
    // What begins with the letters alone may be text.
    if (!text.starts_with(magic) || (magic == "BZh" && !text.substr(4).starts_with("1AY&SY")))
      continue;
    throw Error(name, "JSONL or plain text", std::string(what),
                "unpack it first: " + std::string(tool) + " FILE");
  }
}

}  // namespace

void check_utf8(const std::string& where, std::string_view text) {
  for (size_t i = 0; i < text.size();) {
    const Utf8Char c = first_utf8_char(text.substr(i));
    if (c.state != Utf8::kValid) {
      throw Error(where, "UTF-8", "other bytes at byte " + std::to_string(i + 1),
                  "convert it to UTF-8");
    }
    i += c.length;
  }
}

Flag where_flag(LineFilter* target) {
  const auto set = [=](std::string_view text) {
    const size_t equals = std::min(text.find('='), text.size());
    *target = {std::string(text), std::string(text.substr(0, equals)), {}};
    return !target->field.empty() && equals < text.size() &&
           files(&target->values).set(text.substr(equals + 1));
  };
  return {
      0,
      "where",
      "FIELD=VALUE",
      "only lines of JSONL whose field has this value, such as\nlicence=MIT; or one of several, "
      "separated by commas",
      {set, "FIELD=VALUE or FIELD=VALUE,VALUE...", ""}};
}

std::vector<Prompt> load_prompts(const std::string& path, BrokenLines broken_lines,
                                 const LineFilter& where) {
  const std::string name = printable(path, 4096);
  MappedFile file;
  std::string piped;
  std::string_view rest;
  if (special_file(path) == "a FIFO") {
    rest = piped = read_pipe(path, name);
  } else {
    file = MappedFile(path);
    rest = {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
  }
  expect_uncompressed(name, rest);
  if (rest.starts_with("\xEF\xBB\xBF")) rest.remove_prefix(3);  // byte order mark
  const size_t first = rest.find_first_not_of(" \t\r\n");
  const bool jsonl =
      path.ends_with(".jsonl") || (first != std::string_view::npos && rest[first] == '{');
  if (!jsonl && !where.text.empty())
    throw Error(name, "JSONL, whose lines have fields for --where", "plain text");
  // Scraps of it could pass for prompts.
  if (const size_t at = jsonl ? rest.npos : rest.find('\0'); at != rest.npos)
    throw Error(name, "text", "a NUL byte at byte " + std::to_string(at + 1),
                "give plain text in UTF-8, or JSONL");

  std::vector<Prompt> prompts;
  std::vector<int> broken;  // numbers of lines
  std::string what;         // is wrong with the first
  int64_t left_out = 0;
  for (int number = 1; !rest.empty(); ++number) {
    std::string_view line = rest.substr(0, rest.find('\n'));
    rest.remove_prefix(std::min(rest.size(), line.size() + 1));
    if (line.ends_with('\r')) line.remove_suffix(1);
    if (is_blank(line)) continue;
    try {
      Messages messages = read_line(name + ": line " + std::to_string(number), line, jsonl, where);
      if (messages.empty())
        ++left_out;
      else
        prompts.push_back({std::move(messages), number});
    } catch (const Error& e) {
      if (broken_lines == BrokenLines::kStop) throw;
      if (broken.empty()) what = e.what();
      broken.push_back(number);
    }
  }
  if (!broken.empty()) note_broken(name, broken, what);
  if (prompts.empty() && left_out > 0)
    throw Error(name, "a line with " + printable(where.text),
                "none of " + count_text(left_out, "line"));
  if (left_out > 0)
    note_once(name + ": " + count_text(left_out, "line") + " without " + printable(where.text) +
              " left out, " + count_text(static_cast<int64_t>(prompts.size()), "prompt") + " kept");
  if (prompts.empty())
    throw Error(name, "at least one prompt",
                broken.empty() ? "only blank lines" : "only broken lines");
  return prompts;
}

}  // namespace chimera
