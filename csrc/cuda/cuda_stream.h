// The cuda backend: streams and events are CUDA's own. One host thread enqueues everything; works
// run on it and launch on their stream. The host waits only where it bounds the ticks in flight.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../failure.h"
#include "../stream.h"
#include "handles.h"
#include "span_log.h"

namespace fdg::cuda {

struct Options {
  std::vector<int> devices;  // [stream]
  // [stream] a cudaStream_t of the caller's, which must outlive the scheduler; 0 makes a stream.
  // Empty: all are made.
  std::vector<uintptr_t> handles;
  // For tests: the device sleeps up to max_delay_us microseconds before every action.
  uint64_t delay_seed = 0;
  int max_delay_us = 0;
};

class CudaEvent final : public Event {
 public:
  // Polls, so that the host can look for signals meanwhile. An error of the device is a failure of
  // the whole program, after which nothing is waited for.
  bool wait_host(std::chrono::milliseconds timeout) override;

 private:
  friend class CudaStream;
  std::unique_ptr<EventHandle> handle_;  // made on the device of the first stream it is recorded on
  Failure* failure_ = nullptr;
  bool recorded_ = false;
};

class CudaStream final : public Stream {
 public:
  CudaStream(int device, const Options& options, uint64_t index, Failure& failure,
             std::shared_ptr<SpanLog> log);

  void run(const Action& action, const Invocation& at) override;
  void record(Event& event) override;
  void wait(Event& event) override;
  void flush() override {}  // CUDA starts what it is given
  uintptr_t handle() const override { return reinterpret_cast<uintptr_t>(stream_.get()); }

  cudaStream_t get() const { return stream_.get(); }
  int device() const { return stream_.device(); }

 private:
  // Runs `function` with the stream's device as the current one. What is thrown becomes the failure
  // of the whole program, with what was to be done.
  struct Doing {
    const Action* action = nullptr;  // null: an event
    int64_t batch = 0;
    std::string what() const { return action ? action->label(batch) : "an event"; }
  };
  template <class Function>
  void guarded(const Doing& doing, const Function& function) noexcept;

  const int max_delay_us_;
  std::mt19937_64 delays_;
  Failure& failure_;
  const std::shared_ptr<SpanLog> log_;
  StreamHandle stream_;
};

class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(Options options) : options_(std::move(options)) {}
  std::unique_ptr<Stream> make_stream(const std::string& name, Failure& failure) override;
  std::unique_ptr<Event> make_event() override { return std::make_unique<CudaEvent>(); }
  void record_spans(bool on) override;
  std::vector<Span> take_spans() override;

 private:
  const Options options_;
  std::vector<std::shared_ptr<SpanLog>> logs_;                // [stream]
  std::map<int, std::shared_ptr<const DeviceClock>> clocks_;  // [device]
};

// Works of this backend run on this kind of stream only.
inline CudaStream& on_cuda(Stream& stream) { return static_cast<CudaStream&>(stream); }

}  // namespace fdg::cuda
