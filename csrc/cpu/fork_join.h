// A stage's share of the cores for its native work: `threads - 1` parked helpers and the caller.
#pragma once

#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace fdg::cpu {

class ForkJoin {
 public:
  explicit ForkJoin(int threads);
  ~ForkJoin();
  ForkJoin(const ForkJoin&) = delete;
  ForkJoin& operator=(const ForkJoin&) = delete;

  int threads() const { return static_cast<int>(helpers_.size()) + 1; }
  // Calls part(0) ... part(threads - 1), each on a thread of its own, and returns when all are
  // done. `part` must not throw. One caller at a time.
  void run(const std::function<void(int)>& part);

 private:
  void help(int index);
  void join();

  std::mutex mutex_;
  std::condition_variable begin_;
  std::condition_variable end_;
  const std::function<void(int)>* part_ = nullptr;
  unsigned long round_ = 0;
  int running_ = 0;
  bool closing_ = false;
  std::vector<std::thread> helpers_;
};

}  // namespace fdg::cpu
