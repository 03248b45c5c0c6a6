#include "block_cache.h"

#include <malloc.h>  // malloc_usable_size

#include <algorithm>
#include <cstdlib>
#include <new>

namespace fdg::cpu {

namespace {

// What is kept and what is in use together, in times the most that was ever in use: enough for
// steps that are alike, and a bound where every batch has another size.
constexpr int64_t kMostTimesTwo = 3;
constexpr int kPowerOfSteps = 4;

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

BlockCache::~BlockCache() { free_all(excess(0)); }

int BlockCache::take(void** block, size_t alignment, size_t bytes) noexcept {
  const int size = alignment == kAlignment && bytes > 0 ? size_to_hold(bytes) : kSizes;
  if (size >= kSizes) return ::posix_memalign(block, alignment, bytes);
  Free* unused = nullptr;
  {
    const Lock lock(mutex_);
    if (keepers_ == 0) return ::posix_memalign(block, alignment, bytes);
    lists_[static_cast<size_t>(size)].last_taken = ++takes_;
    if (Free* found = pop(size)) {
      *block = found;
      return 0;
    }
    count_as_taken(bytes_of(size));
    const int64_t most = most_taken_ * kMostTimesTwo / 2 - taken_;
    unused = excess(static_cast<size_t>(std::max<int64_t>(most, 0)));
  }
  free_all(unused);
  int failure = ::posix_memalign(block, alignment, bytes_of(size));
  if (failure != 0) {
    {
      const Lock lock(mutex_);
      unused = excess(0);
    }
    free_all(unused);
    failure = ::posix_memalign(block, alignment, bytes);
  }
  if (failure != 0) {
    const Lock lock(mutex_);
    taken_ -= static_cast<int64_t>(bytes_of(size));
  }
  return failure;
}

void BlockCache::give(void* block) noexcept {
  if (block == nullptr) return;
  const size_t bytes = ::malloc_usable_size(block);
  const int size = size_within(bytes);
  if (size > 0 && size < kSizes && reinterpret_cast<uintptr_t>(block) % kAlignment == 0) {
    const Lock lock(mutex_);
    if (keepers_ > 0) {
      List& list = lists_[static_cast<size_t>(size)];
      list.first = new (block) Free{list.first};
      kept_ += bytes_of(size);
      taken_ = std::max<int64_t>(taken_ - static_cast<int64_t>(bytes_of(size)), 0);
      return;
    }
  }
  std::free(block);
}

void BlockCache::keep() noexcept {
  const Lock lock(mutex_);
  if (keepers_++ == 0) taken_ = most_taken_ = 0;
}

void BlockCache::drop() noexcept {
  Free* unused = nullptr;
  {
    const Lock lock(mutex_);
    if (keepers_ > 0 && --keepers_ == 0) unused = excess(0);
  }
  free_all(unused);
}

size_t BlockCache::kept_bytes() const noexcept {
  const Lock lock(mutex_);
  return kept_;
}

void BlockCache::lock() noexcept { mutex_.lock(); }

void BlockCache::unlock() noexcept { mutex_.unlock(); }

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

BlockCache::Free* BlockCache::pop(int size) {
  List& list = lists_[static_cast<size_t>(size)];
  Free* found = list.first;
  if (found != nullptr) {
    list.first = found->next;
    kept_ -= bytes_of(size);
    count_as_taken(bytes_of(size));
  }
  return found;
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

void BlockCache::count_as_taken(size_t bytes) {
  taken_ += static_cast<int64_t>(bytes);
  most_taken_ = std::max(most_taken_, taken_);
}

}  // namespace fdg::cpu
