// What the tools ask the operating system and the hardware.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "engine/backend.h"
#include "engine/cpu/thread_pool.h"

namespace chimera {

size_t peak_memory_bytes();    // of this process, so far
void return_freed_memory();    // to the system, which malloc() does not do by itself
std::string cpu_model();       // "AMD EPYC"; empty if the system does not say
std::string cpu_generation();  // " 25/17": family and model, since names can be alike

// How fast this machine can read memory: what bounds plain decoding, which reads every weight once
// for every token.
class ReadBandwidth {
 public:
  // A buffer as large as what the engine reads, and as many threads as read it there.
  ReadBandwidth(size_t bytes, int threads);

  // GB/s (1e9) of the fastest pass of plain loads in a fifth of a second. (A limit should not
  // depend on what else the machine is doing.)
  double measure();

 private:
  size_t share_;  // bytes a thread
  cpu::ThreadPool pool_;
  std::shared_ptr<std::byte> buffer_;
  uint64_t sum_ = 0;  // keeps the loads from being optimised away
};

// What it takes `threads` threads to wait for each other after a job, though all come at the same
// time: a thousand short jobs beside one that is as long.
double meeting_seconds(int threads);

// GB/s at which what the backend computes with can read `bytes` of its memory.
double read_bandwidth(const Backend& backend, size_t bytes, int threads);

}  // namespace chimera
