#include "block_cache.h"

#include <malloc.h>  // malloc_usable_size

#include <algorithm>
#include <cstdlib>
#include <new>
#include <utility>

namespace fdg::cpu {

namespace {

// What is kept and what is in use together, in times the most that was lately in use: enough for
// steps that are alike, and a bound where every batch has another size.
constexpr int64_t kMostTimesTwo = 3;
constexpr int kPowerOfSteps = 4;

// From this size on (the C library's limit at first) a block may be a mapping of its own, which
// goes back as a whole; and if it is not, freeing it writes to few of its pages.
constexpr size_t kWorthFreeingInChild = 128 << 10;

int power_of(size_t bytes) {
  int power = 0;
  while (bytes >>= 1) ++power;
  return power;
}

// A moment's patience first: the lock is held for less than a thread takes to fall asleep and wake.
class Lock {
 public:
  explicit Lock(std::mutex& mutex) : mutex_(mutex) {
    for (int attempt = 0; attempt < kAttempts; ++attempt) {
      if (mutex_.try_lock()) return;
    }
    mutex_.lock();
  }
  ~Lock() { mutex_.unlock(); }
  Lock(const Lock&) = delete;
  Lock& operator=(const Lock&) = delete;

 private:
  static constexpr int kAttempts = 50;
  std::mutex& mutex_;
};

}  // namespace

BlockCache::~BlockCache() { free_all(everything()); }

int BlockCache::take(void** block, size_t alignment, size_t bytes) noexcept {
  const int size = alignment >= kAlignment && bytes > 0 ? size_to_hold(bytes) : kSizes;
  if (keepers_.load(std::memory_order_relaxed) == 0 || size >= kSizes) {
    return ::posix_memalign(block, alignment, bytes);
  }
  const auto whole = static_cast<int64_t>(bytes_of(size));
  Free* unused = nullptr;
  {
    const Lock lock(mutex_);
    count_take(size);
    Free* found = pop(size, alignment);
    taken_ += whole;
    if (found != nullptr) {
      most_now_ = std::max(most_now_, taken_);
      *block = found;
      return 0;
    }
    unused = excess(allowance(taken_, std::max(most_taken(), taken_)));
  }
  free_all(unused);
  int failure = ::posix_memalign(block, alignment, bytes_of(size));
  if (failure != 0) {
    {
      const Lock lock(mutex_);
      unused = everything();
    }
    free_all(unused);
    failure = ::posix_memalign(block, alignment, bytes);
  }
  const Lock lock(mutex_);
  if (failure != 0) {
    taken_ -= whole;
  } else {
    most_now_ = std::max(most_now_, taken_);
  }
  return failure;
}

void BlockCache::give(void* block) noexcept {
  if (block == nullptr) return;
  if (keepers_.load(std::memory_order_relaxed) == 0) return std::free(block);
  const int size = size_within(::malloc_usable_size(block));
  if (size == 0 || size >= kSizes || reinterpret_cast<uintptr_t>(block) % kAlignment != 0) {
    return std::free(block);
  }
  Free* unused = nullptr;
  {
    const Lock lock(mutex_);
    List& list = lists_[static_cast<size_t>(size)];
    list.first = new (block) Free{list.first};
    kept_ += bytes_of(size);
    taken_ = std::max<int64_t>(taken_ - static_cast<int64_t>(bytes_of(size)), 0);
    // Nobody keeps any more if the last one dropped a moment ago.
    unused = keepers_ == 0 ? everything() : excess(allowance(taken_, most_taken()));
  }
  free_all(unused);
}

void BlockCache::keep() noexcept {
  const Lock lock(mutex_);
  if (keepers_++ == 0) taken_ = most_now_ = most_before_ = 0;
}

size_t BlockCache::drop() noexcept {
  Free* unused = nullptr;
  size_t bytes = 0;
  {
    const Lock lock(mutex_);
    if (keepers_ == 0 || --keepers_ > 0) return 0;
    bytes = kept_;
    unused = everything();
  }
  free_all(unused);
  return bytes;
}

size_t BlockCache::kept_bytes() const noexcept {
  const Lock lock(mutex_);
  return kept_;
}

void BlockCache::begin_fork() noexcept { mutex_.lock(); }

void BlockCache::end_fork() noexcept { mutex_.unlock(); }

void BlockCache::begin_child() noexcept {
  keepers_ = 0;
  kept_ = 0;
  const auto lists = std::exchange(lists_, {});
  mutex_.unlock();
  for (int size = 0; size < kSizes; ++size) {
    if (bytes_of(size) >= kWorthFreeingInChild) free_all(lists[static_cast<size_t>(size)].first);
  }
}

size_t BlockCache::bytes_of(int size) {
  if (size < kSteps) return static_cast<size_t>(size) * kAlignment;
  const size_t begin = size_t{1} << (kFirstPower + size / kSteps - 1);
  return begin + begin / kSteps * static_cast<size_t>(size % kSteps);
}

int BlockCache::size_within(size_t bytes) {
  const int power = power_of(bytes);
  if (power < kFirstPower) return static_cast<int>(bytes / kAlignment);
  if (power >= kLastPower) return kSizes;
  const auto step = static_cast<int>((bytes >> (power - kPowerOfSteps)) % kSteps);
  return (power - kFirstPower + 1) * kSteps + step;
}

int BlockCache::size_to_hold(size_t bytes) {
  const int size = size_within(bytes);
  return size < kSizes && bytes_of(size) < bytes ? size + 1 : size;
}

BlockCache::Free* BlockCache::pop(int size, size_t alignment) {
  List& list = lists_[static_cast<size_t>(size)];
  Free* found = list.first;
  if (found == nullptr || reinterpret_cast<uintptr_t>(found) % alignment != 0) return nullptr;
  list.first = found->next;
  kept_ -= bytes_of(size);
  return found;
}

void BlockCache::count_take(int size) {
  lists_[static_cast<size_t>(size)].last_taken = ++takes_;
  if (takes_ % kPeriod != 0) return;
  most_before_ = std::exchange(most_now_, taken_);
}

int64_t BlockCache::most_taken() const { return std::max(most_now_, most_before_); }

size_t BlockCache::allowance(int64_t taken, int64_t most) {
  return static_cast<size_t>(std::max<int64_t>(most * kMostTimesTwo / 2 - taken, 0));
}

BlockCache::Free* BlockCache::excess(size_t most) {
  Free* unused = nullptr;
  while (kept_ > most) {
    int oldest = -1;
    for (int size = 0; size < kSizes; ++size) {
      const List& list = lists_[static_cast<size_t>(size)];
      if (list.first != nullptr &&
          (oldest < 0 || list.last_taken < lists_[static_cast<size_t>(oldest)].last_taken)) {
        oldest = size;
      }
    }
    List& list = lists_[static_cast<size_t>(oldest)];
    while (list.first != nullptr && kept_ > most) {
      Free* block = list.first;
      list.first = block->next;
      kept_ -= bytes_of(oldest);
      block->next = unused;
      unused = block;
    }
  }
  return unused;
}

void BlockCache::free_all(Free* blocks) noexcept {
  while (blocks != nullptr) {
    Free* next = blocks->next;
    std::free(blocks);
    blocks = next;
  }
}

}  // namespace fdg::cpu
