// The simulation: programs timed by hand, and random ones judged by the definition.
#include <algorithm>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>

#include "check.h"
#include "trace/simulation.h"

namespace fdg::testing {
namespace {

using trace::Extent;
using trace::PeriodicProgram;
using trace::PeriodicStep;
using trace::RingAccess;
using trace::Simulation;
using Span = Simulation::Span;

Simulation simulated(const PeriodicProgram& program, Extent extent) {
  Simulation simulation(program, extent);
  while (simulation.advance(1)) {
  }
  return simulation;
}

Extent whole(int64_t batches, int64_t ticks, std::optional<int> max_ticks_in_flight = {}) {
  return {batches, ticks, max_ticks_in_flight, 0, ticks};
}

// Stream 0 writes in 1 s what stream 1 reads, in the next tick, for 3 s.
PeriodicProgram producer_and_consumer(int64_t buffers) {
  return {
      2, {buffers}, {{0, 1, 0, 1, {}, {{0, 0}}}, {1, 3, 1, 1, {{0, (buffers - 1) % buffers}}, {}}}};
}

TEST("simulation: with one buffer a write waits for the read before it") {
  const Simulation run = simulated(producer_and_consumer(1), whole(3, 4));
  const std::vector<Span> wanted{{0, 0, 0, 1}, {0, 1, 1, 2}, {1, 1, 2, 5},
                                 {0, 2, 5, 6}, {1, 2, 6, 9}, {1, 3, 9, 12}};
  CHECK(run.spans() == wanted);
}

TEST("simulation: with two buffers it waits for the read before that") {
  const Simulation run = simulated(producer_and_consumer(2), whole(4, 5));
  const std::vector<Span> wanted{{0, 0, 0, 1}, {0, 1, 1, 2}, {1, 1, 1, 4},  {0, 2, 4, 5},
                                 {1, 2, 4, 7}, {0, 3, 7, 8}, {1, 3, 7, 10}, {1, 4, 10, 13}};
  CHECK(run.spans() == wanted);
  CHECK(run.tick_ends_s() == std::vector<double>{1, 4, 7, 10, 13});
  CHECK(run.stream_busy_s() == std::vector<double>{4, 12});
}

TEST("simulation: only the window is kept, and a tick without actions ends when it is enqueued") {
  const Simulation run = simulated(producer_and_consumer(2), {4, 7, 1, 4, 6});
  const std::vector<Span> wanted{{1, 4, 10, 13}};
  CHECK(run.spans() == wanted);
  CHECK(run.tick_ends_s() == std::vector<double>{1, 4, 7, 10, 13, 13, 13});
}

TEST("simulation: the host enqueues a tick when so many are unfinished at most") {
  // In ticks 4 and 9 stream 1 has ten seconds to do.
  const PeriodicProgram program{2, {}, {{0, 1, 0, 1, {}, {}}, {1, 10, 0, 5, {}, {}}}};
  const auto begins = [&](std::optional<int> most) {
    const Simulation run = simulated(program, whole(12, 12, most));
    std::vector<double> times;
    for (const auto& [step, tick, begin, end] : run.spans())
      if (step == 0) times.push_back(begin);
    return times;
  };
  CHECK(begins({}) == std::vector<double>{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11});
  // Tick 4 is enqueued when tick 1 has ended, at second 2, and ends at 12; before tick 8 the host
  // waits until half the room is free, for ticks 4 and 5.
  CHECK(begins(4) == std::vector<double>{0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 14, 15});
  CHECK(begins(1) == std::vector<double>{0, 1, 2, 3, 4, 14, 15, 16, 17, 18, 28, 29});
}

TEST("simulation: what is done once for several batches, and what is left over") {
  const PeriodicProgram program{1, {}, {{0, 1, 2, 3, {}, {}}}};
  const auto ticks = [&](int64_t batches) {
    std::vector<int64_t> of;
    const Simulation run = simulated(program, whole(batches, batches + 3));
    for (const auto& [step, tick, begin, end] : run.spans()) of.push_back(tick);
    return of;
  };
  CHECK(ticks(6) == std::vector<int64_t>{4, 7});
  CHECK(ticks(7) == std::vector<int64_t>{4, 7, 9});
  CHECK(ticks(8) == std::vector<int64_t>{4, 7, 10});
}

TEST("simulation: what cannot be is refused") {
  const auto refuses = [](const PeriodicProgram& program, const Extent& extent,
                          const std::string& words) {
    CHECK_THROWS(std::invalid_argument, words, Simulation(program, extent));
  };
  const Extent some = whole(1, 1);
  refuses({0, {}, {}}, some, "at least one stream, got 0");
  refuses({1, {0}, {}}, some, "at least one buffer, got 0");
  refuses({1, {}, {{1, 1, 0, 1, {}, {}}}}, some, "step 0 names stream 1; there are streams 0 to 0");
  refuses({1, {}, {{0, -1, 0, 1, {}, {}}}}, some, "step 0 must last 0 seconds or more");
  refuses({1, {}, {{0, 1, 0, 0, {}, {}}}}, some, "at least 1 batch, got 0");
  refuses({1, {2}, {{0, 1, 0, 1, {{1, 0}}, {}}}}, some, "step 0 names ring 1");
  refuses({1, {2}, {{0, 1, 0, 1, {}, {{0, 2}}}}}, some, "buffer 2 of a ring of 2");
  refuses({1, {}, {}}, whole(-1, 1), "-1 batches");
  refuses({1, {}, {}}, whole(1, 1, 0), "max_ticks_in_flight must be at least 1, got 0");
}

// The definition: compare with every earlier action.
std::vector<Span> by_definition(const PeriodicProgram& program, int64_t batches, int64_t ticks) {
  struct Done {
    int stream;
    std::vector<std::pair<int, int64_t>> reads, writes;  // (ring, buffer)
    double end;
  };
  std::vector<Done> done;
  std::vector<Span> spans;
  const auto overlap = [](const auto& left, const auto& right) {
    return std::find_first_of(left.begin(), left.end(), right.begin(), right.end()) != left.end();
  };
  for (int64_t tick = 0; tick < ticks; ++tick)
    for (size_t i = 0; i < program.steps.size(); ++i) {
      const PeriodicStep& step = program.steps[i];
      if (tick < step.offset || tick >= step.offset + batches) continue;
      const auto buffers = [&](const std::vector<RingAccess>& accesses) {
        std::vector<std::pair<int, int64_t>> named;
        for (const auto& [ring, shift] : accesses)
          named.emplace_back(ring, (tick + shift) % program.rings[ring]);
        return named;
      };
      Done now{step.stream, buffers(step.reads), buffers(step.writes), 0};
      double begin = 0;
      for (const Done& past : done)
        if (past.stream == now.stream || overlap(past.writes, now.reads) ||
            overlap(past.writes, now.writes) || overlap(past.reads, now.writes))
          begin = std::max(begin, past.end);
      now.end = begin + step.duration_s;
      spans.emplace_back(static_cast<int>(i), tick, begin, now.end);
      done.push_back(now);
    }
  return spans;
}

TEST("simulation: random programs take the times of the definition") {
  for (uint64_t seed = 0; seed < 200; ++seed) {
    const check::Note note("seed " + std::to_string(seed));
    std::mt19937_64 engine(seed);
    const auto draw = [&engine](int low, int high) {
      return std::uniform_int_distribution<int>(low, high)(engine);
    };
    PeriodicProgram program;
    program.streams = draw(1, 4);
    for (int i = draw(1, 4); i > 0; --i) program.rings.push_back(draw(1, 4));
    for (int i = draw(1, 7); i > 0; --i) {
      const auto some = [&] {
        std::vector<RingAccess> accesses;
        for (int n = draw(0, 2); n > 0; --n) {
          const int ring = draw(0, static_cast<int>(program.rings.size()) - 1);
          accesses.emplace_back(ring, draw(0, static_cast<int>(program.rings[ring]) - 1));
        }
        return accesses;
      };
      const auto reads = some();
      program.steps.push_back(
          {draw(0, program.streams - 1), 0.25 * draw(0, 9), draw(0, 3), 1, reads, some()});
    }
    const int64_t batches = draw(1, 6);
    const Simulation run = simulated(program, whole(batches, batches + 3));
    CHECK(run.spans() == by_definition(program, batches, batches + 3));
  }
}

}  // namespace
}  // namespace fdg::testing
