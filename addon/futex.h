// Waiting for a word that another thread of this process changes: by futex(2), after spinning where that has paid.
#pragma once

#include <atomic>
#include <cstdint>

namespace tsvisor {

// How long a waiter spins before it sleeps. A hand-over between two threads that sleep costs several times what KVM takes
// for an exit, one between threads that spin next to nothing; but who spins in vain takes a core from a vCPU. So it spins
// only after a wait that was short, as KVM does when a vCPU halts (halt_poll_ns).
class Waiter {
 public:
  // Returns once the word is not `value`. One thread at a time.
  void WaitWhile(std::atomic<uint32_t>& word, uint32_t value);
  // For who has changed the word.
  void Wake(std::atomic<uint32_t>& word);

 private:
  std::atomic<bool> sleeping_{false};
  bool spins_ = false;
};

}  // namespace tsvisor
