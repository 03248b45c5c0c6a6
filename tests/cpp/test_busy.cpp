// How long the streams' actions were at work: what counts, what does not, and who may ask.
#include <atomic>
#include <cmath>
#include <stdexcept>
#include <thread>

#include "check.h"
#include "tools.h"
#include "trace/trace_stream.h"

namespace fdg::testing {
namespace {

using Clock = std::chrono::steady_clock;

void sleep_ms(int time) { std::this_thread::sleep_for(milliseconds(time)); }

void submit(Rig& rig, int tick_id, int64_t tick) {
  CHECK(rig.wait_for_room());
  rig.scheduler.submit(tick_id, tick);
}

std::vector<double> busy_of(const Rig& rig) { return rig.scheduler.busy_seconds().value(); }

TEST("busy: actions at work count, waiting for another stream does not") {
  Rig rig(3, 2);
  const BufferId token = rig.scheduler.add_buffer("token", true);
  const int tick = rig.tick({rig.add(0, {}, {token}, [] { sleep_ms(30); }),
                             rig.add(1, {token}, {}, [] { sleep_ms(10); })});
  CHECK(busy_of(rig) == std::vector<double>(3, 0.0));
  const auto begin = Clock::now();
  rig.scheduler.submit(tick, 0);
  CHECK(rig.wait_idle());
  const double elapsed = std::chrono::duration<double>(Clock::now() - begin).count();
  const std::vector<double> busy = busy_of(rig);
  CHECK(busy[0] >= 0.030);
  CHECK(busy[1] >= 0.010);
  CHECK(busy[0] + busy[1] <= elapsed);  // they took turns
  CHECK(busy[2] == 0);
}

TEST("busy: it is the spans' length, whether they are recorded or not, without injected delays") {
  cpu::Options options;
  options.delay_seed = 3;
  options.max_delay_us = 2000;
  Rig rig(2, 4, options);
  const int tick = rig.tick(
      {rig.add(0, [] { sleep_ms(1); }), rig.add(0, [] {}), rig.add(1, [] { sleep_ms(2); })});
  rig.scheduler.record_spans(true);
  for (int t = 0; t < 10; ++t) submit(rig, tick, t);
  CHECK(rig.wait_idle());
  std::vector<double> expected(2, 0.0);
  for (const Span& span : rig.scheduler.take_spans())
    expected[static_cast<size_t>(span.stream)] += span.end_s - span.begin_s;
  const std::vector<double> busy = busy_of(rig);
  for (size_t i = 0; i < 2; ++i) CHECK(std::abs(busy[i] - expected[i]) < 1e-6);
  rig.scheduler.record_spans(false);
  submit(rig, tick, 10);
  CHECK(rig.wait_idle());
  CHECK(busy_of(rig)[0] >= busy[0] + 0.001);
  CHECK(busy_of(rig)[1] >= busy[1] + 0.002);
}

TEST("busy: what threw counts, what was skipped does not") {
  Rig rig(2, 4);
  const BufferId token = rig.scheduler.add_buffer("token", true);
  const int tick = rig.tick({rig.add(0, {}, {token},
                                     [] {
                                       sleep_ms(5);
                                       throw std::out_of_range("no such");
                                     }),
                             rig.add(1, {token}, {}, [] { sleep_ms(5); })});
  rig.scheduler.submit(tick, 0);
  CHECK(rig.scheduler.drain(kPatience));
  CHECK(busy_of(rig)[0] >= 0.005);
  CHECK(busy_of(rig)[1] == 0);
  CHECK_THROWS(std::out_of_range, "no such", rig.wait_idle());
}

TEST("busy: any thread may ask while streams are at work, and it never goes back") {
  Rig rig(2, 4);
  const int tick = rig.tick({rig.add(0, [] {}), rig.add(1, [] {})});
  std::atomic<bool> ended{false};
  std::thread asking([&] {
    std::vector<double> last(2, 0.0);
    while (!ended) {
      const std::vector<double> now = busy_of(rig);
      for (size_t i = 0; i < 2; ++i) CHECK(now[i] >= last[i]);
      last = now;
    }
  });
  for (int t = 0; t < 2000; ++t) submit(rig, tick, t);
  CHECK(rig.wait_idle());
  ended = true;
  asking.join();
  for (const double seconds : busy_of(rig)) CHECK(seconds > 0);
}

TEST("busy: the trace backend is never at work") {
  Scheduler scheduler(std::make_unique<trace::TraceBackend>(std::make_shared<trace::Log>()),
                      {"s", "t"}, 1);
  scheduler.submit(scheduler.add_tick({{scheduler.add_action(action(0, [] {})), 0}}), 0);
  CHECK(scheduler.wait_idle(kPatience));
  CHECK(scheduler.busy_seconds().value() == std::vector<double>(2, 0.0));
}

TEST("busy: a backend that does not measure it says so") {
  class Quiet final : public Stream {
   public:
    void run(const Action&, const Invocation&) override {}
    void record(Event&) override {}
    void wait(Event&) override {}
    void flush() override {}
  };
  class QuietBackend final : public Backend {
   public:
    std::unique_ptr<Stream> make_stream(const std::string&, Failure&) override {
      return std::make_unique<Quiet>();
    }
    std::unique_ptr<Event> make_event() override { return nullptr; }
  };
  const Scheduler scheduler(std::make_unique<QuietBackend>(), {"s"}, 1);
  CHECK(!scheduler.busy_seconds().has_value());
}

}  // namespace
}  // namespace fdg::testing
