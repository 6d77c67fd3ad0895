#include "tools/interrupt.h"

namespace chimera {
namespace {

volatile std::sig_atomic_t signalled = 0;  // its number

}  // namespace

Interrupt::Interrupt() {
  signalled = 0;
  struct sigaction action = {};
  action.sa_handler = [](int signal) { signalled = signal; };
  action.sa_flags = static_cast<int>(SA_RESETHAND | SA_RESTART);
  sigaction(SIGINT, &action, &interrupt_);
  sigaction(SIGTERM, &action, &terminate_);
}

Interrupt::~Interrupt() {
  sigaction(SIGINT, &interrupt_, nullptr);
  sigaction(SIGTERM, &terminate_, nullptr);
}

bool Interrupt::asked() const {
  return signalled != 0;
}

int Interrupt::exit_code() const {
  return asked() ? 128 + signalled : 0;
}

void Interrupt::check() const {
  if (asked()) throw Interrupted{exit_code()};
}

}  // namespace chimera
