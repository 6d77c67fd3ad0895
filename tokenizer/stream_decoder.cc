#include "tokenizer/stream_decoder.h"

#include <string_view>

#include "tokenizer/unicode.h"

namespace chimera {

std::string StreamDecoder::push(int32_t id) {
  std::string bytes = tokenizer_->token_bytes(id);
  if (bytes.empty()) return "";
  if (at_text_start_ && tokenizer_->adds_space_prefix() && bytes.starts_with(' '))
    bytes.erase(0, 1);
  at_text_start_ = false;
  pending_ += bytes;
  return take_whole_characters();
}

std::string StreamDecoder::take_whole_characters() {
  std::string printable;
  std::string_view rest = pending_;
  while (!rest.empty()) {
    const Utf8Char c = first_utf8_char(rest);
    if (c.state == Utf8::kTruncated) break;
    append_utf8(printable, c.code_point);
    rest.remove_prefix(c.length);
  }
  pending_.erase(0, pending_.size() - rest.size());
  return printable;
}

std::string StreamDecoder::finish() {
  std::string rest;
  if (!pending_.empty()) append_utf8(rest, kReplacementCharacter);
  pending_.clear();
  at_text_start_ = true;
  return rest;
}

}  // namespace chimera
