// What happens when the system gives no more threads: an exception, with nothing left behind.
//
// The pthread_create below stands before the C library's (and the thread sanitizer's, where that is
// a shared library, as gcc's is; clang links its own into the program, so there it cannot).
#include <cstdlib>  // defines __GLIBC__ where there is one

#if defined(__GLIBC__) && !defined(__clang__)

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <cerrno>
#include <system_error>

#include "check.h"
#include "tools.h"

namespace {
std::atomic<int> threads_left{-1};  // how many may still be started; -1: any number
}

extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* attributes,
                              void* (*start)(void*), void* argument) noexcept {
  using Function = int (*)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
  static const auto next = reinterpret_cast<Function>(dlsym(RTLD_NEXT, "pthread_create"));
  if (threads_left == 0) return EAGAIN;
  if (threads_left > 0) --threads_left;
  return next(thread, attributes, start, argument);
}

namespace fdg::testing {
namespace {

struct Shortage {
  explicit Shortage(int left) { threads_left = left; }
  ~Shortage() { threads_left = -1; }
};

TEST("thread shortage: no worker for the third stream") {
  const Shortage shortage(2);
  CHECK_THROWS(std::system_error, "", Rig(4));
}

}  // namespace
}  // namespace fdg::testing

#endif
