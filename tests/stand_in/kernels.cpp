// The kernels' launchers, done on the host with the same element math and the same chunk table.
#include <cmath>
#include <cstring>
#include <vector>

#include "cuda/sgd_kernel.h"
#include "cuda/sleep_kernel.h"
#include "cudart.h"
#include "races.h"
#include "sgd.h"

namespace fdg::cuda {
namespace {

template <bool nesterov, bool remembers, class T>
void update(const SgdLaunch& launch, const Chunk& chunk, const SgdCoefficients<T>& c) {
  const auto* weights = static_cast<const T*>(launch.weights);
  auto* target = static_cast<T*>(launch.target);
  auto* momentum = static_cast<T*>(launch.momentum);
  const auto* gradient = reinterpret_cast<const T*>(launch.gradients[chunk.segment]);
  for (int64_t e = 0; e < chunk.size; ++e) {
    const int64_t at = chunk.place + e;
    T velocity = momentum[at];
    target[at] = sgd_step<nesterov, remembers>(weights[at], gradient[chunk.begin + e], velocity, c);
    if (remembers) momentum[at] = velocity;
  }
}

bool skipped(const SgdLaunch& launch) { return launch.gain && !std::isfinite(*launch.gain); }

template <class T>
void update(const SgdLaunch& launch) {
  for (int64_t i = 0; i < launch.chunk_count; ++i) {
    const Chunk& chunk = launch.chunks[i];
    if (launch.gradients[chunk.segment] == 0 || skipped(launch)) {
      std::memmove(static_cast<T*>(launch.target) + chunk.place,
                   static_cast<const T*>(launch.weights) + chunk.place,
                   static_cast<size_t>(chunk.size) * sizeof(T));
      continue;
    }
    const double* h = launch.hyper + static_cast<int64_t>(chunk.group) * kHyperFields;
    const T gain = launch.gain ? static_cast<T>(*launch.gain) : T(1);
    const SgdCoefficients<T> c{static_cast<T>(h[hyper_shrink]) * gain,
                               static_cast<T>(h[hyper_weight_decay]),
                               static_cast<T>(h[hyper_momentum]), static_cast<T>(h[hyper_lr])};
    if (c.momentum == T(0))
      update<false, false>(launch, chunk, c);
    else if (h[hyper_nesterov] != 0)
      update<true, true>(launch, chunk, c);
    else
      update<false, true>(launch, chunk, c);
  }
}

// For the race detector.
template <class T>
void touch(const SgdLaunch& launch, uintptr_t stream) {
  using stand_in::races::range;
  const size_t count = static_cast<size_t>(launch.chunk_count);
  std::vector<stand_in::races::Range> reads{range(launch.chunks, count * sizeof(Chunk))};
  std::vector<stand_in::races::Range> writes;
  if (launch.gain) reads.push_back(range(launch.gain, sizeof(double)));
  for (size_t i = 0; i < count; ++i) {
    const Chunk& chunk = launch.chunks[i];
    const size_t bytes = static_cast<size_t>(chunk.size) * sizeof(T);
    reads.push_back(range(launch.gradients + chunk.segment, sizeof(uint64_t)));
    reads.push_back(range(launch.hyper + static_cast<int64_t>(chunk.group) * kHyperFields,
                          kHyperFields * sizeof(double)));
    reads.push_back(range(static_cast<const T*>(launch.weights) + chunk.place, bytes));
    writes.push_back(range(static_cast<T*>(launch.target) + chunk.place, bytes));
    const auto* gradient = reinterpret_cast<const T*>(launch.gradients[chunk.segment]);
    if (!gradient || skipped(launch)) continue;
    reads.push_back(range(gradient + chunk.begin, bytes));
    // With a factor of 0 it is neither read nor written, but that is a matter of the numbers.
    writes.push_back(range(static_cast<T*>(launch.momentum) + chunk.place, bytes));
  }
  for (const auto* list : {&reads, &writes})
    for (const auto& memory : *list) stand_in::races::must_be_known("launch_sgd", stream, memory);
  stand_in::races::touch(stream, reads, writes, "launch_sgd");
}

}  // namespace

cudaError_t launch_sgd(const SgdLaunch& launch, int multiprocessors, cudaStream_t stream) {
  stand_in::check_stream("launch_sgd", reinterpret_cast<uintptr_t>(stream));
  if (multiprocessors < 1) stand_in::violation("launch_sgd for no multiprocessor");
  const cudaError_t entered = stand_in::enter("launch_sgd");
  if (entered != cudaSuccess) return entered;
  const auto on = reinterpret_cast<uintptr_t>(stream);
  if (launch.dtype == Dtype::float32) {
    if (stand_in::races::watching()) touch<float>(launch, on);
    update<float>(launch);
  } else {
    if (stand_in::races::watching()) touch<double>(launch, on);
    update<double>(launch);
  }
  return cudaSuccess;
}

cudaError_t launch_sleep(int, cudaStream_t stream) {
  stand_in::check_stream("launch_sleep", reinterpret_cast<uintptr_t>(stream));
  return stand_in::enter("launch_sleep");
}

}  // namespace fdg::cuda
