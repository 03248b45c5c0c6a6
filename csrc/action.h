// An action: one piece of one stage's work in one tick, as data. The scheduler never looks inside.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace fdg {

class Stream;

using BufferId = int;

// What an action is told when it runs.
struct Invocation {
  int64_t tick = 0;
  int64_t batch = 0;
};

// What an action does. `run` is called on the stream's thread (cpu) or on the enqueuing thread with
// the stream to launch on (cuda). It may throw: the scheduler then skips every later action.
class Work {
 public:
  virtual ~Work() = default;
  virtual void run(Stream& stream, const Invocation& at) = 0;
};

struct Action {
  std::string code;  // F, B, U, C (weight copy), A (send activation), E (send error signal)
  int stage = 0;
  int slot = 0;
  int stream = 0;
  std::vector<BufferId> reads;
  std::vector<BufferId> writes;
  std::shared_ptr<Work> work;  // null: nothing to do but be ordered

  // "1F7": stage 1 forwards batch 7.
  std::string label(int64_t batch) const {
    return std::to_string(stage) + code + std::to_string(batch);
  }
};

}  // namespace fdg
