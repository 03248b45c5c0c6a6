// Blocks of memory that a training loop asks for again and again, kept for the next time.
//
// A step allocates and frees the same sizes as the one before, on several threads. To a C allocator
// each of those is a search under a lock, in memory that is cold by then, or a visit to the kernel;
// here it is the next block of a list. Blocks are the C library's own: they may be freed elsewhere,
// and blocks from elsewhere may be given here.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>

namespace fdg::cpu {

class BlockCache {
 public:
  // Of every block at least; none is smaller.
  static constexpr size_t kAlignment = 64;

  BlockCache() = default;
  // Must not be in use; gives back what is kept.
  ~BlockCache();
  BlockCache(const BlockCache&) = delete;
  BlockCache& operator=(const BlockCache&) = delete;

  // posix_memalign and free, from any thread.
  int take(void** block, size_t alignment, size_t bytes) noexcept;
  void give(void* block) noexcept;

  // From now on what is given is kept, until drop() was called as often: then it goes back. How
  // much that was is returned.
  void keep() noexcept;
  size_t drop() noexcept;

  // Kept at the moment, for the next one who asks.
  size_t kept_bytes() const noexcept;

  // Before a fork, and behind it in the parent and in the child, which has one thread only and
  // keeps nothing: what would be written to only to free it is left, shared with the parent.
  void begin_fork() noexcept;
  void end_fork() noexcept;
  void begin_child() noexcept;

 private:
  // Sizes are multiples of the alignment up to the first power of two, and so many per power of two
  // from there on: there a block is at most a sixteenth larger than was asked for. What the C
  // library makes a block larger by is less than a step (unless it is set up for pages or mappings
  // of other sizes than usual), so that it comes back to the list it was taken from.
  static constexpr int kSteps = 16;
  static constexpr int kFirstPower = 10;
  static constexpr int kLastPower = 40;
  static constexpr int kSizes = (kLastPower - kFirstPower + 1) * kSteps;

  // A period, in takes: a hundred steps of ResNet-20.
  static constexpr uint64_t kPeriod = 1 << 17;

  // The beginning of a block that nobody has.
  struct Free {
    Free* next;
  };
  struct List {
    Free* first = nullptr;
    uint64_t last_taken = 0;  // by the count of takes
  };

  static size_t bytes_of(int size);
  // Of the smallest that holds so many bytes; of the largest that so many bytes can be.
  static int size_to_hold(size_t bytes);
  static int size_within(size_t bytes);

  Free* pop(int size, size_t alignment);
  // How much may be kept while so much is taken, where `most` is the most that lately was.
  static size_t allowance(int64_t taken, int64_t most);
  void count_take(int size);
  int64_t most_taken() const;
  // Takes off the lists what is kept beyond `most` bytes, from those first that were not taken from
  // for longest; joined by `next`.
  Free* excess(size_t most);
  Free* everything() { return excess(0); }
  static void free_all(Free* blocks) noexcept;

  mutable std::mutex mutex_;
  std::array<List, kSizes> lists_{};
  std::atomic<int> keepers_{0};  // changes under the lock
  uint64_t takes_ = 0;
  size_t kept_ = 0;
  // Bytes with those who took them, since keeping began; blocks from before are missing, and may be
  // given all the same.
  int64_t taken_ = 0;
  // The most that were, in this period and in the one before: what was needed once, in a validation
  // with large batches, say, is not kept for the rest of the training.
  int64_t most_now_ = 0;
  int64_t most_before_ = 0;
};

}  // namespace fdg::cpu
