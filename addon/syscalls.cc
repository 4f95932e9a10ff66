#include "syscalls.h"

#include <cerrno>
#include <cstddef>
#include <cstring>
#include <fcntl.h>
#include <linux/kvm.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "environment.h"

namespace tsvisor {

bool BytesOf(napi_env env, napi_value value, uint8_t** data, size_t* length) {
  bool is = false;
  void* raw = nullptr;
  if (napi_is_typedarray(env, value, &is) == napi_ok && is) {
    napi_typedarray_type type;
    size_t count = 0;
    if (napi_get_typedarray_info(env, value, &type, &count, &raw, nullptr, nullptr) != napi_ok) return false;
    static constexpr uint8_t kSize[] = {1, 1, 1, 2, 2, 4, 4, 4, 8, 8, 8};  // indexed by napi_typedarray_type
    *length = count * kSize[type];
  } else if (napi_is_dataview(env, value, &is) == napi_ok && is) {
    if (napi_get_dataview_info(env, value, length, &raw, nullptr, nullptr) != napi_ok) return false;
  } else if (napi_is_arraybuffer(env, value, &is) == napi_ok && is) {
    if (napi_get_arraybuffer_info(env, value, &raw, length) != napi_ok) return false;
  } else {
    return false;
  }
  *data = static_cast<uint8_t*>(raw);
  return true;
}

namespace {

napi_value Int(napi_env env, int64_t value) {
  napi_value result;
  napi_create_int64(env, value, &result);
  return result;
}

napi_value Throw(napi_env env, const char* message) {
  napi_throw_type_error(env, nullptr, message);
  return nullptr;
}

// KVM requests are told by their number alone: in C++ a structure that ends in a flexible array has another layout than in
// C, so the macros of the kernel's headers have another size in them than the requests that JavaScript passes.
bool IsKvm(unsigned long request, unsigned long macro) {
  return _IOC_TYPE(request) == KVMIO && _IOC_NR(request) == _IOC_NR(macro);
}

// Structures that end in an array: where it begins and how long an element is; its count is the first word (KVM API,
// sections 4.3, 4.18 to 4.21, 4.46, 4.68).
struct FlexibleArray {
  unsigned long request;
  size_t header, element;
};
constexpr FlexibleArray kFlexible[] = {
    {KVM_GET_SUPPORTED_CPUID, 8, sizeof(kvm_cpuid_entry2)},
    {KVM_SET_CPUID2, 8, sizeof(kvm_cpuid_entry2)},
    {KVM_GET_CPUID2, 8, sizeof(kvm_cpuid_entry2)},
    {KVM_GET_MSRS, 8, sizeof(kvm_msr_entry)},
    {KVM_SET_MSRS, 8, sizeof(kvm_msr_entry)},
    {KVM_GET_MSR_INDEX_LIST, 4, sizeof(uint32_t)},
    {KVM_SET_SIGNAL_MASK, 4, 1},
};

// The size of an XSAVE area is KVM_CAP_XSAVE2 of the VM, not part of the request (KVM API 4.134). With AMX it is 11 KiB;
// a buffer that could hold several times that is asked for instead of trusting the caller's idea of it.
constexpr size_t kXsaveBuffer = 65536;

// KVM_GET_DIRTY_LOG writes a bit for each page of the slot, whose size is not part of the request: a buffer for the
// largest slot that there can be (its backing is an ArrayBuffer: 4 GiB).
constexpr size_t kDirtyBitmap = (1ul << 32) / 4096 / 8;

// The number of bytes the kernel may touch through the argument of request; SIZE_MAX if bytes cannot hold that many.
size_t BytesNeeded(unsigned long request, const uint8_t* bytes, size_t length) {
  for (const FlexibleArray& f : kFlexible) {
    if (!IsKvm(request, f.request)) continue;
    if (length < f.header) return SIZE_MAX;
    uint32_t count;
    memcpy(&count, bytes, sizeof count);
    return f.header + size_t{count} * f.element;
  }
  if (IsKvm(request, KVM_GET_XSAVE2) || IsKvm(request, KVM_SET_XSAVE)) return kXsaveBuffer;
  return _IOC_SIZE(request);
}

bool ReturnsDescriptor(unsigned long request) {
  return IsKvm(request, KVM_CREATE_VM) || IsKvm(request, KVM_CREATE_VCPU);
}

// ioctl(fd, request, argument?: number | view, pointerOffset?: number, pointee?: view): result or -errno.
// With pointee, its address is stored at pointerOffset of the argument for the duration of the call: no address of this
// process ever appears in JavaScript. For KVM_SET_USER_MEMORY_REGION the pointee is what backs the slot.
napi_value Ioctl(napi_env env, napi_callback_info info) {
  size_t argc = 5;
  napi_value argv[5];
  napi_get_cb_info(env, info, &argc, argv, nullptr, nullptr);
  int32_t fd;
  double request;
  if (argc < 2 || napi_get_value_int32(env, argv[0], &fd) != napi_ok ||
      napi_get_value_double(env, argv[1], &request) != napi_ok || request < 0 || request > UINT32_MAX)
    return Throw(env, "ioctl(fd, request, argument?, pointerOffset?, pointee?)");
  auto number = static_cast<unsigned long>(request);

  unsigned long argument = 0;
  uint8_t* bytes = nullptr;
  size_t length = 0;
  if (argc > 2 && BytesOf(env, argv[2], &bytes, &length)) {
    if (length < BytesNeeded(number, bytes, length)) return Throw(env, "ioctl: argument too short for request");
    argument = reinterpret_cast<unsigned long>(bytes);
  } else if (argc > 2) {
    double value = 0;
    if (napi_get_value_double(env, argv[2], &value) != napi_ok) return Throw(env, "ioctl: argument: number or view");
    // A number is only ever passed by value: a request that carries a pointer must have a view.
    if (_IOC_SIZE(number) != 0) return Throw(env, "ioctl: this request takes a view");
    argument = static_cast<unsigned long>(value);
  } else if (_IOC_SIZE(number) != 0) {
    return Throw(env, "ioctl: this request takes a view");
  }

  uint8_t* slot = nullptr;
  if (argc > 4) {
    uint32_t offset;
    uint8_t* pointee;
    size_t pointeeLength;
    if (bytes == nullptr || napi_get_value_uint32(env, argv[3], &offset) != napi_ok || offset + 8ul > length ||
        !BytesOf(env, argv[4], &pointee, &pointeeLength))
      return Throw(env, "ioctl: bad pointer");
    if (IsKvm(number, KVM_SET_USER_MEMORY_REGION)) {
      auto* region = reinterpret_cast<kvm_userspace_memory_region*>(bytes);
      if (region->memory_size > pointeeLength) return Throw(env, "ioctl: memory region longer than its backing");
    }
    if (IsKvm(number, KVM_X86_SET_MSR_FILTER)) {
      auto* range = reinterpret_cast<kvm_msr_filter_range*>(bytes + offset - offsetof(kvm_msr_filter_range, bitmap));
      if ((range->nmsrs + 7ul) / 8 > pointeeLength) return Throw(env, "ioctl: MSR bitmap too short");
    }
    if (IsKvm(number, KVM_GET_DIRTY_LOG) && pointeeLength < kDirtyBitmap)
      return Throw(env, "ioctl: dirty bitmap too short");
    slot = bytes + offset;
    memcpy(slot, &pointee, sizeof pointee);
  }

  int result = ioctl(fd, number, argument);
  int error = errno;
  if (slot != nullptr) memset(slot, 0, sizeof(void*));
  if (result < 0) return Int(env, -error);
  if (ReturnsDescriptor(number)) Environment::Of(env).Own(result);
  return Int(env, result);
}

napi_value ReadOrWrite(napi_env env, napi_callback_info info, bool isWrite) {
  size_t argc = 4;
  napi_value argv[4];
  napi_get_cb_info(env, info, &argc, argv, nullptr, nullptr);
  int32_t fd;
  uint32_t offset, count;
  uint8_t* bytes;
  size_t length;
  if (argc != 4 || napi_get_value_int32(env, argv[0], &fd) != napi_ok || !BytesOf(env, argv[1], &bytes, &length) ||
      napi_get_value_uint32(env, argv[2], &offset) != napi_ok || napi_get_value_uint32(env, argv[3], &count) != napi_ok ||
      offset > length || count > length - offset)
    return Throw(env, "read/write(fd, view, offset, count)");
  ssize_t n;
  do n = isWrite ? write(fd, bytes + offset, count) : read(fd, bytes + offset, count);
  while (n < 0 && errno == EINTR);
  return Int(env, n < 0 ? -errno : n);
}

napi_value Read(napi_env env, napi_callback_info info) { return ReadOrWrite(env, info, false); }
napi_value Write(napi_env env, napi_callback_info info) { return ReadOrWrite(env, info, true); }

int Result(int value) { return value < 0 ? -errno : value; }

Napi::Value Open(const Napi::CallbackInfo& info) {
  std::string path = info[0].As<Napi::String>();
  int fd = Result(open(path.c_str(), info[1].As<Napi::Number>().Int32Value() | O_CLOEXEC));
  return Napi::Number::New(info.Env(), Environment::Of(info.Env()).Own(fd));
}

// ofdLock(fd, test, exclusive, start, length): takes an open-file-description lock (F_OFD_SETLK) on bytes from start, to
// the end of any file where length is 0; with test (F_OFD_GETLK), only tells whether it could be had. 0 or -errno; -EAGAIN
// where another description's lock is in the way. It goes with the descriptor.
Napi::Value OfdLock(const Napi::CallbackInfo& info) {
  struct flock lock {};
  lock.l_type = info[2].As<Napi::Boolean>() ? F_WRLCK : F_RDLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = info[3].As<Napi::Number>().Int64Value();
  lock.l_len = info[4].As<Napi::Number>().Int64Value();
  bool test = info[1].As<Napi::Boolean>();
  int result = Result(fcntl(info[0].As<Napi::Number>().Int32Value(), test ? F_OFD_GETLK : F_OFD_SETLK, &lock));
  if (result == -EACCES || (test && result == 0 && lock.l_type != F_UNLCK)) result = -EAGAIN;
  return Napi::Number::New(info.Env(), result);
}

// seekData(fd, offset): where the file has data from offset on, or -errno: -ENXIO where only a hole is left (lseek(2)).
Napi::Value SeekData(const Napi::CallbackInfo& info) {
  off_t at = lseek(info[0].As<Napi::Number>().Int32Value(), info[1].As<Napi::Number>().Int64Value(), SEEK_DATA);
  return Napi::Number::New(info.Env(), static_cast<double>(at < 0 ? -errno : at));
}

// ofdUnlock(fd): lets go of every lock of this description; 0 or -errno.
Napi::Value OfdUnlock(const Napi::CallbackInfo& info) {
  struct flock lock {};
  lock.l_type = F_UNLCK;
  lock.l_whence = SEEK_SET;
  return Napi::Number::New(info.Env(), Result(fcntl(info[0].As<Napi::Number>().Int32Value(), F_OFD_SETLK, &lock)));
}

Napi::Value Close(const Napi::CallbackInfo& info) {
  return Napi::Number::New(info.Env(), Environment::Of(info.Env()).Close(info[0].As<Napi::Number>().Int32Value()));
}

Napi::Value CloseLater(const Napi::CallbackInfo& info) {
  return Napi::Number::New(info.Env(), Environment::Of(info.Env()).CloseLater(info[0].As<Napi::Number>().Int32Value()));
}

Napi::Value Eventfd(const Napi::CallbackInfo& info) {
  int fd = Result(eventfd(info[0].As<Napi::Number>().Uint32Value(), EFD_CLOEXEC | EFD_NONBLOCK));
  return Napi::Number::New(info.Env(), Environment::Of(info.Env()).Own(fd));
}

Napi::Value MemfdCreate(const Napi::CallbackInfo& info) {
  std::string name = info[0].As<Napi::String>();
  auto size = static_cast<off_t>(info[1].As<Napi::Number>().Int64Value());
  int fd = Result(memfd_create(name.c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (fd >= 0 && ftruncate(fd, size) != 0) {
    int error = errno;
    close(fd);
    fd = -error;
  }
  return Napi::Number::New(info.Env(), Environment::Of(info.Env()).Own(fd));
}

Napi::Value TimerfdCreate(const Napi::CallbackInfo& info) {
  int fd = Result(timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK));
  return Napi::Number::New(info.Env(), Environment::Of(info.Env()).Own(fd));
}

// timerfdSet(fd, microseconds): fires once; 0 disarms.
napi_value TimerfdSet(napi_env env, napi_callback_info info) {
  size_t argc = 2;
  napi_value argv[2];
  napi_get_cb_info(env, info, &argc, argv, nullptr, nullptr);
  int32_t fd;
  uint32_t microseconds;
  if (argc != 2 || napi_get_value_int32(env, argv[0], &fd) != napi_ok ||
      napi_get_value_uint32(env, argv[1], &microseconds) != napi_ok)
    return Throw(env, "timerfdSet(fd, microseconds)");
  itimerspec spec{};
  spec.it_value.tv_sec = microseconds / 1000000;
  spec.it_value.tv_nsec = long{microseconds % 1000000} * 1000;
  return Int(env, Result(timerfd_settime(fd, 0, &spec, nullptr)));
}

// A connected pair of non-blocking stream sockets: [here, there].
Napi::Value Socketpair(const Napi::CallbackInfo& info) {
  int fds[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds) != 0)
    return Napi::Number::New(info.Env(), -errno);
  Environment& environment = Environment::Of(info.Env());
  Napi::Array result = Napi::Array::New(info.Env(), 2);
  for (uint32_t i = 0; i < 2; i++) result.Set(i, Napi::Number::New(info.Env(), environment.Own(fds[i])));
  return result;
}

// compareExchange16(bytes, words): LOCK CMPXCHG16B on 16 aligned bytes, of guest memory, say. words, four of 64 bits, are
// what is expected and what is to be there then. Returns whether it was so; the first two say what was there.
napi_value CompareExchange16(napi_env env, napi_callback_info info) {
  size_t argc = 2;
  napi_value argv[2];
  napi_get_cb_info(env, info, &argc, argv, nullptr, nullptr);
  uint8_t *bytes, *words;
  size_t length, wordsLength;
  if (argc != 2 || !BytesOf(env, argv[0], &bytes, &length) || !BytesOf(env, argv[1], &words, &wordsLength) ||
      length != 16 || wordsLength != 32 || reinterpret_cast<uintptr_t>(bytes) % 16 != 0)
    return Throw(env, "compareExchange16(16 aligned bytes, 4 words)");
  uint64_t w[4];
  memcpy(w, words, sizeof w);
  bool equal;
  asm volatile("lock cmpxchg16b %0"
               : "+m"(*reinterpret_cast<uint8_t(*)[16]>(bytes)), "=@ccz"(equal), "+a"(w[0]), "+d"(w[1])
               : "b"(w[2]), "c"(w[3])
               : "memory");
  memcpy(words, w, 16);
  napi_value result;
  napi_get_boolean(env, equal, &result);
  return result;
}

// release(fd): another owner (a net.Socket, another Worker) closes it from now on. adopt(fd): this environment does.
Napi::Value Release(const Napi::CallbackInfo& info) {
  return Napi::Boolean::New(info.Env(), Environment::Of(info.Env()).Release(info[0].As<Napi::Number>().Int32Value()));
}

Napi::Value Adopt(const Napi::CallbackInfo& info) {
  return Napi::Number::New(info.Env(), Environment::Of(info.Env()).Own(info[0].As<Napi::Number>().Int32Value()));
}

void SetRaw(Napi::Env env, Napi::Object exports, const char* name, napi_callback callback) {
  napi_value function;
  napi_create_function(env, name, NAPI_AUTO_LENGTH, callback, nullptr, &function);
  exports.Set(name, function);
}

}  // namespace

void InitSyscalls(Napi::Env env, Napi::Object exports) {
  // The ones the run loop uses are raw Node-API: the C++ wrapper adds 4 to 10 % to an exit.
  SetRaw(env, exports, "ioctl", Ioctl);
  SetRaw(env, exports, "read", Read);
  SetRaw(env, exports, "write", Write);
  SetRaw(env, exports, "timerfdSet", TimerfdSet);
  SetRaw(env, exports, "compareExchange16", CompareExchange16);
  exports.Set("open", Napi::Function::New(env, Open, "open"));
  exports.Set("ofdLock", Napi::Function::New(env, OfdLock, "ofdLock"));
  exports.Set("seekData", Napi::Function::New(env, SeekData, "seekData"));
  exports.Set("ofdUnlock", Napi::Function::New(env, OfdUnlock, "ofdUnlock"));
  exports.Set("close", Napi::Function::New(env, Close, "close"));
  exports.Set("closeLater", Napi::Function::New(env, CloseLater, "closeLater"));
  exports.Set("eventfd", Napi::Function::New(env, Eventfd, "eventfd"));
  exports.Set("memfdCreate", Napi::Function::New(env, MemfdCreate, "memfdCreate"));
  exports.Set("timerfdCreate", Napi::Function::New(env, TimerfdCreate, "timerfdCreate"));
  exports.Set("socketpair", Napi::Function::New(env, Socketpair, "socketpair"));
  exports.Set("release", Napi::Function::New(env, Release, "release"));
  exports.Set("adopt", Napi::Function::New(env, Adopt, "adopt"));
}

}  // namespace tsvisor
