#include "tokenizer/chat.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "engine/error.h"
#include "tokenizer/unicode.h"

namespace chimera {
namespace {

// Collects a conversation's tokens. Text between two control tokens is encoded as one, since a word
// may reach from a format's own text into a content ("user\nHello").
class ChatWriter {
 public:
  explicit ChatWriter(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}

  void text(std::string_view text) { text_ += text; }

  void control(std::string_view token_text) {
    const int32_t id = tokenizer_.find(token_text);
    if (id < 0 || !tokenizer_.is_control(id)) {
      throw Error("chat", "control token " + in_quotes(token_text) + " in the vocabulary", "none");
    }
    flush();
    ids_.push_back(id);
  }

  std::vector<int32_t> finish() {
    flush();
    return std::move(ids_);
  }

 private:
  void flush() {
    const std::vector<int32_t> ids = tokenizer_.encode(text_, /*parse_special=*/false);
    ids_.insert(ids_.end(), ids.begin(), ids.end());
    text_.clear();
  }

  const Tokenizer& tokenizer_;
  std::string text_;
  std::vector<int32_t> ids_;
};

void write_chatml(ChatWriter& out, std::span<const Message> messages, std::string_view next_role) {
  const auto write = [&](std::string_view role, std::string_view content) {
    out.control("<|im_start|>");
    out.text(role);
    out.text("\n");
    out.text(content);
    out.control("<|im_end|>");
    out.text("\n");
  };
  if (messages.empty() ? next_role == "user" : messages[0].role != "system") {
    write("system", "You are a helpful AI assistant named SmolLM, trained by Hugging Face");
  }
  for (const Message& message : messages) write(message.role, message.content);
  if (!next_role.empty()) {
    out.control("<|im_start|>");
    out.text(next_role);
    out.text("\n");
  }
}

struct Format {
  ChatFormat format;
  std::string_view name;
  std::string_view chat_template;  // without white space at its ends
  void (*write)(ChatWriter& out, std::span<const Message> messages, std::string_view next_role);
};

constexpr Format kFormats[] = {
    {ChatFormat::kChatMl, "chatml",
     "{% for message in messages %}"
     "{% if loop.first and messages[0]['role'] != 'system' %}"
     "{{ '<|im_start|>system\n"
     "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
     "' }}{% endif %}"
     "{{'<|im_start|>' + message['role'] + '\n"
     "' + message['content'] + '<|im_end|>' + '\n"
     "'}}{% endfor %}"
     "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n"
     "' }}{% endif %}",
     write_chatml},
};

const Format* find_format(ChatFormat format) {
  const auto found = std::find_if(std::begin(kFormats), std::end(kFormats),
                                  [=](const Format& known) { return known.format == format; });
  return found == std::end(kFormats) ? nullptr : found;
}

}  // namespace

ChatFormat detect_chat_format(const Vocabulary& vocabulary) {
  const std::string_view chat_template = trimmed(vocabulary.chat_template);
  for (const Format& known : kFormats) {
    if (chat_template == known.chat_template) return known.format;
  }
  return ChatFormat::kNone;
}

std::string_view name(ChatFormat format) {
  const Format* known = find_format(format);
  return known ? known->name : "none";
}

std::vector<int32_t> encode_chat(const Tokenizer& tokenizer, ChatFormat format,
                                 std::span<const Message> messages, std::string_view next_role) {
  const Format* known = find_format(format);
  if (!known) {
    throw Error("chat", "a model with a known chat format", "none",
                "the model can complete plain text");
  }
  for (const Message& message : messages) {
    if (message.role == "system" || message.role == "user" || message.role == "assistant") continue;
    throw Error("chat: role of a message", "'system', 'user' or 'assistant'",
                in_quotes(message.role));
  }
  ChatWriter writer(tokenizer);
  known->write(writer, messages, next_role);
  return writer.finish();
}

}  // namespace chimera
