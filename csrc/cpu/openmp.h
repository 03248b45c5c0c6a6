// The OpenMP threads that torch's kernels share their work among, as the calling thread sees them.
//
// Each thread that ever computed with several keeps a team of its own, idle or not. GNU's runtime
// counts them all: once there are more than cores, every team sleeps between two kernels instead of
// waiting awake, and an operation of some microseconds takes fifty more (measured: a training step
// of 1.0 ms takes 3.1). And a team of the thread that only feeds the stages takes cores from them.
// So stages have these threads and no others, for native work too.
#pragma once

#include <functional>

namespace fdg::cpu {

// How many the calling thread computes with; 0 if there is no OpenMP in this process.
int openmp_threads();
// From now on; of the calling thread alone. Does nothing without OpenMP.
void set_openmp_threads(int threads);
// Ends the calling thread's own, but itself; the next parallel operation starts them again. Not
// from within one. Only with GNU's runtime: LLVM's and Intel's keep one pool for all teams. Nothing
// is done on the thread that went through a fork, whose own were left behind.
void end_idle_openmp_threads();

// Calls part(0) ... part(parts - 1), spread over a team of that many threads, and returns when all
// are done; on the calling thread alone without OpenMP. `part` must not throw. The runtime ends and
// starts threads where a team has not the size of the one before: `parts` should be 1, or what
// torch's kernels on this thread take. Where the system has no thread left it ends the process, as
// it does in torch's kernels.
void run_on_team(int parts, const std::function<void(int)>& part);

}  // namespace fdg::cpu
