#include "openmp.h"

#include <dlfcn.h>

#include "../forks.h"

namespace fdg::cpu {
namespace {

// torch brings the runtime; one linked here might be another, with threads of its own.
template <class Function>
Function find(const char* name) {
  return reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
}

constexpr int kSoft = 1;  // omp_pause_soft: what threads have of their own stays

// What a compiler makes of a parallel region: in GNU's runtime, and in LLVM's and Intel's on Linux.
struct Region {
  void (*run)(void (*)(void*), void*, unsigned threads, unsigned flags);
  int (*threads)();
  int (*number)();
};

const Region* region() {
  static const Region found{
      find<void (*)(void (*)(void*), void*, unsigned, unsigned)>("GOMP_parallel"),
      find<int (*)()>("omp_get_num_threads"),
      find<int (*)()>("omp_get_thread_num"),
  };
  return found.run && found.threads && found.number ? &found : nullptr;
}

struct Parts {
  int count;
  const std::function<void(int)>& part;
};

// On every thread of a team, which may be smaller than was asked for.
void share(void* data) {
  const auto& parts = *static_cast<const Parts*>(data);
  const int threads = region()->threads();
  for (int i = region()->number(); i < parts.count; i += threads) parts.part(i);
}

}  // namespace

int openmp_threads() {
  static const auto get = find<int (*)()>("omp_get_max_threads");
  return get ? get() : 0;
}

void set_openmp_threads(int threads) {
  static const auto set = find<void (*)(int)>("omp_set_num_threads");
  if (set && threads > 0) set(threads);
}

void end_idle_openmp_threads() {
  static const auto pause = find<int (*)(int)>("omp_pause_resource_all");
  static const bool gnu = !find<void (*)()>("__kmpc_fork_call");
  // In a child of a fork it would wait for threads of the parent.
  if (pause && gnu && !went_through_fork()) pause(kSoft);
}

void run_on_team(int parts, const std::function<void(int)>& part) {
  if (parts > 1 && region()) {
    Parts all{parts, part};
    region()->run(share, &all, static_cast<unsigned>(parts), 0);
    return;
  }
  for (int i = 0; i < parts; ++i) part(i);
}

}  // namespace fdg::cpu
