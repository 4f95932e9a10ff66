#include "page_faults.h"

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "environment.h"

namespace tsvisor {

namespace {

constexpr size_t kChunk = 65536;
constexpr size_t kMaxAsked = 16;     // chunks under way: what they take is in the source's memory
constexpr size_t kMaxFetched = 8;    // of them, such as nobody has touched
constexpr size_t kHeader = 16;       // so that what follows is aligned as memory is that is allocated
constexpr uint32_t kData = 0;

uint32_t Word(const uint8_t* bytes) {
  uint32_t value;
  memcpy(&value, bytes, sizeof value);
  return value;
}

// userfaultfd(): a descriptor for faults of user and kernel, or -errno; -EPERM and -EACCES where this user may not have one.
Napi::Value Userfaultfd(const Napi::CallbackInfo& info) {
  int fd = static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK));
  int error = errno;
  if (fd < 0) {
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (device >= 0) {
      fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
      error = errno;
      close(device);
    }
  }
  uffdio_api api{};
  api.api = UFFD_API;
  if (fd >= 0 && ioctl(fd, UFFDIO_API, &api) != 0) {
    error = errno;
    close(fd);
    fd = -1;
  }
  return Napi::Number::New(info.Env(), fd < 0 ? -error : Environment::Of(info.Env()).Own(fd));
}

}  // namespace

void PageFaults::Init(Napi::Env env, Napi::Object exports) {
  exports.Set("userfaultfd", Napi::Function::New(env, Userfaultfd, "userfaultfd"));
  exports.Set("PageFaults",
              DefineClass(env, "PageFaults",
                          {InstanceMethod<&PageFaults::Fetch>("fetch"), InstanceAccessor<&PageFaults::Missing>("missing"),
                           InstanceAccessor<&PageFaults::Failure>("failure"), InstanceMethod<&PageFaults::Close>("close")}));
}

PageFaults::PageFaults(const Napi::CallbackInfo& info)
    : Napi::ObjectWrap<PageFaults>(info), inbox_(RunHost::Unwrap(info[6].As<Napi::Object>())->inbox()) {
  Napi::Env env = info.Env();
  uffd_ = info[1].As<Napi::Number>().Int32Value();
  channel_ = info[2].As<Napi::Number>().Int32Value();
  stop_ = info[3].As<Napi::Number>().Int32Value();
  timeout_ = std::chrono::milliseconds(info[4].As<Napi::Number>().Int64Value());
  auto lost = info[5].As<Napi::Uint8Array>();
  if (lost.ByteLength() < 1) throw Napi::TypeError::New(env, "lost: a Uint8Array of 1");
  lost_ = lost.Data();
  lostHold_ = Napi::Reference<Napi::Uint8Array>::New(lost, 1);
  token_ = info[7].As<Napi::Number>().Uint32Value() & 0xffff;

  auto regions = info[0].As<Napi::Array>();
  for (uint32_t i = 0; i < regions.Length(); i++) {
    auto pair = regions.Get(i).As<Napi::Array>();
    std::shared_ptr<Pages> pages = Mapping::Unwrap(pair.Get(1u).As<Napi::Object>())->pages();
    auto offset = static_cast<uint64_t>(pair.Get(0u).As<Napi::Number>().Int64Value());
    // A chunk is in one region.
    if (!pages || offset != size_ || offset % kChunk != 0) throw Napi::TypeError::New(env, "not regions one after the other");
    regions_.push_back({offset, pages});
    size_ += pages->length;
  }
  auto fail = [&](const char* what) {
    int number = errno;
    Unregister();
    Napi::Error error = Napi::Error::New(env, std::string(what) + ": " + strerror(number));
    error.Set("errno", Napi::Number::New(env, number));
    throw error;
  };
  for (const Region& region : regions_) {
    uffdio_register range{};
    range.range = {reinterpret_cast<uintptr_t>(region.pages->address), region.pages->length};
    range.mode = UFFDIO_REGISTER_MODE_MISSING;
    if (ioctl(uffd_, UFFDIO_REGISTER, &range) != 0) fail("UFFDIO_REGISTER");
    region.pages->paged = true;
  }
  wake_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (wake_ < 0) fail("eventfd");
  chunks_.resize((size_ + kChunk - 1) / kChunk, State::kMissing);
  missing_ = static_cast<uint32_t>(chunks_.size());
  in_.reserve(kHeader + kChunk);
  thread_ = std::thread([this] { Work(); });
}

PageFaults::~PageFaults() { Stop(); }

void PageFaults::Close(const Napi::CallbackInfo&) { Stop(); }

