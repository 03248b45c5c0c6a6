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
#include <utility>

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

// The C library's own, even where another one comes before it.
void* of_glibc(const char* name) {
  Dl_info info;
  void* version = dlsym(RTLD_DEFAULT, "gnu_get_libc_version");
  if (version == nullptr || dladdr(version, &info) == 0) return nullptr;
  void* library = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  return library == nullptr ? nullptr : dlsym(library, name);  // open for good, as it is anyway
}

// An allocator that somebody preloaded by his own choice is left alone.
bool allocator_is_glibcs() {
  for (const char* name : {"posix_memalign", "free", "malloc_usable_size"}) {
    void* function = of_glibc(name);
    if (function == nullptr || !calls_lead_to(name, function)) return false;
  }
  return true;
}

bool lead_through_cache() {
  if (!allocator_is_glibcs()) return false;
  cache();
  // A child of a fork has none of the threads that may hold the lock, and what this process keeps
  // for its next batch is nothing to it.
  if (pthread_atfork([] { cache().begin_fork(); }, [] { cache().end_fork(); },
                     [] { cache().begin_child(); }) != 0) {
    return false;
  }
  // A block that one of the two never saw is nothing special to the other.
  return redirect_imports(
      kLibrary, {{"free", of_glibc("free"), reinterpret_cast<void*>(&give)},
                 {"posix_memalign", of_glibc("posix_memalign"), reinterpret_cast<void*>(&take)}});
}

// What the user set, in whatever way glibc reads it, stays.
bool is_set_by_user() {
  for (const char* name : {"MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"})
    if (std::getenv(name) != nullptr) return true;
  const char* tunables = std::getenv("GLIBC_TUNABLES");
  return tunables != nullptr && std::strstr(tunables, "glibc.malloc.") != nullptr;
}

// Where blocks cannot be kept: the C library's own means.
std::mutex settings_mutex;
int settings_keepers = 0;
// Above which a block has to be a mapping of its own.
constexpr int kMostOfOldGlibcs = 32 << 20;

// What glibc itself arrives at in a process that frees large blocks.
void undo_settings() {
  mallopt(M_ARENA_MAX, 8 * static_cast<int>(std::thread::hardware_concurrency()));
  mallopt(M_MMAP_THRESHOLD, kMostOfOldGlibcs);
  mallopt(M_TRIM_THRESHOLD, 64 << 20);
}

void undo_settings_in_child() {
  const int keepers = std::exchange(settings_keepers, 0);
  settings_mutex.unlock();
  if (keepers > 0) undo_settings();
}

bool settings_help() {
  static const bool help =
      allocator_is_glibcs() && !is_set_by_user() &&
      pthread_atfork([] { settings_mutex.lock(); }, [] { settings_mutex.unlock(); },
                     undo_settings_in_child) == 0;
  return help;
}

void make_settings() {
  const std::lock_guard<std::mutex> lock(settings_mutex);
  if (settings_keepers++ > 0) return;
  mallopt(M_ARENA_MAX, 1);
  if (mallopt(M_MMAP_THRESHOLD, INT_MAX) == 0) mallopt(M_MMAP_THRESHOLD, kMostOfOldGlibcs);
  mallopt(M_TRIM_THRESHOLD, INT_MAX);
}

void unmake_settings() {
  const std::lock_guard<std::mutex> lock(settings_mutex);
  if (settings_keepers == 0 || --settings_keepers > 0) return;
  undo_settings();
  malloc_trim(0);
}

}  // namespace

bool keeps_blocks() {
  static const bool led = lead_through_cache();
  return led;
}

void keep_freed_memory() {
  if (keeps_blocks()) return cache().keep();
  if (settings_help()) make_settings();
}

void return_freed_memory() {
  if (!keeps_blocks()) {
    if (settings_help()) unmake_settings();
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
