// Copies between devices, and between a device and pinned host memory, as works of a program.
//
// What is copied is looked up when the copy is enqueued: the caller keeps words (uint64) in host
// memory that say where a stage's output lies and how many bytes it has, and changes them before
// the work is enqueued. Between enqueuing and running nothing is looked up any more.
#pragma once

#include <cstdint>

#include "../action.h"
#include "cuda_stream.h"

namespace fdg::cuda {

// A word, or one of `rows` of them that take turns with the batches.
struct Word {
  const uint64_t* words = nullptr;
  int64_t rows = 1;
  uint64_t at(int64_t batch) const { return words[batch % rows]; }
};

constexpr int kHost = -1;

class CopyWork final : public Work {
 public:
  // Devices are ordinals, or kHost. Throws std::invalid_argument for a word that is nowhere.
  CopyWork(Word source, int source_device, Word target, int target_device, Word bytes);
  // Nothing happens where there are no bytes to copy.
  void run(Stream& stream, const Invocation& at) override;

 private:
  const Word source_;
  const Word target_;
  const Word bytes_;
  const int source_device_;
  const int target_device_;
};

// Enqueues one copy; the current device is the stream's.
void copy_async(uint64_t target, int target_device, uint64_t source, int source_device,
                uint64_t bytes, cudaStream_t stream);

}  // namespace fdg::cuda
