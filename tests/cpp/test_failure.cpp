// The first exception comes back, nothing later runs, everything drains; cancelling; the end.
#include <atomic>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>

#include "check.h"
#include "failure.h"
#include "tools.h"

namespace fdg::testing {
namespace {

struct BrokenWork : std::runtime_error {
  BrokenWork(const std::string& what, int code) : std::runtime_error(what), code(code) {}
  const int code;
};

TEST("failure: the first exception is kept, a null one cancels") {
  Failure failure;
  CHECK(!failure.stopped());
  failure.rethrow();
  failure.set(std::make_exception_ptr(std::runtime_error("first")));
  failure.set(std::make_exception_ptr(std::runtime_error("second")));
  failure.set(nullptr);
  CHECK(failure.stopped());
  CHECK_THROWS(std::runtime_error, "first", failure.rethrow());
  CHECK_THROWS(std::runtime_error, "first", failure.rethrow());

  Failure cancelled;
  cancelled.set(nullptr);
  cancelled.set(std::make_exception_ptr(std::runtime_error("too late")));
  CHECK(cancelled.stopped());
  cancelled.rethrow();
}

TEST("failure: of two works that throw at once one is kept") {
  for (int repetition = 0; repetition < 100; ++repetition) {
    Rig rig(2);
    const int tick = rig.tick({rig.add(0, [] { throw std::runtime_error("left"); }),
                               rig.add(1, [] { throw std::runtime_error("right"); })});
    rig.scheduler.submit(tick, 0);
    std::string kept;
    for (int i = 0; i < 2; ++i) {
      try {
        rig.wait_idle();
      } catch (const std::runtime_error& error) {
        if (i > 0) CHECK(kept == error.what());
        kept = error.what();
      }
      CHECK((kept == "left" || kept == "right"));
    }
  }
}

TEST("failure: a work already running when another fails ends, and its own exception is dropped") {
  cpu::CpuBackend backend({});
  Failure failure;
  Gate second_began;
  const Action first = action(0, [&] {
    second_began.wait();
    throw std::runtime_error("first");
  });
  const Action second = action(1, [&] {
    second_began.open();
    while (!failure.stopped()) std::this_thread::yield();
    throw std::runtime_error("second");
  });
  {
    const auto a = backend.make_stream("a", failure);
    const auto b = backend.make_stream("b", failure);
    a->run(first, {});
    b->run(second, {});
    a->flush();
    b->flush();
  }
  CHECK_THROWS(std::runtime_error, "first", failure.rethrow());
}

TEST("failure: the exception comes back as it was thrown, and again") {
  Rig rig(2);
  const int tick = rig.tick({rig.add(1, [] { throw BrokenWork("1F0 broke", 42); })});
  rig.scheduler.submit(tick, 0);
  for (int i = 0; i < 2; ++i) {
    int code = 0;
    try {
      rig.wait_idle();
    } catch (const BrokenWork& error) {
      code = error.code;
      CHECK(error.what() == std::string("1F0 broke"));
    }
    CHECK(code == 42);
  }
  CHECK(rig.scheduler.ticks_in_flight() == 0);
  CHECK_THROWS(BrokenWork, "1F0 broke", rig.wait_for_room());
}

TEST("failure: what is no std::exception comes back too") {
  Rig rig(1);
  rig.scheduler.submit(rig.tick({rig.add(0, [] { throw 7; })}), 0);
  int caught = 0;
  try {
    rig.wait_idle();
  } catch (int value) {
    caught = value;
  }
  CHECK(caught == 7);
}

// Behind the failing work nothing runs: not on its stream, nor on streams that wait for it.
TEST("failure: what comes later is skipped, and everything drains") {
  for (int seed = 0; seed < 20; ++seed) {
    cpu::Options options;
    options.delay_seed = static_cast<uint64_t>(seed);
    options.max_delay_us = seed % 2 * 40;
    int before = 0;
    int after = 0;
    Rig rig(3, 2, options);
    const BufferId buffer = rig.scheduler.add_buffer("b", true);
    const int first = rig.add(1, {}, {buffer}, [&] { ++before; });
    const int broken = rig.add(0, {buffer}, {buffer}, [] { throw BrokenWork("broke", 1); });
    const int same_stream = rig.add(0, [&] { ++after; });
    const int dependent = rig.add(1, {buffer}, {buffer}, [&] { ++after; });
    const int dependent_of_dependent = rig.add(2, {buffer}, {}, [&] { ++after; });
    const int tick = rig.tick({first, broken, same_stream, dependent, dependent_of_dependent});
    int rethrown = 0;
    for (int i = 0; i < 6; ++i) {
      try {
        CHECK(rig.wait_for_room());
      } catch (const BrokenWork&) {
        ++rethrown;
      }
      rig.scheduler.submit(tick, i);  // a failed scheduler still takes ticks and drains them
    }
    CHECK_THROWS(BrokenWork, "broke", rig.wait_idle());
    CHECK(rig.scheduler.ticks_in_flight() == 0);
    CHECK(before == 1);
    CHECK(after == 0);
    CHECK(rethrown >= 4);  // from the third on the first tick is over
  }
}

TEST("failure: it reaches a host that is already waiting") {
  for (const bool for_room : {true, false}) {
    Gate host_waits;
    Rig rig(2, 1);
    const int tick = rig.tick({rig.add(0,
                                       [&] {
                                         host_waits.wait();
                                         std::this_thread::sleep_for(milliseconds(20));
                                         throw BrokenWork("while you waited", 3);
                                       }),
                               rig.add(1, [] {})});
    rig.scheduler.submit(tick, 0);
    host_waits.open();
    CHECK_THROWS(BrokenWork, "while you waited", for_room ? rig.wait_for_room() : rig.wait_idle());
  }
}

TEST("failure: a host that looks again and again sees it") {
  Rig rig(2, 1);
  rig.scheduler.submit(rig.tick({rig.add(1,
                                         [] {
                                           std::this_thread::sleep_for(milliseconds(20));
                                           throw BrokenWork("late", 3);
                                         })}),
                       0);
  const auto look_until_idle = [&rig] {
    while (!rig.scheduler.wait_idle(milliseconds(1))) continue;
  };
  CHECK_THROWS(BrokenWork, "late", look_until_idle());
}

// ---- cancel, destruction

TEST("cancel: what has not begun does not run, and nothing is thrown") {
  Gate began;
  Gate gate;
  int ran = 0;
  Rig rig(1, 3);
  const int held = rig.add(0, [&] {
    began.open();
    gate.wait();
    ++ran;
  });
  const int later = rig.add(0, [&] { ran += 100; });
  const int tick = rig.tick({held, later});
  rig.scheduler.submit(tick, 0);
  rig.scheduler.submit(tick, 1);
  began.wait();
  rig.scheduler.cancel();
  CHECK(!rig.scheduler.wait_idle(milliseconds(2)));
  gate.open();
  CHECK(rig.wait_idle());
  CHECK(ran == 1);
  CHECK(rig.scheduler.ticks_in_flight() == 0);
  rig.scheduler.submit(tick, 2);
  CHECK(rig.wait_idle());
  CHECK(ran == 1);
}

TEST("cancel: from another thread, while the host waits") {
  Rig rig(1, 2);
  Gate began;
  std::atomic<bool> stop{false};
  int later = 0;
  const int tick = rig.tick({rig.add(0,
                                     [&] {
                                       began.open();
                                       while (!stop) std::this_thread::yield();
                                     }),
                             rig.add(0, [&] { ++later; })});
  rig.scheduler.submit(tick, 0);
  std::thread canceller([&] {
    began.wait();
    rig.scheduler.cancel();
    stop = true;
  });
  CHECK(rig.wait_idle());
  canceller.join();
  CHECK(later == 0);
}

TEST("destruction: work still queued is dropped, all of it released, threads joined") {
  for (int seed = 0; seed < 40; ++seed) {
    const auto held = std::make_shared<int>(0);
    std::atomic<int> inside{0};
    {
      cpu::Options options;
      options.delay_seed = static_cast<uint64_t>(seed);
      options.max_delay_us = 30;
      Rig rig(4, 3, options);
      const BufferId buffer = rig.scheduler.add_buffer("b", true);
      std::vector<int> actions;
      for (int i = 0; i < 12; ++i)
        actions.push_back(rig.add(i % 4, {}, {buffer}, [&inside, held, i, seed] {
          ++inside;
          if (seed % 4 == 1 && i == 5) throw BrokenWork("in passing", i);
          --inside;
        }));
      const int tick = rig.tick(actions);
      for (int i = 0; i < 3; ++i) rig.scheduler.submit(tick, i);
      if (seed % 2 == 0) rig.scheduler.wait_idle(milliseconds(0));
    }
    CHECK(inside <= (seed % 4 == 1 ? 1 : 0));  // the one that threw
    CHECK(held.use_count() == 1);
  }
}

// Tells of every flush; otherwise the stream it was given.
class FlushTeller final : public Stream {
 public:
  FlushTeller(std::unique_ptr<Stream> stream, const std::function<void()>& tell)
      : stream_(std::move(stream)), tell_(tell) {}
  void run(const Action& action, const Invocation& at) override { stream_->run(action, at); }
  void record(Event& event) override { stream_->record(event); }
  void wait(Event& event) override { stream_->wait(event); }
  void flush() override {
    stream_->flush();
    tell_();
  }

