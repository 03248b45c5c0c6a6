#include "span_log.h"

#include <chrono>
#include <utility>

namespace fdg::cuda {
namespace {

std::unique_ptr<EventHandle> recorded(int device, cudaStream_t stream) {
  auto event = std::make_unique<EventHandle>(device, cudaEventDefault);
  FDG_CUDA_CHECK(cudaEventRecord(event->get(), stream));
  return event;
}

}  // namespace

DeviceClock::DeviceClock(int device) : base_(device, cudaEventDefault) {
  const DeviceGuard guard(device);
  const StreamHandle stream(device);
  FDG_CUDA_CHECK(cudaEventRecord(base_.get(), stream.get()));
  FDG_CUDA_CHECK(cudaEventSynchronize(base_.get()));
  base_s_ =
      std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double DeviceClock::seconds(const EventHandle& event) const {
  float milliseconds = 0;
  FDG_CUDA_CHECK(cudaEventElapsedTime(&milliseconds, base_.get(), event.get()));
  return base_s_ + 1e-3 * static_cast<double>(milliseconds);
}

void SpanLog::begin(Span what, cudaStream_t stream) {
  auto event = recorded(device_, stream);
  pending_.push_back({std::move(what), clock_, std::move(event), nullptr});
}

void SpanLog::end(cudaStream_t stream) { pending_.back().end = recorded(device_, stream); }

void SpanLog::take(std::vector<Span>& spans) {
  const std::vector<Pending> pending = std::exchange(pending_, {});
  if (pending.empty()) return;
  const DeviceGuard guard(device_);
  for (const Pending& entry : pending) {
    if (!entry.end) continue;
    Span span = entry.span;
    span.begin_s = entry.clock->seconds(*entry.begin);
    span.end_s = entry.clock->seconds(*entry.end);
    spans.push_back(std::move(span));
  }
}

}  // namespace fdg::cuda
