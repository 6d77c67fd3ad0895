#include "engine/backend.h"

#include "engine/error.h"

namespace chimera {

std::unique_ptr<Backend> make_backend(const std::string& name, const BackendOptions& options) {
  if (name == "cpu") return make_cpu_backend(options);
  if (name == "cuda") return make_cuda_backend(options);
  if (name == "auto")
    return cuda_available() ? make_cuda_backend(options) : make_cpu_backend(options);
  throw Error("device", "cpu, cuda or auto", in_quotes(name));
}

}  // namespace chimera
