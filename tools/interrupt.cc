#include "tools/interrupt.h"

#include <utility>

namespace chimera {
namespace {

volatile std::sig_atomic_t signalled = 0;  // its number

}  // namespace

Interrupt::Interrupt() {
  signalled = 0;
  struct sigaction action = {};
  action.sa_handler = [](int signal) { signalled = signal; };
  action.sa_flags = static_cast<int>(SA_RESETHAND | SA_RESTART);
  // What the parent ignores for us (a script's job in the background: Ctrl-C is the script's) stays
  // so.
  for (const auto& [signal, before] : {std::pair{SIGINT, &interrupt_}, {SIGTERM, &terminate_}}) {
    sigaction(signal, &action, before);
    if (before->sa_handler == SIG_IGN) sigaction(signal, before, nullptr);
  }
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
