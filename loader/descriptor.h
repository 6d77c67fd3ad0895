// A file as the system sees it, for what streams cannot do: locking it, and cutting it.
#pragma once

#include <string>

namespace chimera {

class Descriptor {
 public:
  // Opened for reading and writing, made if there is none. Throws Error.
  explicit Descriptor(const std::string& path);
  ~Descriptor();
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;

  int number() const { return number_; }
  // Until it is closed. Throws Error if another process has it. Some file systems have no locks:
  // there it is up to the user.
  void lock();

 private:
  std::string name_;
  int number_;
};

}  // namespace chimera
