#include "copy_work.h"

#include <stdexcept>

namespace fdg::cuda {

void copy_async(uint64_t target, int target_device, uint64_t source, int source_device,
                uint64_t bytes, cudaStream_t stream) {
  auto* const to = reinterpret_cast<void*>(target);
  const auto* const from = reinterpret_cast<const void*>(source);
  if (target_device == kHost)
    FDG_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream));
  else if (source_device == kHost)
    FDG_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream));
  else if (source_device == target_device)
    FDG_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream));
  else
    FDG_CUDA_CHECK(cudaMemcpyPeerAsync(to, target_device, from, source_device, bytes, stream));
}

CopyWork::CopyWork(Word source, int source_device, Word target, int target_device, Word bytes)
    : source_(source),
      target_(target),
      bytes_(bytes),
      source_device_(source_device),
      target_device_(target_device) {
  for (const Word* word : {&source_, &target_, &bytes_})
    if (!word->words || word->rows < 1)
      throw std::invalid_argument("a copy needs words that say from where, to where, how much");
  if (source_device == kHost && target_device == kHost)
    throw std::invalid_argument("a copy from host to host needs no stream");
}

void CopyWork::run(Stream& stream, const Invocation& at) {
  const uint64_t bytes = bytes_.at(at.batch);
  if (bytes == 0) return;
  copy_async(target_.at(at.batch), target_device_, source_.at(at.batch), source_device_, bytes,
             on_cuda(stream).get());
}

}  // namespace fdg::cuda
