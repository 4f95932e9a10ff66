// Guest memory whose pages somebody else gives when they are touched: userfaultfd(2) in its MISSING mode.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <mutex>
#include <napi.h>
#include <string>
#include <thread>
#include <vector>

#include "mapping.h"
#include "run_host.h"

namespace tsvisor {

// new PageFaults(regions, uffd, channel, stop, timeout, lost, runHost, token): registers anonymous mappings that nothing
// has touched, and starts a thread that asks for chunks of 64 KiB as they are touched. Throws an Error with a numeric
// .errno. regions is [[offset, Mapping], ...], what of the memory each holds; uffd, of userfaultfd() below; channel, a
// non-blocking stream socket to who has the pages; stop, an eventfd that gives it up when it is written to; timeout, the
// milliseconds that an answer may take; lost, a Uint8Array of 1: see below. The descriptors stay their opener's.
//   channel out: the chunk's number. In: its number, 0, its length and 0, then as many bytes; or any number, 1, the length
//   of a text that says why there will be no more, and 0. Each number is a little-endian word of 32 bits.
//   .fetch()   asks for all that is missing, a few chunks at a time, after those that are touched
//   .missing   chunks that are not there; once it is 0, the memory is ordinary memory
//   .failure   why it was given up, '' by stop; undefined while it was not
//   .close()   ends the thread and the registration; what is missing reads as zeros from then on
// next() of the RunHost says 0x10000 | token when all is there, and when it is given up.
//
// Giving up has an order. A thread may wait in a fault: the vCPU's, in KVM_RUN or in JavaScript, or one of GuestIo. Only
// pages can let it go on, and those there are read as zeros, which the guest never wrote: so first everyone is told
// that they will be. `lost` is set, which who reads guest memory looks at after reading, and before doing anything with
// what was read; the RunHost is halted, so that the vCPU's thread has a signal pending before its fault ends: KVM
// looks for that before every entry, and next() reports no exit of the instruction that faulted. Only then the ranges are
// unregistered, which wakes all.
class PageFaults : public Napi::ObjectWrap<PageFaults> {
 public:
  static void Init(Napi::Env env, Napi::Object exports);
  explicit PageFaults(const Napi::CallbackInfo& info);
  ~PageFaults() override;

 private:
  enum class State : uint8_t { kMissing, kQueued, kAsked, kPresent };
  struct Region {
    uint64_t offset;
    std::shared_ptr<Pages> pages;
  };
  struct Request {
    uint32_t chunk;
    std::chrono::steady_clock::time_point deadline;
  };

  void Fetch(const Napi::CallbackInfo& info);
  Napi::Value Missing(const Napi::CallbackInfo& info);
  Napi::Value Failure(const Napi::CallbackInfo& info);
  void Close(const Napi::CallbackInfo& info);

  void Work();
  std::string Serve();  // Until close(), until all is there, or until it fails: why.
  bool Ask();
  bool ReadFaults();
  bool Receive(std::string* why);
  bool Fill(uint32_t chunk, const uint8_t* bytes, size_t length);
  bool Put(uint8_t* to, const uint8_t* from, size_t length);
  size_t LengthOf(uint32_t chunk) const;
  void Wake();
  void Stop();
  void Unregister();

  const std::shared_ptr<RunHost::Inbox> inbox_;
  std::vector<Region> regions_;
  uint64_t size_ = 0;
  int uffd_, channel_, stop_;
  std::chrono::milliseconds timeout_;
  uint8_t* lost_;
  Napi::Reference<Napi::Uint8Array> lostHold_;
  uint32_t token_;
  int wake_ = -1;  // eventfd of close() and fetch()

  // Of the thread.
  std::vector<State> chunks_;
  std::deque<uint32_t> touched_;
  std::vector<Request> asked_;  // the oldest first
  uint32_t next_ = 0;           // what fetch() looks at next
  std::vector<uint8_t> in_;

  std::atomic<uint32_t> missing_{0};
  std::atomic<bool> fetching_{false};
  std::atomic<bool> closing_{false};
  std::mutex mutex_;  // guards failed_ and failure_
  bool failed_ = false;
  std::string failure_;
  std::thread thread_;
};

}  // namespace tsvisor
