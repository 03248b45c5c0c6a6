#include "sleep_kernel.h"

namespace fdg::cuda {
namespace {

__device__ unsigned long long nanoseconds() {
  unsigned long long now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

__global__ void sleep_kernel(unsigned long long duration_ns) {
  const unsigned long long begin = nanoseconds();
  while (nanoseconds() - begin < duration_ns) __nanosleep(1000);
}

}  // namespace

cudaError_t launch_sleep(int microseconds, cudaStream_t stream) {
  sleep_kernel<<<1, 1, 0, stream>>>(1000ull * static_cast<unsigned long long>(microseconds));
  return cudaGetLastError();
}

}  // namespace fdg::cuda
