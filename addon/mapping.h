// A memory mapping exposed to JavaScript as an external ArrayBuffer.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <napi.h>

namespace tsvisor {

constexpr size_t kPage = 4096;

bool IsZero(const uint8_t* page);

// The pages themselves; unmapped when the last holder (the Mapping, its ArrayBuffer, a RunHost) lets go.
struct Pages {
  Pages(void* a, size_t l) : address(a), length(l) {}
  ~Pages();
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  void* const address;
  const size_t length;
  std::atomic<bool> paged{false};  // Those not there yet are given by a source: see page_faults.h.
  std::atomic<bool> lost{false};   // What was not there when the source failed reads as zeros.
};

// new Mapping(length, protection, flags, fd, offset): mmap(2). Throws an Error with a numeric .errno.
//   .buffer    the ArrayBuffer (at most 4 GiB: Node refuses more)
//   .advise(n) madvise(2) over the whole mapping; 0 or -errno
//   .savePages(fd, offset, pages?)  writes the pages that are not all zeros to fd, each at offset + its place; with pages
//              (a byte for each page of the mapping, not 0: wanted), those and zeros too. Bytes written, or -errno.
//   .mapOver(at, length, fd, offset)  maps a file copy-on-write in place of a part; 0 or -errno
//   .renew()   has private pages of zeros in place of all that is there; 0, -EBUSY while somebody else holds the pages, or
//              -errno
//   .unmap()   detaches the buffer (every view of it becomes empty) and drops this hold on the pages
class Mapping : public Napi::ObjectWrap<Mapping> {
 public:
  static void Init(Napi::Env env, Napi::Object exports);
  explicit Mapping(const Napi::CallbackInfo& info);
  std::shared_ptr<Pages> pages() const { return pages_; }

 private:
  Napi::Value Buffer(const Napi::CallbackInfo& info);
  Napi::Value Advise(const Napi::CallbackInfo& info);
  Napi::Value SavePages(const Napi::CallbackInfo& info);
  Napi::Value MapOver(const Napi::CallbackInfo& info);
  Napi::Value Renew(const Napi::CallbackInfo& info);
  void Unmap(const Napi::CallbackInfo& info);

  std::shared_ptr<Pages> pages_;
  std::shared_ptr<Pages>* bufferHold_ = nullptr;  // Deleted by the ArrayBuffer's finalizer.
  Napi::Reference<Napi::ArrayBuffer> buffer_;
};

}  // namespace tsvisor
