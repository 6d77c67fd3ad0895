// The one error type. Its text is one line: where, what was expected, what was found, what to do.
//
//   throw Error("m.gguf: tensor 'output.weight'", "49152 columns", "1024", "download it again");
//   -> m.gguf: tensor 'output.weight': expected 49152 columns, found 1024; download it again
//
// The library throws and whoever calls it catches: tools/main.cc, for the program.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

namespace chimera {

class Error : public std::runtime_error {
 public:
  explicit Error(const std::string& message) : std::runtime_error(message) {}
  Error(const std::string& where, const std::string& expected, const std::string& found,
        const std::string& hint = "")
      : std::runtime_error(where + ": expected " + expected + ", found " + found +
                           (hint.empty() ? "" : "; " + hint)) {}
};

// There is no memory left for `bytes` more.
class MemoryError : public Error {
 public:
  explicit MemoryError(size_t bytes, const std::string& hint = "")
      : Error("memory", std::to_string(bytes) + " bytes", "none left", hint) {}
};

// What a message says of texts that others wrote: `text` with every byte outside printable ASCII as
// \xNN, and cut with "..." after `limit` bytes.
std::string printable(std::string_view text, size_t limit = 80);
// The same between single quotes.
std::string in_quotes(std::string_view text);

}  // namespace chimera
