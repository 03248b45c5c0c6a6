#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "../sgd.h"
#include "sgd_kernel.h"

namespace fdg::cuda {
namespace {

constexpr int kThreads = 256;
// The update is bound by memory: this many blocks have at least 48 KB of loads in flight, and every
// architecture has the registers and threads for them.
constexpr int kBlocksPerMultiprocessor = 4;

// n elements that are loaded and stored 16 bytes at a time.
template <class T, int n>
struct alignas(16) Pack {
  static_assert(n * sizeof(T) % 16 == 0, "a pack is a whole number of 16-byte words");
  T at[n];
};

template <int n, class T>
__device__ Pack<T, n> load(const T* from) {
  return *reinterpret_cast<const Pack<T, n>*>(from);
}

template <int n, class T>
__device__ void store(T* to, const Pack<T, n>& pack) {
  *reinterpret_cast<Pack<T, n>*>(to) = pack;
}

// A chunk's elements, each pointer at its first. `out` may be `weights`: an element is read before
// it is written, and by no other thread.
template <class T, class G>
struct Span {
  const T* weights;
  const G* gradients;
  T* momentum;
  T* out;
  int size;
};

template <bool nesterov, bool remembers, class T, class G>
__device__ void update_element(const Span<T, G>& s, int i, const SgdCoefficients<T>& c) {
  // What is not remembered is not read either.
  T velocity = remembers ? s.momentum[i] : T(0);
  s.out[i] =
      sgd_step<nesterov, remembers>(s.weights[i], static_cast<T>(s.gradients[i]), velocity, c);
  if (remembers) s.momentum[i] = velocity;
}

// Elements [i, i + n). All loads come first, so that they are in flight together.
template <bool nesterov, bool remembers, bool aligned_gradients, int n, class T, class G>
__device__ void update_pack(const Span<T, G>& s, int i, const SgdCoefficients<T>& c) {
  Pack<T, n> w = load<n>(s.weights + i);
  Pack<G, n> g;
  if constexpr (aligned_gradients)
    g = load<n>(s.gradients + i);
  else
    for (int j = 0; j < n; ++j) g.at[j] = s.gradients[i + j];
  Pack<T, n> v{};
  if constexpr (remembers) v = load<n>(s.momentum + i);
  for (int j = 0; j < n; ++j)
    w.at[j] = sgd_step<nesterov, remembers>(w.at[j], static_cast<T>(g.at[j]), v.at[j], c);
  store<n>(s.out + i, w);
  if constexpr (remembers) store<n>(s.momentum + i, v);
}

template <bool nesterov, bool remembers, bool aligned_gradients, class T, class G>
__device__ void update_span(const Span<T, G>& s, const SgdCoefficients<T>& c) {
  // 16 bytes of the smallest element: of half gradients one word, and two of the weights.
  constexpr int n = 16 / sizeof(G);
  const int packed = s.size / n * n;
  // Unrolled it takes more registers and gains nothing: no load can pass a store to `out`.
#pragma unroll 1
  for (int i = threadIdx.x * n; i < packed; i += kThreads * n)
    update_pack<nesterov, remembers, aligned_gradients, n>(s, i, c);
  const int last = packed + threadIdx.x;
  if (last < s.size) update_element<nesterov, remembers>(s, last, c);
}

template <class T>
__device__ void copy_span(const T* from, T* to, int size) {
  constexpr int n = 16 / sizeof(T);
  const int packed = size / n * n;
  for (int i = threadIdx.x * n; i < packed; i += kThreads * n) store<n>(to + i, load<n>(from + i));
  const int last = packed + threadIdx.x;
  if (last < size) to[last] = from[last];
}

template <bool nesterov, bool remembers, class T, class G>
__device__ void update_aligned(const Span<T, G>& s, const SgdCoefficients<T>& c) {
  if (reinterpret_cast<uintptr_t>(s.gradients) % 16 == 0)
    update_span<nesterov, remembers, true>(s, c);
  else
    update_span<nesterov, remembers, false>(s, c);
}

// The hyper-parameters, and with them the rule, come from memory: a captured graph that is launched
// again makes another batch's update.
template <class T, class G>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    sgd_kernel(const SgdLaunch launch) {
  const double gain = launch.gain ? *launch.gain : 1.0;
  const bool skipped = !isfinite(gain);
  SgdCoefficients<T> c{};
  bool nesterov = false;
  int32_t known = -1;  // the group that `c` and `nesterov` are of
  for (int64_t index = blockIdx.x; index < launch.chunk_count; index += gridDim.x) {
    const Chunk chunk = launch.chunks[index];
    const T* weights = static_cast<const T*>(launch.weights) + chunk.place;
    T* out = static_cast<T*>(launch.target) + chunk.place;
    const uint64_t address = launch.gradients[chunk.segment];
    if (address == 0 || skipped) {
      if (out != weights) copy_span(weights, out, chunk.size);
      continue;
    }
    if (chunk.group != known) {
      known = chunk.group;
      const double* hyper = launch.hyper + static_cast<int64_t>(known) * kHyperFields;
      c = {
          static_cast<T>(hyper[hyper_shrink]) * static_cast<T>(gain),
          static_cast<T>(hyper[hyper_weight_decay]),
          static_cast<T>(hyper[hyper_momentum]),
          static_cast<T>(hyper[hyper_lr]),
      };
      nesterov = hyper[hyper_nesterov] != 0;
    }
    // By a mere cast the compiler would not know that this is global memory.
    const G* gradient = static_cast<const G*>(__cvta_global_to_generic(address)) + chunk.begin;
    T* momentum = static_cast<T*>(launch.momentum) + chunk.place;
    const Span<T, G> span{weights, gradient, momentum, out, chunk.size};
    if (c.momentum == T(0))
      update_aligned<false, false>(span, c);
    else if (nesterov)
      update_aligned<true, true>(span, c);
    else
      update_aligned<false, true>(span, c);
  }
}

using Kernel = void (*)(SgdLaunch);

// Null: there is none for these dtypes.
Kernel kernel_for(Dtype dtype, GradientDtype gradient_dtype) {
  const bool is_double = dtype == Dtype::float64;
  switch (gradient_dtype) {
    case GradientDtype::as_weights:
      return is_double ? Kernel{sgd_kernel<double, double>} : Kernel{sgd_kernel<float, float>};
    case GradientDtype::bfloat16:
      return is_double ? nullptr : sgd_kernel<float, __nv_bfloat16>;
    case GradientDtype::float16:
      return is_double ? nullptr : sgd_kernel<float, __half>;
  }
  return nullptr;
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

cudaError_t launch_sgd(const SgdLaunch& launch, int multiprocessors, cudaStream_t stream) {
  const Kernel kernel = kernel_for(launch.dtype, launch.gradient_dtype);
  if (!kernel || launch.chunk_count < 0 || multiprocessors < 1) return cudaErrorInvalidValue;
  if (!is_aligned(launch.weights) || !is_aligned(launch.target) || !is_aligned(launch.momentum))
    return cudaErrorMisalignedAddress;
  if (launch.chunk_count == 0) return cudaSuccess;
  const int64_t most = int64_t{multiprocessors} * kBlocksPerMultiprocessor;
  const auto blocks = static_cast<unsigned>(std::min(launch.chunk_count, most));
  SgdLaunch argument = launch;
  void* arguments[] = {&argument};
  // Not <<<>>> and cudaGetLastError, which may return the error of an earlier call.
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(kThreads),
                          arguments, 0, stream);
}

}  // namespace fdg::cuda
