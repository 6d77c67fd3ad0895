#include "tokenizer/sentencepiece.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "engine/error.h"
#include "tokenizer/unicode.h"

namespace chimera {
namespace {

constexpr std::string_view kSpaceMark = "\u2581";

void append_with_spaces(std::string_view text, std::string& out) {
  size_t mark;
  while ((mark = text.find(kSpaceMark)) != std::string_view::npos) {
    out += text.substr(0, mark);
    out += ' ';
    text.remove_prefix(mark + kSpaceMark.size());
  }
  out += text;
}

// The value of a hexadecimal digit, or -1.
int digit_value(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  return -1;
}

// The byte of "<0x0A>".
uint8_t parse_byte_token(std::string_view text) {
  const bool framed = text.size() == 6 && text.starts_with("<0x") && text.ends_with('>');
  const int high = framed ? digit_value(text[3]) : -1;
  const int low = framed ? digit_value(text[4]) : -1;
  if (high < 0 || low < 0) {
    throw Error("tokenizer: byte token", "'<0x00>' to '<0xFF>'", in_quotes(text));
  }
  return static_cast<uint8_t>(high << 4 | low);
}

}  // namespace

SentencePiece::SentencePiece(const Vocabulary& vocabulary, const std::vector<TokenType>& types)
    : add_space_prefix_(vocabulary.add_space_prefix), unknown_(vocabulary.unk) {
  const std::vector<float>& scores = vocabulary.scores;
  const size_t size = vocabulary.tokens.size();
  if (scores.size() != size) {
    throw Error("tokenizer: scores", std::to_string(size) + ", one for each token",
                std::to_string(scores.size()));
  }
  for (size_t i = 0; i < size; ++i) {
    if (!std::isfinite(scores[i])) {
      throw Error("tokenizer: score of token " + std::to_string(i), "a finite number",
                  std::to_string(scores[i]));
    }
  }

  byte_ids_.fill(-1);
  for (size_t i = 0; i < size; ++i) {
    if (types[i] != TokenType::kByte) continue;
    int32_t& id = byte_ids_[parse_byte_token(vocabulary.tokens[i])];
    if (id < 0) id = static_cast<int32_t>(i);
    has_byte_tokens_ = true;
  }
  const auto missing = std::count(byte_ids_.begin(), byte_ids_.end(), -1);
  if (has_byte_tokens_ && missing > 0) {
    throw Error("tokenizer", "256 byte tokens", std::to_string(256 - missing),
                "a text with the missing bytes could not be encoded");
  }
  if (!has_byte_tokens_ && unknown_ < 0) {
    throw Error("tokenizer", "byte tokens or an unknown token", "neither",
                "a character outside the vocabulary could not be encoded");
  }

  std::vector<int32_t> by_score(size);
  std::iota(by_score.begin(), by_score.end(), 0);
  std::stable_sort(by_score.begin(), by_score.end(),
                   [&](int32_t a, int32_t b) { return scores[a] > scores[b]; });
  std::vector<std::string> texts;
  uint32_t rank = 0;
  for (size_t i = 0; i < size; ++i) {
    const int32_t id = by_score[i];
    if (i > 0 && scores[id] != scores[by_score[i - 1]]) ++rank;
    const TokenType type = types[id];
    if (type != TokenType::kNormal && type != TokenType::kUserDefined) continue;
    std::string text = token_bytes(vocabulary.tokens[id], type);
    longest_piece_ = std::max(longest_piece_, text.size());
    if (text.find(' ', text.find_first_not_of(' ')) != std::string::npos) {
      spaces_start_pieces_ = false;
    }
    texts.push_back(std::move(text));
    pieces_.push_back({id, rank});
  }
  piece_texts_ = TokenTable(texts);
  // Of equal texts the first token counts, with its own rank.
  for (int32_t i = 0; i < piece_texts_.size(); ++i) {
    Piece& found = pieces_[piece_texts_.find(texts[i])];
    if (pieces_[i].id < found.id) found = pieces_[i];
  }
}

const SentencePiece::Piece* SentencePiece::find(std::string_view text) const {
  if (text.size() > longest_piece_) return nullptr;
  const int32_t found = piece_texts_.find(text);
  return found < 0 ? nullptr : &pieces_[found];
}

void SentencePiece::encode(std::string_view text, std::vector<int32_t>& out) const {
  if (text.empty()) return;
  std::string spaced = add_space_prefix_ ? " " : "";
  append_with_spaces(text, spaced);

  // Where no piece reaches from a character into a space behind it, nothing merges across that
  // place: word by word gives the same tokens, from a queue that stays small.
  MergeQueue queue;
  std::string_view rest = spaced;
  while (!rest.empty()) {
    const size_t word_end =
        spaces_start_pieces_ ? rest.find(' ', rest.find_first_not_of(' ')) : rest.size();
    const std::string_view word = rest.substr(0, word_end);
    encode_word(word, queue, out);
    rest.remove_prefix(word.size());
  }
}

void SentencePiece::encode_word(std::string_view word, MergeQueue& queue,
                                std::vector<int32_t>& out) const {
  queue.clear();
  for (size_t i = 0; i < word.size();) {
    const uint32_t length = first_utf8_char(word.substr(i)).length;
    const Piece* piece = find(word.substr(i, length));
    queue.add(piece ? piece->id : -1, static_cast<uint32_t>(i), length);
    i += length;
  }
  queue.run([&](const Symbol& left, const Symbol& right) -> Merge {
    const Piece* piece = find(word.substr(left.begin, left.length + right.length));
    return piece ? Merge{piece->rank, piece->id} : kNoMerge;
  });
  queue.for_each([&](const Symbol& symbol) {
    if (symbol.id >= 0) {
      out.push_back(symbol.id);
    } else if (!has_byte_tokens_) {
      out.push_back(unknown_);
    } else {
      for (const char byte : word.substr(symbol.begin, symbol.length)) {
        out.push_back(byte_ids_[static_cast<unsigned char>(byte)]);
      }
    }
  });
}

std::string SentencePiece::token_bytes(std::string_view token_text, TokenType type) {
  if (type == TokenType::kByte) {
    return std::string(1, static_cast<char>(parse_byte_token(token_text)));
  }
  std::string bytes;
  append_with_spaces(token_text, bytes);
  return bytes;
}

}  // namespace chimera