 private:
  const std::unique_ptr<Stream> stream_;
  const std::function<void()>& tell_;
};

class FlushTellingBackend final : public Backend {
 public:
  explicit FlushTellingBackend(const std::function<void()>& tell) : tell_(tell) {}
  std::unique_ptr<Stream> make_stream(const std::string& name, Failure& failure) override {
    return std::make_unique<FlushTeller>(backend_.make_stream(name, failure), tell_);
  }
  std::unique_ptr<Event> make_event() override { return backend_.make_event(); }

 private:
  cpu::CpuBackend backend_{{}};
  const std::function<void()>& tell_;
};

// The work that runs is held until the destructor flushes, so what follows it can only be dropped.
TEST("destruction: it drops what has not begun, and flushes so that everything ends") {
  Gate gate;
  bool destroying = false;
  int later = 0;
  const std::function<void()> tell = [&] {
    if (destroying) gate.open();
  };
  {
    Scheduler scheduler(std::make_unique<FlushTellingBackend>(tell), stream_names(1), 3);
    const int held = scheduler.add_action(action(0, [&] { gate.wait(); }));
    const int next = scheduler.add_action(action(0, [&] { ++later; }));
    const int tick = scheduler.add_tick({{held, 0}, {next, 0}});
    scheduler.submit(tick, 0);
    scheduler.submit(tick, 1);
    destroying = true;
  }
  CHECK(later == 0);
}

TEST("destruction: it waits for the work that has begun") {
  Gate began;
  Gate gate;
  bool ended = false;
  bool later = false;
  std::thread opener([&] {
    began.wait();
    std::this_thread::sleep_for(milliseconds(10));
    gate.open();
  });
  {
    Rig rig(2);
    const BufferId buffer = rig.scheduler.add_buffer("b", true);
    const int held = rig.add(0, {}, {buffer}, [&] {
      began.open();
      gate.wait();
      ended = true;
    });
    const int next = rig.add(1, {buffer}, {}, [&] { later = true; });
    rig.scheduler.submit(rig.tick({held, next}), 0);
    rig.scheduler.submit(rig.tick({next, held}), 1);
    began.wait();
    rig.scheduler.cancel();
  }
  CHECK(ended);
  CHECK(!later);
  opener.join();
}

}  // namespace
}  // namespace fdg::testing
