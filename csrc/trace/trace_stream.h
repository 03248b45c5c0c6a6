// The trace backend: runs nothing, records what would be enqueued.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "../stream.h"

namespace fdg::trace {

enum class OperationKind { run, record, wait };

// One operation as enqueued. Plain data, so that a program can be altered and checked again.
struct Operation {
  OperationKind kind = OperationKind::run;
  int stream = 0;
  // run
  std::string code;
  int stage = 0;
  int slot = 0;
  int64_t tick = 0;
  int64_t batch = 0;
  std::vector<BufferId> reads;
  std::vector<BufferId> writes;
  // record, wait: the event, and which of its records (1 is the first)
  int event = 0;
  uint64_t ticket = 0;

  std::string describe() const;
};

struct Log {
  std::vector<std::string> streams;
  std::vector<Operation> operations;  // of all streams, in the order they were enqueued
  int events = 0;
};

class TraceBackend final : public Backend {
 public:
  explicit TraceBackend(std::shared_ptr<Log> log) : log_(std::move(log)) {}
  std::unique_ptr<Stream> make_stream(const std::string& name, Failure& failure) override;
  std::unique_ptr<Event> make_event() override;

 private:
  std::shared_ptr<Log> log_;
};

}  // namespace fdg::trace
