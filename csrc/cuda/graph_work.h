// A forward or backward that is replayed as a captured graph where that is possible, and called
// eagerly where it is not: before it is captured, and for batches of another shape.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "../action.h"
#include "copy_work.h"

namespace fdg::cuda {

class GraphWork final : public Work {
 public:
  // `regular[batch % rows]` says whether the batch has the shape graphs are captured for; the
  // caller writes it before the batch is enqueued.
  GraphWork(std::shared_ptr<Work> eager, const uint8_t* regular, int64_t rows);

  // Of what arrived in an inbox, into the memory the graph reads.
  struct Intake {
    const uint64_t* source = nullptr;  // word: where it arrived
    uint64_t target = 0;
    uint64_t bytes = 0;
    const uint64_t* sent = nullptr;  // word: how many bytes arrived; null: always as many
  };
  // Host words as they must be after the graph; an eager run in between leaves others.
  struct Words {
    uint64_t* place = nullptr;
    std::vector<uint64_t> values;
  };

  // Before the next regular batch `prepare` is run, once: it may call use_graph.
  void prepare_with(std::shared_ptr<Work> prepare) { prepare_ = std::move(prepare); }
  // From now on regular batches are replayed: natively from `graph`, an instantiated graph that
  // draws no random numbers and outlives this work, or by `replay` where that is 0.
  void use_graph(uint64_t graph, std::shared_ptr<Work> replay, std::vector<Intake> intakes,
                 std::vector<Words> words);
  // From now on every batch is eager.
  void drop_graph();
  bool has_graph() const { return graph_ != nullptr || replay_ != nullptr; }

  void run(Stream& stream, const Invocation& at) override;

 private:
  bool can_replay(int64_t batch) const;

  const std::shared_ptr<Work> eager_;
  const uint8_t* const regular_;
  const int64_t rows_;
  std::shared_ptr<Work> prepare_;
  cudaGraphExec_t graph_ = nullptr;
  std::shared_ptr<Work> replay_;
  std::vector<Intake> intakes_;
  std::vector<Words> words_;
};

}  // namespace fdg::cuda
