// Which waits an action needs: derived from what it and earlier actions read and write.
//
// Vector clocks say what every stream is already known to come after, so a wait is asked for only
// when nothing enqueued so far implies it. Hence every wait is necessary: without it some pair of
// conflicting accesses would be unordered.
#pragma once

#include <cstdint>
#include <vector>

#include "action.h"

namespace fdg {

class Hazards {
 public:
  explicit Hazards(int streams);

  void add_buffer();
  void add_action();

  // Registers one run of action `id` and returns the actions whose latest run its stream has to
  // wait for first, none of them implied by another. Only buffers several streams touch need be in
  // `reads` and `writes`: a stream is ordered with itself.
  const std::vector<int>& enqueue(int id, int stream, const std::vector<BufferId>& reads,
                                  const std::vector<BufferId>& writes);

 private:
  using Clock = std::vector<uint64_t>;

  // The latest run of an action: where it stands on its stream, and what that stream was known to
  // come after. One per action is enough: a later run of the same action touches the same buffers
  // on the same stream, so it supersedes the earlier one wherever that one is still listed.
  struct Run {
    int stream = -1;
    uint64_t position = 0;
    Clock clock;
  };
  struct Buffer {
    int writer = -1;
    std::vector<int> readers;  // since the last write
  };

  void consider(int id, int stream);
  void drop_implied();

  std::vector<Clock> clocks_;  // [stream][other stream]: last position known to come before
  std::vector<Run> runs_;      // [action]
  std::vector<Buffer> buffers_;
  std::vector<int> needed_;
};

}  // namespace fdg
