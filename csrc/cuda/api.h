// Every call of the CUDA runtime goes through here: checked, and with an error people can act on.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace fdg::cuda {

class CudaError : public std::runtime_error {
 public:
  CudaError(cudaError_t code, const std::string& what) : std::runtime_error(what), code(code) {}
  const cudaError_t code;
};

// What is wrong and what to do about it; `doing` says what the call was for ("tried to ...").
std::string explain(cudaError_t code, const char* call, const std::string& doing);

// Throws CudaError unless `code` is success.
inline void check(cudaError_t code, const char* call, const std::string& doing = {}) {
  if (code == cudaSuccess) return;
  cudaGetLastError();  // or a later, innocent launch would report it again
  throw CudaError(code, explain(code, call, doing));
}

#define FDG_CUDA_CHECK(call) ::fdg::cuda::check((call), #call)

// Makes `device` the calling thread's current one for its scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    FDG_CUDA_CHECK(cudaGetDevice(&previous_));
    if (previous_ == device) return;
    FDG_CUDA_CHECK(cudaSetDevice(device));
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) static_cast<void>(cudaSetDevice(previous_));
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

}  // namespace fdg::cuda
