// Ctrl-C, or SIGTERM, while something is under way that can end cleanly: the first one asks it to,
// the second, if that takes too long, ends the program. Without an Interrupt the first one does.
#pragma once

#include <csignal>

namespace chimera {

// Stop: nothing is wrong, and all is said. main.cc catches it.
struct Interrupted {
  int exit_code;
};

class Interrupt {
 public:
  Interrupt();
  ~Interrupt();  // what was there before is back
  Interrupt(const Interrupt&) = delete;
  Interrupt& operator=(const Interrupt&) = delete;

  bool asked() const;
  int exit_code() const;  // 0, or 128 + the signal's number once it has asked
  void check() const;     // throws Interrupted once it has asked

 private:
  struct sigaction interrupt_, terminate_;  // what was there before
};

}  // namespace chimera
