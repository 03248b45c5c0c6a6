// When the actions of a stream were at work, by events the device itself recorded.
#pragma once

#include <memory>
#include <vector>

#include "../span.h"
#include "handles.h"

namespace fdg::cuda {

// Relates what one device's events say to the host's clock, which all devices share.
class DeviceClock {
 public:
  // Waits until the device has come to an event on a stream of its own.
  explicit DeviceClock(int device);
  double seconds(const EventHandle& event) const;

 private:
  EventHandle base_;
  double base_s_ = 0;
};

// The spans of one stream: begun and ended by events around each action.
class SpanLog {
 public:
  explicit SpanLog(int device) : device_(device) {}

  bool on() const { return clock_ != nullptr; }
  void start(std::shared_ptr<const DeviceClock> clock) { clock_ = std::move(clock); }
  void stop() { clock_ = nullptr; }
  int device() const { return device_; }

  void begin(Span what, cudaStream_t stream);
  void end(cudaStream_t stream);
  // Only when all events are complete. A span that failed half-way is left out.
  void take(std::vector<Span>& spans);

 private:
  struct Pending {
    Span span;
    std::shared_ptr<const DeviceClock> clock;
    std::unique_ptr<EventHandle> begin;
    std::unique_ptr<EventHandle> end;
  };

  const int device_;
  std::shared_ptr<const DeviceClock> clock_;  // null: nothing is recorded
  std::vector<Pending> pending_;
};

}  // namespace fdg::cuda
