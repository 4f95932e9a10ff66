// The primitive under a machine thread's run loop: one call that blocks until something needs TypeScript.
#pragma once

#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <napi.h>
#include <thread>
#include <vector>

#include "futex.h"
#include "vcpu.h"

namespace tsvisor {

// new RunHost(): starts the poller thread.
//   .attachVcpu(fd, mapping, own)  a vCPU and its kvm_run mapping; own: it gets a thread of its own, otherwise next() runs
//                             it inline: then it is the only one. Returns its index, from 0. It does not run yet.
//   .detachVcpu(index)        it is out of the guest, and its thread has ended
//   .setRunnable(indices, on) lets vCPUs run, or has them all out of the guest when it returns. Exits that they still have
//                             to tell are told once they run again, or by settle()
//   .watch(fd, token, events) one-shot epoll interest; token 0..0xffff comes back from next(). Same fd again: re-arms.
//   .unwatch(fd)
//   .next(wait)               >= 0 and < 0x40000000: index << 8 | KVM exit reason (0xff: KVM_RUN failed, see failure());
//                             0x40000000 | token: descriptor ready; -EAGAIN: nothing yet, and it was not to wait.
//                             A vCPU whose exit was told goes on with the next call
//   .failure(index)           errno of KVM_RUN
//   .settle(index)            lets KVM finish the instruction of the last exit (KVM API 5: state is consistent only then)
//                             and take kvm_dirty_regs, without running the guest: 0, an exit reason + 1, or -errno. The
//                             vCPU is not runnable. Once another thread has halted the RunHost: -ECANCELED
//   .close()                  joins its threads. Also done when the object or its environment goes.
class RunHost : public Napi::ObjectWrap<RunHost> {
 public:
  // Where other threads leave tokens for next(), and how they wake its thread. Whoever posts holds it.
  struct Inbox {
    void Post(const uint32_t* events, size_t count);
    // For good: no vCPU runs any more, and what they did last is not reported, but the token.
    void Halt(uint32_t token);

    std::atomic<bool> pending{false};
    std::atomic<bool> halted{false};
    std::atomic<uint32_t> posted{0};  // counts Post()s: what next() sleeps on
    Waiter waiter;
    std::mutex mutex;  // guards ready, vcpus and inlined
    // Bounded: a token is posted once and then not before it was taken, as is a vCPU with an exit, as kVcpu | index.
    std::deque<uint32_t> ready;
    std::vector<std::shared_ptr<Vcpu>> vcpus;
    std::shared_ptr<Vcpu> inlined;
  };
  std::shared_ptr<Inbox> inbox() const { return inbox_; }

  static void Init(Napi::Env env, Napi::Object exports);
  explicit RunHost(const Napi::CallbackInfo& info);
  ~RunHost() override;

 private:
  static napi_value Next(napi_env env, napi_callback_info info);
  int32_t Next(bool wait);
  void Poll();
  void Stop();
  Vcpu* At(const Napi::Value& index);

  Napi::Value AttachVcpu(const Napi::CallbackInfo& info);
  void DetachVcpu(const Napi::CallbackInfo& info);
  void SetRunnable(const Napi::CallbackInfo& info);
  Napi::Value Failure(const Napi::CallbackInfo& info);
  Napi::Value Settle(const Napi::CallbackInfo& info);
  Napi::Value Watch(const Napi::CallbackInfo& info);
  Napi::Value Unwatch(const Napi::CallbackInfo& info);
  void Close(const Napi::CallbackInfo& info);

  int epoll_ = -1;
  int wake_ = -1;  // eventfd that ends the poller
  std::thread poller_;
  const std::shared_ptr<Inbox> inbox_ = std::make_shared<Inbox>();

  std::vector<std::shared_ptr<Vcpu>> vcpus_;  // as the Inbox has them: those of next()'s thread
  Vcpu* inlined_ = nullptr;
  int32_t inlinedIndex_ = 0;
  Vcpu* told_ = nullptr;  // has a thread, and its exit was told last
};

}  // namespace tsvisor
