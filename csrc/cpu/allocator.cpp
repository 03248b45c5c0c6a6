#include "allocator.h"

#include <cstdlib>  // defines __GLIBC__ where there is one

#if defined(__GLIBC__)
#include <dlfcn.h>
#include <malloc.h>
#include <pthread.h>

#include <climits>
#include <cstring>
#include <thread>

#include "block_cache.h"
#include "import_slot.h"
#endif

namespace fdg::cpu {

#if defined(__GLIBC__)
namespace {

// torch's, from which all its tensors on the CPU come.
constexpr const char* kLibrary = "libc10.so";

BlockCache& cache() {
  static BlockCache& cache = *new BlockCache;  // for good: tensors outlive whatever ends in an exit
  return cache;
}

int take(void** block, size_t alignment, size_t bytes) {
  return cache().take(block, alignment, bytes);
}

void give(void* block) { cache().give(block); }

// Not if somebody preloaded one of his own choice.
bool allocator_is_glibcs() {
  Dl_info own, called;
  void* version = dlsym(RTLD_DEFAULT, "gnu_get_libc_version");
  void* allocate = dlsym(RTLD_DEFAULT, "posix_memalign");
  return version != nullptr && allocate != nullptr && dladdr(version, &own) != 0 &&
         dladdr(allocate, &called) != 0 && std::strcmp(own.dli_fname, called.dli_fname) == 0;
}

bool lead_through_cache() {
  if (!allocator_is_glibcs()) return false;
  cache();
  // A child of a fork has none of the threads that may hold the lock.
  pthread_atfork([] { cache().lock(); }, [] { cache().unlock(); }, [] { cache().unlock(); });
  // A block that one of the two never saw is nothing special to the other.
  return redirect_import(kLibrary, "free", reinterpret_cast<void*>(&give)) &&
         redirect_import(kLibrary, "posix_memalign", reinterpret_cast<void*>(&take));
}

}  // namespace

bool keeps_blocks() {
  static const bool led = lead_through_cache();
  return led;
}

void keep_freed_memory() {
  if (keeps_blocks()) return cache().keep();
  if (!allocator_is_glibcs()) return;
  mallopt(M_ARENA_MAX, 1);
  mallopt(M_MMAP_THRESHOLD, INT_MAX);
  mallopt(M_TRIM_THRESHOLD, INT_MAX);
}

void return_freed_memory() {
  if (keeps_blocks()) return cache().drop();
  if (!allocator_is_glibcs()) return;
  // What glibc itself arrives at in a process that frees large blocks.
  mallopt(M_ARENA_MAX, 8 * static_cast<int>(std::thread::hardware_concurrency()));
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TRIM_THRESHOLD, 64 << 20);
  malloc_trim(0);
}

size_t kept_bytes() { return keeps_blocks() ? cache().kept_bytes() : 0; }
#else
bool keeps_blocks() { return false; }
void keep_freed_memory() {}
void return_freed_memory() {}
size_t kept_bytes() { return 0; }
#endif

}  // namespace fdg::cpu
