#include "fork_join.h"

namespace fdg::cpu {

ForkJoin::ForkJoin(int threads) {
  try {
    for (int i = 1; i < threads; ++i) helpers_.emplace_back([this, i] { help(i); });
  } catch (...) {  // the system has no thread left: end those there are
    join();
    throw;
  }
}

ForkJoin::~ForkJoin() { join(); }

void ForkJoin::join() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    closing_ = true;
  }
  begin_.notify_all();
  for (auto& helper : helpers_) helper.join();
}

void ForkJoin::run(const std::function<void(int)>& part) {
  if (!helpers_.empty()) {
    std::lock_guard<std::mutex> lock(mutex_);
    part_ = &part;
    running_ = static_cast<int>(helpers_.size());
    ++round_;
    begin_.notify_all();
  }
  part(0);
  std::unique_lock<std::mutex> lock(mutex_);
  end_.wait(lock, [this] { return running_ == 0; });
}

void ForkJoin::help(int index) {
  unsigned long seen = 0;
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    begin_.wait(lock, [&] { return closing_ || round_ != seen; });
    if (closing_) return;
    seen = round_;
    const auto* part = part_;
    lock.unlock();
    (*part)(index);
    lock.lock();
    if (--running_ == 0) end_.notify_one();
  }
}

}  // namespace fdg::cpu
