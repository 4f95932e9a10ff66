#include "futex.h"

#include <climits>
#include <immintrin.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <thread>
#include <time.h>
#include <unistd.h>

namespace tsvisor {

namespace {

// Nanoseconds. About what two threads that sleep take to hand over to each other and back.
constexpr int64_t kLongestSpin = 60'000;

int64_t Now() {
  timespec time{};
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1'000'000'000 + time.tv_nsec;
}

void Futex(std::atomic<uint32_t>& word, int operation, uint32_t value) {
  static_assert(sizeof word == sizeof(uint32_t));
  syscall(SYS_futex, &word, operation | FUTEX_PRIVATE_FLAG, value, nullptr, nullptr, 0);
}

}  // namespace

void Waiter::WaitWhile(std::atomic<uint32_t>& word, uint32_t value) {
  if (word.load() != value) return;
  static const bool alone = std::thread::hardware_concurrency() == 1;
  const int64_t begin = Now();
  if (spins_ && !alone) {
    do {
      for (int i = 0; i < 16; i++) {
        if (word.load() != value) return;
        _mm_pause();
      }
    } while (Now() - begin < kLongestSpin);
  }
  sleeping_.store(true);
  while (word.load() == value) Futex(word, FUTEX_WAIT, value);
  sleeping_.store(false);
  spins_ = Now() - begin < kLongestSpin;
}

void Waiter::Wake(std::atomic<uint32_t>& word) {
  if (sleeping_.load()) Futex(word, FUTEX_WAKE, INT_MAX);
}

}  // namespace tsvisor