void PageFaults::Stop() {
  if (!thread_.joinable()) return;
  closing_ = true;
  Wake();
  thread_.join();
  close(wake_);
  wake_ = -1;
  if (missing_ > 0) {
    for (const Region& region : regions_) region.pages->lost = true;
  }
  Unregister();
  shutdown(channel_, SHUT_RDWR);
  regions_.clear();
}

void PageFaults::Wake() {
  uint64_t one = 1;
  while (write(wake_, &one, sizeof one) < 0 && errno == EINTR) {
  }
}

void PageFaults::Unregister() {
  for (const Region& region : regions_) {
    if (!region.pages->paged) continue;
    uffdio_range range{reinterpret_cast<uintptr_t>(region.pages->address), region.pages->length};
    ioctl(uffd_, UFFDIO_UNREGISTER, &range);
    region.pages->paged = false;
  }
}

void PageFaults::Fetch(const Napi::CallbackInfo&) {
  fetching_ = true;
  if (wake_ >= 0) Wake();
}

Napi::Value PageFaults::Missing(const Napi::CallbackInfo& info) { return Napi::Number::New(info.Env(), missing_.load()); }

Napi::Value PageFaults::Failure(const Napi::CallbackInfo& info) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!failed_) return info.Env().Undefined();
  return Napi::String::New(info.Env(), failure_);
}

void PageFaults::Work() {
  // Signals of the process are for its other threads.
  sigset_t all;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, nullptr);
  pthread_setname_np(pthread_self(), "tsvisor-faults");
  std::string why = Serve();
  if (closing_) return;
  if (missing_ == 0) {
    Unregister();
    shutdown(channel_, SHUT_RDWR);  // the source has nothing more to do
    inbox_->Post(&token_, 1);
    return;
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    failed_ = true;
    failure_ = why;
  }
  for (const Region& region : regions_) region.pages->lost = true;
  __atomic_store_n(lost_, 1, __ATOMIC_SEQ_CST);
  inbox_->Halt(token_);
  Unregister();
  shutdown(channel_, SHUT_RDWR);
}

std::string PageFaults::Serve() {
  while (missing_ > 0) {
    if (!Ask()) return std::string("its thread cannot be asked: ") + strerror(errno);
    int wait = -1;
    if (!asked_.empty()) {
      auto left = asked_.front().deadline - std::chrono::steady_clock::now();
      wait = static_cast<int>(std::max<int64_t>(0, std::chrono::ceil<std::chrono::milliseconds>(left).count()));
    }
    pollfd fds[] = {{wake_, POLLIN, 0}, {stop_, POLLIN, 0}, {channel_, POLLIN, 0}, {uffd_, POLLIN, 0}};
    int ready = poll(fds, 4, wait);
    if (ready < 0 && errno != EINTR) return std::string("poll: ") + strerror(errno);
    if (closing_) return "";
    if (ready < 0) continue;
    if (fds[0].revents != 0) {
      uint64_t count;
      if (read(wake_, &count, sizeof count) < 0 && errno != EAGAIN) return std::string("eventfd: ") + strerror(errno);
    }
    if (fds[1].revents != 0) return "";
    std::string why;
    if (fds[2].revents != 0 && !Receive(&why)) return why;
    if (fds[3].revents != 0 && !ReadFaults()) return std::string("userfaultfd: ") + strerror(errno);
    if (!asked_.empty() && asked_.front().deadline <= std::chrono::steady_clock::now()) {
      return "it did not give the bytes at " + std::to_string(uint64_t{asked_.front().chunk} * kChunk) + " within " +
             std::to_string(timeout_.count()) + " ms";
    }
  }
  return "";
}

// Asks for chunks that were touched, then for others if all are wanted.
bool PageFaults::Ask() {
  while (asked_.size() < kMaxAsked) {
    uint32_t chunk;
    if (!touched_.empty()) {
      chunk = touched_.front();
      touched_.pop_front();
    } else if (fetching_ && asked_.size() < kMaxFetched) {
      while (next_ < chunks_.size() && chunks_[next_] != State::kMissing) next_++;
      if (next_ == chunks_.size()) return true;
      chunk = next_;
    } else {
      return true;
    }
    chunks_[chunk] = State::kAsked;
    // So few words always fit the socket: what is not answered is not more than kMaxAsked. That the other end is closed
    // Receive() finds, after the reason that may be there still.
    if (send(channel_, &chunk, sizeof chunk, MSG_NOSIGNAL) != sizeof chunk && errno != EPIPE) return false;
    asked_.push_back({chunk, std::chrono::steady_clock::now() + timeout_});
  }
  return true;
}

