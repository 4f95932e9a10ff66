// A vCPU and who calls KVM_RUN for it.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <linux/kvm.h>
#include <memory>
#include <mutex>
#include <pthread.h>
#include <thread>
#include <vector>

#include "futex.h"
#include "mapping.h"

namespace tsvisor {

// The signal that interrupts KVM_RUN, 0 where none is free.
int KickSignal();
// Lets it through to this thread.
void UnblockKickSignal();

// Its owner, the RunHost's thread, calls KVM_RUN itself (inline), or gives a vCPU its turn on a thread of the vCPU's own
// and gets it back with an exit. Nothing but Kick() is for other threads.
//
// A vCPU is kicked out of KVM_RUN: whoever wants it out first says why (a token for next(), `stopping`, `halted`), then
// sets kvm_run->immediate_exit, then sends a signal. Who enters clears immediate_exit before it looks for a reason, so
// whichever order the two threads run in, either the reason is seen or KVM_RUN sees immediate_exit (KVM API 5,
// "immediate_exit"); the signal only shortens a KVM_RUN that is already under way.
class Vcpu {
 public:
  // What an exit is told as: a reason of KVM's, all of which are below this, or that KVM_RUN failed, with `error`.
  static constexpr int32_t kFailed = 0xff;

  // Of a vCPU that whoever makes this runs inline.
  Vcpu(int fd, std::shared_ptr<Pages> pages);
  // Of a vCPU with a thread of its own, on which onExit is called when there is an exit to take.
  Vcpu(int fd, std::shared_ptr<Pages> pages, const std::atomic<bool>& halted, std::function<void()> onExit);
  // Ends the thread.
  ~Vcpu();
  Vcpu(const Vcpu&) = delete;
  Vcpu& operator=(const Vcpu&) = delete;

  // A 32-bit write of the guest's, upon which a vCPU with a thread of its own calls ring() there and goes on.
  struct Doorbell {
    uint64_t gpa;
    uint32_t value;
    const void* owner;
    std::function<void()> ring;
  };
  void AddDoorbell(Doorbell doorbell);
  // Those are not called any more.
  void RemoveDoorbells(const void* owner);

  bool inlined() const { return !thread_.joinable(); }
  void Kick();

  // Inline: enters the guest unless `unless()` says otherwise, and returns an exit, or -1: interrupted, or not entered.
  template <typename Predicate>
  int32_t Enter(Predicate unless) {
    inGuest_.store(true);
    __atomic_store_n(&run()->immediate_exit, 0, __ATOMIC_SEQ_CST);
    if (unless()) {
      inGuest_.store(false);
      return -1;
    }
    return Leave();
  }

  // The processor on which its thread entered the guest last.
  int processor() const { return processor_.load(std::memory_order_relaxed); }

  // On a thread: whether it runs, or has an exit to be taken.
  bool running() const { return turn_.load() != kOwner; }
  void Go() { Give(kGuest); }
  // Asks it to come out; AwaitOwner() returns when it has, with an exit or without.
  void BeginStop();
  void AwaitOwner();
  bool hasExit() const { return hasExit_; }
  int32_t TakeExit();

  // Lets KVM finish the instruction of the last exit: 0, an exit + 1, or -errno. The vCPU does not run.
  int32_t Settle();

  int error = 0;          // errno of the last kFailed
  bool runnable = false;  // For the owner's use.
  bool deferred = false;  // It has an exit that nobody wants before it is runnable again.

 private:
  enum Turn : uint32_t { kOwner, kGuest, kSettle, kQuit };

  kvm_run* run() const { return static_cast<kvm_run*>(pages_->address); }
  int32_t Leave();
  int32_t FinishInstruction();
  void Give(Turn turn);
  bool Rings();
  void Run(const std::atomic<bool>& halted, const std::function<void()>& onExit);

  const int fd_;
  const std::shared_ptr<Pages> pages_;
  std::atomic<bool> inGuest_{false};
  pthread_t runner_;

  std::atomic<uint32_t> turn_{kOwner};
  std::atomic<bool> stopping_{false};
  std::atomic<int> processor_{-1};
  bool hasExit_ = false;  // Belongs to who has the turn, as result_ does.
  int32_t result_ = 0;
  std::mutex doorbellsMutex_;
  std::vector<Doorbell> doorbells_;
  Waiter ours_;    // who waits for its turn on the thread
  Waiter owners_;  // who waits for the thread to give it back
  std::thread thread_;
};

}  // namespace tsvisor
