// The waits the scheduler derives: enough for any program, and not one too many.
#include <algorithm>
#include <atomic>
#include <memory>
#include <stdexcept>
#include <string>

#include "check.h"
#include "random_program.h"
#include "tools.h"
#include "trace/happens_before.h"
#include "trace/trace_stream.h"

namespace fdg::testing {
namespace {

using trace::Operation;
using trace::OperationKind;

std::shared_ptr<trace::Log> traced(const RandomProgram& program) {
  const auto log = std::make_shared<trace::Log>();
  Scheduler scheduler(std::make_unique<trace::TraceBackend>(log), stream_names(program.streams),
                      program.max_ticks_in_flight);
  register_program(program, scheduler, [](size_t) { return nullptr; });
  for (size_t i = 0; i < program.submitted.size(); ++i) {
    CHECK(scheduler.wait_for_room(kPatience));
    scheduler.submit(program.submitted[i], static_cast<int64_t>(i));
  }
  return log;
}

TEST("random programs: on the cpu they compute what they compute one by one") {
  for (uint64_t seed = 0; seed < 250; ++seed) {
    const check::Note note("seed " + std::to_string(seed));
    const RandomProgram program = random_program(seed);
    Memory expected(program);
    run_one_by_one(program, expected);

    Memory memory(program);
    cpu::Options options;
    options.delay_seed = seed;
    options.max_delay_us = seed % 3 == 0 ? 0 : 40;
    Rig rig(program.streams, program.max_ticks_in_flight, options);
    register_program(program, rig.scheduler, [&](size_t id) {
      return work_at([&, id](const Invocation& at) { memory.apply(program.actions[id], id, at); });
    });
    for (size_t i = 0; i < program.submitted.size(); ++i) {
      CHECK(rig.wait_for_room());
      rig.scheduler.submit(program.submitted[i], static_cast<int64_t>(i));
      CHECK(rig.scheduler.ticks_in_flight() <= program.max_ticks_in_flight);
    }
    CHECK(rig.wait_idle());
    // The streams are still there: it is wait_idle that lets the host see what they did.
    CHECK(memory.seen == expected.seen);
    CHECK((memory.buffers == expected.buffers));
  }
}

TEST("random programs: the trace holds every run in order, free of races and deadlocks") {
  for (uint64_t seed = 0; seed < 300; ++seed) {
    const check::Note note("seed " + std::to_string(seed));
    const RandomProgram program = random_program(seed);
    const auto log = traced(program);
    const trace::Report report = trace::check_happens_before(log->operations);
    CHECK(report.races == std::vector<std::string>{});
    CHECK(report.deadlocks == std::vector<std::string>{});

    std::vector<std::pair<int, int64_t>> wanted;
    for (size_t tick = 0; tick < program.submitted.size(); ++tick)
      for (const auto& [id, offset] : program.ticks[program.submitted[tick]])
        wanted.emplace_back(id, static_cast<int64_t>(tick) + offset);
    std::vector<std::pair<int, int64_t>> enqueued;
    for (const Operation& operation : log->operations)
      if (operation.kind == OperationKind::run)
        enqueued.emplace_back(operation.slot, operation.batch);
    CHECK((enqueued == wanted));
  }
}

TEST("random programs: without any single wait there is a race") {
  int waits = 0;
  for (uint64_t seed = 0; seed < 120; ++seed) {
    const check::Note note("seed " + std::to_string(seed));
    const auto log = traced(random_program(seed));
    for (size_t i = 0; i < log->operations.size(); ++i) {
      if (log->operations[i].kind != OperationKind::wait) continue;
      ++waits;
      std::vector<Operation> less = log->operations;
      less.erase(less.begin() + static_cast<std::ptrdiff_t>(i));
      const check::Note which("without " + log->operations[i].describe());
      CHECK(!trace::check_happens_before(less).races.empty());
    }
  }
  CHECK(waits > 500);  // else the programs are too tame to show anything
}

TEST("random programs: without a record that is waited for there is a deadlock") {
  for (uint64_t seed = 0; seed < 30; ++seed) {
    const check::Note note("seed " + std::to_string(seed));
    const auto log = traced(random_program(seed));
    const auto waited_for = [&log](const Operation& record) {
      return std::any_of(log->operations.begin(), log->operations.end(), [&](const auto& other) {
        return other.kind == OperationKind::wait && other.event == record.event &&
               other.ticket == record.ticket;
      });
    };
    for (size_t i = 0; i < log->operations.size(); ++i) {
      if (log->operations[i].kind != OperationKind::record) continue;
      std::vector<Operation> less = log->operations;
      less.erase(less.begin() + static_cast<std::ptrdiff_t>(i));
      const trace::Report report = trace::check_happens_before(less);
      CHECK(report.deadlocks.empty() == !waited_for(log->operations[i]));
      CHECK(report.races.empty());
    }
  }
}

TEST("random programs: a failure anywhere comes back, and everything drains") {
  for (uint64_t seed = 0; seed < 120; ++seed) {
    const check::Note note("seed " + std::to_string(seed));
    const RandomProgram program = random_program(seed);
    Memory unused(program);
    const int runs = run_one_by_one(program, unused);
    if (runs == 0) continue;
    const int breaks_at = static_cast<int>(seed) % runs;

    Memory memory(program);
    std::atomic<int> ran{0};
    cpu::Options options;
    options.delay_seed = seed;
    options.max_delay_us = seed % 2 == 0 ? 0 : 30;
    Rig rig(program.streams, program.max_ticks_in_flight, options);
    register_program(program, rig.scheduler, [&](size_t id) {
      return work_at([&, id](const Invocation& at) {
        if (ran++ == breaks_at) throw std::runtime_error("broken");
        memory.apply(program.actions[id], id, at);
      });
    });
    int submitted = 0;
    try {
      for (const int tick : program.submitted) {
        CHECK(rig.wait_for_room());
        rig.scheduler.submit(tick, submitted++);
      }
    } catch (const std::runtime_error& error) {
      CHECK(error.what() == std::string("broken"));
    }
    CHECK_THROWS(std::runtime_error, "broken", rig.wait_idle());
    CHECK(rig.scheduler.ticks_in_flight() == 0);
    CHECK(ran > breaks_at);
  }
}

}  // namespace
}  // namespace fdg::testing
