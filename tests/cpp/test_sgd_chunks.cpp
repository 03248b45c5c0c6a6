// The pieces that the blocks of the CUDA update work on. Plain C++: needs neither toolkit nor GPU.
#include <algorithm>
#include <string>

#include "check.h"
#include "cuda/sgd_chunks.h"

namespace fdg::testing {
namespace {

using cuda::Chunk;
using cuda::cut_into_chunks;
using cuda::kChunkSize;

// How often each element of the flat arrays is in a chunk.
std::vector<int> coverage(const std::vector<Chunk>& chunks, int64_t end) {
  std::vector<int> times(static_cast<size_t>(end));
  for (const Chunk& chunk : chunks)
    for (int64_t i = chunk.place; i < chunk.place + chunk.size; ++i)
      ++times.at(static_cast<size_t>(i));
  return times;
}

void check_chunks(const std::vector<Segment>& segments) {
  const std::vector<Chunk> chunks = cut_into_chunks(segments);
  int64_t end = 0;
  for (const Segment& segment : segments) end = std::max(end, segment.offset + segment.size);
  std::vector<int> wanted(static_cast<size_t>(end));
  for (const Segment& segment : segments)
    for (int64_t i = 0; i < segment.size; ++i) wanted[static_cast<size_t>(segment.offset + i)] = 1;
  CHECK((coverage(chunks, end) == wanted));

  for (size_t i = 0; i < chunks.size(); ++i) {
    const Chunk& chunk = chunks[i];
    const Segment& segment = segments.at(static_cast<size_t>(chunk.segment));
    CHECK(chunk.place == segment.offset + chunk.begin);
    CHECK(chunk.begin % kChunkSize == 0);
    CHECK(chunk.size > 0);
    CHECK(chunk.group == segment.group);
    const bool last = chunk.begin + chunk.size == segment.size;
    CHECK((last ? chunk.size <= kChunkSize : chunk.size == kChunkSize));
    if (i > 0) CHECK(chunks[i - 1].place + chunks[i - 1].size <= chunk.place);
  }
}

TEST("chunks cover every element of every segment once") {
  for (const int64_t size : {1, 15, 16, 17, kChunkSize - 1, kChunkSize, kChunkSize + 1,
                             2 * kChunkSize - 1, 2 * kChunkSize, 3 * kChunkSize + 5}) {
    const check::Note note("size " + std::to_string(size));
    check_chunks({{0, size}});
    const int64_t second = (size + 15) / 16 * 16;
    check_chunks({{0, size, 1}, {second, size, 0}, {second + 4 * kChunkSize, 7, 2}});
  }
}

TEST("an empty segment has no chunk and leaves its number to no other") {
  CHECK(cut_into_chunks({}).empty());
  CHECK(cut_into_chunks({{0, 0}}).empty());
  const std::vector<Segment> segments{{0, 0}, {0, 3}, {16, 0}, {16, kChunkSize}, {5000, 0}};
  check_chunks(segments);
  const std::vector<Chunk> chunks = cut_into_chunks(segments);
  CHECK(chunks.size() == 2u);
  CHECK(chunks.front().segment == 1);
  CHECK(chunks.back().segment == 3);
}

TEST("a chunk begins at 16 bytes of every dtype where its parameter does") {
  for (const int bytes : {2, 4, 8}) CHECK(kChunkSize * bytes % 16 == 0);
  // Beyond 2^31 elements, where an int would not do.
  const int64_t large = (int64_t{1} << 31) + 1;
  const std::vector<Chunk> chunks = cut_into_chunks({{0, 16}, {16, large}});
  CHECK(chunks.back().begin == int64_t{1} << 31);
  CHECK(chunks.back().place == (int64_t{1} << 31) + 16);
  CHECK(chunks.back().size == 1);
}

}  // namespace
}  // namespace fdg::testing
