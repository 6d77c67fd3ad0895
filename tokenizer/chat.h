// Chat formats: how a conversation becomes the tokens that a model was trained on.
//
// A model file describes its format as a Jinja template. That is code from an untrusted file and is
// never run: the formats known here are told by what stands in it.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/tokenizer.h"
#include "tokenizer/vocabulary.h"

namespace chimera {

struct Message {
  std::string role;  // "system", "user" or "assistant"
  std::string content;
};

enum class ChatFormat : uint8_t {
  kNone,    // not known: the model can complete text only
  kChatMl,  // SmolLM2's ChatML; it has a default system message
  kLlama3,  // of the LLaMA 3 instruct models
};

// The format whose template the vocabulary carries, or kNone.
ChatFormat detect_chat_format(const Vocabulary& vocabulary);

// "none", "chatml", "llama3".
std::string_view name(ChatFormat format);

// The tokens of a conversation, and those that open the next message, where a role for it is given:
// "assistant", for an answer to be generated, or "user", for a question. Control tokens are put in
// by id; roles and contents are encoded as ordinary text, so that nothing in a content can end its
// message. BOS is in the result where the format has one. Throws Error for kNone, for a role that
// the format does not have, and where the vocabulary lacks one of the format's control tokens.
std::vector<int32_t> encode_chat(const Tokenizer& tokenizer, ChatFormat format,
                                 std::span<const Message> messages, std::string_view next_role);

}  // namespace chimera
