// The draft model's file: safetensors with BF16 weights under the names of DraftTensors' members,
// an I32 `vocabulary`, and metadata:
//
//   chimera_draft         "1", the format version
//   target_name           the model it was trained for
//   target_fingerprint    fingerprint() of it
//   config                JSON: DraftConfig's members by name; trigram, slot_features and the
//                         calibrations only where they are not the default
//   training              JSON: how it was made
//   licence
#pragma once

#include <span>
#include <string>

#include "engine/chimera/draft_tensors.h"
#include "engine/llama_tensors.h"
#include "tokenizer/vocabulary.h"

namespace chimera {

// Throws Error for a file that is not exactly such a draft. Pickles are never opened.
DraftTensors load_draft(const std::string& path);
// Throws Error, which begins and ends so, where an id is negative or there twice.
void check_vocabulary(std::span<const int32_t> ids, const std::string& where,
                      const std::string& hint);

// There is never half a file of that name.
void save_draft(const DraftTensors& draft, const std::string& path);

// 16 hex digits over a model's configuration, its tensors' types, shapes and a sample of their
// bytes, and the texts of its tokens: two models with the same have the same states.
std::string fingerprint(const LlamaTensors& tensors, const Vocabulary& vocabulary);

}  // namespace chimera
