// Module entry and per-environment state.
#include <cerrno>
#include <unistd.h>

#include "environment.h"
#include "guest_io.h"
#include "mapping.h"
#include "page_faults.h"
#include "run_host.h"
#include "syscalls.h"

namespace tsvisor {

Environment::Environment(Napi::Env) {}

Environment::~Environment() {
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
