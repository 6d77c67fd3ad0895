#include "tools/output.h"

#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>

#include "engine/error.h"

namespace chimera {

void print(std::string_view text) {
  const bool written = std::fwrite(text.data(), 1, text.size(), stdout) == text.size();
  if (written && std::fflush(stdout) == 0) return;
  if (errno == EPIPE) throw OutputClosed();
  throw Error("standard output", "room for the text", std::strerror(errno));
}

void print_json(const nlohmann::ordered_json& object) {
  print(object.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n");
}

void note(const std::string& line) {
  std::fprintf(stderr, "%s\n", line.c_str());
}

Progress::Progress()
    : terminal_(isatty(STDERR_FILENO) != 0), start_(std::chrono::steady_clock::now()) {}

void Progress::show(const std::string& line) {
  if (terminal_) std::fprintf(stderr, "\r\033[K%s", line.c_str());
}

void Progress::bar(const std::string& label, double done) {
  constexpr int kWidth = 20;
  const auto full = static_cast<size_t>(done * kWidth);
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  show(label + " [" + std::string(full, '#') + std::string(kWidth - full, '-') + "] " +
       fixed_text(100 * done, 0) + "%" +
       (done > 0.02 ? ", " + fixed_text(seconds * (1 - done) / done, 0) + " s left" : ""));
}

std::string xml_text(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '<' || c == '&')
      out += c == '<' ? "&lt;" : "&amp;";
    else
      out += c;
  }
  return out;
}

std::string bytes_text(size_t bytes) {
  const auto b = static_cast<double>(bytes);
  if (bytes < 1000) return std::to_string(bytes) + " bytes";
  if (b < 999.95e3) return fixed_text(b / 1e3, 1) + " kB";
  if (b < 999.95e6) return fixed_text(b / 1e6, 1) + " MB";
  return fixed_text(b / 1e9, 2) + " GB";
}

std::string count_text(int64_t n, const std::string& thing) {
  return std::to_string(n) + " " + thing + (n == 1 ? "" : "s");
}

std::string fixed_text(double value, int decimals) {
  char buffer[400];
  std::snprintf(buffer, sizeof buffer, "%.*f", decimals, value);
  return buffer;
}

}  // namespace chimera
