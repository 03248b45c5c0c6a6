// A kernel that does nothing for a while: for tests, where it makes a missing wait show.
#pragma once

#include <cuda_runtime_api.h>

namespace fdg::cuda {

// Keeps `stream` busy for about `microseconds`. Does not synchronise; returns the launch's error.
cudaError_t launch_sleep(int microseconds, cudaStream_t stream);

}  // namespace fdg::cuda
