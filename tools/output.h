// What the program says: results on standard output, everything else on standard error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace chimera {

// The reader of standard output went away (`chimera ... | head`): stop, and say nothing.
struct OutputClosed {};

// To standard output, at once. Throws OutputClosed, or Error if it cannot be written.
void print(std::string_view text);
// One object on one line. Strings from files may hold anything: what is no UTF-8 becomes U+FFFD.
void print_json(const nlohmann::ordered_json& object);

// One line to standard error.
void note(const std::string& line);

std::string fixed_text(double value, int decimals);           // "3.14"
std::string bytes_text(size_t bytes);                         // "98.4 MB"
std::string count_text(int64_t n, const std::string& thing);  // "1 token", "2 tokens"

}  // namespace chimera
