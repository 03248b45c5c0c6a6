#include "cuda_sgd.h"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda_stream.h"
#include "sgd_chunks.h"

namespace fdg::cuda {
namespace {

class UpdateWork final : public Work {
 public:
  UpdateWork(std::shared_ptr<CudaSgd> sgd, int from, int to, int slot)
      : sgd_(std::move(sgd)), from_(from), to_(to), slot_(slot) {}
  void run(Stream& stream, const Invocation& at) override {
    sgd_->run_update(from_, to_, slot_, at.batch, on_cuda(stream).get());
  }

 private:
  const std::shared_ptr<CudaSgd> sgd_;
  const int from_;
  const int to_;
  const int slot_;
};

class CopyWeightsWork final : public Work {
 public:
  CopyWeightsWork(std::shared_ptr<CudaSgd> sgd, int from, int to)
      : sgd_(std::move(sgd)), from_(from), to_(to) {}
  void run(Stream& stream, const Invocation&) override {
    sgd_->run_copy(from_, to_, on_cuda(stream).get());
  }

 private:
  const std::shared_ptr<CudaSgd> sgd_;
  const int from_;
  const int to_;
};

size_t chunk_bytes(const FlatParameters& parameters) {
  return std::max<size_t>(1, cut_into_chunks(parameters.segments).size() * sizeof(Chunk));
}

}  // namespace

CudaSgd::CudaSgd(FlatParameters parameters, const SgdOptions& options)
    : parameters_((parameters.check(), std::move(parameters))),
      options_(options),
      bytes_(static_cast<size_t>(parameters_.size() * item_size(parameters_.dtype))),
      chunks_(options.device, chunk_bytes(parameters_)),
      hyper_(options.device, options.slots,
             static_cast<size_t>(parameters_.hyper.groups) * kHyperFields * sizeof(double),
             options.ticks_in_flight),
      gradients_(options.device, options.slots, parameters_.segments.size() * sizeof(uint64_t),
                 options.ticks_in_flight) {
  const DeviceGuard guard(options_.device);
  FDG_CUDA_CHECK(
      cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, options_.device));
  const std::vector<Chunk> chunks = cut_into_chunks(parameters_.segments);
  chunk_count_ = static_cast<int64_t>(chunks.size());
  if (!chunks.empty())
    FDG_CUDA_CHECK(cudaMemcpy(chunks_.get(), chunks.data(), chunks.size() * sizeof(Chunk),
                              cudaMemcpyHostToDevice));
}

void CudaSgd::check_slot(int slot) const {
  if (slot < 0 || slot >= options_.slots)
    throw std::invalid_argument("slot " + std::to_string(slot) + " does not exist; there are " +
                                std::to_string(options_.slots));
}

std::shared_ptr<Work> CudaSgd::update(int from, int to, int slot) {
  parameters_.check_copy(from);
  parameters_.check_copy(to);
  check_slot(slot);
  return std::make_shared<UpdateWork>(shared_from_this(), from, to, slot);
}

std::shared_ptr<Work> CudaSgd::copy(int from, int to) {
  parameters_.check_copy(from);
  parameters_.check_copy(to);
  return std::make_shared<CopyWeightsWork>(shared_from_this(), from, to);
}

void CudaSgd::run_update(int from, int to, int slot, int64_t batch, cudaStream_t stream) {
  std::vector<double> hyper;
  for (int64_t group = 0; group < parameters_.hyper.groups; ++group) {
    const double* block = parameters_.hyper.block(batch, group);
    std::array<double, kHyperFields> fields{};
    fields[hyper_lr] = block[HyperTable::lr];
    fields[hyper_momentum] = block[HyperTable::momentum];
    fields[hyper_weight_decay] = block[HyperTable::weight_decay];
    fields[hyper_nesterov] = block[HyperTable::nesterov];
    fields[hyper_shrink] = block[HyperTable::first_shrink + parameters_.stage];
    hyper.insert(hyper.end(), fields.begin(), fields.end());
  }
  hyper_.refresh(slot, hyper.data(), stream);
  const size_t segments = parameters_.segments.size();
  gradients_.refresh(slot, parameters_.gradients + static_cast<size_t>(slot) * segments, stream);

  SgdLaunch launch;
  launch.dtype = parameters_.dtype;
  launch.gradient_dtype = options_.gradient_dtype;
  launch.weights = reinterpret_cast<const void*>(parameters_.weights[from]);
  launch.target = reinterpret_cast<void*>(parameters_.weights[to]);
  launch.momentum = reinterpret_cast<void*>(parameters_.momentum);
  launch.gradients = static_cast<const uint64_t*>(gradients_.row(slot));
  launch.chunks = reinterpret_cast<const Chunk*>(chunks_.get());
  launch.chunk_count = chunk_count_;
  launch.hyper = static_cast<const double*>(hyper_.row(slot));
  launch.gain = reinterpret_cast<const double*>(parameters_.gain);
  check(launch_sgd(launch, multiprocessors_, stream), "launch_sgd");
  parameters_.progress[0] = to;
  ++parameters_.progress[1];
}

void CudaSgd::run_copy(int from, int to, cudaStream_t stream) {
  if (from != to)
    FDG_CUDA_CHECK(cudaMemcpyAsync(reinterpret_cast<void*>(parameters_.weights[to]),
                                   reinterpret_cast<const void*>(parameters_.weights[from]), bytes_,
                                   cudaMemcpyDeviceToDevice, stream));
  parameters_.progress[0] = to;
}

}  // namespace fdg::cuda
