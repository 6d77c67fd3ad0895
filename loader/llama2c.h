// Models of llama2.c (https://github.com/karpathy/llama2.c): the version 0 checkpoint, and the
// tokenizer that lies beside it.
//
// Checkpoint: seven i32 (dim, hidden_dim, layers, heads, kv_heads, vocab_size, seq_len), then f32:
// tok_embeddings, then for all layers at once att_norm, wq, wk, wv, wo, ffn_norm, w1, w2, w3, then
// final_norm, two tables of RoPE angles (unused here), and the classifier if vocab_size is
// negative. There is no magic: the header must account for the file's size to the byte.
#pragma once

#include <cstddef>
#include <span>
#include <string>

#include "engine/llama_tensors.h"
#include "tokenizer/vocabulary.h"

namespace chimera {

// Whether the file begins with values that a version 0 header could have. Other formats and text
// do not.
bool looks_like_llama2c(std::span<const std::byte> bytes);

// The views point into `bytes`. RoPE base 10000 and epsilon 1e-5 are llama2.c's constants; wq and
// wk are stored for pairs (2i, 2i+1), and the views say so. Throws Error, which names the file
// `name`, for values that make no sense, a size that does not match, or norm weights that are not
// finite.
LlamaTensors read_llama2c(std::span<const std::byte> bytes, const std::string& name);

// A tokenizer.bin: i32 longest token, then for each of `vocab_size` tokens f32 score, i32 length,
// text. Throws Error if it holds more or fewer tokens, or is damaged.
//
// The file has spaces for SentencePiece's U+2581 and newlines around <s> and </s>; the vocabulary
// gets the SentencePiece form back. Ids are fixed as llama2.c fixes them: 0 unknown, 1 <s>, 2 </s>,
// 3 to 258 the byte tokens. eos is 1 as well as bos: the training text has <s> between stories and
// never </s>, and llama2.c stops at <s>.
Vocabulary read_llama2c_vocabulary(std::span<const std::byte> bytes, const std::string& name,
                                   int vocab_size);

// The vocabulary beside a checkpoint: the first of tokN.bin, tokenizer.bin, tokN.model and
// tokenizer.model (N: vocab_size) in the checkpoint's folder; *.model is read as SentencePiece's
// own format (sentencepiece.h), with eos set to 1 as above. Throws Error if there is none.
Vocabulary load_llama2c_vocabulary(const std::string& checkpoint_path, int vocab_size);

}  // namespace chimera
