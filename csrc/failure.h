// The first exception of any stream, shared by all of them. Once it is set no further work runs,
// but events are still recorded and waited for, so everything enqueued drains and nobody hangs.
#pragma once

#include <atomic>
#include <exception>
#include <mutex>
#include <stdexcept>
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

  // Throws what `set` was given, the first time. An exception object may hold what can be handed on
  // only once (a Python error), so later calls throw a plain one that says so.
  void rethrow() {
    std::exception_ptr error;
    bool thrown_before = false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      error = std::move(error_);
      error_ = nullptr;
      thrown_before = thrown_;
      thrown_ = thrown_ || error;
    }
    if (error) std::rethrow_exception(error);
    if (thrown_before) throw std::runtime_error("this scheduler has failed before; make a new one");
  }

 private:
  std::mutex mutex_;
  std::atomic<bool> stopped_{false};
  std::exception_ptr error_;
  bool thrown_ = false;
};

}  // namespace fdg
