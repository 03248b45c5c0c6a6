// Proves a recorded program free of races and deadlocks, or says where it is not.
//
// Independent of how the waits were derived: it replays the streams as FIFOs that know nothing of
// one another but events, and compares every access to a buffer with the earlier accesses (in the
// order of enqueuing, which is the meaning of the program) it conflicts with.
#pragma once

#include <string>
#include <vector>

#include "trace_stream.h"

namespace fdg::trace {

struct Report {
  std::vector<std::string> races;      // conflicting pairs no event orders
  std::vector<std::string> deadlocks;  // operations that would wait for ever
  // For every run, in the order of enqueuing: for each buffer it reads, the index (among the
  // program's operations) of the run that last wrote it, or -1.
  std::vector<std::vector<int>> reads_from;
  bool clean() const { return races.empty() && deadlocks.empty(); }
};

Report check_happens_before(const std::vector<Operation>& operations);

}  // namespace fdg::trace
