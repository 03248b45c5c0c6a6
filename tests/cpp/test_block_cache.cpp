// Blocks are kept between keep() and drop(), nobody's twice, and not more of them than steps need.
#include <malloc.h>

#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/block_cache.h"

namespace fdg::testing {
namespace {

using cpu::BlockCache;

void* taken(BlockCache& cache, size_t bytes) {
  void* block = nullptr;
  CHECK(cache.take(&block, BlockCache::kAlignment, bytes) == 0);
  return block;
}

std::array<unsigned char, 5000> bytes_of(const void* block) {
  std::array<unsigned char, 5000> bytes;
  std::memcpy(bytes.data(), block, bytes.size());
  return bytes;
}

struct Keeping {
  explicit Keeping(BlockCache& cache) : cache(cache) { cache.keep(); }
  ~Keeping() { cache.drop(); }
  BlockCache& cache;
};

TEST("block cache: whoever asks for the size of a block that was given gets that block") {
  BlockCache cache;
  const Keeping keeping(cache);
  for (size_t bytes = 1; bytes < size_t{3} << 20; bytes += 1 + bytes / 7) {
    const check::Note note(std::to_string(bytes) + " bytes");
    void* first = taken(cache, bytes);
    CHECK(reinterpret_cast<uintptr_t>(first) % BlockCache::kAlignment == 0u);
    CHECK(malloc_usable_size(first) >= bytes);
    CHECK(malloc_usable_size(first) <= bytes + bytes / 16 + BlockCache::kAlignment + 4096);
    std::memset(first, 1, bytes);
    void* second = taken(cache, bytes);
    CHECK((first != second));
    const size_t before = cache.kept_bytes();
    cache.give(first);
    CHECK(cache.kept_bytes() >= before + bytes);
    CHECK((taken(cache, bytes) == first));
    CHECK(cache.kept_bytes() == before);
    cache.give(second);
    cache.give(first);
    CHECK((taken(cache, bytes) == first));  // the latest, which is warm
    cache.give(first);
  }
}

TEST("block cache: nothing is kept but between keep and the drop that belongs to the first keep") {
  BlockCache cache;
  cache.give(taken(cache, 5000));
  CHECK(cache.kept_bytes() == 0u);
  void* before = taken(cache, 8192);
  cache.keep();
  cache.give(taken(cache, 8192));
  CHECK(cache.kept_bytes() == 8192u);
  cache.give(before);
  CHECK(cache.kept_bytes() == 8192u);  // no more than one and a half times what was in use
  cache.keep();
  cache.drop();
  CHECK(cache.kept_bytes() > 0u);
  void* behind = taken(cache, 8192);
  CHECK(cache.kept_bytes() == 0u);
  void* other = taken(cache, 70000);
  cache.give(other);
  CHECK(cache.drop() >= 70000u);
  CHECK(cache.kept_bytes() == 0u);
  cache.give(behind);
  CHECK(cache.kept_bytes() == 0u);
  cache.drop();  // once too often
  cache.keep();
  cache.give(taken(cache, 100));
  CHECK(cache.kept_bytes() > 0u);
  cache.drop();
}

TEST("block cache: blocks are the C library's, from elsewhere or freed elsewhere") {
  BlockCache cache;
  const Keeping keeping(cache);
  cache.give(nullptr);
  std::free(taken(cache, 3000));
  for (size_t bytes : {1, 8, 40, 100, 1000, 5000, 100000}) {
    cache.give(std::malloc(bytes));
    void* block = taken(cache, bytes);
    CHECK(reinterpret_cast<uintptr_t>(block) % BlockCache::kAlignment == 0u);
    std::memset(block, 1, bytes);
    cache.give(block);
  }
  void* aligned = nullptr;
  CHECK(cache.take(&aligned, 4096, 10000) == 0);
  CHECK(reinterpret_cast<uintptr_t>(aligned) % 4096 == 0u);
  std::memset(aligned, 1, 10000);
  cache.give(aligned);
}

TEST("block cache: blocks aligned to more") {
  BlockCache cache;
  const Keeping keeping(cache);
  for (int step = 0; step < 100; ++step) {
    void* page = nullptr;
    CHECK(cache.take(&page, 4096, 30000) == 0);
    CHECK(reinterpret_cast<uintptr_t>(page) % 4096 == 0u);
    void* usual = taken(cache, 30000);
    std::memset(page, 1, 30000);
    std::memset(usual, 1, 30000);
    cache.give(step % 2 == 0 ? page : usual);
    cache.give(step % 2 == 0 ? usual : page);
    CHECK(cache.kept_bytes() < 100000u);
  }
}

TEST("block cache: a child of a fork keeps nothing") {
  BlockCache cache;
  const Keeping keeping(cache);
  cache.give(taken(cache, 5000));
  cache.begin_fork();
  cache.end_fork();
  CHECK(cache.kept_bytes() > 0u);
  // Left as it is, shared with the parent: freeing it would write to it.
  void* small = taken(cache, 5000);
  std::memset(small, 1, 5000);
  void* large = taken(cache, 1 << 20);
  cache.give(small);
  cache.give(large);
  const std::array<unsigned char, 5000> before = bytes_of(small);
  cache.begin_fork();
  cache.begin_child();
  CHECK(cache.kept_bytes() == 0u);
  CHECK((bytes_of(small) == before));
  cache.give(taken(cache, 5000));
  CHECK(cache.kept_bytes() == 0u);
  std::free(small);  // nobody else has: of the large one the address sanitizer would say so
}

TEST("block cache: what was needed once is not kept for good") {
  BlockCache cache;
  const Keeping keeping(cache);
  std::vector<void*> many;
  for (int i = 0; i < 100; ++i) many.push_back(taken(cache, 1 << 20));
  for (void* block : many) cache.give(block);
  CHECK(cache.kept_bytes() == size_t{100} << 20);
  for (int step = 0; step < 1000; ++step) cache.give(taken(cache, 5000));
  CHECK(cache.kept_bytes() >= size_t{100} << 20);
  for (int step = 0; step < 300'000; ++step) cache.give(taken(cache, 5000));
  CHECK(cache.kept_bytes() < 20000u);
  CHECK(cache.kept_bytes() > 0u);
}

TEST(
    "block cache: where every batch has another size no more is kept than half of the most in "
    "use") {
  BlockCache cache;
  const Keeping keeping(cache);
  constexpr size_t kBlocks = 10;
  size_t most = 0, found = 0;
  std::mt19937 random(3);
  for (int batch = 0; batch < 300; ++batch) {
    const size_t bytes = 1000 + random() % 200000;
    most = std::max(most, (bytes + bytes / 16 + BlockCache::kAlignment) * kBlocks);
    std::array<void*, kBlocks> blocks;
    for (void*& block : blocks) block = taken(cache, bytes);
    found = std::max(found, cache.kept_bytes() + bytes * kBlocks);
    for (void* block : blocks) cache.give(block);
    found = std::max(found, cache.kept_bytes());
  }
  CHECK(found <= most * 3 / 2);
  CHECK(found > most / 2);
}

TEST("block cache: what was not asked for the longest goes first") {
  BlockCache cache;
  const Keeping keeping(cache);
  void* old = taken(cache, 40000);
  void* recent = taken(cache, 50000);
  cache.give(recent);
  cache.give(old);
  CHECK((taken(cache, 50000) == recent));
  cache.give(recent);
  void* other = taken(cache, 45500);  // 135,500 in all would be more than 1.5 times 90,000
  const size_t kept = cache.kept_bytes();
  CHECK(kept >= 50000u);
  CHECK(kept < 54000u);
  CHECK((taken(cache, 50000) == recent));
  cache.give(recent);
  cache.give(other);
}

TEST("block cache: threads that give each other blocks never have the same one at once") {
  BlockCache cache;
  const Keeping keeping(cache);
  constexpr int kThreads = 4, kTurns = 4000;
  constexpr std::array<size_t, 5> kSizes = {96, 4096, 4500, 9000, 100000};
  struct Parcel {
    unsigned char* block;
    size_t bytes;
    unsigned char mark;
  };
  std::mutex mutex;
  std::vector<Parcel> parcels;
  std::vector<std::thread> threads;
  for (int id = 0; id < kThreads; ++id) {
    threads.emplace_back([&, id] {
      std::mt19937 random(static_cast<unsigned>(id));
      for (int turn = 0; turn < kTurns; ++turn) {
        const size_t bytes = kSizes[random() % kSizes.size()];
        const auto mark = static_cast<unsigned char>(random());
        auto* block = static_cast<unsigned char*>(taken(cache, bytes));
        std::memset(block, mark, 32);
        block[bytes - 1] = mark;
        Parcel parcel{};
        {
          const std::lock_guard<std::mutex> lock(mutex);
          parcels.push_back({block, bytes, mark});
          const size_t any = random() % parcels.size();
          std::swap(parcels[any], parcels.back());
          if (parcels.size() < 2 * kThreads) continue;
          parcel = parcels.back();
          parcels.pop_back();
        }
        CHECK(parcel.block[0] == parcel.mark);
        CHECK(parcel.block[31] == parcel.mark);
        CHECK(parcel.block[parcel.bytes - 1] == parcel.mark);
        cache.give(parcel.block);
        if (turn % 1000 == 0) {  // another runner begins and ends
          cache.keep();
          cache.drop();
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const Parcel& parcel : parcels) cache.give(parcel.block);
}

}  // namespace
}  // namespace fdg::testing
