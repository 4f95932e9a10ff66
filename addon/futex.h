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
// only after a wait that was short, as KVM does when a vCPU halts (halt_poll_ns). What it waits for may be done by a thread
// that stands behind it in the queue of its core: then it yields, but not for a while after another thread has taken a
// whole time slice of that. Where there are more threads than cores every wait would be as long.
class Spinner {
 public:
  // Spins, where that has paid, or for `anyway` nanoseconds: whether done() was true before it was in vain.
  template <typename Done>
  bool Spin(Done done, int64_t anyway, bool yields) {
    if (done()) return true;
    begin_ = Now();
    const int64_t longest = Alone() ? 0 : std::max(anyway, spins_ ? kLongestSpin : 0);
    if (longest == 0) return false;
    if (yields && noYield_ > 0) noYield_--;
    int64_t now;
    do {
      for (int i = 0; i < 16; i++) {
        if (done()) return true;
        _mm_pause();
      }
      now = Now();
      if (!yields || noYield_ > 0) continue;
      sched_yield();
      const int64_t before = now;
      now = Now();
      if (now - before > kLongYield) noYield_ = kNoYield;
    } while (now - begin_ < longest);
    spins_ = false;
    return false;
  }
  // It has slept since it spun in vain, and what it waited for is there.
  void Slept() { spins_ = Now() - begin_ < kLongestSpin; }

 private:
  // Nanoseconds. About what two threads that sleep take to hand over to each other and back.
  static constexpr int64_t kLongestSpin = 60'000;
  static constexpr int64_t kLongYield = 1'000'000;  // less than a time slice, more than any I/O out of the page cache
  static constexpr uint32_t kNoYield = 30;          // waits

  static int64_t Now();
  // On one processor, what it waits for does not happen while it spins.
  static bool Alone();

  bool spins_ = false;
  uint32_t noYield_ = 0;  // so many waits
  int64_t begin_ = 0;  // of the wait
};

// Spins, then sleeps. One thread at a time.
class Waiter {
 public:
  // Returns once the word is not `value`.
  void WaitWhile(std::atomic<uint32_t>& word, uint32_t value) {
    if (!SpinWhile(word, value, [] { return false; }, 0, false)) SleepWhile(word, value);
  }
  // Its two parts. The first is over when done() says so, too: whether it was before it was in vain.
  template <typename Done>
  bool SpinWhile(std::atomic<uint32_t>& word, uint32_t value, Done done, int64_t anyway, bool yields) {
    return spinner_.Spin([&] { return word.load() != value || done(); }, anyway, yields);
  }
  void SleepWhile(std::atomic<uint32_t>& word, uint32_t value);
  // For who has changed the word.
  void Wake(std::atomic<uint32_t>& word);

 private:
  Spinner spinner_;
  std::atomic<bool> sleeping_{false};
};

}  // namespace tsvisor
