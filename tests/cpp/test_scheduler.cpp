// Back-pressure and arguments of the scheduler. What it orders is tested in
// test_random_programs.cpp, how it fails and ends in test_failure.cpp.
#include <array>
#include <atomic>
#include <memory>
#include <stdexcept>

#include "check.h"
#include "scheduler.h"
#include "tools.h"
#include "trace/trace_stream.h"

namespace fdg::testing {
namespace {

// ---- back-pressure

TEST("back-pressure: no more ticks than the bound are in flight") {
  for (int bound = 1; bound <= 3; ++bound) {
    Gate gate;
    int ran = 0;
    Rig rig(2, bound);
    const int tick = rig.tick({rig.add(0,
                                       [&] {
                                         gate.wait();
                                         ++ran;
                                       }),
                               rig.add(1, [] {})});
    for (int i = 0; i < bound; ++i) {
      CHECK(rig.wait_for_room());
      rig.scheduler.submit(tick, i);
      CHECK(rig.scheduler.ticks_in_flight() == i + 1);
    }
    CHECK(!rig.scheduler.wait_for_room(milliseconds(0)));
    CHECK(!rig.scheduler.wait_for_room(milliseconds(3)));
    CHECK(!rig.scheduler.wait_idle(milliseconds(3)));
    CHECK(rig.scheduler.ticks_in_flight() == bound);
    CHECK_THROWS(std::logic_error, "submit without room", rig.scheduler.submit(tick, 9));
    CHECK(rig.scheduler.ticks_in_flight() == bound);
    gate.open();
    CHECK(rig.wait_for_room());
    CHECK(rig.scheduler.ticks_in_flight() < bound);
    rig.scheduler.submit(tick, bound);
    CHECK(rig.scheduler.ticks_in_flight() <= bound);
    CHECK(rig.wait_idle());
    CHECK(rig.scheduler.ticks_in_flight() == 0);
    CHECK(ran == bound + 1);
  }
}

// A tick may begin only when all but the `bound - 1` ticks before it are over, on every stream.
TEST("back-pressure: a tick begins only when older ones are over") {
  constexpr int kStreams = 3;
  constexpr int kTicks = 60;
  for (int bound = 1; bound <= 3; ++bound) {
    std::array<std::atomic<int>, kTicks> left;
    for (auto& count : left) count = kStreams;
    std::atomic<int> early{0};
    cpu::Options options;
    options.delay_seed = static_cast<uint64_t>(bound);
    options.max_delay_us = 50;
    Rig rig(kStreams, bound, options);
    std::vector<std::pair<int, int64_t>> actions;
    for (int stream = 0; stream < kStreams; ++stream)
      actions.emplace_back(
          rig.scheduler.add_action(action(stream, {}, {}, work_at([&](const Invocation& at) {
                                            for (int64_t old = 0; old <= at.tick - bound; ++old)
                                              if (left[static_cast<size_t>(old)] > 0) ++early;
                                            --left[static_cast<size_t>(at.tick)];
                                          }))),
          0);
    const int tick = rig.scheduler.add_tick(actions);
    for (int i = 0; i < kTicks; ++i) {
      CHECK(rig.wait_for_room());
      rig.scheduler.submit(tick, i);
      CHECK(rig.scheduler.ticks_in_flight() <= bound);
    }
    CHECK(rig.wait_idle());
    CHECK(early == 0);
  }
}

TEST("back-pressure: ticks without actions, and ticks that leave streams out, pass") {
  Rig rig(3, 2);
  int ran = 0;
  const int empty = rig.tick({});
  const int one = rig.tick({rig.add(2, [&ran] { ++ran; })});
  CHECK(rig.wait_idle());
  for (int i = 0; i < 20; ++i) {
    CHECK(rig.wait_for_room());
    rig.scheduler.submit(i % 3 == 0 ? one : empty, i);
  }
  CHECK(rig.wait_idle());
  CHECK(ran == 7);
}

TEST("back-pressure: the batch is the tick plus the action's offset") {
  Rig rig(1, 1);
  std::vector<int64_t> batches;
  const int id = rig.scheduler.add_action(
      action(0, {}, {}, work_at([&](const Invocation& at) { batches.push_back(at.batch); })));
  const int tick = rig.scheduler.add_tick({{id, 0}, {id, -2}, {id, 5}});
  rig.scheduler.submit(tick, 10);
  CHECK(rig.wait_idle());
  CHECK(batches == std::vector<int64_t>({10, 8, 15}));
}

TEST("back-pressure: a wait without end waits") {
  Gate began;
  Gate gate;
  Rig rig(1);
  rig.scheduler.submit(rig.tick({rig.add(0,
                                         [&] {
                                           began.open();
                                           gate.opens_within(milliseconds(50));
                                         })}),
                       0);
  began.wait();
  CHECK(rig.scheduler.wait_idle(milliseconds::max()));
  gate.open();
}

// ---- arguments

std::unique_ptr<Scheduler> traced(int streams, int max_ticks_in_flight) {
  return std::make_unique<Scheduler>(
      std::make_unique<trace::TraceBackend>(std::make_shared<trace::Log>()), stream_names(streams),
      max_ticks_in_flight);
}

TEST("arguments: a scheduler needs a stream and room for a tick") {
  CHECK_THROWS(std::invalid_argument, "at least one stream", traced(0, 2));
  CHECK_THROWS(std::invalid_argument, "at least 1, got 0", traced(1, 0));
  CHECK_THROWS(std::invalid_argument, "at least 1, got -3", traced(1, -3));
  CHECK_THROWS(std::invalid_argument, "at least 1, got 0", Rig(1, 0));
}

TEST("arguments: unknown streams, buffers, actions and ticks are named") {
  const auto scheduler = traced(2, 2);
  const BufferId buffer = scheduler->add_buffer("b", true);
  CHECK(buffer == 0);
  CHECK(scheduler->buffer_names() == std::vector<std::string>{"b"});
  const auto add = [&](int stream, std::vector<BufferId> reads, std::vector<BufferId> writes) {
    return scheduler->add_action(action(stream, reads, writes, nullptr, "F"));
  };
  CHECK_THROWS(std::invalid_argument, "names stream 2; there are streams 0 to 1", add(2, {}, {}));
  CHECK_THROWS(std::invalid_argument, "names stream -1", add(-1, {}, {}));
  CHECK_THROWS(std::invalid_argument, "0F0 names buffer 1, which was never added", add(0, {1}, {}));
  CHECK_THROWS(std::invalid_argument, "1F0 names buffer -1", add(1, {}, {0, -1}));
  CHECK(add(0, {0}, {0}) == 0);  // the refused ones took no number
  CHECK_THROWS(std::invalid_argument, "action 1, which was never added",
               scheduler->add_tick({{0, 0}, {1, 0}}));
  CHECK_THROWS(std::invalid_argument, "action -1", scheduler->add_tick({{-1, 0}}));
  CHECK_THROWS(std::invalid_argument, "tick 0 was never added", scheduler->submit(0, 0));
  CHECK(scheduler->add_tick({{0, 0}}) == 0);
  CHECK_THROWS(std::invalid_argument, "tick 1 was never added", scheduler->submit(1, 0));
  CHECK_THROWS(std::invalid_argument, "tick -1 was never added", scheduler->submit(-1, 0));
  CHECK(scheduler->ticks_in_flight() == 0);
}

TEST("arguments: a private buffer stays with its stream") {
  const auto scheduler = traced(2, 2);
  const BufferId own = scheduler->add_buffer("own", false);
  const BufferId common = scheduler->add_buffer("common", true);
  scheduler->add_action(action(1, {own}, {}, nullptr));
  scheduler->add_action(action(1, {}, {own, common}, nullptr));
  scheduler->add_action(action(0, {common}, {common}, nullptr));
  CHECK_THROWS(std::invalid_argument, "buffer own is private to stream 1 but action 0B0",
               scheduler->add_action(action(0, {own}, {}, nullptr, "B")));
  CHECK_THROWS(std::invalid_argument, "add it with shared=true",
               scheduler->add_action(action(0, {}, {common, own}, nullptr)));
}

TEST("arguments: a refused action claims no private buffer") {
  const auto scheduler = traced(3, 2);
  const BufferId first = scheduler->add_buffer("first", false);
  const BufferId taken = scheduler->add_buffer("taken", false);
  scheduler->add_action(action(0, {taken}, {}, nullptr));
  CHECK_THROWS(std::invalid_argument, "buffer taken is private to stream 0",
               scheduler->add_action(action(1, {first, taken}, {}, nullptr)));
  CHECK(scheduler->add_action(action(2, {first}, {}, nullptr)) == 1);
}

TEST("scheduler: ticks that are done leave those in flight without a wait") {
  Rig rig(2, 4);
  Gate gate;
  const int free = rig.tick({rig.add(0, [] {}), rig.add(1, [] {})});
  const int held = rig.tick({rig.add(0, [&gate] { gate.wait(); })});
  rig.scheduler.submit(free, 0);
  rig.scheduler.submit(held, 1);
  rig.scheduler.submit(free, 2);
  while (rig.scheduler.ticks_in_flight() > 2) rig.scheduler.retire();
  rig.scheduler.retire();
  CHECK(rig.scheduler.ticks_in_flight() == 2);
  gate.open();
  while (rig.scheduler.ticks_in_flight() > 0) rig.scheduler.retire();
  CHECK(rig.wait_idle());
}

}  // namespace
}  // namespace fdg::testing
