// Vectored I/O between descriptors and guest memory without a copy: at once, or on threads of its own.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <napi.h>
#include <sys/uio.h>
#include <thread>
#include <vector>

#include "futex.h"
#include "mapping.h"
#include "run_host.h"

namespace tsvisor {

// new GuestIo([[gpa, Mapping], ...], runHost, token, order): the guest's RAM, which stays mapped while an operation uses it,
// what the RunHost's next() says (0x10000 | token) when there are completions, and a Float64Array for transfer().
//   .transfer() one system call now: preadv2 or pwritev2 at offset, readv or writev where offset is negative. The order says
//               what: operation, fd, offset, RWF_ flags, count, length of a prefix, its bytes, `count` pairs (gpa, length);
//               see src/backends/transfer-order.ts. A prefix is written before the pairs. Bytes moved, or -errno; -EFAULT
//               where a pair is not RAM.
//   .submit(token, operation, fd, offset, length, pairs, count, bytes?)
//               the whole of an operation on a thread; 0, or -EFAULT. Ends in one completion, in any order. A file has one
//               write at a time, in which those that follow one another in it, and in time, go together; direct writes go
//               each by itself. A write of bytes, in place of pairs, takes a copy of them; copy has the one pair
//               (descriptor, offset) to read from.
//   .completions(into)  moves (token, result) pairs into a Float64Array; how many. A result is bytes moved (fewer at the
//               end of the file), 0 or -errno.
//   .cancel(tokens)  those that no thread has begun complete with -ECANCELED; tokens is a Float64Array
//   .close()    drops what is queued, waits for what threads have begun, ends them
class GuestIo : public Napi::ObjectWrap<GuestIo> {
 public:
  static void Init(Napi::Env env, Napi::Object exports);
  explicit GuestIo(const Napi::CallbackInfo& info);
  ~GuestIo() override;

 private:
  enum Operation : uint32_t { kRead, kWrite, kFlush, kPunchHole, kZeroRange, kCopy, kDirectWrite, kOperations };
  struct Region {
    uint64_t gpa;
    std::shared_ptr<Pages> pages;
  };
  struct Job {
    double token;
    Operation operation;
    int fd;
    off_t offset;
    off_t length;
    std::vector<iovec> iov;
    std::vector<uint8_t> bytes;
    int from = -1;
    off_t fromOffset = 0;
  };
  struct Completion {
    double token;
    double result;
  };

  static napi_value Transfer(napi_env env, napi_callback_info info);
  static napi_value Submit(napi_env env, napi_callback_info info);
  static napi_value Completions(napi_env env, napi_callback_info info);
  static napi_value Cancel(napi_env env, napi_callback_info info);
  void Close(const Napi::CallbackInfo& info);

  bool Translate(const double* pairs, size_t count, std::vector<iovec>* iov) const;
  // Waits for pages that a source gives; whether they are what the guest wrote. Only then they may be written anywhere: in
  // the kernel, what the source has lost would be written as zeros.
  bool Present(const std::vector<iovec>& iov) const;
  void AddThread();  // With mutex_ held.
  void Work();
  // With the lock held, as they return.
  void Await(std::unique_lock<std::mutex>* lock, Spinner* spinner);
  int64_t Do(Job* job) const;
  void WriteSome(int fd, std::unique_lock<std::mutex>* lock);
  void Complete(double token, int64_t result);  // With mutex_ held.
  void Stop();

  std::vector<Region> regions_;
  Napi::Reference<Napi::Float64Array> orderHold_;
  double* order_;
  size_t orderLength_;
  std::vector<iovec> scratch_;
  const std::shared_ptr<RunHost::Inbox> inbox_;
  const uint32_t ready_;  // the token that goes into it
  std::mutex mutex_;
  std::condition_variable work_;
  // What threads are to do. A kWrite stands for the writes of its file, in which there is one as long as there are any.
  std::deque<Job> queue_;
  std::map<int, std::deque<Job>> writes_;
  std::vector<Completion> completions_;
  std::vector<std::thread> threads_;
  std::atomic<uint32_t> submitted_{0};  // Changes with each Submit() that has to be seen.
  size_t working_ = 0;                  // that have no completion yet
  size_t idle_ = 0;                     // threads that sleep
  bool spins_ = false;                  // One does.
  bool stopping_ = false;
};

}  // namespace tsvisor
