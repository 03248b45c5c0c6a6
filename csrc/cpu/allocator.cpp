#include "allocator.h"

#include <cstdlib>  // defines __GLIBC__ where there is one

#if defined(__GLIBC__)
#include <dlfcn.h>
#include <malloc.h>
#include <pthread.h>

#include <climits>
#include <cstring>
#include <mutex>
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

// Less is not worth looking for what can go back to the system.
constexpr size_t kWorthTrimming = 16 << 20;

// The C library's function of this name, if that is what everyone calls who names it: not if
// somebody preloaded an allocator of his own choice.
void* of_glibc(const char* name) {
  Dl_info library, called;
  void* version = dlsym(RTLD_DEFAULT, "gnu_get_libc_version");
  void* function = dlsym(RTLD_DEFAULT, name);
  const bool found = version != nullptr && function != nullptr && dladdr(version, &library) != 0 &&
                     dladdr(function, &called) != 0 &&
                     std::strcmp(library.dli_fname, called.dli_fname) == 0;
  return found ? function : nullptr;
}

bool allocator_is_glibcs() {
  return of_glibc("posix_memalign") != nullptr && of_glibc("free") != nullptr &&
         of_glibc("malloc_usable_size") != nullptr;
}

bool lead_through_cache() {
  if (!allocator_is_glibcs()) return false;
  cache();
  // A child of a fork has none of the threads that may hold the lock, and what this process keeps
  // for its next batch is nothing to it.
  pthread_atfork([] { cache().begin_fork(); }, [] { cache().end_fork(); },
                 [] { cache().begin_child(); });
  // A block that one of the two never saw is nothing special to the other.
  return redirect_imports(
      kLibrary, {{"free", of_glibc("free"), reinterpret_cast<void*>(&give)},
                 {"posix_memalign", of_glibc("posix_memalign"), reinterpret_cast<void*>(&take)}});
}

// Where blocks cannot be kept: the C library's own means.
std::mutex settings_mutex;
int settings_keepers = 0;

void make_settings() {
  const std::lock_guard<std::mutex> lock(settings_mutex);
  if (settings_keepers++ > 0) return;
  mallopt(M_ARENA_MAX, 1);
  mallopt(M_MMAP_THRESHOLD, INT_MAX);
  mallopt(M_TRIM_THRESHOLD, INT_MAX);
}

void unmake_settings() {
  const std::lock_guard<std::mutex> lock(settings_mutex);
  if (settings_keepers == 0 || --settings_keepers > 0) return;
  // What glibc itself arrives at in a process that frees large blocks.
  mallopt(M_ARENA_MAX, 8 * static_cast<int>(std::thread::hardware_concurrency()));
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TRIM_THRESHOLD, 64 << 20);
  malloc_trim(0);
}

}  // namespace

bool keeps_blocks() {
  static const bool led = lead_through_cache();
  return led;
}

void keep_freed_memory() {
  if (keeps_blocks()) return cache().keep();
  if (allocator_is_glibcs()) make_settings();
}

void return_freed_memory() {
  if (!keeps_blocks()) {
    if (allocator_is_glibcs()) unmake_settings();
  } else if (cache().drop() >= kWorthTrimming) {
    malloc_trim(0);
  }
}

size_t kept_bytes() { return cache().kept_bytes(); }
#else
bool keeps_blocks() { return false; }
void keep_freed_memory() {}
void return_freed_memory() {}
size_t kept_bytes() { return 0; }
#endif

}  // namespace fdg::cpu
