// Prompt files, of two kinds.
//
// JSONL, one object a line, which has one of
//   "turns":    ["Compose a travel blog post.", ...]             the first turn (MT-bench)
//   "prompt":   "Compose a travel blog post."
//   "text":     "Compose a travel blog post."
//   "messages": [{"role": "user", "content": "Compose ..."}]     without a last answer
// Plain text, one prompt a line.
//
// Either may come through a pipe, as in --prompts <(...). What is compressed is refused.
//
// It is JSONL if its name ends in .jsonl or its first character, white space apart, is '{'.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/chat.h"
#include "tools/flags.h"

namespace chimera {

inline constexpr size_t kLongestLine = 16 << 20;  // bytes

// A conversation: one message of the user's unless the file has "messages".
struct Prompt {
  std::vector<Message> messages;
  int line = 0;  // of the file
};

// Of a JSONL file, the lines to read: those whose `field` is one of `values`. As given, "" for all
// lines: text.
struct LineFilter {
  std::string text, field;
  std::vector<std::string> values;
};
Flag where_flag(LineFilter* target);

// At least one; blank lines are skipped, and those that the filter leaves out. Throws Error, which
// names the file and the line - unless broken lines are to be left out: then notes which, if there
// are any.
enum class BrokenLines { kStop, kLeaveOut };
std::vector<Prompt> load_prompts(const std::string& path,
                                 BrokenLines broken_lines = BrokenLines::kStop,
                                 const LineFilter& where = {});

// Throws Error, which names the first byte that is part of no character: a tokenizer has no token
// for it, or another one.
void check_utf8(const std::string& where, std::string_view text);

}  // namespace chimera
