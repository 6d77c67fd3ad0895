#include "tokenizer/tokenizer.h"

#include <limits>
#include <utility>

#include "engine/error.h"
#include "tokenizer/unicode.h"

namespace chimera {
namespace {

// Far above any real token, and low enough that no search for one in a text takes long: those that
// are cut out of a text are looked for at every place.
constexpr size_t kMaxTokenBytes = 65536, kMaxSpecialBytes = 512;

// Symbols hold 32-bit places, and SentencePiece puts a space in front.
constexpr size_t kMaxTextBytes = std::numeric_limits<int32_t>::max() - 1;

std::string id_range(size_t size) {
  return "an id from 0 to " + std::to_string(size - 1);
}

void check(const Vocabulary& vocabulary) {
  const size_t size = vocabulary.tokens.size();
  if (size == 0 || size > static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
    throw Error("tokenizer: vocabulary", "1 to 2147483647 tokens", std::to_string(size));
  }
  size_t bytes = 0;
  for (size_t id = 0; id < size; ++id) {
    const size_t length = vocabulary.tokens[id].size();
    bytes += length;
    if (length <= kMaxTokenBytes) continue;
    throw Error("tokenizer: token " + std::to_string(id),
                "at most " + std::to_string(kMaxTokenBytes) + " bytes", std::to_string(length));
  }
  if (bytes > std::numeric_limits<uint32_t>::max())
    throw Error("tokenizer: vocabulary", "tokens of less than 4 GiB together",
                std::to_string(bytes) + " bytes");

  const std::vector<TokenType>& types = vocabulary.types;
  if (!types.empty() && types.size() != size) {
    throw Error("tokenizer: token types", std::to_string(size) + ", one for each token",
                std::to_string(types.size()));
  }
  for (size_t id = 0; id < types.size(); ++id) {
    const TokenType type = types[id];
    if (type < TokenType::kNormal || type > TokenType::kByte)
      throw Error("tokenizer: type of token " + std::to_string(id), "1 to 6",
                  std::to_string(static_cast<int>(type)));
    const size_t length = vocabulary.tokens[id].size();
    if (length > kMaxSpecialBytes && (type == TokenType::kControl || type == TokenType::kUnknown ||
                                      type == TokenType::kUserDefined))
      throw Error("tokenizer: token " + std::to_string(id),
                  "at most " + std::to_string(kMaxSpecialBytes) +
                      " bytes, as it is a control or user-defined one",
                  std::to_string(length));
  }

  const std::pair<const char*, int32_t> named_ids[] = {
      {"bos", vocabulary.bos}, {"eos", vocabulary.eos}, {"unk", vocabulary.unk}};
  for (const auto& [name, id] : named_ids) {
    if (id == -1 || (id >= 0 && static_cast<size_t>(id) < size)) continue;
    throw Error(std::string("tokenizer: ") + name, id_range(size), std::to_string(id));
  }
  if (vocabulary.add_bos && vocabulary.bos < 0) {
    throw Error("tokenizer: bos", "an id, since the vocabulary asks for it before every text",
                "none");
  }
}

}  // namespace

Tokenizer::Tokenizer(const Vocabulary& vocabulary)
    : types_(vocabulary.types),
      bos_(vocabulary.bos),
      eos_(vocabulary.eos),
      add_bos_(vocabulary.add_bos),
      adds_space_prefix_(vocabulary.model == TokenizerModel::kSentencePiece &&
                         vocabulary.add_space_prefix) {
  check(vocabulary);
  texts_ = TokenTable(vocabulary.tokens);
  if (types_.empty()) types_.assign(vocabulary.tokens.size(), TokenType::kNormal);
  if (vocabulary.model == TokenizerModel::kByteBpe) {
    model_.emplace<ByteBpe>(vocabulary, texts_, types_);
  } else {
    model_.emplace<SentencePiece>(vocabulary, types_);
  }

  for (int32_t id = 0; id < size(); ++id) {
    const TokenType type = types_[id];
    if (type == TokenType::kControl || type == TokenType::kUnknown) {
      all_special_.add(texts_[id], id);
    } else if (type == TokenType::kUserDefined) {
      const std::string bytes = token_bytes(id);
      user_defined_.add(bytes, id);
      all_special_.add(bytes, id);
    }
  }
}

std::vector<int32_t> Tokenizer::encode(std::string_view text, bool parse_special) const {
  if (text.size() > kMaxTextBytes) {
    throw Error("tokenizer: text", "at most " + std::to_string(kMaxTextBytes) + " bytes",
                std::to_string(text.size()));
  }
  const SpecialTokens& special = parse_special ? all_special_ : user_defined_;
  std::vector<int32_t> ids;
  size_t ordinary = 0;  // where the ordinary text since the last special token begins
  for (size_t i = 0; i < text.size();) {
    const SpecialTokens::Match match = special.longest_at_start(text.substr(i));
    if (match.id < 0) {
      ++i;
      continue;
    }
    encode_ordinary(text.substr(ordinary, i - ordinary), ids);
    ids.push_back(match.id);
    i += match.length;
    ordinary = i;
  }
  encode_ordinary(text.substr(ordinary), ids);
  return ids;
}

void Tokenizer::encode_ordinary(std::string_view text, std::vector<int32_t>& out) const {
  if (const auto* byte_bpe = std::get_if<ByteBpe>(&model_)) {
    byte_bpe->encode(text, texts_, types_, out);
  } else {
    std::get<SentencePiece>(model_).encode(text, out);
  }
}

std::string Tokenizer::decode(std::span<const int32_t> ids) const {
  std::string text;
  for (const int32_t id : ids) text += token_bytes(id);
  if (adds_space_prefix() && text.starts_with(' ')) text.erase(0, 1);
  return text;
}

std::string Tokenizer::token_bytes(int32_t id) const {
  const std::string_view text = token_text(id);
  const TokenType type = types_[id];
  if (type == TokenType::kControl || type == TokenType::kUnknown) return "";
  if (std::holds_alternative<SentencePiece>(model_)) return SentencePiece::token_bytes(text, type);
  // What is found in a text as it is, is written as it is.
  return type == TokenType::kUserDefined ? std::string(text) : ByteBpe::token_bytes(text);
}

std::string_view Tokenizer::token_text(int32_t id) const {
  check_id(id);
  return texts_[id];
}

bool Tokenizer::is_control(int32_t id) const {
  check_id(id);
  return types_[id] == TokenType::kControl;
}

void Tokenizer::check_id(int32_t id) const {
  if (id >= 0 && id < size()) return;
  throw Error("tokenizer: token", id_range(static_cast<size_t>(size())), std::to_string(id));
}

}  // namespace chimera
