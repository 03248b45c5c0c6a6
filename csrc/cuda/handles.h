// Owners of CUDA's handles and memory: not copyable, each sets its device, none throws when it
// ends.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "api.h"

namespace fdg::cuda {

// A stream that the default stream does not wait for, nor it for the default stream. One that is
// adopted is drained but not destroyed at the end: it is somebody else's.
class StreamHandle {
 public:
  explicit StreamHandle(int device, uintptr_t adopted = 0)
      : device_(device), owned_(adopted == 0), stream_(reinterpret_cast<cudaStream_t>(adopted)) {
    if (!owned_) return;
    const DeviceGuard guard(device);
    FDG_CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  }
  // Whatever was enqueued has run by then.
  ~StreamHandle() {
    int previous = 0;
    static_cast<void>(cudaGetDevice(&previous));
    static_cast<void>(cudaSetDevice(device_));
    static_cast<void>(cudaStreamSynchronize(stream_));
    if (owned_) static_cast<void>(cudaStreamDestroy(stream_));
    static_cast<void>(cudaSetDevice(previous));
    static_cast<void>(cudaGetLastError());
  }
  StreamHandle(const StreamHandle&) = delete;
  StreamHandle& operator=(const StreamHandle&) = delete;

  cudaStream_t get() const { return stream_; }
  int device() const { return device_; }

 private:
  const int device_;
  const bool owned_;
  cudaStream_t stream_;
};

class EventHandle {
 public:
  EventHandle(int device, unsigned flags) : device_(device) {
    const DeviceGuard guard(device);
    FDG_CUDA_CHECK(cudaEventCreateWithFlags(&event_, flags));
  }
  ~EventHandle() {
    static_cast<void>(cudaEventDestroy(event_));
    static_cast<void>(cudaGetLastError());
  }
  EventHandle(const EventHandle&) = delete;
  EventHandle& operator=(const EventHandle&) = delete;

  cudaEvent_t get() const { return event_; }
  int device() const { return device_; }

 private:
  const int device_;
  cudaEvent_t event_ = nullptr;
};

class DeviceMemory {
 public:
  DeviceMemory(int device, size_t bytes) : device_(device) {
    const DeviceGuard guard(device);
    check(cudaMalloc(&data_, bytes), "cudaMalloc",
          "tried to allocate " + std::to_string(bytes) + " bytes");
  }
  ~DeviceMemory() {
    int previous = 0;
    static_cast<void>(cudaGetDevice(&previous));
    static_cast<void>(cudaSetDevice(device_));
    static_cast<void>(cudaFree(data_));
    static_cast<void>(cudaSetDevice(previous));
    static_cast<void>(cudaGetLastError());
  }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  char* get() const { return static_cast<char*>(data_); }

 private:
  const int device_;
  void* data_ = nullptr;
};

// Page-locked host memory, which copies need to be asynchronous.
class PinnedMemory {
 public:
  explicit PinnedMemory(size_t bytes) {
    check(cudaHostAlloc(&data_, bytes, cudaHostAllocPortable), "cudaHostAlloc",
          "tried to allocate " + std::to_string(bytes) + " bytes of page-locked host memory");
  }
  ~PinnedMemory() {
    static_cast<void>(cudaFreeHost(data_));
    static_cast<void>(cudaGetLastError());
  }
  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;

  char* get() const { return static_cast<char*>(data_); }

 private:
  void* data_ = nullptr;
};

}  // namespace fdg::cuda
