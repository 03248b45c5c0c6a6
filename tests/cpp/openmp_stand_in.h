// What the runtime of openmp_stand_in.cpp gives and was asked for.
#pragma once

#include <atomic>

namespace fdg::testing {

extern std::atomic<int> thread_limit;  // of a team
extern std::atomic<int> pauses;        // calls of omp_pause_resource_all
extern std::atomic<int> teams;         // that were asked for

}  // namespace fdg::testing
