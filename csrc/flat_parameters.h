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
};

// The hyper-parameters of the batches in flight: row `batch % rows` is
// [lr, momentum, weight_decay, nesterov (0 or 1), shrink of stage 0, shrink of stage 1, ...].
// The host writes a batch's row when it enters and leaves it alone until its last update.
struct HyperTable {
  const double* data = nullptr;
  int64_t rows = 0;
  int64_t columns = 0;

  enum Column { lr = 0, momentum = 1, weight_decay = 2, nesterov = 3, first_shrink = 4 };
  const double* row(int64_t batch) const { return data + (batch % rows) * columns; }
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
