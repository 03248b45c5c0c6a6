#include "forks.h"

#include <pthread.h>

namespace fdg {
namespace {

int count = 0;  // changes where there is one thread only
thread_local bool went_through = false;

[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] {
  ++count;
  went_through = true;
});

}  // namespace

int forks() { return count; }

bool went_through_fork() { return went_through; }

}  // namespace fdg
