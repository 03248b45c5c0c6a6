// Small tables of the host that kernels read from device memory (hyper-parameters, addresses of
// gradients): copied only where they changed.
#pragma once

#include <cstdint>
#include <vector>

#include "handles.h"

namespace fdg::cuda {

class DeviceTable {
 public:
  // `rows` rows of `bytes` each. A row may be refreshed once per tick; `ticks_in_flight` bounds the
  // ticks that are enqueued and unfinished, so that pinned memory is not written while it is read.
  DeviceTable(int device, int rows, size_t bytes, int ticks_in_flight);

  // Brings `row` up to date with `data`, on `stream`. At most once per tick.
  void refresh(int row, const void* data, cudaStream_t stream);
  const void* row(int row) const { return device_.get() + static_cast<size_t>(row) * stride_; }

 private:
  const size_t bytes_;
  const size_t stride_;
  const size_t turns_;
  DeviceMemory device_;
  PinnedMemory pinned_;
  std::vector<char> known_;  // what the device's rows hold, or are about to
  std::vector<bool> filled_;
  size_t turn_ = 0;
};

}  // namespace fdg::cuda
