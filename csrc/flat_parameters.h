// One stage's trainable parameters as flat memory: where they lie, not who owns them.
#pragma once

#include <cstdint>
#include <vector>

namespace fdg {

enum class Dtype { float32, float64 };

inline int64_t item_size(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 8; }

// A parameter inside every flat array of the stage. Counts are elements, not bytes.
struct Segment {
  int64_t offset = 0;
  int64_t size = 0;
  int32_t group = 0;  // whose hyper-parameters are its own
};

// The hyper-parameters of the batches in flight: row `batch % rows` is one block per parameter
// group, one behind the other, each
// [lr, momentum, weight_decay, nesterov (0 or 1), shrink of stage 0, shrink of stage 1, ...].
// The host writes a batch's row when it enters and leaves it alone until its last update.
struct HyperTable {
  const double* data = nullptr;
  int64_t rows = 0;
  int64_t columns = 0;  // of a block
  int64_t groups = 1;

  enum Column { lr = 0, momentum = 1, weight_decay = 2, nesterov = 3, first_shrink = 4 };
  const double* block(int64_t batch, int64_t group) const {
    return data + ((batch % rows) * groups + group) * columns;
  }
};

// All pointers are the caller's, who keeps them valid and aligned to 64 bytes at offset 0.
struct FlatParameters {
  Dtype dtype = Dtype::float32;
  int stage = 0;
  std::vector<Segment> segments;
  std::vector<uintptr_t> weights;       // [weight copy] flat weights
  uintptr_t momentum = 0;               // flat
  const uint64_t* gradients = nullptr;  // [segment] address of a dense gradient; 0: none
  HyperTable hyper;
  // One number where the update runs (host or device), read when it runs: gradients are multiplied
  // by it. If it is not finite the update is skipped: weights are copied, momentum stays. 0: none.
  uintptr_t gain = 0;
  int64_t* progress = nullptr;  // [0] the newest weight copy, [1] updates made

  // Throws std::invalid_argument when a segment or pointer cannot be right.
  void check() const;
  // Throws std::invalid_argument when there is no such weight copy.
  void check_copy(int index) const;
  // Elements of a flat array, gaps between segments included.
  int64_t size() const {
    return segments.empty() ? 0 : segments.back().offset + segments.back().size;
  }
};

}  // namespace fdg
