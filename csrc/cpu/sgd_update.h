// The fused update of a stage on the CPU, out of place into a weight copy, and the plain copy that
// fills a slot while there is nothing to update.
#pragma once

#include <memory>
#include <vector>

#include "../action.h"
#include "../flat_parameters.h"

namespace fdg::cpu {

class FlatSgd : public std::enable_shared_from_this<FlatSgd> {
 public:
  // `threads`: of a team that shares each update. Throws std::invalid_argument when a segment or
  // pointer cannot be right.
  FlatSgd(FlatParameters parameters, int threads);

  // Reads weight copy `from`, writes `to` (they may be the same). Gradients are read where the
  // table points when the work runs. A segment without gradient is only copied.
  std::shared_ptr<Work> update(int from, int to);
  std::shared_ptr<Work> copy(int from, int to);

  void run_update(int from, int to, int64_t batch);
  void run_copy(int from, int to);

 private:
  struct Piece {
    size_t segment;
    int64_t begin;  // element within the segment
    int64_t size;
  };

  template <class T>
  void update_typed(int from, int to, int64_t batch);
  void copy_weights(int from, int to);

  const FlatParameters parameters_;
  std::vector<std::vector<Piece>> pieces_;  // [thread]
  bool stream_stores_ = false;
};

}  // namespace fdg::cpu
