// Where the tests of the CUDA backend run: under the emulator on every machine, and on the device
// as well where there is one, or only there (gpu_check.sh).
#pragma once

#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "cuda/emulated_backend.h"
#include "tests/support.h"

namespace chimera::test {

inline std::vector<std::string> devices() {
  const char* only = std::getenv("CHIMERA_TEST_DEVICE");
  if (only != nullptr) return {only};
  std::vector<std::string> names = {"emulated"};
  if (cuda_available()) names.push_back("cuda");
  return names;
}
inline std::unique_ptr<Backend> backend_on(const std::string& device, bool eager = false) {
  const BackendOptions options{.eager = eager};
  return device == "cuda" ? make_cuda_backend(options) : make_emulated_cuda_backend(options);
}
inline Loaded load_on(const std::string& device, const std::string& path, bool eager = false) {
  Loaded l{load_model(path), backend_on(device, eager), nullptr};
  l.model = std::make_unique<Llama>(*l.backend, l.file.tensors);
  return l;
}

}  // namespace chimera::test
