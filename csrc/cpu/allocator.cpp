#include "allocator.h"

#include <cstdlib>  // defines __GLIBC__ where there is one

#if defined(__GLIBC__)
#include <malloc.h>

#include <climits>
#include <thread>
#endif

namespace fdg::cpu {

#if defined(__GLIBC__)
void keep_freed_memory() {
  mallopt(M_ARENA_MAX, 1);
  mallopt(M_MMAP_THRESHOLD, INT_MAX);
  mallopt(M_TRIM_THRESHOLD, INT_MAX);
}
void return_freed_memory() {
  // What glibc itself arrives at in a process that frees large blocks.
  mallopt(M_ARENA_MAX, 8 * static_cast<int>(std::thread::hardware_concurrency()));
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TRIM_THRESHOLD, 64 << 20);
  malloc_trim(0);
}
#else
void keep_freed_memory() {}
void return_freed_memory() {}
#endif

}  // namespace fdg::cpu
