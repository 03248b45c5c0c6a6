#include "cuda_stream.h"

#include <stdexcept>
#include <thread>

#include "sleep_kernel.h"

namespace fdg::cuda {
namespace {

using Clock = std::chrono::steady_clock;

// Looking this long without sleep costs less than waking up late.
constexpr std::chrono::microseconds kLook{50};
constexpr std::chrono::microseconds kNap{20};

}  // namespace

bool CudaEvent::wait_host(std::chrono::milliseconds timeout) {
  if (!recorded_) return true;
  const auto begin = Clock::now();
  while (true) {
    const cudaError_t status = cudaEventQuery(handle_->get());
    if (status == cudaSuccess) return true;
    if (status != cudaErrorNotReady) {
      try {
        check(status, "cudaEventQuery", "waited for a tick in flight");
      } catch (...) {
        failure_->set(std::current_exception());
      }
      return true;
    }
    static_cast<void>(cudaGetLastError());
    const auto waited = Clock::now() - begin;
    if (waited >= timeout) return false;
    if (waited > kLook)
      std::this_thread::sleep_for(kNap);
    else
      std::this_thread::yield();
  }
}

CudaStream::CudaStream(int device, const Options& options, uint64_t index, Failure& failure,
                       std::shared_ptr<SpanLog> log)
    : max_delay_us_(options.max_delay_us),
      delays_(options.delay_seed * 1000003 + index),
      failure_(failure),
      log_(std::move(log)),
      stream_(device, index < options.handles.size() ? options.handles[index] : 0) {}

template <class Function>
void CudaStream::guarded(const Doing& doing, const Function& function) noexcept {
  try {
    try {
      const DeviceGuard guard(device());
      function();
    } catch (const CudaError& error) {
      throw CudaError(error.code, std::string(error.what()) + " (in " + doing.what() +
                                      " on device " + std::to_string(device()) + ")");
    }
  } catch (...) {
    failure_.set(std::current_exception());
  }
}

void CudaStream::run(const Action& action, const Invocation& at) {
  if (!action.work || failure_.stopped()) return;
  guarded({&action, at.batch}, [&] {
    const bool recorded = log_->on();
    if (recorded)
      log_->begin({action.code, action.stage, action.slot, action.stream, at.tick, at.batch, 0, 0},
                  get());
    if (max_delay_us_ > 0) {
      std::uniform_int_distribution<int> delay_us(0, max_delay_us_);
      check(launch_sleep(delay_us(delays_), get()), "launch_sleep");
    }
    action.work->run(*this, at);
    if (recorded) log_->end(get());
  });
}

void CudaStream::record(Event& event) {
  auto& cuda_event = static_cast<CudaEvent&>(event);
  cuda_event.failure_ = &failure_;
  cuda_event.recorded_ = false;
  guarded({}, [&] {
    if (!cuda_event.handle_)
      cuda_event.handle_ = std::make_unique<EventHandle>(device(), cudaEventDisableTiming);
    if (cuda_event.handle_->device() != device())
      throw std::logic_error("an event of device " + std::to_string(cuda_event.handle_->device()) +
                             " is to be recorded on a stream of device " +
                             std::to_string(device()));
    FDG_CUDA_CHECK(cudaEventRecord(cuda_event.handle_->get(), get()));
    cuda_event.recorded_ = true;
  });
}

void CudaStream::wait(Event& event) {
  auto& cuda_event = static_cast<CudaEvent&>(event);
  if (!cuda_event.recorded_) return;
  guarded({}, [&] { FDG_CUDA_CHECK(cudaStreamWaitEvent(get(), cuda_event.handle_->get(), 0)); });
}

std::unique_ptr<Stream> CudaBackend::make_stream(const std::string& name, Failure& failure) {
  const size_t index = logs_.size();
  if (index >= options_.devices.size())
    throw std::invalid_argument("stream '" + name + "' has no device: " +
                                std::to_string(options_.devices.size()) + " were given");
  logs_.push_back(std::make_shared<SpanLog>(options_.devices[index]));
  return std::make_unique<CudaStream>(options_.devices[index], options_, index, failure,
                                      logs_.back());
}

void CudaBackend::record_spans(bool on) {
  for (const auto& log : logs_) {
    if (!on) {
      log->stop();
      continue;
    }
    auto& clock = clocks_[log->device()];
    if (!clock) clock = std::make_shared<const DeviceClock>(log->device());
    log->start(clock);
  }
}

std::vector<Span> CudaBackend::take_spans() {
  std::vector<Span> taken;
  for (const auto& log : logs_) log->take(taken);
  return taken;
}

}  // namespace fdg::cuda
