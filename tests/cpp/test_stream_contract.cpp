// The contract of csrc/stream.h, written once for every backend.
//
// A contract is a short program and the pairs of its actions that are ordered, or free:
//
//   run(0, 'a')     stream 0 runs action a          ordered "ab"  a ends before b begins
//   record(0, 'e')  stream 0 records event e        free "ab"     b may begin while a still runs
//   wait(1, 'e')    stream 1 waits for event e      (a is enqueued before b in both)
//
// A judge says of a pair whether it is ordered on its backend.
#include <atomic>
#include <map>
#include <random>

#include "check.h"
#include "cpu/cpu_stream.h"
#include "tools.h"
#include "trace/happens_before.h"
#include "trace/trace_stream.h"

namespace fdg::testing {
namespace {

constexpr int kStreams = 4;

enum class Verb { run, record, wait };

struct Step {
  Verb verb;
  int stream;
  char name;  // of the action, or of the event
};
Step run(int stream, char action) { return {Verb::run, stream, action}; }
Step record(int stream, char event) { return {Verb::record, stream, event}; }
Step wait(int stream, char event) { return {Verb::wait, stream, event}; }

struct Contract {
  std::string name;
  std::vector<Step> steps;
  std::vector<std::string> ordered;
  std::vector<std::string> free;
};

const std::vector<Contract>& contracts() {
  static const std::vector<Contract> all{
      {"a stream is a FIFO", {run(0, 'a'), run(0, 'b'), run(0, 'c')}, {"ab", "bc", "ac"}, {}},
      {"streams know nothing of one another", {run(0, 'a'), run(1, 'b')}, {}, {"ab"}},
      {"what follows a wait comes after what precedes the record",
       {run(0, 'a'), run(0, 'b'), record(0, 'e'), wait(1, 'e'), run(1, 'c'), run(1, 'd')},
       {"ac", "bc", "ad", "bd"},
       {}},
      {"what follows the record is not waited for",
       {run(0, 'a'), record(0, 'e'), run(0, 'b'), wait(1, 'e'), run(1, 'c')},
       {"ac"},
       {"bc"}},
      {"a record on an idle stream is complete",
       {record(0, 'e'), run(0, 'a'), wait(1, 'e'), run(1, 'b')},
       {},
       {"ab"}},
      {"a wait captures the record that is there: a later one does not delay it",
       {run(0, 'a'), record(0, 'e'), wait(1, 'e'), run(0, 'x'), record(0, 'e'), run(1, 'b')},
       {"ab"},
       {"xb"}},
      {"a wait captures the most recent record",
       {run(0, 'a'), record(0, 'e'), run(0, 'b'), record(0, 'e'), wait(1, 'e'), run(1, 'c')},
       {"ac", "bc"},
       {}},
      {"a later record on another stream neither delays nor meets an earlier wait",
       {run(0, 'a'), record(0, 'e'), wait(2, 'e'), run(1, 'x'), record(1, 'e'), run(2, 'b')},
       {"ab"},
       {"xb"}},
      {"the most recent record may be another stream's",
       {run(0, 'a'), record(0, 'e'), run(1, 'x'), record(1, 'e'), wait(2, 'e'), run(2, 'b')},
       {"xb"},
       {"ab"}},
      {"two waits capture two records of one event",
       {run(0, 'a'), record(0, 'e'), wait(1, 'e'), run(0, 'b'), record(0, 'e'), wait(2, 'e'),
        run(1, 'c'), run(2, 'd')},
       {"ac", "ad", "bd"},
       {"bc"}},
      {"an event not recorded yet is not waited for",
       {wait(1, 'e'), run(0, 'a'), record(0, 'e'), run(1, 'b')},
       {},
       {"ab"}},
      {"an event never recorded is not waited for",
       {run(0, 'a'), wait(1, 'e'), run(1, 'b')},
       {},
       {"ab"}},
      {"a wait orders only what is enqueued later",
       {run(0, 'a'), record(0, 'e'), run(1, 'b'), wait(1, 'e'), run(1, 'c')},
       {"ac", "bc"},
       {"ab"}},
      {"a wait orders only its own stream",
       {run(0, 'a'), record(0, 'e'), wait(1, 'e'), run(1, 'b'), run(2, 'c')},
       {"ab"},
       {"ac"}},
      {"a wait for the stream's own record changes nothing",
       {run(0, 'a'), record(0, 'e'), wait(0, 'e'), run(0, 'b'), run(1, 'c')},
       {"ab"},
       {"ac", "bc"}},
      {"several may wait for one record, and more than once",
       {run(0, 'a'), record(0, 'e'), wait(1, 'e'), wait(1, 'e'), wait(2, 'e'), run(1, 'b'),
        run(2, 'c')},
       {"ab", "ac"},
       {"bc"}},
      {"order is transitive over three streams",
       {run(0, 'a'), record(0, 'e'), wait(1, 'e'), run(1, 'b'), record(1, 'f'), wait(2, 'f'),
        run(2, 'c')},
       {"ab", "bc", "ac"},
       {}},
      {"order passes through a stream that runs nothing",
       {run(0, 'a'), record(0, 'e'), wait(1, 'e'), record(1, 'f'), wait(2, 'f'), run(2, 'c'),
        run(1, 'd')},
       {"ac", "ad"},
       {"cd"}},
      {"a diamond",
       {run(0, 'a'), record(0, 'e'), wait(1, 'e'), run(1, 'b'), record(1, 'f'), wait(2, 'e'),
        run(2, 'c'), record(2, 'g'), wait(3, 'f'), wait(3, 'g'), run(3, 'd')},
       {"ab", "ac", "bd", "cd", "ad"},
       {"bc"}},
      {"to and fro, with the same two events recorded again",
       {run(0, 'a'), record(0, 'e'), wait(1, 'e'), run(1, 'b'), record(1, 'f'), wait(0, 'f'),
        run(0, 'c'), record(0, 'e'), wait(1, 'e'), run(1, 'd'), record(1, 'f'), wait(0, 'f'),
        run(0, 'g')},
       {"ab", "bc", "cd", "dg", "ag"},
       {}},
  };
  return all;
}

// Enqueues the steps, making the events as they are first named. `flush_always` after every step,
// else once at the end.
void enqueue(const Contract& contract, std::map<char, Action>& actions,
             std::vector<std::unique_ptr<Stream>>& streams, Backend& backend,
             std::map<char, std::unique_ptr<Event>>& events, bool flush_always) {
  for (const auto& [verb, stream, name] : contract.steps) {
    if (verb == Verb::run) {
      actions[name].stream = stream;
      streams[stream]->run(actions[name], {});
    } else {
      auto& event = events[name];
      if (!event) event = backend.make_event();
      if (verb == Verb::record)
        streams[stream]->record(*event);
      else
        streams[stream]->wait(*event);
    }
    if (flush_always) streams[stream]->flush();
  }
  for (auto& stream : streams) stream->flush();
}

class Judge {
 public:
  virtual ~Judge() = default;
  virtual bool is_ordered(const Contract& contract, char first, char second) = 0;
  virtual bool is_free(const Contract& contract, char first, char second) = 0;
};

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

void check_contract(Judge& judge, const Contract& contract) {
  const check::Note note(contract.name);
  for (const auto& pair : contract.ordered) {
    const check::Note which("ordered " + pair);
    CHECK(judge.is_ordered(contract, pair[0], pair[1]));
  }
  for (const auto& pair : contract.free) {
    const check::Note which("free " + pair);
    CHECK(judge.is_free(contract, pair[0], pair[1]));
  }
}

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
