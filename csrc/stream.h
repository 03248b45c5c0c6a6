// The interface every backend implements, with CUDA's meaning of stream and event.
//
// A Stream is a FIFO: what is enqueued on it runs in that order, asynchronously to the host and to
// other streams. An Event marks a point of one stream:
//   record(e)  enqueues "e is complete" behind everything enqueued on the stream so far;
//   wait(e)    makes everything enqueued later on the stream wait for the record of e that is the
//              most recent *at the time of this call*; a later record does not move it, and an
//              event never recorded is waited for by nobody. So the order of the calls is the
//              contract, and a wait can only refer to something enqueued before it: no deadlock.
//   wait_host  blocks the calling thread until the most recent record is complete.
// All enqueuing calls come from one thread at a time. `flush` must be called before the host waits;
// a backend may hold back what was enqueued until then. A stream outlives the events used on it
// only if it is idle: destroy streams (their destructors drain them) before events.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "action.h"
#include "span.h"

namespace fdg {

class Event {
 public:
  virtual ~Event() = default;
  // False when `timeout` passed first; one of 0 only looks.
  virtual bool wait_host(std::chrono::milliseconds timeout) = 0;
};

class Stream {
 public:
  virtual ~Stream() = default;
  virtual void run(const Action& action, const Invocation& at) = 0;
  virtual void record(Event& event) = 0;
  virtual void wait(Event& event) = 0;
  virtual void flush() = 0;
  // The backend's own handle (cuda: the cudaStream_t), 0 where there is none.
  virtual uintptr_t handle() const { return 0; }
  // How long its actions were at work, those that have ended; nothing where a backend does not
  // measure it. Any thread may ask, at any time.
  virtual std::optional<std::chrono::nanoseconds> busy() const { return std::nullopt; }
};

class Failure;

class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::unique_ptr<Stream> make_stream(const std::string& name, Failure& failure) = 0;
  virtual std::unique_ptr<Event> make_event() = 0;

  // Whether the actions enqueued from now on, on any stream, are measured: it is decided when an
  // action is enqueued, not when it runs. Called by the enqueuing thread. A backend that cannot
  // measure records nothing.
  virtual void record_spans(bool) {}
  // What was measured since the last call: one span for each recorded action that had work and ran,
  // stream by stream, in each stream's order. Call only while nothing runs.
  virtual std::vector<Span> take_spans() { return {}; }
};

}  // namespace fdg
