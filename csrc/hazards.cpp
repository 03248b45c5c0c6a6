#include "hazards.h"

#include <algorithm>

namespace fdg {

Hazards::Hazards(int streams)
    : clocks_(static_cast<size_t>(streams), Clock(static_cast<size_t>(streams), 0)) {}

void Hazards::add_buffer() { buffers_.emplace_back(); }

void Hazards::add_action() { runs_.emplace_back(); }

void Hazards::consider(int id, int stream) {
  if (id < 0) return;
  const Run& run = runs_[id];
  if (run.stream == stream || clocks_[stream][run.stream] >= run.position) return;
  if (std::find(needed_.begin(), needed_.end(), id) == needed_.end()) needed_.push_back(id);
}

void Hazards::drop_implied() {
  const auto implied = [this](int id) {
    const Run& run = runs_[id];
    return std::any_of(needed_.begin(), needed_.end(), [&](int other) {
      return other != id && runs_[other].clock[run.stream] >= run.position;
    });
  };
  // Two runs cannot imply one another, so testing against the whole list removes no cycle.
  std::vector<int> kept;
  for (const int id : needed_)
    if (!implied(id)) kept.push_back(id);
  needed_ = std::move(kept);
}

const std::vector<int>& Hazards::enqueue(int id, int stream, const std::vector<BufferId>& reads,
                                         const std::vector<BufferId>& writes) {
  needed_.clear();
  for (const BufferId buffer : reads) consider(buffers_[buffer].writer, stream);
  for (const BufferId buffer : writes) {
    consider(buffers_[buffer].writer, stream);
    for (const int reader : buffers_[buffer].readers) consider(reader, stream);
  }
  if (needed_.size() > 1) drop_implied();

  Clock& clock = clocks_[stream];
  for (const int waited : needed_) {
    const Clock& other = runs_[waited].clock;
    for (size_t i = 0; i < clock.size(); ++i) clock[i] = std::max(clock[i], other[i]);
  }
  Run& run = runs_[id];
  run.stream = stream;
  run.position = ++clock[stream];
  run.clock = clock;

  for (const BufferId buffer : reads) {
    auto& readers = buffers_[buffer].readers;
    // An earlier reader on the same stream comes before this one: waiting for this one is enough.
    readers.erase(std::remove_if(readers.begin(), readers.end(),
                                 [&](int other) { return runs_[other].stream == stream; }),
                  readers.end());
    readers.push_back(id);
  }
  for (const BufferId buffer : writes) {
    buffers_[buffer].writer = id;
    buffers_[buffer].readers.clear();
  }
  return needed_;
}

}  // namespace fdg
