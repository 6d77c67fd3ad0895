// Prompt files, of two kinds.
//
// JSONL, one object a line, which has one of
//   "turns":    ["Compose a travel blog post.", ...]             the first turn (MT-bench)
//   "prompt":   "Compose a travel blog post."
//   "text":     "Compose a travel blog post."
//   "messages": [{"role": "user", "content": "Compose ..."}]     without a last answer
// Plain text, one prompt a line.
//
// It is JSONL if its name ends in .jsonl or its first character, white space apart, is '{'.
#pragma once

#include <string>
#include <vector>

#include "tokenizer/chat.h"

namespace chimera {

inline constexpr size_t kLongestLine = 16 << 20;  // bytes

// A prompt is a conversation: one message of the user's unless the file has "messages".
using Prompt = std::vector<Message>;

// At least one; blank lines are skipped. Throws Error, which names the file and the line - unless
// broken lines are to be left out: then notes which, if there are any.
enum class BrokenLines { kStop, kLeaveOut };
std::vector<Prompt> load_prompts(const std::string& path,
                                 BrokenLines broken_lines = BrokenLines::kStop);

}  // namespace chimera
