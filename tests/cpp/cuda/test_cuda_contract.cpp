// The cuda backend keeps the contract of csrc/stream.h. On the stand-in for the CUDA runtime, whose
// race detector says whether anything orders two actions that touch the same memory.
#include <map>

#include "check.h"
#include "cuda/cuda_stream.h"
#include "cudart.h"
#include "races.h"
#include "stream_contract.h"
#include "tools.h"

namespace fdg::testing {
namespace {

class Touching final : public Work {
 public:
  explicit Touching(const char* memory) : memory_(memory) {}
  void run(Stream& stream, const Invocation&) override {
    stand_in::races::touch(stream.handle(), {}, {stand_in::races::range(memory_, 8)}, "an action");
  }

 private:
  const char* const memory_;
};

class CudaJudge final : public Judge {
 public:
  bool is_ordered(const Contract& contract, char first, char second) override {
    alignas(8) static char memory[8];
    stand_in::state().reset();
    stand_in::races::watch(true);
    stand_in::races::allocated(stand_in::races::range(memory, 8), stand_in::races::kHost);
    {
      cuda::Options options;
      options.devices = std::vector<int>(kStreams, 0);
      cuda::CudaBackend backend(options);
      Failure failure;
      std::map<char, Action> actions;
      actions[first].work = actions[second].work = std::make_shared<Touching>(memory);
      std::map<char, std::unique_ptr<Event>> events;
      std::vector<std::unique_ptr<Stream>> streams;
      for (const auto& name : stream_names(kStreams))
        streams.push_back(backend.make_stream(name, failure));
      enqueue(contract, actions, streams, backend, events, false);
      failure.rethrow();
      raced_ = stand_in::state().violations.size();
      streams.clear();
    }
    stand_in::races::watch(false);
    CHECK(raced_ <= size_t{1});
    for (const auto& [kind, alive] : stand_in::state().alive) CHECK(alive == 0);
    return raced_ == 0;
  }
  bool is_free(const Contract& contract, char first, char second) override {
    return !is_ordered(contract, first, second);
  }

 private:
  size_t raced_ = 0;
};

TEST("contract: the cuda backend keeps it") {
  CudaJudge judge;
  for (const auto& contract : contracts()) check_contract(judge, contract);
}

}  // namespace
}  // namespace fdg::testing
