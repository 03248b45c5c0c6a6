#include "peer.h"

#include <cstdint>
#include <vector>

#include "handles.h"

namespace fdg::cuda {
namespace {

constexpr size_t kWords = size_t{1} << 18;  // 1 MiB: more than one packet, page and copy engine

bool enable(int from, int to) {
  const DeviceGuard guard(from);
  int possible = 0;
  FDG_CUDA_CHECK(cudaDeviceCanAccessPeer(&possible, from, to));
  if (!possible) return false;
  const cudaError_t code = cudaDeviceEnablePeerAccess(to, 0);
  static_cast<void>(cudaGetLastError());
  if (code == cudaErrorPeerAccessAlreadyEnabled) return true;
  if (code == cudaErrorTooManyPeers || code == cudaErrorPeerAccessUnsupported) return false;
  check(code, "cudaDeviceEnablePeerAccess");
  return true;
}

bool arrives(int from, int to) {
  const size_t bytes = kWords * sizeof(uint32_t);
  const DeviceMemory source(from, bytes);
  const DeviceMemory target(to, bytes);
  std::vector<uint32_t> sent(kWords);
  for (size_t i = 0; i < kWords; ++i) sent[i] = static_cast<uint32_t>(i * 2654435761u);
  {
    const StreamHandle stream(to);
    const DeviceGuard guard(to);
    FDG_CUDA_CHECK(cudaMemsetAsync(target.get(), 0, bytes, stream.get()));
    FDG_CUDA_CHECK(cudaStreamSynchronize(stream.get()));
  }
  const StreamHandle stream(from);
  const DeviceGuard guard(from);
  FDG_CUDA_CHECK(
      cudaMemcpyAsync(source.get(), sent.data(), bytes, cudaMemcpyHostToDevice, stream.get()));
  FDG_CUDA_CHECK(cudaMemcpyPeerAsync(target.get(), to, source.get(), from, bytes, stream.get()));
  FDG_CUDA_CHECK(cudaStreamSynchronize(stream.get()));
  std::vector<uint32_t> received(kWords);
  const DeviceGuard back(to);
  FDG_CUDA_CHECK(cudaMemcpy(received.data(), target.get(), bytes, cudaMemcpyDeviceToHost));
  return received == sent;
}

}  // namespace

bool peer_copies_work(int from, int to) {
  if (from == to) return true;
  return enable(from, to) && enable(to, from) && arrives(from, to);
}

}  // namespace fdg::cuda
