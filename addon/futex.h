// Waiting for a word that another thread of this process changes: by futex(2), after spinning where that has paid.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <immintrin.h>

namespace tsvisor {

// How long a waiter spins before it sleeps. A hand-over between two threads that sleep costs several times what KVM takes
// for an exit, one between threads that spin next to nothing; but who spins in vain takes a core from a vCPU. So it spins
// only after a wait that was short, as KVM does when a vCPU halts (halt_poll_ns).
class Waiter {
 public:
  // Returns once the word is not `value`. One thread at a time.
  void WaitWhile(std::atomic<uint32_t>& word, uint32_t value) {
    if (!SpinWhile(word, value, [] { return false; }, 0)) SleepWhile(word, value);
  }
  // Its two parts. Spins, where that has paid, or for `anyway` nanoseconds: whether the word has changed, or what done()
  // says, before it was in vain.
  template <typename Done>
  bool SpinWhile(std::atomic<uint32_t>& word, uint32_t value, Done done, int64_t anyway) {
    if (word.load() != value || done()) return true;
    begin_ = Now();
    const int64_t longest = Alone() ? 0 : std::max(anyway, spins_ ? kLongestSpin : 0);
    if (longest == 0) return false;
    do {
      for (int i = 0; i < 16; i++) {
        if (word.load() != value || done()) return true;
        _mm_pause();
      }
    } while (Now() - begin_ < longest);
    spins_ = false;
    return false;
  }
  void SleepWhile(std::atomic<uint32_t>& word, uint32_t value);
  // For who has changed the word.
  void Wake(std::atomic<uint32_t>& word);

 private:
  // Nanoseconds. About what two threads that sleep take to hand over to each other and back.
  static constexpr int64_t kLongestSpin = 60'000;

  static int64_t Now();
  // On one processor, what it waits for does not happen while it spins.
  static bool Alone();

  std::atomic<bool> sleeping_{false};
  bool spins_ = false;
  int64_t begin_ = 0;  // of the wait
};

}  // namespace tsvisor
