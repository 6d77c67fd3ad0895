// SentencePiece's own file, tokenizer.model: a protocol buffer, of which this reads
//
//   ModelProto:     1 pieces (repeated), 2 trainer_spec, 3 normalizer_spec
//   piece:          1 text, 2 score (f32), 3 type (as TokenType numbers them; 1 if absent)
//   trainer_spec:   3 model_type (2: BPE; 1, unigram, if absent), 40 unk_id, 41 bos_id, 42 eos_id
//   normalizer_spec: 2 precompiled_charsmap, 3 add_dummy_prefix
//
// (https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto)
#pragma once

#include <cstddef>
#include <span>
#include <string>

#include "tokenizer/vocabulary.h"

namespace chimera {

// Throws Error, which names the file `name`, if the file is damaged, is not a BPE model, maps
// characters before it splits text, has scores that are not finite, or has special ids outside the
// vocabulary. Runs of spaces stay as they are, whatever remove_extra_whitespaces says: so does
// llama2.c, and its models are compared with what it makes of them.
Vocabulary read_sentencepiece(std::span<const std::byte> bytes, const std::string& name);

}  // namespace chimera
