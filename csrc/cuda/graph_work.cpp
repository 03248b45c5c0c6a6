#include "graph_work.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace fdg::cuda {

GraphWork::GraphWork(std::shared_ptr<Work> eager, const uint8_t* regular, int64_t rows)
    : eager_(std::move(eager)), regular_(regular), rows_(rows) {
  if (!eager_ || !regular_ || rows_ < 1)
    throw std::invalid_argument("a graph work needs an eager one and a table of regular batches");
}

void GraphWork::use_graph(uint64_t graph, std::shared_ptr<Work> replay, std::vector<Intake> intakes,
                          std::vector<Words> words) {
  if ((graph != 0) == (replay != nullptr))
    throw std::invalid_argument("give either a graph or a work that replays one");
  graph_ = reinterpret_cast<cudaGraphExec_t>(graph);
  replay_ = std::move(replay);
  intakes_ = std::move(intakes);
  words_ = std::move(words);
}

void GraphWork::drop_graph() {
  graph_ = nullptr;
  replay_ = nullptr;
  intakes_.clear();
  words_.clear();
}

bool GraphWork::can_replay(int64_t batch) const {
  return has_graph() && regular_[batch % rows_] &&
         std::all_of(intakes_.begin(), intakes_.end(), [](const Intake& intake) {
           return !intake.sent || *intake.sent == intake.bytes;
         });
}

void GraphWork::run(Stream& stream, const Invocation& at) {
  if (prepare_ && regular_[at.batch % rows_]) std::exchange(prepare_, nullptr)->run(stream, at);
  if (!can_replay(at.batch)) {
    eager_->run(stream, at);
    return;
  }
  CudaStream& cuda_stream = on_cuda(stream);
  const int device = cuda_stream.device();
  for (const Intake& intake : intakes_)
    copy_async(intake.target, device, *intake.source, device, intake.bytes, cuda_stream.get());
  for (const Words& words : words_)
    std::copy(words.values.begin(), words.values.end(), words.place);
  if (graph_)
    FDG_CUDA_CHECK(cudaGraphLaunch(graph_, cuda_stream.get()));
  else
    replay_->run(stream, at);
}

}  // namespace fdg::cuda
