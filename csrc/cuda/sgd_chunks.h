// How a stage's parameters are cut into the pieces that the blocks of the fused update work on.
#pragma once

#include <cstdint>
#include <vector>

#include "../flat_parameters.h"

namespace fdg::cuda {

// Elements. Small enough that a small net occupies many multiprocessors, large enough that reading
// the table costs next to nothing. A multiple of 16 bytes in every dtype: of a parameter whose
// gradient is aligned, every chunk's gradient is.
constexpr int32_t kChunkSize = 4096;

// A piece of one parameter that one block works on.
struct Chunk {
  int64_t place;  // element in every flat array
  int64_t begin;  // element within the parameter
  int32_t segment;
  int32_t size;
  int32_t group;
};

// In order of segment and place, each element in one chunk. Only a segment's last chunk is smaller
// than kChunkSize.
std::vector<Chunk> cut_into_chunks(const std::vector<Segment>& segments);

}  // namespace fdg::cuda
