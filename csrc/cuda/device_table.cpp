#include "device_table.h"

#include <algorithm>
#include <cstring>

namespace fdg::cuda {
namespace {

constexpr size_t kAlignment = 64;

}  // namespace

DeviceTable::DeviceTable(int device, int rows, size_t bytes, int ticks_in_flight)
    : bytes_(bytes),
      stride_((std::max<size_t>(bytes, 1) + kAlignment - 1) / kAlignment * kAlignment),
      turns_(static_cast<size_t>(ticks_in_flight) + 1),
      device_(device, stride_ * static_cast<size_t>(rows)),
      pinned_(stride_ * turns_),
      known_(stride_ * static_cast<size_t>(rows)),
      filled_(static_cast<size_t>(rows), false) {}

void DeviceTable::refresh(int row, const void* data, cudaStream_t stream) {
  const auto at = static_cast<size_t>(row);
  char* const known = known_.data() + at * stride_;
  if (bytes_ == 0 || (filled_[at] && std::memcmp(known, data, bytes_) == 0)) return;
  char* const pinned = pinned_.get() + turn_ * stride_;
  turn_ = (turn_ + 1) % turns_;
  std::memcpy(pinned, data, bytes_);
  FDG_CUDA_CHECK(cudaMemcpyAsync(device_.get() + at * stride_, pinned, bytes_,
                                 cudaMemcpyHostToDevice, stream));
  std::memcpy(known, data, bytes_);
  filled_[at] = true;
}

}  // namespace fdg::cuda
