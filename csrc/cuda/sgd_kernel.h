// The fused update of a stage's parameters, as one kernel launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../flat_parameters.h"
#include "sgd_chunks.h"

namespace fdg::cuda {

enum class GradientDtype { as_weights, bfloat16, float16 };  // the half ones: float32 weights only

// The device copy of a batch's hyper-parameters of one parameter group, float64.
enum HyperField {
  hyper_lr,
  hyper_momentum,
  hyper_weight_decay,
  hyper_nesterov,  // 0 or 1
  hyper_shrink,
};
constexpr int kHyperFields = 5;

// Every pointer is device memory of the caller's, who keeps it valid until the kernel has run. The
// flat arrays are aligned to 16 bytes and so is every segment in them; gradients may lie anywhere.
struct SgdLaunch {
  Dtype dtype;
  GradientDtype gradient_dtype;
  const void* weights;
  void* target;               // the new weights; may be `weights`
  void* momentum;             // replaced, unless the momentum factor is 0 or there is no gradient
  const uint64_t* gradients;  // [segment] address of the dense gradient; 0: weights are only copied
  const Chunk* chunks;
  int64_t chunk_count;
  const double* hyper;  // [group][kHyperFields]
  // Null, or one number: a gradient's factor is the product of the stage's shrinking factor and of
  // this gain, each rounded to the dtype of the weights first. Not finite: weights are only copied.
  const double* gain;
};

// Queues the update on `stream` of the current device and returns the launch's error, without
// synchronising. `multiprocessors` is how many the device has.
cudaError_t launch_sgd(const SgdLaunch& launch, int multiprocessors, cudaStream_t stream);

}  // namespace fdg::cuda
