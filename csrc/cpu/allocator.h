// The memory of torch's tensors on the CPU, set up for a training loop on several threads.
//
// A worker thread gets an arena of its own from glibc, whose large blocks come straight from the
// kernel and go straight back: every activation of every batch is then paid for in page faults. One
// arena for all that keeps what it has needs none, but its lock puts stages to sleep. So blocks
// that torch frees are kept in a BlockCache.
#pragma once

#include <cstddef>

namespace fdg::cpu {

// Whether what torch frees can be kept: its library of this process calls the C library's
// allocator, and those calls can be led through a BlockCache. They are from the first call of this
// on.
bool keeps_blocks();

// For the whole process, until freed memory is returned as often: what was kept then goes back to
// the system. Where blocks cannot be kept, the C library is told to keep them; nothing is done
// where it is not glibc, where another allocator stands in for its own, or where the user has set
// it up himself (MALLOC_ARENA_MAX and its like).
void keep_freed_memory();
void return_freed_memory();

// What is kept of freed blocks now.
size_t kept_bytes();

}  // namespace fdg::cpu
