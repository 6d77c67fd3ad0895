// A model file of any supported format: the header to start with.
//
//   ModelFile model = load_model("models/SmolLM2-135M-Instruct.Q4_1.gguf");
//   Llama llama(*backend, model.tensors);  Tokenizer tokenizer(model.vocabulary);
#pragma once

#include <string>
#include <vector>

#include "engine/llama_tensors.h"
#include "loader/mapped_file.h"
#include "tokenizer/vocabulary.h"

namespace chimera {

// Moving it keeps every view in `tensors` valid: they point into the mapping that `file` owns.
struct ModelFile {
  MappedFile file;
  LlamaTensors tensors;
  Vocabulary vocabulary;              // copies; as long as the embedding has rows
  std::string format;                 // "GGUF v3", "llama2.c"
  std::vector<std::string> warnings;  // one line each: for the user, once
};

// Recognises the format by the file's content, never by its name, and checks the file completely
// but for the values of its matrices. Throws Error: see the readers (llama_gguf.h, llama2c.h); for
// a format that is not supported it says which and what to use instead. Pickles are never opened:
// loading one runs the code in it.
ModelFile load_model(const std::string& path);

}  // namespace chimera
