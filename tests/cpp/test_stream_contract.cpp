// The trace and the cpu backend keep the contract of csrc/stream.h.
#include <atomic>
#include <map>
#include <random>

#include "check.h"
#include "cpu/cpu_stream.h"
#include "stream_contract.h"
#include "tools.h"
#include "trace/happens_before.h"
#include "trace/trace_stream.h"

namespace fdg::testing {
namespace {

// Gives the two actions a buffer to fight over.
class TraceJudge final : public Judge {
 public:
  bool is_ordered(const Contract& contract, char first, char second) override {
    const auto log = std::make_shared<trace::Log>();
    trace::TraceBackend backend(log);
    Failure failure;
    std::map<char, Action> actions;
    actions[first].writes = actions[second].writes = {0};
    std::map<char, std::unique_ptr<Event>> events;
    std::vector<std::unique_ptr<Stream>> streams;
    for (const auto& name : stream_names(kStreams))
      streams.push_back(backend.make_stream(name, failure));
    enqueue(contract, actions, streams, backend, events, false);
    const trace::Report report = trace::check_happens_before(log->operations);
    CHECK(report.deadlocks == std::vector<std::string>{});
    return report.races.empty();
  }
  bool is_free(const Contract& contract, char first, char second) override {
    return !is_ordered(contract, first, second);
  }
};

// Executes: once with `first` held back to give `second` the chance to overtake it, and for what is
// ordered many times with random delays.
class CpuJudge final : public Judge {
 public:
  explicit CpuJudge(milliseconds moment) : moment_(moment) {}

  bool is_ordered(const Contract& contract, char first, char second) override {
    if (overtakes(contract, first, second, moment_)) return false;
    for (int repetition = 0; repetition < kRepetitions; ++repetition)
      if (!is_ordered_once(contract, first, second, repetition)) return false;
    return true;
  }
  bool is_free(const Contract& contract, char first, char second) override {
    return overtakes(contract, first, second, kPatience);
  }

 private:
  static constexpr int kRepetitions = 15;

  static void execute(const Contract& contract, const cpu::Options& options, bool flush_always,
                      const std::function<void(char)>& act) {
    cpu::CpuBackend backend(options);
    Failure failure;
    std::map<char, Action> actions;
    for (const auto& step : contract.steps)
      if (step.verb == Verb::run)
        actions[step.name].work = work([&act, name = step.name] { act(name); });
    std::map<char, std::unique_ptr<Event>> events;
    std::vector<std::unique_ptr<Stream>> streams;
    for (const auto& name : stream_names(kStreams))
      streams.push_back(backend.make_stream(name, failure));
    enqueue(contract, actions, streams, backend, events, flush_always);
    streams.clear();
    failure.rethrow();
  }

  // Holds `first` until `second` has begun, no longer than `patience`. True if it has.
  static bool overtakes(const Contract& contract, char first, char second, milliseconds patience) {
    Gate second_began;
    bool overtaken = false;
    execute(contract, {}, false, [&](char name) {
      if (name == first) overtaken = second_began.opens_within(patience);
      if (name == second) second_began.open();
    });
    return overtaken;
  }

  static bool is_ordered_once(const Contract& contract, char first, char second, int repetition) {
    cpu::Options options;
    options.delay_seed = static_cast<uint64_t>(repetition);
    options.max_delay_us = repetition % 3 == 0 ? 0 : 60;
    // Relaxed, so that it orders nothing itself; `written` is plain, so that the thread sanitizer
    // sees what is not ordered.
    std::atomic<int> clock{0};
    int first_ended = -1;
    int second_began = -1;
    bool written = false;
    bool seen = false;
    execute(contract, options, repetition % 2 == 0, [&](char name) {
      if (name == second) {
        second_began = clock.fetch_add(1, std::memory_order_relaxed);
        seen = written;
      }
      if (name == first) {
        written = true;
        first_ended = clock.fetch_add(1, std::memory_order_relaxed);
      }
    });
    return seen && first_ended < second_began;
  }

  const milliseconds moment_;
};

TEST("contract: the trace backend keeps it") {
  TraceJudge judge;
  for (const auto& contract : contracts()) check_contract(judge, contract);
}

TEST("contract: the cpu backend keeps it") {
  CpuJudge judge(milliseconds(2));
  for (const auto& contract : contracts()) check_contract(judge, contract);
}

}  // namespace
}  // namespace fdg::testing
