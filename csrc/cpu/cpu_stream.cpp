#include "cpu_stream.h"

#include <algorithm>
#include <chrono>
#include <exception>
#include <iterator>
#include <utility>

#if defined(__linux__)
#include <pthread.h>
#endif

namespace fdg::cpu {
namespace {

// Waking a sleeping thread costs many microseconds, so a waiter looks for a moment first. Between
// two looks it yields: the one it waits for may need this very core.
constexpr int kLooks = 100;

template <class Ready>
bool look(const Ready& ready) {
  for (int i = 0; i < kLooks; ++i) {
    if (ready()) return true;
    std::this_thread::yield();
  }
  return ready();
}

using Clock = std::chrono::steady_clock;

double seconds(Clock::time_point time) {
  return std::chrono::duration<double>(time.time_since_epoch()).count();
}

// For debuggers and top.
void name_this_thread(const std::string& name) {
#if defined(__linux__)
  pthread_setname_np(pthread_self(), name.substr(0, 15).c_str());
#else
  (void)name;
#endif
}

}  // namespace

void CpuRecord::complete() {
  done_.store(true);  // sequentially consistent, as is sleepers_: one of the two sides sees the
  if (sleepers_.load() > 0) {  // other, so no wake-up is lost
    std::lock_guard<std::mutex> lock(mutex_);
    changed_.notify_all();
  }
}

void CpuRecord::wait() {
  const auto ready = [this] { return done_.load(); };
  if (look(ready)) return;
  std::unique_lock<std::mutex> lock(mutex_);
  ++sleepers_;
  changed_.wait(lock, ready);
  --sleepers_;
}

bool CpuRecord::wait_for(std::chrono::milliseconds timeout) {
  const auto ready = [this] { return done_.load(); };
  if (timeout <= timeout.zero()) return ready();
  if (look(ready)) return true;
  // Added to the clock's time a longest timeout would overflow.
  const auto bounded = std::min<std::chrono::milliseconds>(timeout, std::chrono::hours(24 * 365));
  std::unique_lock<std::mutex> lock(mutex_);
  ++sleepers_;
  const bool done = changed_.wait_for(lock, bounded, ready);
  --sleepers_;
  return done;
}

bool CpuEvent::wait_host(std::chrono::milliseconds timeout) {
  const auto record = latest_;
  return !record || record->wait_for(timeout);
}

CpuStream::CpuStream(const Options& options, const std::string& name, uint64_t index,
                     Failure& failure, std::shared_ptr<SpanLog> log)
    : max_delay_us_(options.max_delay_us),
      delays_(options.delay_seed * 1000003 + index),
      failure_(failure),
      log_(std::move(log)),
      thread_([this, name, on_start = options.on_thread_start] {
        name_this_thread(name);
        work(on_start);
      }) {}

CpuStream::~CpuStream() {
  flush();
  {
    std::lock_guard<std::mutex> lock(mutex_);
    closing_ = true;
  }
  changed_.notify_one();
  thread_.join();
}

void CpuStream::run(const Action& action, const Invocation& at) {
  held_.push_back({Kind::run, &action, nullptr, at, log_->on});
}

void CpuStream::record(Event& event) {
  auto& cpu_event = static_cast<CpuEvent&>(event);
  cpu_event.latest_ = std::make_shared<CpuRecord>();
  held_.push_back({Kind::record, nullptr, cpu_event.latest_, {}, false});
}

void CpuStream::wait(Event& event) {
  auto& cpu_event = static_cast<CpuEvent&>(event);
  if (cpu_event.latest_) held_.push_back({Kind::wait, nullptr, cpu_event.latest_, {}, false});
}

void CpuStream::flush() {
  if (held_.empty()) return;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    queue_.insert(queue_.end(), held_.begin(), held_.end());
    available_.store(true, std::memory_order_release);
  }
  changed_.notify_one();
  held_.clear();
}

bool CpuStream::take(std::vector<Operation>& operations) {
  look([this] { return available_.load(std::memory_order_acquire); });
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return !queue_.empty() || closing_; });
  operations.clear();
  operations.swap(queue_);
  available_.store(false, std::memory_order_release);
  return !operations.empty();
}

void CpuStream::work(const std::function<std::shared_ptr<void>()>& on_start) {
  std::shared_ptr<void> guard;
  try {
    if (on_start) guard = on_start();
  } catch (...) {
    failure_.set(std::current_exception());
  }
  std::vector<Operation> operations;
  while (take(operations))
    for (const Operation& operation : operations) execute(operation);
}

void CpuStream::execute(const Operation& operation) {
  switch (operation.kind) {
    case Kind::run:
      run_action(operation);
      break;
    case Kind::record:
      operation.record->complete();
      break;
    case Kind::wait:
      operation.record->wait();
      break;
  }
}

void CpuStream::run_action(const Operation& operation) {
  const Action& action = *operation.action;
  if (!action.work || failure_.stopped()) return;
  Span* span = nullptr;
  Clock::time_point begin;
  try {
    delay();
    if (operation.measured) span = new_span(operation);
    begin = Clock::now();
    action.work->run(*this, operation.at);
  } catch (...) {
    failure_.set(std::current_exception());
    if (begin == Clock::time_point()) return;  // it was not begun
  }
  const Clock::time_point end = Clock::now();
  const auto took = std::chrono::duration_cast<std::chrono::nanoseconds>(end - begin).count();
  busy_ns_.store(busy_ns_.load(std::memory_order_relaxed) + took, std::memory_order_relaxed);
  if (span) {
    span->begin_s = seconds(begin);
    span->end_s = seconds(end);
  }
}

void CpuStream::delay() {
  if (max_delay_us_ == 0) return;
  std::uniform_int_distribution<int> delay_us(0, max_delay_us_);
  std::this_thread::sleep_for(std::chrono::microseconds(delay_us(delays_)));
}

Span* CpuStream::new_span(const Operation& operation) {
  const Action& action = *operation.action;
  log_->spans.push_back({action.code, action.stage, action.slot, action.stream, operation.at.tick,
                         operation.at.batch, 0, 0});
  return &log_->spans.back();
}

std::unique_ptr<Stream> CpuBackend::make_stream(const std::string& name, Failure& failure) {
  auto log = std::make_shared<SpanLog>();
  log->on = recording_;
  logs_.push_back(log);
  return std::make_unique<CpuStream>(options_, name, logs_.size() - 1, failure, std::move(log));
}

void CpuBackend::record_spans(bool on) {
  recording_ = on;
  for (const auto& log : logs_) log->on = on;
}

std::vector<Span> CpuBackend::take_spans() {
  std::vector<Span> taken;
  for (const auto& log : logs_) {
    taken.insert(taken.end(), std::make_move_iterator(log->spans.begin()),
                 std::make_move_iterator(log->spans.end()));
    log->spans = {};  // and its memory
  }
  return taken;
}

}  // namespace fdg::cpu
