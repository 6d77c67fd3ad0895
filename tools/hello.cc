// The library in one program: goes on with a text, greedily, guesses by n-gram search.
//
//   build/hello MODEL "Once upon a time"
#include <cstdio>
#include <exception>

#include "engine/generate.h"
#include "loader/load.h"
#include "tokenizer/stream_decoder.h"

int main(int argc, char** argv) try {
  if (argc != 3) return std::fprintf(stderr, "usage: hello MODEL TEXT\n"), 2;
  using namespace chimera;
  const ModelFile file = load_model(argv[1]);
  const Tokenizer tokenizer(file.vocabulary);
  const auto backend = make_backend("cpu", {});
  const Llama llama(*backend, file.tensors);  // packs the weights: the file is not read again

  std::vector<int32_t> prompt = tokenizer.encode(argv[2], /*parse_special=*/false);
  if (tokenizer.add_bos()) prompt.insert(prompt.begin(), tokenizer.bos());
  constexpr int kNew = 64, kNodes = 8;
  const int context = static_cast<int>(prompt.size()) + kNew;
  Session session(llama, {.context = context, .max_nodes = kNodes});
  const auto drafter = make_ngram_drafter({.nodes = kNodes}, 1, context);

  GenerateOptions options;
  options.eos = {tokenizer.eos()};
  StreamDecoder decoder(tokenizer, /*at_text_start=*/false);
  const Generation g = generate(session, drafter.get(), prompt, options, [&](int32_t id) {
    std::printf("%s", decoder.push(id).c_str());
    std::fflush(stdout);
  });
  std::printf("%s\n", decoder.finish().c_str());
  std::fprintf(stderr, "%.2f tokens a pass\n", g.tokens_per_step());
} catch (const std::exception& error) {
  std::fprintf(stderr, "hello: %s\n", error.what());
  return 1;
}
