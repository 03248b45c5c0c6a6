#include "sgd_chunks.h"

#include <algorithm>

namespace fdg::cuda {

std::vector<Chunk> cut_into_chunks(const std::vector<Segment>& segments) {
  std::vector<Chunk> chunks;
  for (size_t segment = 0; segment < segments.size(); ++segment)
    for (int64_t begin = 0; begin < segments[segment].size; begin += kChunkSize) {
      const int64_t size = std::min<int64_t>(kChunkSize, segments[segment].size - begin);
      chunks.push_back({segments[segment].offset + begin, begin, static_cast<int32_t>(segment),
                        static_cast<int32_t>(size), segments[segment].group});
    }
  return chunks;
}

}  // namespace fdg::cuda
