#include "random_program.h"

#include <random>
#include <string>

namespace fdg::testing {
namespace {

uint64_t mix(uint64_t a, uint64_t b) {
  const uint64_t mixed = (a * 6364136223846793005u + b) * 1442695040888963407u;
  return mixed ^ (mixed >> 29);
}

}  // namespace

RandomProgram random_program(uint64_t seed) {
  std::mt19937_64 engine(seed);
  const auto draw = [&engine](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(engine);
  };
  RandomProgram program;
  program.streams = draw(1, 5);
  program.max_ticks_in_flight = draw(1, 4);
  const int buffers = draw(1, 6);
  for (int i = 0; i < buffers; ++i)
    program.owners.push_back(draw(0, 4) == 0 ? draw(0, program.streams - 1)
                                             : RandomProgram::kShared);
  const auto draw_buffers = [&](int stream, int most) {
    std::vector<BufferId> drawn;
    for (int i = draw(0, most); i > 0; --i) {
      const BufferId buffer = draw(0, buffers - 1);
      if (program.owners[buffer] == RandomProgram::kShared || program.owners[buffer] == stream)
        drawn.push_back(buffer);
    }
    return drawn;
  };
  for (int i = draw(2, 12); i > 0; --i) {
    const int stream = draw(0, program.streams - 1);
    program.actions.push_back({stream, draw_buffers(stream, 3), draw_buffers(stream, 2)});
  }
  for (int i = draw(1, 4); i > 0; --i) {
    program.ticks.emplace_back();
    for (int j = draw(0, 8); j > 0; --j)
      program.ticks.back().emplace_back(draw(0, static_cast<int>(program.actions.size()) - 1),
                                        draw(-3, 3));
  }
  for (int i = draw(1, 14); i > 0; --i)
    program.submitted.push_back(draw(0, static_cast<int>(program.ticks.size()) - 1));
  return program;
}

void Memory::apply(const RandomAction& action, size_t id, const Invocation& at) {
  uint64_t value = mix(id * 1000003 + static_cast<uint64_t>(at.batch), seen[id]);
  for (const BufferId buffer : action.reads)
    for (const uint64_t word : buffers[buffer]) value = mix(value, word);
  for (const BufferId buffer : action.writes)
    for (size_t i = 0; i < kWords; ++i) buffers[buffer][i] = mix(value, i);
  seen[id] = value;
}

int run_one_by_one(const RandomProgram& program, Memory& memory) {
  int runs = 0;
  for (size_t tick = 0; tick < program.submitted.size(); ++tick)
    for (const auto& [id, offset] : program.ticks[program.submitted[tick]]) {
      const auto number = static_cast<int64_t>(tick);
      memory.apply(program.actions[id], static_cast<size_t>(id), {number, number + offset});
      ++runs;
    }
  return runs;
}

void register_program(const RandomProgram& program, Scheduler& scheduler,
                      const std::function<std::shared_ptr<Work>(size_t)>& make_work) {
  for (size_t i = 0; i < program.owners.size(); ++i)
    scheduler.add_buffer("buffer " + std::to_string(i),
                         program.owners[i] == RandomProgram::kShared);
  for (size_t id = 0; id < program.actions.size(); ++id) {
    Action action;
    action.code = "T";
    action.slot = static_cast<int>(id);
    action.stream = program.actions[id].stream;
    action.reads = program.actions[id].reads;
    action.writes = program.actions[id].writes;
    action.work = make_work(id);
    scheduler.add_action(std::move(action));
  }
  for (const auto& tick : program.ticks) scheduler.add_tick(tick);
}

}  // namespace fdg::testing
