// Stands in for torch's OpenMP runtime, in threads that the sanitizers understand.
#include "openmp_stand_in.h"

#include <algorithm>
#include <thread>
#include <vector>

namespace fdg::testing {
std::atomic<int> thread_limit{1 << 20};
std::atomic<int> pauses{0};
std::atomic<int> teams{0};
}  // namespace fdg::testing

namespace {
thread_local int own_threads = 1;
thread_local int team_size = 1;
thread_local int number = 0;
}  // namespace

extern "C" {

int omp_get_max_threads() { return own_threads; }
void omp_set_num_threads(int threads) { own_threads = threads; }
int omp_get_num_threads() { return team_size; }
int omp_get_thread_num() { return number; }
int omp_pause_resource_all(int) {
  ++fdg::testing::pauses;
  return 0;
}

void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned) {
  ++fdg::testing::teams;
  const int size = std::min(static_cast<int>(threads), fdg::testing::thread_limit.load());
  const auto run = [=](int i) {
    team_size = size;
    number = i;
    function(data);
    team_size = 1;
    number = 0;
  };
  std::vector<std::thread> team;
  for (int i = 1; i < size; ++i) team.emplace_back(run, i);
  run(0);
  for (auto& thread : team) thread.join();
}

}  // extern "C"
