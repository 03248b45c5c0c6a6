// The cpu backend: a stream is a worker thread with a FIFO, an event a counter of records.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../failure.h"
#include "../span.h"
#include "../stream.h"

namespace fdg::cpu {

struct Options {
  // Called on every worker thread when it starts; what it returns is destroyed when the thread
  // ends (a Python thread state, for example).
  std::function<std::shared_ptr<void>()> on_thread_start;
  // For tests: every action is preceded by a sleep drawn from [0, max_delay_us] microseconds.
  uint64_t delay_seed = 0;
  int max_delay_us = 0;
};

// One record of an event. Shared by whoever waits for it and the stream that completes it, so it
// outlives the event and knows nothing of later records, on whatever stream.
class CpuRecord {
 public:
  void complete();
  void wait();
  bool wait_for(std::chrono::milliseconds timeout);

 private:
  std::atomic<bool> done_{false};
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
};

class CpuEvent final : public Event {
 public:
  bool wait_host(std::chrono::milliseconds timeout) override;

 private:
  friend class CpuStream;
  std::shared_ptr<CpuRecord> latest_;  // touched by the enqueuing thread only
};

// What one stream measured. Kept by the backend too, so it outlives the stream.
struct SpanLog {
  bool on = false;          // touched by the enqueuing thread only
  std::vector<Span> spans;  // touched by the stream's worker only, while anything runs
};

class CpuStream final : public Stream {
 public:
  // `index` makes the stream's injected delays its own.
  CpuStream(const Options& options, const std::string& name, uint64_t index, Failure& failure,
            std::shared_ptr<SpanLog> log);
  ~CpuStream() override;

  void run(const Action& action, const Invocation& at) override;
  void record(Event& event) override;
  void wait(Event& event) override;
  void flush() override;
  std::optional<std::chrono::nanoseconds> busy() const override {
    return std::chrono::nanoseconds(busy_ns_.load(std::memory_order_relaxed));
  }

 private:
  enum class Kind { run, record, wait };
  struct Operation {
    Kind kind;
    const Action* action;
    std::shared_ptr<CpuRecord> record;
    Invocation at;
    bool measured;
  };

  void work(const std::function<std::shared_ptr<void>()>& on_start);
  bool take(std::vector<Operation>& operations);
  void execute(const Operation& operation);
  void run_action(const Operation& operation);
  void delay();
  Span* new_span(const Operation& operation);

  const int max_delay_us_;
  std::mt19937_64 delays_;
  Failure& failure_;
  const std::shared_ptr<SpanLog> log_;
  std::atomic<int64_t> busy_ns_{0};  // written by the worker only
  std::vector<Operation> held_;      // enqueued, not flushed yet

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Operation> queue_;
  std::atomic<bool> available_{false};
  bool closing_ = false;
  std::thread thread_;
};

class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(Options options) : options_(std::move(options)) {}
  std::unique_ptr<Stream> make_stream(const std::string& name, Failure& failure) override;
  std::unique_ptr<Event> make_event() override { return std::make_unique<CpuEvent>(); }
  void record_spans(bool on) override;
  std::vector<Span> take_spans() override;

 private:
  const Options options_;
  bool recording_ = false;
  std::vector<std::shared_ptr<SpanLog>> logs_;  // [stream]
};

}  // namespace fdg::cpu
