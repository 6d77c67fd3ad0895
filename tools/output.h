// What the program says: results on standard output, everything else on standard error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "engine/clock.h"

namespace chimera {

// The reader of standard output went away (`chimera ... | head`): stop, and say nothing.
struct OutputClosed {};

// To standard output, at once. Throws OutputClosed, or Error if it cannot be written.
void print(std::string_view text);
// One object on one line. Strings from files may hold anything: what is no UTF-8 becomes U+FFFD.
void print_json(const nlohmann::ordered_json& object);

// One line to standard error.
void note(const std::string& line);

// A line on standard error that says how far a command is: on a terminal only.
class Progress {
 public:
  Progress();
  ~Progress() { show(""); }
  void show(const std::string& line);
  // "mt_bench.jsonl [#######-------------] 35%, 20 s left". done: from 0 to 1, in equal steps.
  void bar(const std::string& label, double done);
  // ... and without a terminal a line a minute, for the log of what takes hours.
  void log(const std::string& line);

 private:
  bool terminal_;
  Clock::time_point start_, logged_;
};

// Throws Error, before hours of work, where a file could not be written after them.
void expect_writable(const std::string& path);

// Throws Error where an output is the same file as an input or another output, by whatever name.
void expect_other_file(const std::string& output, const std::vector<std::string>& others);
void expect_other_file(const std::string& output,
                       std::initializer_list<std::optional<std::string>> others);

std::string fixed_text(double value, int decimals);           // "3.14"
std::string number_text(float value);                         // "3.14", "1e-06": as short as can be
std::string percent_text(int64_t n, int64_t of);              // "31.4", "-" of none
std::string bytes_text(size_t bytes);                         // "98.4 MB"
std::string xml_text(const std::string& text);                // for the inside of an SVG element
std::string count_text(int64_t n, const std::string& thing);  // "1 token", "2 tokens"
std::string hash_text(std::string_view bytes);                // 16 hex digits: FNV-1a

}  // namespace chimera
