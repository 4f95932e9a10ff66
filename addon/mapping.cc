#include "mapping.h"

#include <cerrno>
#include <cstring>
#include <sys/mman.h>

#include "environment.h"

namespace tsvisor {

Pages::~Pages() { munmap(address, length); }

void Mapping::Init(Napi::Env env, Napi::Object exports) {
  Napi::Function constructor = DefineClass(env, "Mapping",
                                           {InstanceAccessor<&Mapping::Buffer>("buffer"),
                                            InstanceMethod<&Mapping::Advise>("advise"),
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
  Napi::ArrayBuffer buffer = Napi::ArrayBuffer::New(
      env, address, length, [](Napi::Env, void*, std::shared_ptr<Pages>* held) { delete held; },
      bufferHold_);
  buffer_ = Napi::Reference<Napi::ArrayBuffer>::New(buffer, 1);
}

Napi::Value Mapping::Buffer(const Napi::CallbackInfo&) { return buffer_.Value(); }

Napi::Value Mapping::Advise(const Napi::CallbackInfo& info) {
  int result = 0;
  if (pages_ && madvise(pages_->address, pages_->length, info[0].As<Napi::Number>().Int32Value()) != 0) result = -errno;
  return Napi::Number::New(info.Env(), result);
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
