// The fused update of a stage on its device, out of place into a weight copy, and the plain copy
// that fills a slot while there is nothing to update.
#pragma once

#include <memory>

#include "../action.h"
#include "../flat_parameters.h"
#include "device_table.h"
#include "sgd_kernel.h"

namespace fdg::cuda {

struct SgdOptions {
  int device = 0;
  GradientDtype gradient_dtype = GradientDtype::as_weights;
  int slots = 1;
  int ticks_in_flight = 1;
};

class CudaSgd : public std::enable_shared_from_this<CudaSgd> {
 public:
  // `parameters.gradients` has a row of addresses per slot; they are read when the update is
  // enqueued. Throws std::invalid_argument when a segment or pointer cannot be right.
  CudaSgd(FlatParameters parameters, const SgdOptions& options);

  // Reads weight copy `from`, writes `to` (they may be the same), with the gradients of `slot`. A
  // segment without gradient is only copied.
  std::shared_ptr<Work> update(int from, int to, int slot);
  std::shared_ptr<Work> copy(int from, int to);

  void run_update(int from, int to, int slot, int64_t batch, cudaStream_t stream);
  void run_copy(int from, int to, cudaStream_t stream);

 private:
  void check_slot(int slot) const;

  const FlatParameters parameters_;
  const SgdOptions options_;
  const size_t bytes_;  // of a weight copy
  int multiprocessors_ = 0;
  int64_t chunk_count_ = 0;
  DeviceMemory chunks_;
  DeviceTable hyper_;
  DeviceTable gradients_;
};

}  // namespace fdg::cuda