bool PageFaults::ReadFaults() {
  uffd_msg messages[16];
  ssize_t n = read(uffd_, messages, sizeof messages);
  if (n < 0) return errno == EAGAIN || errno == EINTR;
  for (size_t i = 0; i < static_cast<size_t>(n) / sizeof messages[0]; i++) {
    if (messages[i].event != UFFD_EVENT_PAGEFAULT) continue;
    uint64_t address = messages[i].arg.pagefault.address;
    for (const Region& region : regions_) {
      uint64_t at = address - reinterpret_cast<uintptr_t>(region.pages->address);
      if (at >= region.pages->length) continue;
      auto chunk = static_cast<uint32_t>((region.offset + at) / kChunk);
      if (chunks_[chunk] == State::kMissing) {
        chunks_[chunk] = State::kQueued;
        touched_.push_back(chunk);
      } else if (chunks_[chunk] == State::kPresent) {  // It came while this one was on its way.
        uffdio_range page{address & ~uint64_t{kPage - 1}, kPage};
        ioctl(uffd_, UFFDIO_WAKE, &page);
      }
    }
  }
  return true;
}

bool PageFaults::Receive(std::string* why) {
  for (;;) {
    size_t want = kHeader;
    if (in_.size() >= kHeader) {
      uint32_t chunk = Word(&in_[0]), kind = Word(&in_[4]), length = Word(&in_[8]);
      bool asked = kind != kData || (chunk < chunks_.size() && chunks_[chunk] == State::kAsked && length == LengthOf(chunk));
      if (length > kChunk || !asked) {
        *why = "its thread gave what it was not asked for";
        return false;
      }
      want += length;
      if (in_.size() == want) {
        if (kind != kData) {
          why->assign(in_.begin() + kHeader, in_.end());
          return false;
        }
        if (!Fill(chunk, &in_[kHeader], length)) {
          *why = std::string("its pages cannot be placed: ") + strerror(errno);
          return false;
        }
        in_.clear();
        continue;
      }
    }
    size_t have = in_.size();
    in_.resize(want);
    ssize_t n = recv(channel_, &in_[have], want - have, 0);
    in_.resize(have + static_cast<size_t>(std::max<ssize_t>(n, 0)));
    if (n > 0 || (n < 0 && errno == EINTR)) continue;
    if (n < 0 && errno == EAGAIN) return true;
    *why = "its thread ended";
    return false;
  }
}

size_t PageFaults::LengthOf(uint32_t chunk) const {
  return static_cast<size_t>(std::min<uint64_t>(kChunk, size_ - uint64_t{chunk} * kChunk));
}

bool PageFaults::Fill(uint32_t chunk, const uint8_t* bytes, size_t length) {
  uint64_t offset = uint64_t{chunk} * kChunk;
  auto region = std::find_if(regions_.rbegin(), regions_.rend(), [offset](const Region& r) { return offset >= r.offset; });
  uint8_t* to = static_cast<uint8_t*>(region->pages->address) + (offset - region->offset);
  // Pages of zeros take no memory.
  for (size_t at = 0; at < length;) {
    bool zero = IsZero(bytes + at);
    size_t end = at + kPage;
    while (end < length && IsZero(bytes + end) == zero) end += kPage;
    if (!Put(to + at, zero ? nullptr : bytes + at, end - at)) return false;
    at = end;
  }
  chunks_[chunk] = State::kPresent;
  missing_--;
  asked_.erase(std::find_if(asked_.begin(), asked_.end(), [chunk](const Request& r) { return r.chunk == chunk; }));
  return true;
}

// Places pages, from nullptr pages of zeros, and wakes who waits for them.
bool PageFaults::Put(uint8_t* to, const uint8_t* from, size_t length) {
  for (size_t done = 0; done < length;) {
    int64_t placed;
    int result;
    if (from) {
      uffdio_copy copy{};
      copy.dst = reinterpret_cast<uintptr_t>(to) + done;
      copy.src = reinterpret_cast<uintptr_t>(from) + done;
      copy.len = length - done;
      result = ioctl(uffd_, UFFDIO_COPY, &copy);
      placed = copy.copy;
    } else {
      uffdio_zeropage zero{};
      zero.range = {reinterpret_cast<uintptr_t>(to) + done, length - done};
      result = ioctl(uffd_, UFFDIO_ZEROPAGE, &zero);
      placed = zero.zeropage;
    }
    if (placed > 0) done += static_cast<size_t>(placed);
    else if (result != 0 && errno != EAGAIN && errno != EINTR) return false;
  }
  return true;
}

}  // namespace tsvisor
