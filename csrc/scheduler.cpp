#include "scheduler.h"

#include <algorithm>
#include <stdexcept>

namespace fdg {

Scheduler::Scheduler(std::unique_ptr<Backend> backend, const std::vector<std::string>& streams,
                     int max_ticks_in_flight)
    : backend_(std::move(backend)), hazards_(static_cast<int>(streams.size())) {
  if (streams.empty())
    throw std::invalid_argument("a scheduler needs at least one stream, got none");
  if (max_ticks_in_flight < 1)
    throw std::invalid_argument("max_ticks_in_flight must be at least 1, got " +
                                std::to_string(max_ticks_in_flight));
  in_flight_.resize(static_cast<size_t>(max_ticks_in_flight));
  for (auto& entry : in_flight_)
    for (size_t i = 0; i < streams.size(); ++i) entry.done.push_back(backend_->make_event());
  for (const auto& name : streams) streams_.push_back(backend_->make_stream(name, failure_));
}

Scheduler::~Scheduler() {
  cancel();
  for (auto& stream : streams_) stream->flush();
  streams_.clear();
}

BufferId Scheduler::add_buffer(std::string name, bool shared) {
  buffer_names_.push_back(std::move(name));
  buffer_shared_.push_back(shared);
  buffer_owner_.push_back(-1);
  hazards_.add_buffer();
  return static_cast<BufferId>(buffer_names_.size()) - 1;
}

void Scheduler::check_action(const Action& action) const {
  if (action.stream < 0 || action.stream >= stream_count())
    throw std::invalid_argument("action " + action.label(0) + " names stream " +
                                std::to_string(action.stream) + "; there are streams 0 to " +
                                std::to_string(stream_count() - 1));
  for (const auto* list : {&action.reads, &action.writes})
    for (const BufferId buffer : *list)
      if (buffer < 0 || buffer >= static_cast<int>(buffer_names_.size()))
        throw std::invalid_argument("action " + action.label(0) + " names buffer " +
                                    std::to_string(buffer) + ", which was never added");
}

void Scheduler::claim_private_buffers(const Action& action) {
  for (const auto* list : {&action.reads, &action.writes})
    for (const BufferId buffer : *list) {
      const int owner = buffer_owner_[buffer];
      if (buffer_shared_[buffer]) continue;
      if (owner >= 0 && owner != action.stream)
        throw std::invalid_argument("buffer " + buffer_names_[buffer] + " is private to stream " +
                                    std::to_string(owner) + " but action " + action.label(0) +
                                    " uses it on stream " + std::to_string(action.stream) +
                                    "; add it with shared=true");
    }
  // Only when none was refused.
  for (const auto* list : {&action.reads, &action.writes})
    for (const BufferId buffer : *list)
      if (!buffer_shared_[buffer]) buffer_owner_[buffer] = action.stream;
}

int Scheduler::add_action(Action action) {
  check_action(action);
  claim_private_buffers(action);
  auto entry = std::make_unique<Registered>();
  const auto shared = [this](BufferId buffer) { return buffer_shared_[buffer]; };
  std::copy_if(action.reads.begin(), action.reads.end(), std::back_inserter(entry->shared_reads),
               shared);
  std::copy_if(action.writes.begin(), action.writes.end(), std::back_inserter(entry->shared_writes),
               shared);
  if (!entry->shared_reads.empty() || !entry->shared_writes.empty())
    entry->done = backend_->make_event();
  entry->action = std::move(action);
  actions_.push_back(std::move(entry));
  hazards_.add_action();
  return static_cast<int>(actions_.size()) - 1;
}

int Scheduler::add_tick(std::vector<std::pair<int, int64_t>> actions) {
  Tick tick;
  for (const auto& [id, offset] : actions) {
    if (id < 0 || id >= static_cast<int>(actions_.size()))
      throw std::invalid_argument("a tick names action " + std::to_string(id) +
                                  ", which was never added");
    const int stream = actions_[id]->action.stream;
    if (std::find(tick.streams.begin(), tick.streams.end(), stream) == tick.streams.end())
      tick.streams.push_back(stream);
  }
  tick.actions = std::move(actions);
  ticks_.push_back(std::move(tick));
  return static_cast<int>(ticks_.size()) - 1;
}

void Scheduler::submit(int tick_id, int64_t tick) {
  if (tick_id < 0 || tick_id >= static_cast<int>(ticks_.size()))
    throw std::invalid_argument("tick " + std::to_string(tick_id) + " was never added");
  if (ticks_in_flight() >= static_cast<int64_t>(in_flight_.size()))
    throw std::logic_error("submit without room: wait_for_room comes first");
  for (const auto& [id, offset] : ticks_[tick_id].actions) {
    Registered& entry = *actions_[id];
    Stream& stream = *streams_[entry.action.stream];
    if (entry.done)
      for (const int waited :
           hazards_.enqueue(id, entry.action.stream, entry.shared_reads, entry.shared_writes))
        stream.wait(*actions_[waited]->done);
    stream.run(entry.action, Invocation{tick, tick + offset});
    if (entry.done) stream.record(*entry.done);
  }
  InFlight& entry = in_flight_[static_cast<size_t>(submitted_) % in_flight_.size()];
  entry.tick_id = tick_id;
  for (const int stream : ticks_[tick_id].streams) streams_[stream]->record(*entry.done[stream]);
  for (const int stream : ticks_[tick_id].streams) streams_[stream]->flush();
  ++submitted_;
}

bool Scheduler::wait_oldest(std::chrono::milliseconds timeout) {
  InFlight& entry = in_flight_[static_cast<size_t>(finished_) % in_flight_.size()];
  for (const int stream : ticks_[entry.tick_id].streams)
    if (!entry.done[stream]->wait_host(timeout)) return false;
  ++finished_;
  return true;
}

bool Scheduler::wait_for_room(std::chrono::milliseconds timeout) {
  const auto most = static_cast<int64_t>(in_flight_.size());
  // Once there is no room, wait for more than one tick: waking the host costs more than a tick of
  // small actions, and this way it is woken less often.
  if (ticks_in_flight() >= most)
    while (ticks_in_flight() > most / 2)
      if (!wait_oldest(timeout)) return false;
  failure_.rethrow();
  return true;
}

void Scheduler::retire() {
  while (ticks_in_flight() > 0 && wait_oldest(std::chrono::milliseconds(0))) {
  }
}

bool Scheduler::drain(std::chrono::milliseconds timeout) {
  while (ticks_in_flight() > 0)
    if (!wait_oldest(timeout)) return false;
  return true;
}

bool Scheduler::wait_idle(std::chrono::milliseconds timeout) {
  if (!drain(timeout)) return false;
  failure_.rethrow();
  return true;
}

std::vector<Span> Scheduler::take_spans() {
  if (ticks_in_flight() > 0)
    throw std::logic_error("take_spans while ticks are in flight: wait_idle or drain comes first");
  return backend_->take_spans();
}

std::optional<std::vector<double>> Scheduler::busy_seconds() const {
  std::vector<double> seconds;
  for (const auto& stream : streams_) {
    const auto busy = stream->busy();
    if (!busy) return std::nullopt;
    seconds.push_back(std::chrono::duration<double>(*busy).count());
  }
  return seconds;
}

}  // namespace fdg
