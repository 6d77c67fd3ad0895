// What the engine's tests share: where data is, models loaded once, backends by instruction set.
#pragma once

#include <gtest/gtest.h>
#include <sys/wait.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "engine/cpu/kernels.h"
#include "engine/generate.h"
#include "loader/load.h"
#include "tests/tiny_model.h"
#include "tokenizer/chat.h"
#include "tokenizer/tokenizer.h"

namespace chimera::test {

// Data that is not part of the project: golden files, models, prompts. Tests run in the checkout's
// root.
inline std::string shared(const std::string& path) {
  return "../shared/data/" + path;
}
inline const char* const kSmolLm2 = "models/SmolLM2-135M-Instruct.Q4_1.gguf";
inline const char* const kDraft = "models/smollm2-135m-instruct.chimera.safetensors";

#define SKIP_WITHOUT(path)                                                   \
  if (const std::string missing = (path); !std::filesystem::exists(missing)) \
  GTEST_SKIP() << "needs " << missing

// A backend of one instruction set, whatever the environment says.
inline std::unique_ptr<Backend> backend_of(const std::string& isa, int threads) {
  const char* old = std::getenv("CHIMERA_ISA");
  const std::string saved = old ? old : "";
  setenv("CHIMERA_ISA", isa.c_str(), 1);
  auto backend = make_backend("cpu", {threads});
  if (saved.empty())
    unsetenv("CHIMERA_ISA");
  else
    setenv("CHIMERA_ISA", saved.c_str(), 1);
  return backend;
}

// The instruction sets of this machine, the scalar reference first.
inline std::vector<std::string> isas() {
  std::vector<std::string> names = {"scalar"};
  if (cpu::machine_has(cpu::Isa::kAvx2)) names.push_back("avx2");
  if (cpu::machine_has(cpu::Isa::kAvxVnni)) names.push_back("avxvnni");
  if (cpu::machine_has(cpu::Isa::kAvx512)) names.push_back("avx512");
  if (cpu::machine_has(cpu::Isa::kAmx)) names.push_back("amx");
  if (cpu::machine_has(cpu::Isa::kNeon)) names.push_back("neon");
  return names;
}

// A model with its weights prepared for one backend.
struct Loaded {
  ModelFile file;
  std::unique_ptr<Backend> backend;
  std::unique_ptr<Llama> model;
};
inline Loaded load(const std::string& path, const std::string& isa, int threads) {
  Loaded l{load_model(path), backend_of(isa, threads), nullptr};
  l.model = std::make_unique<Llama>(*l.backend, l.file.tensors);
  return l;
}

inline std::vector<float> floats_of(const TensorView& view) {
  std::vector<float> values(static_cast<size_t>(view.rows * view.cols));
  for (int64_t r = 0; r < view.rows; ++r)
    dequantize_row(view.type, view.row(r), view.cols, values.data() + r * view.cols);
  return values;
}

template <typename T>
std::vector<T> read_array(const std::string& path) {
  std::vector<T> data(std::filesystem::file_size(path) / sizeof(T));
  std::ifstream(path, std::ios::binary)
      .read(reinterpret_cast<char*>(data.data()),
            static_cast<std::streamsize>(data.size() * sizeof(T)));
  return data;
}

inline std::string read_text(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// A shell's command: its exit code, -1 where a signal ended it, and its standard output.
struct Ran {
  int code = -1;
  std::string out;
};
inline Ran run(const std::string& command) {
  Ran ran;
  std::FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return ran;
  char buffer[4096];
  for (size_t n; (n = std::fread(buffer, 1, sizeof buffer, pipe)) > 0;) ran.out.append(buffer, n);
  const int status = pclose(pipe);
  if (WIFEXITED(status)) ran.code = WEXITSTATUS(status);
  return ran;
}

inline std::vector<int32_t> random_tokens(std::mt19937& random, int n, int vocab) {
  std::vector<int32_t> ids(static_cast<size_t>(n));
  for (int32_t& id : ids) id = static_cast<int32_t>(random() % static_cast<unsigned>(vocab));
  return ids;
}

// First turns of MT-bench, or of another file of its kind, in SmolLM2's chat format.
inline std::vector<std::vector<int32_t>> test_prompts(size_t n, const Vocabulary& vocabulary,
                                                      const std::string& name = "mt_bench.jsonl") {
  const Tokenizer tokenizer(vocabulary);
  std::ifstream file(shared("prompts/" + name));
  std::vector<std::vector<int32_t>> prompts;
  for (std::string line; prompts.size() < n && std::getline(file, line);) {
    const Message message{"user", nlohmann::json::parse(line)["turns"][0].get<std::string>()};
    prompts.push_back(encode_chat(tokenizer, ChatFormat::kChatMl, {&message, 1}, "assistant"));
  }
  return prompts;
}

}  // namespace chimera::test
