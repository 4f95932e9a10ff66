#include "vcpu.h"

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <sched.h>
#include <sys/ioctl.h>
#include <utility>

namespace tsvisor {

// The first real-time one that this process has no handler for. Installed once.
int KickSignal() {
  static const int signal = [] {
    for (int candidate = SIGRTMIN; candidate <= SIGRTMAX; candidate++) {
      struct sigaction current {};
      if (sigaction(candidate, nullptr, &current) != 0 || current.sa_handler != SIG_DFL) continue;
      struct sigaction action {};
      action.sa_handler = [](int) {};
      if (sigaction(candidate, &action, nullptr) == 0) return candidate;
    }
    return 0;
  }();
  return signal;
}

void UnblockKickSignal() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, KickSignal());
  pthread_sigmask(SIG_UNBLOCK, &set, nullptr);
}

Vcpu::Vcpu(int fd, std::shared_ptr<Pages> pages) : fd_(fd), pages_(std::move(pages)), runner_(pthread_self()) {}

Vcpu::Vcpu(int fd, std::shared_ptr<Pages> pages, const std::atomic<bool>& halted, std::function<void()> onExit)
    : Vcpu(fd, std::move(pages)) {
  // Signals of the process are for its other threads.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, &before);
  thread_ = std::thread([this, &halted, onExit = std::move(onExit)] { Run(halted, onExit); });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  runner_ = thread_.native_handle();
  pthread_setname_np(runner_, "tsvisor-vcpu");
}

Vcpu::~Vcpu() {
  if (inlined()) return;
  BeginStop();
  AwaitOwner();
  Give(kQuit);
  thread_.join();
}

void Vcpu::Kick() {
  __atomic_store_n(&run()->immediate_exit, 1, __ATOMIC_SEQ_CST);
  if (inGuest_.load()) pthread_kill(runner_, KickSignal());
}

int32_t Vcpu::Leave() {
  int result = ioctl(fd_, KVM_RUN, 0);
  int error = errno;
  inGuest_.store(false, std::memory_order_relaxed);
  if (result >= 0) return static_cast<int32_t>(run()->exit_reason);
  // EINTR: kicked, or a signal of the process. EAGAIN: an application processor that got its SIPI (KVM API 4.10).
  if (error == EINTR || error == EAGAIN) return -1;
  this->error = error;
  return kFailed;
}

int32_t Vcpu::FinishInstruction() {
  __atomic_store_n(&run()->immediate_exit, 1, __ATOMIC_SEQ_CST);  // who enters clears it
  if (ioctl(fd_, KVM_RUN, 0) >= 0) return static_cast<int32_t>(run()->exit_reason) + 1;
  return errno == EINTR || errno == EAGAIN ? 0 : -errno;
}

int32_t Vcpu::Settle() {
  if (inlined()) return FinishInstruction();
  if (hasExit_) {
    int32_t exit = TakeExit();
    return exit == kFailed ? -error : exit + 1;
  }
  Give(kSettle);
  AwaitOwner();
  return result_;
}

int32_t Vcpu::TakeExit() {
  hasExit_ = deferred = false;
  return result_;
}

void Vcpu::Give(Turn turn) {
  turn_.store(turn);
  ours_.Wake(turn_);
}

void Vcpu::BeginStop() {
  if (turn_.load() == kOwner) return;
  stopping_.store(true);
  Kick();
}

void Vcpu::AwaitOwner() {
  for (uint32_t turn; (turn = turn_.load()) != kOwner;) owners_.WaitWhile(turn_, turn);
  stopping_.store(false);
}

void Vcpu::AddDoorbell(Doorbell doorbell) {
  std::lock_guard<std::mutex> lock(doorbellsMutex_);
  doorbells_.push_back(std::move(doorbell));
}

void Vcpu::RemoveDoorbells(const void* owner) {
  std::lock_guard<std::mutex> lock(doorbellsMutex_);
  auto isOwners = [owner](const Doorbell& doorbell) { return doorbell.owner == owner; };
  doorbells_.erase(std::remove_if(doorbells_.begin(), doorbells_.end(), isOwners), doorbells_.end());
}

// Whether the exit is one that needs nobody but a doorbell.
bool Vcpu::Rings() {
  const auto& mmio = run()->mmio;
  if (result_ != KVM_EXIT_MMIO || !mmio.is_write || mmio.len != sizeof(uint32_t)) return false;
  uint32_t value;
  memcpy(&value, mmio.data, sizeof value);
  std::lock_guard<std::mutex> lock(doorbellsMutex_);
  for (const Doorbell& doorbell : doorbells_) {
    if (doorbell.gpa != mmio.phys_addr || doorbell.value != value) continue;
    doorbell.ring();
    return true;
  }
  return false;
}

void Vcpu::Run(const std::atomic<bool>& halted, const std::function<void()>& onExit) {
  UnblockKickSignal();
  for (;;) {
    ours_.WaitWhile(turn_, kOwner);
    const uint32_t turn = turn_.load();
    if (turn == kQuit) return;
    if (turn == kSettle) {
      result_ = FinishInstruction();
    } else {
      bool out = false;
      do {
        processor_.store(sched_getcpu(), std::memory_order_relaxed);
        result_ = Enter([&] { return out = stopping_.load() || halted.load(); });
      } while ((result_ < 0 && !out) || (!halted.load() && Rings()));
      hasExit_ = result_ >= 0 && !halted.load();
    }
    const bool exited = turn == kGuest && hasExit_;
    turn_.store(kOwner);
    owners_.Wake(turn_);
    if (exited) onExit();
  }
}

}  // namespace tsvisor
