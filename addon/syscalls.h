// Thin, length-checked system calls. Each returns its result, or -errno: a failed call is an ordinary value here and
// becomes a typed error in TypeScript.
#pragma once

#include <napi.h>

namespace tsvisor {

void InitSyscalls(Napi::Env env, Napi::Object exports);

// The bytes behind an ArrayBufferView or ArrayBuffer argument; false (and no exception) when value is neither.
bool BytesOf(napi_env env, napi_value value, uint8_t** data, size_t* length);

}  // namespace tsvisor
