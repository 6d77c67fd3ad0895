// Counts every `new` of the test program.
#pragma once

#include <cstdint>

namespace chimera::test {

int64_t allocation_count();

}  // namespace chimera::test
