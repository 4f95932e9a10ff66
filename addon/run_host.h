// The primitive under a machine's run loop: one call that blocks until something needs TypeScript.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <napi.h>
#include <pthread.h>
#include <thread>

#include "mapping.h"

struct kvm_run;

namespace tsvisor {

// new RunHost(): starts the poller thread.
//   .attachVcpu(fd, mapping)  the inline vCPU and its kvm_run mapping
//   .setRunnable(bool)        false: next() only waits for descriptors (a paused machine)
//   .watch(fd, token, events) one-shot epoll interest; token 0..0xffff comes back from next(). Same fd again: re-arms.
//   .unwatch(fd)
//   .next()                   >= 0 and < 0x10000: KVM exit reason; 0x10000 | token: descriptor ready; < 0: -errno
//   .settle()                 lets KVM finish the instruction of the last exit (KVM API 5: state is consistent only then)
//                             and take kvm_dirty_regs, without running the guest: 0, an exit reason + 1, or -errno
//                             Once another thread has halted the RunHost: -ECANCELED
//   .close()                  joins the poller. Also done when the object or its environment goes.
//
// An inline vCPU is kicked out of KVM_RUN by the poller: it publishes the event, sets kvm_run->immediate_exit, then sends
// a signal. next() clears immediate_exit before it looks at the events, so whichever order the two threads run in, either
// next() sees the event or KVM_RUN sees immediate_exit (KVM API 5, "immediate_exit"); the signal only shortens a KVM_RUN
// that is already under way.
class RunHost : public Napi::ObjectWrap<RunHost> {
 public:
  // Where other threads leave tokens for next(), and how they wake its thread. Whoever posts holds it.
  struct Inbox {
    explicit Inbox(pthread_t owner) : thread(owner) {}
    void Post(const uint32_t* tokens, size_t count);
    // For good: the vCPU does not run any more, and what it did last is not reported, but the token.
    void Halt(uint32_t token);

    const pthread_t thread;  // The only one that calls next(): the one that made the RunHost.
    std::atomic<bool> inGuest{false};
    std::atomic<bool> pending{false};
    std::atomic<bool> halted{false};
    std::mutex mutex;  // guards ready and, against who posts, runPages
    std::condition_variable changed;
    std::deque<uint32_t> ready;       // bounded: each token is posted once and then not before it was taken
    std::shared_ptr<Pages> runPages;  // immediate_exit is written through it
  };
  std::shared_ptr<Inbox> inbox() const { return inbox_; }

  static void Init(Napi::Env env, Napi::Object exports);
  explicit RunHost(const Napi::CallbackInfo& info);
  ~RunHost() override;

 private:
  static napi_value Next(napi_env env, napi_callback_info info);
  int64_t Next();
  kvm_run* run() const { return static_cast<kvm_run*>(inbox_->runPages->address); }
  void Poll();
  void Stop();

  Napi::Value AttachVcpu(const Napi::CallbackInfo& info);
  void SetRunnable(const Napi::CallbackInfo& info);
  Napi::Value Settle(const Napi::CallbackInfo& info);
  Napi::Value Watch(const Napi::CallbackInfo& info);
  Napi::Value Unwatch(const Napi::CallbackInfo& info);
  void Close(const Napi::CallbackInfo& info);

  int epoll_ = -1;
  int wake_ = -1;  // eventfd that ends the poller
  std::thread poller_;

  int vcpu_ = -1;
  bool runnable_ = false;
  const std::shared_ptr<Inbox> inbox_;
};

}  // namespace tsvisor
