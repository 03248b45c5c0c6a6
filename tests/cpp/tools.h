// What several of the tests need: gates, works made of functions, a scheduler at hand.
#pragma once

#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/cpu_stream.h"
#include "scheduler.h"

namespace fdg::testing {

using std::chrono::milliseconds;

// Long enough for anything that is going to happen, on any machine; nobody waits for it to pass.
constexpr milliseconds kPatience{20000};

// Closed until it is opened. Whoever waits in vain says so instead of hanging.
class Gate {
 public:
  void open();
  bool opens_within(milliseconds timeout);
  void wait();

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool open_ = false;
};

std::shared_ptr<Work> work_at(std::function<void(const Invocation&)> function);
std::shared_ptr<Work> work(std::function<void()> function);

std::vector<std::string> stream_names(int streams);

Action action(int stream, std::vector<BufferId> reads, std::vector<BufferId> writes,
              std::shared_ptr<Work> work, const std::string& code = "T");
// That touches no buffer.
Action action(int stream, std::function<void()> function);

// A scheduler on the cpu backend.
struct Rig {
  explicit Rig(int streams, int max_ticks_in_flight = 2, const cpu::Options& options = {});

  int add(int stream, std::function<void()> function);
  int add(int stream, std::vector<BufferId> reads, std::vector<BufferId> writes,
          std::function<void()> function);
  int tick(const std::vector<int>& actions);
  bool wait_idle();
  bool wait_for_room();

  Scheduler scheduler;
};

}  // namespace fdg::testing
