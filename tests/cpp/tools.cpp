#include "tools.h"

#include <utility>

namespace fdg::testing {
namespace {

class FunctionWork final : public Work {
 public:
  explicit FunctionWork(std::function<void(const Invocation&)> function)
      : function_(std::move(function)) {}
  void run(Stream&, const Invocation& at) override { function_(at); }

 private:
  const std::function<void(const Invocation&)> function_;
};

}  // namespace

void Gate::open() {
  std::lock_guard<std::mutex> lock(mutex_);
  open_ = true;
  changed_.notify_all();
}

bool Gate::opens_within(milliseconds timeout) {
  std::unique_lock<std::mutex> lock(mutex_);
  return changed_.wait_for(lock, timeout, [this] { return open_; });
}

void Gate::wait() { CHECK(opens_within(kPatience)); }

std::shared_ptr<Work> work_at(std::function<void(const Invocation&)> function) {
  return std::make_shared<FunctionWork>(std::move(function));
}

std::shared_ptr<Work> work(std::function<void()> function) {
  return work_at([function = std::move(function)](const Invocation&) { function(); });
}

std::vector<std::string> stream_names(int streams) {
  std::vector<std::string> names;
  for (int i = 0; i < streams; ++i) names.push_back("stream " + std::to_string(i));
  return names;
}

Action action(int stream, std::vector<BufferId> reads, std::vector<BufferId> writes,
              std::shared_ptr<Work> work, const std::string& code) {
  Action made;
  made.code = code;
  made.stage = stream;
  made.stream = stream;
  made.reads = std::move(reads);
  made.writes = std::move(writes);
  made.work = std::move(work);
  return made;
}

Action action(int stream, std::function<void()> function) {
  return action(stream, {}, {}, work(std::move(function)));
}

Rig::Rig(int streams, int max_ticks_in_flight, const cpu::Options& options)
    : scheduler(std::make_unique<cpu::CpuBackend>(options), stream_names(streams),
                max_ticks_in_flight) {}

int Rig::add(int stream, std::function<void()> function) {
  return scheduler.add_action(action(stream, std::move(function)));
}

int Rig::add(int stream, std::vector<BufferId> reads, std::vector<BufferId> writes,
             std::function<void()> function) {
  return scheduler.add_action(
      action(stream, std::move(reads), std::move(writes), work(std::move(function))));
}

int Rig::tick(const std::vector<int>& actions) {
  std::vector<std::pair<int, int64_t>> entries;
  for (const int id : actions) entries.emplace_back(id, 0);
  return scheduler.add_tick(std::move(entries));
}

bool Rig::wait_idle() { return scheduler.wait_idle(kPatience); }
bool Rig::wait_for_room() { return scheduler.wait_for_room(kPatience); }

}  // namespace fdg::testing
