// Native works of the cuda backend on the stand-in, with every call of the runtime failing in turn:
// the sanitizers see what is used after it is gone.
#include <array>
#include <numeric>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/copy_work.h"
#include "cuda/cuda_sgd.h"
#include "cuda/cuda_stream.h"
#include "cuda/graph_work.h"
#include "cudart.h"
#include "scheduler.h"
#include "tools.h"

namespace fdg::testing {
namespace {

constexpr cudaError_t kFault = cudaErrorIllegalAddress;
constexpr int kTicks = 6;

// One stage on device 1 that is fed and read from the host: a load, a graph, an update, a read.
class Machine {
 public:
  Machine() : segments_{{0, 5}, {16, 40}}, hyper_{0.1, 0.9, 0.01, 0.0, 0.5} {
    std::iota(weights_[0].begin(), weights_[0].end(), 0.0F);
    gradients_ = {reinterpret_cast<uint64_t>(gradient_.data()),
                  reinterpret_cast<uint64_t>(gradient_.data() + 5)};
    words_ = {address(input_),      address(inbox_), sizeof input_,
              address(weights_[0]), address(read_),  sizeof weights_[0]};
    graph_ = stand_in::make_graph([this] { gradient_.fill(static_cast<float>(inbox_[0])); });
  }
  ~Machine() { stand_in::destroy_graph(graph_); }

  void run() {
    cuda::Options options;
    options.devices = {1, 1, 1};
    Scheduler scheduler(std::make_unique<cuda::CudaBackend>(options), stream_names(3), 3);
    scheduler.record_spans(true);
    const BufferId inbox = scheduler.add_buffer("inbox", true);
    const BufferId gradients = scheduler.add_buffer("gradients", false);
    const BufferId weights = scheduler.add_buffer("weights", true);
    const auto sgd = make_sgd();
    const auto graph =
        std::make_shared<cuda::GraphWork>(work([this] { ++eager_runs; }), regular_, 2);
    graph->use_graph(graph_, nullptr, {{&words_[1], address(taken_), sizeof taken_, nullptr}},
                     {{gradients_copy_, {gradients_[0], gradients_[1]}}});
    const std::vector<int> actions{
        scheduler.add_action(action(2, {}, {inbox}, copy(0, cuda::kHost, 1, 1, 2), "I")),
        scheduler.add_action(action(0, {inbox}, {gradients}, graph, "B")),
        scheduler.add_action(action(0, {gradients}, {weights}, sgd->update(0, 0, 0), "U")),
        scheduler.add_action(action(1, {weights}, {}, copy(3, 1, 4, cuda::kHost, 5), "M")),
    };
    std::vector<std::pair<int, int64_t>> entries;
    for (const int id : actions) entries.emplace_back(id, 0);
    const int tick = scheduler.add_tick(entries);
    for (int t = 0; t < kTicks; ++t) {
      CHECK(scheduler.wait_for_room(kPatience));
      scheduler.submit(tick, t);
    }
    CHECK(scheduler.wait_idle(kPatience));
    spans = scheduler.take_spans().size();
  }

  size_t spans = 0;
  int eager_runs = 0;
  std::array<float, 64> read_{};

 private:
  template <class T>
  static uint64_t address(T& thing) {
    return reinterpret_cast<uint64_t>(&thing);
  }

  std::shared_ptr<Work> copy(size_t source, int from, size_t target, int to, size_t bytes) {
    return std::make_shared<cuda::CopyWork>(cuda::Word{&words_[source], 1}, from,
                                            cuda::Word{&words_[target], 1}, to,
                                            cuda::Word{&words_[bytes], 1});
  }

  std::shared_ptr<cuda::CudaSgd> make_sgd() {
    FlatParameters parameters;
    parameters.segments = segments_;
    parameters.weights = {reinterpret_cast<uintptr_t>(weights_[0].data())};
    parameters.momentum = reinterpret_cast<uintptr_t>(momentum_.data());
    parameters.gradients = gradients_.data();
    parameters.hyper = {hyper_.data(), 1, static_cast<int64_t>(hyper_.size())};
    parameters.progress = progress_;
    cuda::SgdOptions options;
    options.device = 1;
    options.ticks_in_flight = 3;
    return std::make_shared<cuda::CudaSgd>(std::move(parameters), options);
  }

  const std::vector<Segment> segments_;
  const std::vector<double> hyper_;
  alignas(64) std::array<std::array<float, 64>, 1> weights_{};
  alignas(64) std::array<float, 64> momentum_{};
  alignas(64) std::array<float, 64> gradient_{};
  std::vector<uint64_t> gradients_;
  uint64_t gradients_copy_[2] = {};
  double input_[2] = {2.0, 3.0};
  double inbox_[2] = {};
  double taken_[2] = {};
  std::vector<uint64_t> words_;
  const uint8_t regular_[2] = {1, 0};  // every second batch is eager
  int64_t progress_[2] = {};
  uintptr_t graph_ = 0;
};

void check_nothing_left() {
  for (const auto& [kind, alive] : stand_in::state().alive) {
    const check::Note note(kind);
    CHECK(alive == 0);
  }
  CHECK(stand_in::state().violations == std::vector<std::string>{});
}

TEST("cuda: loads, replays, updates and reads") {
  stand_in::state().reset();
  {
    Machine machine;
    machine.run();
    CHECK(machine.eager_runs == kTicks / 2);
    CHECK(stand_in::state().calls_of["cudaGraphLaunch"] == kTicks / 2);
    CHECK(stand_in::state().calls_of["launch_sgd"] == kTicks);
    CHECK(machine.spans == size_t{4 * kTicks});
    CHECK(machine.read_[1] < 1.0F);
  }
  check_nothing_left();
}

TEST("cuda: whichever call fails, an error comes or no harm was done, and nothing is left") {
  stand_in::state().reset();
  Machine().run();
  const int64_t calls = stand_in::state().calls;
  CHECK(calls > 100);
  int64_t errors = 0;
  for (const bool lost : {false, true})
    for (int64_t number = 1; number <= calls; ++number) {
      const check::Note note("call " + std::to_string(number));
      stand_in::state().reset();
      {
        Machine machine;
        stand_in::state().fail_at = number;
        stand_in::state().fail_code = kFault;
        stand_in::state().lost = lost;
        try {
          machine.run();
        } catch (const cuda::CudaError& error) {
          ++errors;
          CHECK(error.code == kFault);
          CHECK(std::string(error.what()).find("start it again") != std::string::npos);
        }
      }
      check_nothing_left();
    }
  CHECK(errors > calls);  // of twice as many runs
  stand_in::state().reset();
}

}  // namespace
}  // namespace fdg::testing
