// A small LLaMA with random weights, in each of the eleven weight types: for tests that need a
// model but no figures of somebody else's, so that they run wherever the project builds.
#pragma once

#include <string>

namespace chimera::test {

inline const char* const kQuantTypes[] = {"f32",  "f16",  "bf16", "q8_0", "q4_0", "q4_1",
                                          "q5_0", "q5_1", "q4_k", "q5_k", "q6_k"};

// Its GGUF file in the build folder, made from a fixed seed: hidden 256 (the K types come in blocks
// of that), 2 layers, 4 heads and 2 KV heads of 64, ffn 512, context 2,048; an untied head; 512
// SentencePiece tokens: <unk>, <s>, </s>, the bytes, letters and syllables. Weights have deviations
// of about 1/16, so logits of about 1.
std::string tiny(const std::string& type);

}  // namespace chimera::test
