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
//   .poll(table)              an Int32Array that says which rings next() looks at for as long as it spins: how many, then of
//                             each its index and the avail.idx that its device has seen, negative: it is not looked at
//   .attachRing(mapping, offset, token, vcpus, gpa, value)  avail.idx of a virtqueue is at that offset; a vCPU with a thread of
//                             its own notifies by writing the 32-bit value there, and goes on. Returns its index, from 0
//   .detachRing(index)
//   .next(wait)               >= 0 and < 0x40000000: index << 8 | KVM exit reason (0xff: KVM_RUN failed, see failure());
//                             0x40000000 | token: descriptor ready, or a ring's vCPU has notified, or its avail.idx is another
//                             one: then what the table has seen of it is negative. -EAGAIN: nothing yet, and it was not to
//                             wait, or would sleep with rings in the table: their drivers are to notify first, and the table
//                             to be empty.
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
    std::atomic<size_t> working{0};   // operations that threads have been given and will post
    Waiter waiter;
    std::mutex mutex;  // guards ready, vcpus and inlined
    // Bounded: a token is posted once and then not before it was taken, as is a vCPU with an exit, as
    // kVcpu | index, and a ring whose vCPU notifies, as kRing | index.
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
  bool polls() const { return table_ != nullptr && table_[0] > 0; }
  // The token of a polled ring with something new, or -1.
  int32_t MovedRing();
  // Leaves the processor to a vCPU of whose ring it is about to wait: that cannot move while this thread spins.
  void StepAside() const;

  Napi::Value AttachVcpu(const Napi::CallbackInfo& info);
  void DetachVcpu(const Napi::CallbackInfo& info);
  void SetRunnable(const Napi::CallbackInfo& info);
  Napi::Value Failure(const Napi::CallbackInfo& info);
  Napi::Value Settle(const Napi::CallbackInfo& info);
  void PollTable(const Napi::CallbackInfo& info);
  Napi::Value AttachRing(const Napi::CallbackInfo& info);
  void DetachRing(const Napi::CallbackInfo& info);
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

  struct Ring {
    std::shared_ptr<Pages> pages;
    const uint16_t* index;
    int32_t token;
    std::vector<std::weak_ptr<Vcpu>> vcpus;
    std::atomic<bool> rung{false};  // It is in the inbox.
  };
  std::vector<std::shared_ptr<Ring>> rings_;  // By index; empty places are free.
  Napi::Reference<Napi::Int32Array> tableHold_;
  int32_t* table_ = nullptr;
  int32_t tableLength_ = 0;
  // When to look at rings though the waits before were long: those for requests that come with a notification are, and no
  // others tell whether requests would come soon without one. Each time that it was in vain it is longer until the next.
  class Tries {
   public:
    bool Take() { return wait_ == 0 || --wait_ == 0; }
    void Paid() { wait_ = last_ = 0; }
    void InVain() { wait_ = last_ = last_ < kLongest ? 2 * last_ + 1 : kLongest; }

   private:
    static constexpr uint32_t kLongest = 127;  // waits
    uint32_t wait_ = 0;
    uint32_t last_ = 0;
  } tries_;
  bool ringsFirst_ = false;  // Rings and the inbox take turns: neither keeps the other from being seen.
  bool spun_ = false;        // It has spun in vain, and told so, since there were rings in the table.
};

}  // namespace tsvisor
