#include "run_host.h"

#include <cerrno>
#include <csignal>
#include <cstring>
#include <linux/kvm.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "environment.h"

namespace tsvisor {

namespace {

constexpr int64_t kReady = 0x10000;
constexpr uint64_t kWakeToken = UINT64_MAX;

// The signal that interrupts KVM_RUN: the first real-time one that this process has no handler for. Installed once.
int KickSignal() {
  static const int signal = [] {
    for (int candidate = SIGRTMIN; candidate <= SIGRTMAX; candidate++) {
      struct sigaction current {};
      if (sigaction(candidate, nullptr, &current) != 0 || current.sa_handler != SIG_DFL) continue;
      struct sigaction action {};
      action.sa_handler = [](int) {};
      if (sigaction(candidate, &action, nullptr) == 0) return candidate;
    }
    return 0;
  }();
  return signal;
}

}  // namespace

void RunHost::Init(Napi::Env env, Napi::Object exports) {
  Napi::Function constructor = DefineClass(
      env, "RunHost",
      {InstanceMethod<&RunHost::AttachVcpu>("attachVcpu"), InstanceMethod<&RunHost::SetRunnable>("setRunnable"),
       InstanceMethod<&RunHost::Watch>("watch"), InstanceMethod<&RunHost::Unwatch>("unwatch"),
       InstanceMethod<&RunHost::Settle>("settle"), InstanceMethod<&RunHost::Close>("close")});
  exports.Set("RunHost", constructor);
}

RunHost::RunHost(const Napi::CallbackInfo& info) : Napi::ObjectWrap<RunHost>(info), inbox_(std::make_shared<Inbox>(pthread_self())) {
  Napi::Env env = info.Env();
  int signal = KickSignal();
  if (signal == 0) throw Napi::Error::New(env, "no free real-time signal to interrupt a vCPU with");
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, signal);
  pthread_sigmask(SIG_UNBLOCK, &set, nullptr);

  epoll_ = epoll_create1(EPOLL_CLOEXEC);
  wake_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = kWakeToken;
  if (epoll_ < 0 || wake_ < 0 || epoll_ctl(epoll_, EPOLL_CTL_ADD, wake_, &event) != 0) {
    std::string reason = strerror(errno);
    Stop();
    throw Napi::Error::New(env, "epoll: " + reason);
  }
  poller_ = std::thread([this] { Poll(); });

  // A raw function bound to this object: the wrapper's argument and exception handling costs 4 to 10 % of an exit.
  napi_value next;
  napi_create_function(env, "next", NAPI_AUTO_LENGTH, Next, this, &next);
  info.This().As<Napi::Object>().Set("next", next);
}

RunHost::~RunHost() { Stop(); }

void RunHost::Stop() {
  if (poller_.joinable()) {
    uint64_t one = 1;
    while (write(wake_, &one, sizeof one) < 0 && errno == EINTR) {
    }
    poller_.join();
  }
  if (epoll_ >= 0) close(epoll_);
  if (wake_ >= 0) close(wake_);
  epoll_ = wake_ = vcpu_ = -1;
  std::lock_guard<std::mutex> lock(inbox_->mutex);
  inbox_->runPages.reset();
}

void RunHost::Close(const Napi::CallbackInfo&) { Stop(); }

Napi::Value RunHost::AttachVcpu(const Napi::CallbackInfo& info) {
  Mapping* mapping = Mapping::Unwrap(info[1].As<Napi::Object>());
  std::shared_ptr<Pages> pages = mapping->pages();
  if (!pages || pages->length < sizeof(kvm_run)) throw Napi::TypeError::New(info.Env(), "not a kvm_run mapping");
  vcpu_ = info[0].As<Napi::Number>().Int32Value();
  std::lock_guard<std::mutex> lock(inbox_->mutex);
  inbox_->runPages = pages;
  return info.Env().Undefined();
}

void RunHost::SetRunnable(const Napi::CallbackInfo& info) { runnable_ = info[0].As<Napi::Boolean>().Value(); }

Napi::Value RunHost::Settle(const Napi::CallbackInfo& info) {
  if (!inbox_->runPages) return Napi::Number::New(info.Env(), -EBADF);
  int64_t value = 0;
  __atomic_store_n(&run()->immediate_exit, 1, __ATOMIC_SEQ_CST);
  if (ioctl(vcpu_, KVM_RUN, 0) >= 0) value = int64_t{run()->exit_reason} + 1;
  else if (errno != EINTR && errno != EAGAIN) value = -errno;
  if (inbox_->halted.load()) value = -ECANCELED;
  return Napi::Number::New(info.Env(), value);  // next() clears immediate_exit
}

