// Random programs for the scheduler, and what they compute when run one action after the other.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "action.h"
#include "scheduler.h"

namespace fdg::testing {

struct RandomAction {
  int stream = 0;
  std::vector<BufferId> reads;
  std::vector<BufferId> writes;
};

struct RandomProgram {
  static constexpr int kShared = -1;

  int streams = 1;
  int max_ticks_in_flight = 1;
  std::vector<int> owners;  // [buffer] the stream it is private to, or kShared
  std::vector<RandomAction> actions;
  std::vector<std::vector<std::pair<int, int64_t>>> ticks;  // (action, offset of its batch)
  std::vector<int> submitted;                               // tick ids, in order
};

RandomProgram random_program(uint64_t seed);

// All plain memory, touched only as the actions declare: the thread sanitizer sees a missing wait.
struct Memory {
  explicit Memory(const RandomProgram& program)
      : buffers(program.owners.size()), seen(program.actions.size(), 0) {}

  // Depends on everything read and on the order; overwrites what is written but not read.
  void apply(const RandomAction& action, size_t id, const Invocation& at);

  static constexpr size_t kWords = 8;
  std::vector<std::array<uint64_t, kWords>> buffers;
  std::vector<uint64_t> seen;  // [action] what it saw so far; an action stays on its stream
};

// Returns how many runs there were.
int run_one_by_one(const RandomProgram& program, Memory& memory);

// Registers the program's buffers, its actions with the works `make_work(id)`, and its ticks.
void register_program(const RandomProgram& program, Scheduler& scheduler,
                      const std::function<std::shared_ptr<Work>(size_t)>& make_work);

}  // namespace fdg::testing
