#include "mapping.h"

#include <cerrno>
#include <cstring>
#include <sys/mman.h>
#include <unistd.h>

#include "environment.h"

namespace tsvisor {

namespace {

constexpr size_t kMaxRun = 256;  // pages written by one call

// V8 counts a buffer's bytes as if collecting garbage could give them back: every machine that is made would have it collect.
// They are taken out of the count once before the buffer is there, so that its coming stays below V8's limit (of 64 MiB:
// a larger one is collected for all the same), and once after. Nothing is put back: that would count as growth, too.
void NotOfTheHeap(Napi::Env env, size_t bytes) {
  Napi::MemoryManagement::AdjustExternalMemory(env, -static_cast<int64_t>(bytes));
}

}  // namespace

bool IsZero(const uint8_t* page) {
  auto* words = reinterpret_cast<const uint64_t*>(page);
  for (size_t i = 0; i < kPage / sizeof(uint64_t); i += 16) {
    uint64_t any = 0;
    for (size_t j = 0; j < 16; j++) any |= words[i + j];
    if (any != 0) return false;
  }
  return true;
}

Pages::~Pages() { munmap(address, length); }

void Mapping::Init(Napi::Env env, Napi::Object exports) {
  Napi::Function constructor = DefineClass(env, "Mapping",
                                           {InstanceAccessor<&Mapping::Buffer>("buffer"),
                                            InstanceMethod<&Mapping::Advise>("advise"),
                                            InstanceMethod<&Mapping::SavePages>("savePages"),
                                            InstanceMethod<&Mapping::MapOver>("mapOver"),
                                            InstanceMethod<&Mapping::Renew>("renew"),
                                            InstanceMethod<&Mapping::Unmap>("unmap")});
  Environment::Of(env).mappingConstructor = Napi::Persistent(constructor);
  exports.Set("Mapping", constructor);
}

Mapping::Mapping(const Napi::CallbackInfo& info) : Napi::ObjectWrap<Mapping>(info) {
  Napi::Env env = info.Env();
  auto length = static_cast<size_t>(info[0].As<Napi::Number>().Int64Value());
  void* address = mmap(nullptr, length, info[1].As<Napi::Number>().Int32Value(), info[2].As<Napi::Number>().Int32Value(),
                       info[3].As<Napi::Number>().Int32Value(), info[4].As<Napi::Number>().Int64Value());
  if (address == MAP_FAILED) {
    int number = errno;
    Napi::Error error = Napi::Error::New(env, std::string("mmap: ") + strerror(number));
    error.Set("errno", Napi::Number::New(env, number));
    throw error;
  }
  pages_ = std::make_shared<Pages>(address, length);
  bufferHold_ = new std::shared_ptr<Pages>(pages_);
  NotOfTheHeap(env, length);
  Napi::ArrayBuffer buffer = Napi::ArrayBuffer::New(
      env, address, length,
      [](Napi::Env, void*, std::shared_ptr<Pages>* held) {
        delete held;
      },
      bufferHold_);
  NotOfTheHeap(env, length);
  buffer_ = Napi::Reference<Napi::ArrayBuffer>::New(buffer, 1);
}

Napi::Value Mapping::Buffer(const Napi::CallbackInfo&) { return buffer_.Value(); }

Napi::Value Mapping::Advise(const Napi::CallbackInfo& info) {
  int result = 0;
  if (pages_ && madvise(pages_->address, pages_->length, info[0].As<Napi::Number>().Int32Value()) != 0) result = -errno;
  return Napi::Number::New(info.Env(), result);
}

Napi::Value Mapping::SavePages(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  if (!pages_) return Napi::Number::New(env, -EBADF);
  int fd = info[0].As<Napi::Number>().Int32Value();
  int64_t offset = info[1].As<Napi::Number>().Int64Value();
  size_t count = pages_->length / kPage;
  const uint8_t* wanted = nullptr;
  if (info.Length() > 2) {
    auto selection = info[2].As<Napi::Uint8Array>();
    if (selection.ByteLength() < count) throw Napi::RangeError::New(env, "savePages: a byte for each page");
    wanted = selection.Data();
  }
  auto* bytes = static_cast<const uint8_t*>(pages_->address);
  auto take = [&](size_t page) { return wanted ? wanted[page] != 0 : !IsZero(bytes + page * kPage); };
  int64_t total = 0;
  for (size_t page = 0; page < count; page++) {
    if (!take(page)) continue;
    size_t end = page + 1;
    while (end < count && end - page < kMaxRun && take(end)) end++;
    size_t length = (end - page) * kPage;
    for (size_t done = 0; done < length;) {
      size_t at = page * kPage + done;
      ssize_t n = pwrite(fd, bytes + at, length - done, offset + static_cast<int64_t>(at));
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) return Napi::Number::New(env, n < 0 ? -errno : -EIO);
      done += static_cast<size_t>(n);
    }
    total += static_cast<int64_t>(length);
    page = end - 1;
  }
  return Napi::Number::New(env, static_cast<double>(total));
}

Napi::Value Mapping::MapOver(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  if (!pages_) return Napi::Number::New(env, -EBADF);
  double at = info[0].As<Napi::Number>().DoubleValue();
  double length = info[1].As<Napi::Number>().DoubleValue();
  double limit = static_cast<double>(pages_->length);
  if (!(at >= 0 && length > 0 && at + length <= limit)) throw Napi::RangeError::New(env, "mapOver: outside the mapping");
  auto* address = static_cast<uint8_t*>(pages_->address) + static_cast<size_t>(at);
  void* result = mmap(address, static_cast<size_t>(length), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE,
                      info[2].As<Napi::Number>().Int32Value(), info[3].As<Napi::Number>().Int64Value());
  return Napi::Number::New(env, result == MAP_FAILED ? -errno : 0);
}

Napi::Value Mapping::Renew(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  if (!pages_) return Napi::Number::New(env, -EBADF);
  if (pages_.use_count() > 2) return Napi::Number::New(env, -EBUSY);  // this and the buffer's
  void* result = mmap(pages_->address, pages_->length, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
  return Napi::Number::New(env, result == MAP_FAILED ? -errno : 0);
}

void Mapping::Unmap(const Napi::CallbackInfo&) {
  if (!pages_) return;
  // The finalizer of a detached buffer waits for this thread's event loop, which a run loop never enters: take the
  // buffer's hold over, so that the pages go now.
  std::shared_ptr<Pages> hold = std::move(*bufferHold_);
  buffer_.Value().Detach();
  buffer_.Reset();
  pages_.reset();
}

}  // namespace tsvisor
