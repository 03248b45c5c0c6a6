#include "flat_parameters.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace fdg {

void FlatParameters::check() const {
  int64_t total = 0;
  int64_t end = 0;
  for (const Segment& segment : segments) {
    if (segment.offset < end || segment.size < 0)
      throw std::invalid_argument("segments must be in order and must not overlap; one begins at " +
                                  std::to_string(segment.offset) + ", before " +
                                  std::to_string(end));
    if (segment.group < 0 || segment.group >= hyper.groups)
      throw std::invalid_argument("a segment is in parameter group " +
                                  std::to_string(segment.group) + "; there are " +
                                  std::to_string(hyper.groups));
    end = segment.offset + segment.size;
    total += segment.size;
  }
  if (total > 0) {
    const bool missing = std::find(weights.begin(), weights.end(), 0) != weights.end();
    if (weights.empty() || missing || !momentum || !gradients || !hyper.data || !progress)
      throw std::invalid_argument("a pointer of the stage's flat memory is null");
  }
  if (stage < 0)
    throw std::invalid_argument("there is no stage " + std::to_string(stage) +
                                "; stages are numbered from 0");
  if (hyper.rows < 1 || hyper.columns <= HyperTable::first_shrink + stage)
    throw std::invalid_argument("the hyper-parameter table has no column for stage " +
                                std::to_string(stage));
}

void FlatParameters::check_copy(int index) const {
  if (index < 0 || index >= static_cast<int>(weights.size()))
    throw std::invalid_argument("weight copy " + std::to_string(index) +
                                " does not exist; there are " + std::to_string(weights.size()));
}

}  // namespace fdg
