// A race detector over real addresses: whether everything that touches the same memory is ordered
// by the waits that were really asked for, whatever the program declares.
//
// Vector clocks say what a stream is known to come after. An operation of a stream comes after all
// the host knew when it enqueued it; an event carries the clock of its stream to whoever waits for
// it. Every operation has the number of its place on its stream.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace stand_in::races {

// Streams are named by their handles; these two are no handles. What torch does outside any stream
// of the program's goes to the default stream, one for all devices here. It does not wait for the
// program's streams, nor they for it.
constexpr uintptr_t kDefaultStream = 0;
constexpr uintptr_t kHost = 1;

struct Range {
  uintptr_t begin = 0;
  uintptr_t end = 0;
};

inline Range range(const void* begin, size_t bytes) {
  const auto at = reinterpret_cast<uintptr_t>(begin);
  return {at, at + bytes};
}

// Off at first. Nothing below does anything while it is off; switching forgets everything.
void watch(bool on);
bool watching();
void name_stream(uintptr_t stream, const std::string& name);

// -- order ----------------------------------------------------------------------------------------

void record(uintptr_t event, uintptr_t stream);
void wait(uintptr_t stream, uintptr_t event);
// The host knows that what was enqueued on the stream, or recorded in the event, is done.
void host_waited_for_stream(uintptr_t stream);
void host_waited_for_event(uintptr_t event);

// -- memory ---------------------------------------------------------------------------------------

// Memory that was allocated for `owner`, whose allocator hands it out again, once it is given back,
// to operations of that stream and with regard for that stream alone (as torch's does). kHost:
// whoever gives it back must know that nothing uses it any more. False if it overlaps memory that
// is known.
bool allocated(Range memory, uintptr_t owner);
void given_back(uintptr_t begin);
bool is_known(Range memory);

// One operation of `stream`. What lies in memory nobody allocated is not looked at.
void touch(uintptr_t stream, const std::vector<Range>& reads, const std::vector<Range>& writes,
           const std::string& name);
// A violation if it lies in memory that nobody allocated, or that was given back.
void must_be_known(const std::string& name, uintptr_t stream, Range memory);

}  // namespace stand_in::races
