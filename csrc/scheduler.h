// Executes ticks (lists of actions) on the streams of one backend. It derives the waits from what
// the actions read and write, bounds the ticks in flight, and brings the first failure back.
// It computes no delay and knows no training method: those are data it is given.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "action.h"
#include "failure.h"
#include "hazards.h"
#include "span.h"
#include "stream.h"

namespace fdg {

class Scheduler {
 public:
  // `max_ticks_in_flight` >= 1: a tick is enqueued only when at most that many, itself included,
  // are unfinished.
  Scheduler(std::unique_ptr<Backend> backend, const std::vector<std::string>& streams,
            int max_ticks_in_flight);
  ~Scheduler();
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  // A buffer that is not `shared` may be used by one stream only, and costs nothing.
  BufferId add_buffer(std::string name, bool shared);
  int add_action(Action action);
  // A tick: actions in an order in which they could run one by one, each with its batch's number
  // relative to the tick's.
  int add_tick(std::vector<std::pair<int, int64_t>> actions);

  // Both return false when `timeout` passed first, and rethrow the first failure.
  bool wait_for_room(std::chrono::milliseconds timeout);
  bool wait_idle(std::chrono::milliseconds timeout);
  // As wait_idle, but a failure stays where it is.
  bool drain(std::chrono::milliseconds timeout);
  // Takes the oldest ticks that are done out of those in flight; waits for nothing.
  void retire();
  // Enqueues; never blocks. Call only when there is room.
  void submit(int tick_id, int64_t tick);
  // Nothing that has not begun will run; what was enqueued drains.
  void cancel() { failure_.set(nullptr); }

  // Whether the actions of the ticks submitted from now on are measured.
  void record_spans(bool on) { backend_->record_spans(on); }
  // What was measured since the last call. Call only when idle.
  std::vector<Span> take_spans();

  // [stream] seconds its actions were at work since it began, those that have ended; nothing where
  // the backend does not measure it. Any thread may ask, at any time.
  std::optional<std::vector<double>> busy_seconds() const;

  const std::vector<std::string>& buffer_names() const { return buffer_names_; }
  int64_t ticks_in_flight() const { return submitted_ - finished_; }
  int stream_count() const { return static_cast<int>(streams_.size()); }
  // Throws std::out_of_range when there is no such stream.
  uintptr_t stream_handle(int stream) const {
    return streams_.at(static_cast<size_t>(stream))->handle();
  }

 private:
  struct Registered {
    Action action;
    std::vector<BufferId> shared_reads;
    std::vector<BufferId> shared_writes;
    std::unique_ptr<Event> done;  // recorded after the action if another stream may wait for it
  };
  struct Tick {
    std::vector<std::pair<int, int64_t>> actions;
    std::vector<int> streams;  // that have something to do in it
  };
  struct InFlight {
    int tick_id = -1;
    std::vector<std::unique_ptr<Event>> done;  // [stream]
  };

  void check_action(const Action& action) const;
  void claim_private_buffers(const Action& action);
  bool wait_oldest(std::chrono::milliseconds timeout);

  // Destruction goes upwards: the streams first (they drain and join), then the events and
  // actions they use, then the backend.
  Failure failure_;
  std::unique_ptr<Backend> backend_;
  std::vector<std::string> buffer_names_;
  std::vector<bool> buffer_shared_;
  std::vector<int> buffer_owner_;  // [buffer] stream that uses a private buffer, -1 for none yet
  Hazards hazards_;
  std::vector<std::unique_ptr<Registered>> actions_;
  std::vector<Tick> ticks_;
  std::vector<InFlight> in_flight_;  // ring, by tick sequence number
  int64_t submitted_ = 0;
  int64_t finished_ = 0;
  std::vector<std::unique_ptr<Stream>> streams_;
};

}  // namespace fdg
