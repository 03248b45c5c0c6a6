// What the cpu backend measures: which actions, and that the times agree with the order.
#include <map>
#include <stdexcept>
#include <thread>

#include "check.h"
#include "cpu/cpu_stream.h"
#include "tools.h"
#include "trace/trace_stream.h"

namespace fdg::testing {
namespace {

void sleep_ms(int time) { std::this_thread::sleep_for(milliseconds(time)); }

void submit(Rig& rig, int tick_id, int64_t tick) {
  CHECK(rig.wait_for_room());
  rig.scheduler.submit(tick_id, tick);
}

void check_order_within_streams(const std::vector<Span>& spans) {
  std::map<int, double> last_end;
  for (const Span& span : spans) {
    CHECK(span.begin_s > 0);
    CHECK(span.begin_s <= span.end_s);
    if (last_end.count(span.stream) > 0) CHECK(last_end[span.stream] <= span.begin_s);
    last_end[span.stream] = span.end_s;
  }
}

TEST("spans: every recorded action once, in its stream's order") {
  constexpr int kStreams = 3;
  constexpr int kTicks = 200;
  Rig rig(kStreams, 4);
  std::vector<int> actions;
  for (int stream = 0; stream < kStreams; ++stream)
    for (int i = 0; i < 2; ++i) actions.push_back(rig.add(stream, [] {}));
  const int tick = rig.tick(actions);
  rig.scheduler.record_spans(true);
  for (int t = 0; t < kTicks; ++t) submit(rig, tick, t);
  CHECK(rig.wait_idle());
  const std::vector<Span> spans = rig.scheduler.take_spans();
  CHECK(spans.size() == size_t{2} * kStreams * kTicks);
  check_order_within_streams(spans);
  std::map<int, std::vector<int64_t>> ticks;
  for (const Span& span : spans) {
    CHECK(span.code == "T");
    CHECK(span.stage == span.stream);
    CHECK(span.batch == span.tick);
    ticks[span.stream].push_back(span.tick);
  }
  for (int stream = 0; stream < kStreams; ++stream)
    for (size_t i = 0; i < ticks[stream].size(); ++i)
      CHECK(ticks[stream][i] == static_cast<int64_t>(i / 2));
  CHECK(rig.scheduler.take_spans().empty());
}

TEST("spans: the window is that of the ticks submitted, however late they run") {
  Rig rig(1, 8);
  Gate gate;
  const int held = rig.tick({rig.add(0, [&gate] { gate.wait(); })});
  const int tick = rig.tick({rig.add(0, [] {})});
  rig.scheduler.submit(held, 0);
  for (int t = 1; t <= 6; ++t) {  // all enqueued before the first one runs
    rig.scheduler.record_spans(3 <= t && t < 5);
    rig.scheduler.submit(tick, t);
  }
  gate.open();
  CHECK(rig.wait_idle());
  std::vector<int64_t> ticks;
  for (const Span& span : rig.scheduler.take_spans()) ticks.push_back(span.tick);
  CHECK(ticks == std::vector<int64_t>({3, 4}));
}

TEST("spans: nothing is measured unless it was asked for") {
  Rig rig(2, 2);
  const int tick = rig.tick({rig.add(0, [] {}), rig.add(1, [] {})});
  for (int t = 0; t < 5; ++t) submit(rig, tick, t);
  CHECK(rig.wait_idle());
  CHECK(rig.scheduler.take_spans().empty());
  rig.scheduler.record_spans(true);
  rig.scheduler.record_spans(false);
  submit(rig, tick, 5);
  CHECK(rig.wait_idle());
  CHECK(rig.scheduler.take_spans().empty());
}

TEST("spans: actions that are ordered across streams do not overlap") {
  constexpr int kStreams = 3;
  for (uint64_t seed = 0; seed < 5; ++seed) {
    const check::Note note("seed " + std::to_string(seed));
    cpu::Options options;
    options.delay_seed = seed;
    options.max_delay_us = 300;
    Rig rig(kStreams, 4, options);
    const BufferId token = rig.scheduler.add_buffer("token", true);
    std::vector<int> actions;
    for (int stream = 0; stream < kStreams; ++stream)
      actions.push_back(rig.add(stream, {token}, {token}, [] {
        std::this_thread::sleep_for(std::chrono::microseconds(100));
      }));
    const int tick = rig.tick(actions);
    rig.scheduler.record_spans(true);
    for (int t = 0; t < 20; ++t) submit(rig, tick, t);
    CHECK(rig.wait_idle());
    const std::vector<Span> spans = rig.scheduler.take_spans();
    check_order_within_streams(spans);
    std::map<int64_t, Span> by_turn;  // the order in which they were enqueued
    for (const Span& span : spans) by_turn[span.tick * kStreams + span.stream] = span;
    CHECK(by_turn.size() == size_t{20} * kStreams);
    double last_end = 0;
    for (const auto& [turn, span] : by_turn) {
      CHECK(last_end <= span.begin_s);
      CHECK(span.end_s - span.begin_s >= 100e-6);
      last_end = span.end_s;
    }
  }
}

TEST("spans: the clock is common and in seconds, and waiting is no work") {
  Rig rig(2, 2);
  const BufferId token = rig.scheduler.add_buffer("token", true);
  const int tick = rig.tick({rig.add(0, {}, {token}, [] { sleep_ms(40); }),
                             rig.add(1, {token}, {}, [] { sleep_ms(10); })});
  rig.scheduler.record_spans(true);
  rig.scheduler.submit(tick, 0);
  CHECK(rig.wait_idle());
  const std::vector<Span> spans = rig.scheduler.take_spans();
  CHECK(spans.size() == 2u);
  const double first = spans[0].end_s - spans[0].begin_s;
  CHECK(first >= 0.040);
  CHECK(first < 20);
  CHECK(spans[1].end_s - spans[1].begin_s >= 0.010);
  CHECK(spans[1].begin_s >= spans[0].end_s);
}

TEST("spans: what threw is measured, what was skipped is not, and both can be taken") {
  Rig rig(2, 4);
  const BufferId token = rig.scheduler.add_buffer("token", true);
  const int tick = rig.tick({rig.add(0, {}, {token}, [] { throw std::out_of_range("no such"); }),
                             rig.add(1, {token}, {}, [] {})});
  rig.scheduler.record_spans(true);
  for (int t = 0; t < 3; ++t) rig.scheduler.submit(tick, t);
  CHECK(rig.scheduler.drain(kPatience));
  const std::vector<Span> spans = rig.scheduler.take_spans();
  CHECK(spans.size() == 1u);
  CHECK(spans[0].stream == 0);
  CHECK(spans[0].begin_s <= spans[0].end_s);
  CHECK_THROWS(std::out_of_range, "no such", rig.wait_idle());
}

TEST("spans: an action without work has none") {
  Rig rig(1, 2);
  const int tick = rig.tick({rig.scheduler.add_action(action(0, {}, {}, nullptr))});
  rig.scheduler.record_spans(true);
  rig.scheduler.submit(tick, 0);
  CHECK(rig.wait_idle());
  CHECK(rig.scheduler.take_spans().empty());
}

TEST("spans: they cannot be taken while ticks are in flight") {
  Rig rig(1, 2);
  Gate gate;
  const int tick = rig.tick({rig.add(0, [&gate] { gate.wait(); })});
  rig.scheduler.record_spans(true);
  rig.scheduler.submit(tick, 0);
  CHECK_THROWS(std::logic_error, "in flight", rig.scheduler.take_spans());
  gate.open();
  CHECK(rig.wait_idle());
  CHECK(rig.scheduler.take_spans().size() == 1u);
}

TEST("spans: streams made while recording record, and their spans outlive them") {
  cpu::CpuBackend backend({});
  Failure failure;
  const Action nothing = action(0, [] {});
  backend.record_spans(true);
  for (int i = 0; i < 2; ++i) backend.make_stream("s", failure)->run(nothing, {i, i});
  const std::vector<Span> spans = backend.take_spans();
  CHECK(spans.size() == 2u);
  CHECK(spans[1].tick == 1);
}

TEST("spans: a backend that cannot measure has none") {
  Scheduler scheduler(std::make_unique<trace::TraceBackend>(std::make_shared<trace::Log>()), {"s"},
                      1);
  scheduler.record_spans(true);
  scheduler.submit(scheduler.add_tick({{scheduler.add_action(action(0, [] {})), 0}}), 0);
  CHECK(scheduler.wait_idle(kPatience));
  CHECK(scheduler.take_spans().empty());
}

}  // namespace
}  // namespace fdg::testing
