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
//   .close()                  joins the poller. Also done when the object or its environment goes.
//
// An inline vCPU is kicked out of KVM_RUN by the poller: it publishes the event, sets kvm_run->immediate_exit, then sends
// a signal. next() clears immediate_exit before it looks at the events, so whichever order the two threads run in, either
// next() sees the event or KVM_RUN sees immediate_exit (KVM API 5, "immediate_exit"); the signal only shortens a KVM_RUN
// that is already under way.
class RunHost : public Napi::ObjectWrap<RunHost> {
 public:
  static void Init(Napi::Env env, Napi::Object exports);
  explicit RunHost(const Napi::CallbackInfo& info);
  ~RunHost() override;

 private:
  static napi_value Next(napi_env env, napi_callback_info info);
  int64_t Next();
  kvm_run* run() const { return static_cast<kvm_run*>(runPages_->address); }
  void Poll();
  void Stop();

  Napi::Value AttachVcpu(const Napi::CallbackInfo& info);
  void SetRunnable(const Napi::CallbackInfo& info);
  Napi::Value Watch(const Napi::CallbackInfo& info);
  Napi::Value Unwatch(const Napi::CallbackInfo& info);
  void Close(const Napi::CallbackInfo& info);

  int epoll_ = -1;
  int wake_ = -1;  // eventfd that ends the poller
  std::thread poller_;

  int vcpu_ = -1;
  bool runnable_ = false;
  std::shared_ptr<Pages> runPages_;  // changed under mutex_ only: the poller writes immediate_exit through it
  pthread_t thread_;  // The only thread that calls next(): the one that made this object.

  std::atomic<bool> inGuest_{false};
  std::atomic<bool> pending_{false};
  std::mutex mutex_;  // guards ready_ and, against the poller, runPages_
  std::condition_variable changed_;
  std::deque<uint32_t> ready_;  // tokens; bounded by the number of watches, since each is one-shot
};

}  // namespace tsvisor