Napi::Value RunHost::Watch(const Napi::CallbackInfo& info) {
  int fd = info[0].As<Napi::Number>().Int32Value();
  epoll_event event{};
  event.data.u64 = info[1].As<Napi::Number>().Uint32Value() & (kReady - 1);
  event.events = info[2].As<Napi::Number>().Uint32Value() | EPOLLONESHOT;
  int result = epoll_ctl(epoll_, EPOLL_CTL_MOD, fd, &event);
  if (result != 0 && errno == ENOENT) result = epoll_ctl(epoll_, EPOLL_CTL_ADD, fd, &event);
  return Napi::Number::New(info.Env(), result == 0 ? 0 : -errno);
}

Napi::Value RunHost::Unwatch(const Napi::CallbackInfo& info) {
  int result = epoll_ctl(epoll_, EPOLL_CTL_DEL, info[0].As<Napi::Number>().Int32Value(), nullptr);
  return Napi::Number::New(info.Env(), result == 0 ? 0 : -errno);
}

void RunHost::Poll() {
  // Signals of the process are for its other threads.
  sigset_t all;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, nullptr);
  pthread_setname_np(pthread_self(), "tsvisor-poller");
  epoll_event events[16];
  uint32_t tokens[16];
  for (;;) {
    int count = epoll_wait(epoll_, events, 16, -1);
    if (count < 0 && errno != EINTR) return;
    size_t ready = 0;
    for (int i = 0; i < count; i++) {
      if (events[i].data.u64 == kWakeToken) return;
      tokens[ready++] = static_cast<uint32_t>(events[i].data.u64);
    }
    if (ready > 0) inbox_->Post(tokens, ready);
  }
}

void RunHost::Inbox::Post(const uint32_t* tokens, size_t count) {
  {
    std::lock_guard<std::mutex> lock(mutex);
    ready.insert(ready.end(), tokens, tokens + count);
    pending.store(true);
    if (runPages) {
      __atomic_store_n(&static_cast<kvm_run*>(runPages->address)->immediate_exit, 1, __ATOMIC_SEQ_CST);
      if (inGuest.load()) pthread_kill(thread, KickSignal());
    }
  }
  changed.notify_one();
}

void RunHost::Inbox::Halt(uint32_t token) {
  halted.store(true);
  Post(&token, 1);
}

int64_t RunHost::Next() {
  Inbox& inbox = *inbox_;
  for (;;) {
    if (inbox.pending.load()) {
      std::lock_guard<std::mutex> lock(inbox.mutex);
      if (!inbox.ready.empty()) {
        uint32_t token = inbox.ready.front();
        inbox.ready.pop_front();
        if (inbox.ready.empty()) inbox.pending.store(false);
        return kReady | token;
      }
      inbox.pending.store(false);
    }
    if (!runnable_ || !inbox.runPages || inbox.halted.load()) {
      std::unique_lock<std::mutex> lock(inbox.mutex);
      if (epoll_ < 0) return -EBADF;
      inbox.changed.wait(lock, [&inbox] { return !inbox.ready.empty(); });
      continue;
    }
    inbox.inGuest.store(true);
    __atomic_store_n(&run()->immediate_exit, 0, __ATOMIC_SEQ_CST);
    if (inbox.pending.load()) {
      inbox.inGuest.store(false);
      continue;
    }
    int result = ioctl(vcpu_, KVM_RUN, 0);
    int error = errno;
    inbox.inGuest.store(false, std::memory_order_relaxed);
    if (inbox.halted.load()) continue;
    if (result >= 0) return run()->exit_reason;
    // EINTR: kicked, or a signal of the process. EAGAIN: an application processor that got its SIPI (KVM API 4.10).
    if (error != EINTR && error != EAGAIN) return -error;
  }
}

napi_value RunHost::Next(napi_env env, napi_callback_info info) {
  void* self;
  napi_get_cb_info(env, info, nullptr, nullptr, nullptr, &self);
  int64_t value = static_cast<RunHost*>(self)->Next();
  napi_value result;
  napi_create_int32(env, static_cast<int32_t>(value), &result);
  return result;
}

}  // namespace tsvisor
