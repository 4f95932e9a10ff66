// Waiting for a word that another thread of this process changes: by futex(2), after spinning where that has paid.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <immintrin.h>
#include <sched.h>

namespace tsvisor {

// How long a waiter spins before it sleeps. A hand-over between two threads that sleep costs several times what KVM takes
// for an exit, one between threads that spin next to nothing; but who spins in vain takes a core from a vCPU. So it spins
// only after a wait that was short, as KVM does when a vCPU halts (halt_poll_ns), and leaves the core to any other thread
// that could run there: that may be the one it waits for.
class Spinner {
 public:
  // Spins, where that has paid, or for `anyway` nanoseconds: whether done() was true before it was in vain.
  template <typename Done>
  bool Spin(Done done, int64_t anyway = 0) {
    if (done()) return true;
    begin_ = Now();
    const int64_t longest = Alone() ? 0 : std::max(anyway, spins_ ? kLongestSpin : 0);
    if (longest == 0) return false;
    do {
      for (int i = 0; i < 16; i++) {
        if (done()) return true;
        _mm_pause();
      }
      sched_yield();
    } while (Now() - begin_ < longest);
    spins_ = false;
    return false;
  }
  // It has slept since it spun in vain, and what it waited for is there.
  void Slept() { spins_ = Now() - begin_ < kLongestSpin; }

 private:
  // Nanoseconds. About what two threads that sleep take to hand over to each other and back.
  static constexpr int64_t kLongestSpin = 60'000;

  static int64_t Now();
  // On one processor, what it waits for does not happen while it spins.
  static bool Alone();

  bool spins_ = false;
  int64_t begin_ = 0;  // of the wait
};

// Spins, then sleeps. One thread at a time.
class Waiter {
 public:
  // Returns once the word is not `value`.
  void WaitWhile(std::atomic<uint32_t>& word, uint32_t value) {
    if (!SpinWhile(word, value, [] { return false; }, 0)) SleepWhile(word, value);
  }
  // Its two parts. The first is over when done() says so, too: whether it was before it was in vain.
  template <typename Done>
  bool SpinWhile(std::atomic<uint32_t>& word, uint32_t value, Done done, int64_t anyway) {
    return spinner_.Spin([&] { return word.load() != value || done(); }, anyway);
  }
  void SleepWhile(std::atomic<uint32_t>& word, uint32_t value);
  // For who has changed the word.
  void Wake(std::atomic<uint32_t>& word);

 private:
  Spinner spinner_;
  std::atomic<bool> sleeping_{false};
};

}  // namespace tsvisor
