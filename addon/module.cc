// Module entry and per-environment state.
#include <cerrno>
#include <csignal>
#include <unistd.h>

#include "environment.h"
#include "guest_io.h"
#include "mapping.h"
#include "page_faults.h"
#include "run_host.h"
#include "syscalls.h"

namespace tsvisor {

namespace {

constexpr size_t kMaxClosing = 8;  // VMs that wait to be closed

}  // namespace

Environment::Environment(Napi::Env) {}

Environment::~Environment() {
  if (closer_.joinable()) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      over_ = true;
    }
    changed_.notify_one();
    closer_.join();
  }
  for (int fd : fds_) close(fd);
}

Environment& Environment::Of(napi_env env) { return *Napi::Env(env).GetInstanceData<Environment>(); }

int Environment::Own(int fd) {
  if (fd >= 0) fds_.insert(fd);
  return fd;
}

bool Environment::Release(int fd) { return fds_.erase(fd) != 0; }

int Environment::Close(int fd) {
  if (fds_.erase(fd) == 0) return -EBADF;
  return close(fd) == 0 ? 0 : -errno;
}

int Environment::CloseLater(int fd) {
  if (fds_.erase(fd) == 0) return -EBADF;
  std::unique_lock<std::mutex> lock(mutex_);
  if (closing_.size() >= kMaxClosing) {
    lock.unlock();
    return close(fd) == 0 ? 0 : -errno;
  }
  closing_.push_back(fd);
  if (!closer_.joinable()) closer_ = std::thread([this] { CloseAll(); });
  changed_.notify_one();
  return 0;
}

void Environment::CloseAll() {
  sigset_t all;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, nullptr);
  pthread_setname_np(pthread_self(), "tsvisor-closer");
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return over_ || !closing_.empty(); });
    if (closing_.empty()) return;
    const int fd = closing_.front();
    closing_.erase(closing_.begin());
    lock.unlock();
    close(fd);
    lock.lock();
  }
}

static Napi::Object Init(Napi::Env env, Napi::Object exports) {
  env.SetInstanceData(new Environment(env));
  InitSyscalls(env, exports);
  Mapping::Init(env, exports);
  RunHost::Init(env, exports);
  GuestIo::Init(env, exports);
  PageFaults::Init(env, exports);
  return exports;
}

NODE_API_MODULE(tsvisor, Init)

}  // namespace tsvisor
