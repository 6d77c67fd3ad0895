#include "loader/descriptor.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "engine/error.h"

namespace chimera {

Descriptor::Descriptor(const std::string& path)
    : name_(printable(path, 4096)),
      number_(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666)) {
  if (number_ < 0) throw Error(name_, "a file that can be read and written", std::strerror(errno));
}

Descriptor::~Descriptor() {
  close(number_);
}

void Descriptor::lock() {
  if (flock(number_, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
    throw Error(name_, "no other run that adds to it", "one", "wait until that has ended");
}

}  // namespace chimera
