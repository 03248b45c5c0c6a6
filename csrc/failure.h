// The first exception of any stream, shared by all of them. Once it is set no further work runs,
// but events are still recorded and waited for, so everything enqueued drains and nobody hangs.
#pragma once

#include <atomic>
#include <exception>
#include <mutex>
#include <utility>

namespace fdg {

class Failure {
 public:
  // Stops all work that has not begun. Only the first exception is kept; null means "cancelled".
  void set(std::exception_ptr error) noexcept {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!stopped_.exchange(true)) error_ = std::move(error);
  }

  bool stopped() const noexcept { return stopped_.load(std::memory_order_acquire); }

  void rethrow() {
    std::exception_ptr error;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      error = error_;
    }
    if (error) std::rethrow_exception(error);
  }

 private:
  std::mutex mutex_;
  std::atomic<bool> stopped_{false};
  std::exception_ptr error_;
};

}  // namespace fdg
