// The cpu backend itself: many threads, its hook for new threads, its shared failure.
#include <atomic>
#include <set>
#include <stdexcept>
#include <thread>

#include "check.h"
#include "cpu/cpu_stream.h"
#include "tools.h"

namespace fdg::testing {
namespace {

// A ring of streams that wait for one another all the time, with more streams than cores.
void run_ring(int streams, int rounds, int flush_every) {
  cpu::CpuBackend backend({});
  Failure failure;
  std::vector<int64_t> ran(static_cast<size_t>(streams), 0);  // plain: a stream is one thread
  int64_t token = 0;                                          // plain: handed on by the events
  std::vector<Action> actions;
  std::vector<std::unique_ptr<Event>> events;
  for (int i = 0; i < streams; ++i) {
    actions.push_back(action(i, [&ran, i] { ++ran[i]; }));
    events.push_back(backend.make_event());
  }
  const Action hand_on = action(0, [&token] { ++token; });
  {
    std::vector<std::unique_ptr<Stream>> all;
    for (const auto& name : stream_names(streams))
      all.push_back(backend.make_stream(name, failure));
    for (int round = 0; round < rounds; ++round)
      for (int i = 0; i < streams; ++i) {
        all[i]->run(actions[i], {});
        if (round % 7 == 0) {
          all[i]->wait(*events[(i + streams - 1) % streams]);
          all[i]->run(hand_on, {});
          all[i]->record(*events[i]);
        }
        if ((round + i) % flush_every == 0) all[i]->flush();
      }
    // What is held back on one stream may be waited for by another.
    for (auto& stream : all) stream->flush();
  }
  for (const int64_t count : ran) CHECK(count == rounds);
  CHECK(token == int64_t{streams} * ((rounds + 6) / 7));
}

TEST("cpu stream: thousands of tiny actions over more streams than cores end") {
  run_ring(8, 3000, 1);
  run_ring(8, 3000, 50);
}

TEST("cpu stream: one, two and three streams end") {
  for (int streams = 1; streams <= 3; ++streams) run_ring(streams, 2000, 3);
}

TEST("cpu stream: streams that are never used end") {
  for (int repetition = 0; repetition < 50; ++repetition) {
    cpu::CpuBackend backend({});
    Failure failure;
    for (int i = 0; i < 3; ++i) backend.make_stream("idle", failure);
  }
}

TEST("cpu stream: what was not flushed runs before the stream ends") {
  cpu::CpuBackend backend({});
  Failure failure;
  int ran = 0;
  const Action once = action(0, [&ran] { ++ran; });
  {
    const auto stream = backend.make_stream("s", failure);
    for (int i = 0; i < 5; ++i) stream->run(once, {});
  }
  CHECK(ran == 5);
}

TEST("cpu stream: an action is told its tick and batch, and its own stream") {
  class Ask final : public Work {
   public:
    void run(Stream& stream, const Invocation& at) override {
      seen = &stream;
      asked.push_back(at.tick * 100 + at.batch);
    }
    Stream* seen = nullptr;
    std::vector<int64_t> asked;
  };
  cpu::CpuBackend backend({});
  Failure failure;
  const auto ask = std::make_shared<Ask>();
  const Action asking = action(0, {}, {}, ask);
  const Action nothing = action(0, {}, {}, nullptr);
  auto stream = backend.make_stream("s", failure);
  const Stream* const address = stream.get();
  stream->run(asking, {3, 1});
  stream->run(nothing, {4, 4});
  stream->run(asking, {4, 2});
  stream.reset();
  CHECK(ask->seen == address);
  CHECK(ask->asked == std::vector<int64_t>({301, 402}));
}

struct ThreadLog {
  std::atomic<int> created{0};
  std::atomic<int> destroyed{0};
  std::atomic<int> elsewhere{0};  // destroyed on another thread than created
};

class Guard {
 public:
  explicit Guard(ThreadLog& log) : log_(log) { ++log_.created; }
  ~Guard() {
    ++log_.destroyed;
    if (std::this_thread::get_id() != thread_) ++log_.elsewhere;
  }

 private:
  ThreadLog& log_;
  const std::thread::id thread_ = std::this_thread::get_id();
};

TEST("cpu stream: on_thread_start's guard lives as long as the worker, on the worker") {
  ThreadLog log;
  std::mutex mutex;
  std::set<std::thread::id> starters;
  std::set<std::thread::id> workers;
  cpu::Options options;
  options.on_thread_start = [&] {
    std::lock_guard<std::mutex> lock(mutex);
    starters.insert(std::this_thread::get_id());
    return std::make_shared<Guard>(log);
  };
  {
    Rig rig(3, 2, options);
    std::vector<int> actions;
    for (int i = 0; i < 3; ++i)
      actions.push_back(rig.add(i, [&] {
        CHECK(log.destroyed == 0);
        std::lock_guard<std::mutex> lock(mutex);
        workers.insert(std::this_thread::get_id());
      }));
    const int tick = rig.tick(actions);
    for (int i = 0; i < 4; ++i) {
      CHECK(rig.wait_for_room());
      rig.scheduler.submit(tick, i);
    }
    CHECK(rig.wait_idle());
    CHECK(log.created == 3);
    CHECK(log.destroyed == 0);
  }
  CHECK(log.destroyed == 3);
  CHECK(log.elsewhere == 0);
  CHECK(workers.size() == 3u);
  CHECK((workers == starters));
  CHECK(workers.count(std::this_thread::get_id()) == 0u);
}

TEST("cpu stream: a throwing on_thread_start becomes the failure") {
  cpu::Options options;
  std::atomic<int> started{0};
  options.on_thread_start = [&started]() -> std::shared_ptr<void> {
    if (++started > 0) throw std::out_of_range("no state for this thread");
    return nullptr;
  };
  Rig rig(2, 2, options);
  bool ran[2] = {false, false};
  const int tick =
      rig.tick({rig.add(0, [&ran] { ran[0] = true; }), rig.add(1, [&ran] { ran[1] = true; })});
  rig.scheduler.submit(tick, 0);
  CHECK_THROWS(std::out_of_range, "no state for this thread", rig.wait_idle());
  CHECK_THROWS(std::out_of_range, "no state for this thread", rig.wait_for_room());
  CHECK(!ran[0]);
  CHECK(!ran[1]);
}

}  // namespace
}  // namespace fdg::testing
