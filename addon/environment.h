// What the addon keeps for one Node environment (the main thread or one Worker). Nothing is shared between them.
#pragma once

#include <napi.h>
#include <set>

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

  Napi::FunctionReference mappingConstructor;

 private:
  std::set<int> fds_;
};

}  // namespace tsvisor
