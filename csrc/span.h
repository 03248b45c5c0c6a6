// When an action was at work: what a backend that was asked to record gives back.
#pragma once

#include <cstdint>
#include <string>

namespace fdg {

struct Span {
  std::string code;  // of the action, as its stage, slot and stream
  int stage = 0;
  int slot = 0;
  int stream = 0;
  int64_t tick = 0;
  int64_t batch = 0;
  // Seconds, on one clock that all streams of the backend share.
  double begin_s = 0;
  double end_s = 0;
};

}  // namespace fdg
