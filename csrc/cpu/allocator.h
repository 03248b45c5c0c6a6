// The C allocator, set up for a training loop on several threads.
//
// A worker thread gets an arena of its own from glibc, whose large blocks come straight from the
// kernel and go straight back: every activation of every batch is then paid for in page faults
// (measured: a fifth of a ResNet-56 step). One arena that keeps what it has needs none.
#pragma once

namespace fdg::cpu {

// For the whole process, until freed memory is returned. Does nothing where the C library is not
// glibc.
void keep_freed_memory();
// Gives back to the system what is free, and from now on large blocks when they are freed.
void return_freed_memory();

}  // namespace fdg::cpu
