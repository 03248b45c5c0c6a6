// What a fork leaves to its child: a copy of all memory, and one thread, the one that forked.
#pragma once

namespace fdg {

// How many forks lie between this process and the one that loaded this library. What was made at
// another number may speak of threads that are not here.
int forks();

// Whether the calling thread went through a fork. Threads that it had started before are gone.
bool went_through_fork();

}  // namespace fdg
