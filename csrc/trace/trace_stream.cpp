#include "trace_stream.h"

namespace fdg::trace {
namespace {

class TraceEvent final : public Event {
 public:
  explicit TraceEvent(int id) : id(id) {}
  bool wait_host(std::chrono::milliseconds) override { return true; }

  const int id;
  uint64_t recorded = 0;
};

class TraceStream final : public Stream {
 public:
  TraceStream(int index, std::shared_ptr<Log> log) : index_(index), log_(std::move(log)) {}

  void run(const Action& action, const Invocation& at) override {
    Operation operation = blank(OperationKind::run);
    operation.code = action.code;
    operation.stage = action.stage;
    operation.slot = action.slot;
    operation.tick = at.tick;
    operation.batch = at.batch;
    operation.reads = action.reads;
    operation.writes = action.writes;
    log_->operations.push_back(std::move(operation));
  }

  void record(Event& event) override {
    auto& trace_event = static_cast<TraceEvent&>(event);
    Operation operation = blank(OperationKind::record);
    operation.event = trace_event.id;
    operation.ticket = ++trace_event.recorded;
    log_->operations.push_back(std::move(operation));
  }

  void wait(Event& event) override {
    const auto& trace_event = static_cast<TraceEvent&>(event);
    Operation operation = blank(OperationKind::wait);
    operation.event = trace_event.id;
    operation.ticket = trace_event.recorded;
    log_->operations.push_back(std::move(operation));
  }

  void flush() override {}
  std::optional<std::chrono::nanoseconds> busy() const override {
    return std::chrono::nanoseconds(0);
  }

 private:
  Operation blank(OperationKind kind) const {
    Operation operation;
    operation.kind = kind;
    operation.stream = index_;
    return operation;
  }

  const int index_;
  std::shared_ptr<Log> log_;
};

}  // namespace

std::string Operation::describe() const {
  const std::string place = " on stream " + std::to_string(stream);
  const std::string record =
      " of record " + std::to_string(ticket) + " of event " + std::to_string(event);
  switch (kind) {
    case OperationKind::run:
      return std::to_string(stage) + code + std::to_string(batch) + " (tick " +
             std::to_string(tick) + ", slot " + std::to_string(slot) + ")" + place;
    case OperationKind::record:
      return "record " + std::to_string(ticket) + " of event " + std::to_string(event) + place;
    case OperationKind::wait:
      return "wait" + record + place;
  }
  return "unknown operation" + place;
}

std::unique_ptr<Stream> TraceBackend::make_stream(const std::string& name, Failure&) {
  log_->streams.push_back(name);
  return std::make_unique<TraceStream>(static_cast<int>(log_->streams.size()) - 1, log_);
}

std::unique_ptr<Event> TraceBackend::make_event() {
  return std::make_unique<TraceEvent>(log_->events++);
}

}  // namespace fdg::trace
