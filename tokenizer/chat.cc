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
  // The template has it before the first message; before a first question that is to be generated,
  // since that is where a conversation's begins; never before an answer to nothing.
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

// Versions 3 to 3.3 differ in tools and in a default system message with dates, which is left out.
void write_llama3(ChatWriter& out, std::span<const Message> messages, std::string_view next_role) {
  const auto header = [&](std::string_view role) {
    out.control("<|start_header_id|>");
    out.text(role);
    out.control("<|end_header_id|>");
    out.text("\n\n");
  };
  out.control("<|begin_of_text|>");
  for (const Message& message : messages) {
    header(message.role);
    out.text(trimmed(message.content));
    out.control("<|eot_id|>");
  }
  if (!next_role.empty()) header(next_role);
}

struct Format {
  ChatFormat format;
  std::string_view name;
  bool (*is)(std::string_view chat_template);  // without white space at its ends
  void (*write)(ChatWriter& out, std::span<const Message> messages, std::string_view next_role);
};

constexpr std::string_view kSmolLm2Template =
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n"
    "' + message['content'] + '<|im_end|>' + '\n"
    "'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n"
    "' }}{% endif %}";

// The whole template, since its default message is part of the format.
bool is_chatml(std::string_view chat_template) {
  return chat_template == kSmolLm2Template;
}

bool is_llama3(std::string_view chat_template) {
  return chat_template.find("<|start_header_id|>") != chat_template.npos &&
         chat_template.find("<|eot_id|>") != chat_template.npos;
}

constexpr Format kFormats[] = {
    {ChatFormat::kChatMl, "chatml", is_chatml, write_chatml},
    {ChatFormat::kLlama3, "llama3", is_llama3, write_llama3},
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
    if (known.is(chat_template)) return known.format;
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
  const auto check_role = [](std::string_view role) {
    if (role != "system" && role != "user" && role != "assistant")
      throw Error("chat: role of a message", "'system', 'user' or 'assistant'", in_quotes(role));
  };
  for (const Message& message : messages) check_role(message.role);
  if (!next_role.empty()) check_role(next_role);
  ChatWriter writer(tokenizer);
  known->write(writer, messages, next_role);
  return writer.finish();
}

}  // namespace chimera
