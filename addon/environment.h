// What the addon keeps for one Node environment (the main thread or one Worker). Nothing is shared between them.
#pragma once

#include <condition_variable>
#include <mutex>
#include <napi.h>
#include <set>
#include <thread>
#include <vector>

namespace tsvisor {

// Descriptors opened through the addon and not yet closed. A Worker that is terminated closes them with its environment,
// so a machine that dies at any moment leaks none.
class Environment {
 public:
  explicit Environment(Napi::Env env);
  ~Environment();
  Environment(const Environment&) = delete;
  Environment& operator=(const Environment&) = delete;

  static Environment& Of(napi_env env);

  int Own(int fd);    // Records fd (when >= 0) and returns it.
  bool Release(int fd);  // Forgets fd without closing it: it has another owner now.
  int Close(int fd);  // Closes and forgets; -EBADF for a descriptor this environment does not own.
  // As Close(), on another thread: KVM takes 10 ms and more to close a VM, in which it waits for all CPUs. Who is quicker
  // than that thread by some has to wait himself.
  int CloseLater(int fd);

  Napi::FunctionReference mappingConstructor;

 private:
  void CloseAll();

  std::set<int> fds_;

  std::mutex mutex_;  // guards closing_ and over_
  std::condition_variable changed_;
  std::vector<int> closing_;
  bool over_ = false;
  std::thread closer_;
};

}  // namespace tsvisor
