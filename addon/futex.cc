#include "futex.h"

#include <climits>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <thread>
#include <time.h>
#include <unistd.h>

namespace tsvisor {

namespace {

void Futex(std::atomic<uint32_t>& word, int operation, uint32_t value) {
  static_assert(sizeof word == sizeof(uint32_t));
  syscall(SYS_futex, &word, operation | FUTEX_PRIVATE_FLAG, value, nullptr, nullptr, 0);
}

}  // namespace

int64_t Spinner::Now() {
  timespec time{};
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1'000'000'000 + time.tv_nsec;
}

bool Spinner::Alone() {
  static const bool alone = std::thread::hardware_concurrency() == 1;
  return alone;
}

void Waiter::SleepWhile(std::atomic<uint32_t>& word, uint32_t value) {
  sleeping_.store(true);
  while (word.load() == value) Futex(word, FUTEX_WAIT, value);
  sleeping_.store(false);
  spinner_.Slept();
}

void Waiter::Wake(std::atomic<uint32_t>& word) {
  if (sleeping_.load()) Futex(word, FUTEX_WAKE, INT_MAX);
}

}  // namespace tsvisor
