#include "races.h"

#include <algorithm>
#include <iterator>
#include <map>
#include <set>
#include <utility>

#include "cudart.h"

namespace stand_in::races {
namespace {

using Clock = std::vector<uint64_t>;  // [stream] position that is known to come before

struct Access {
  int stream = -1;
  uint64_t position = 0;
  int name = -1;
};

// Memory with one history.
struct Cell {
  uintptr_t end = 0;
  Access written;
  std::vector<Access> read;  // since it was written; one per stream
};

struct Block {
  uintptr_t end = 0;
  int owner = 0;
};

struct Stream {
  std::string name;
  Clock clock;
  // The last position at which memory was used that its allocator may hand out again.
  uint64_t reusable = 0;
};

struct Detector {
  bool on = false;
  std::map<uintptr_t, int> index;
  std::vector<Stream> streams;
  std::map<uintptr_t, Clock> events;
  std::map<uintptr_t, Block> blocks;
  std::map<uintptr_t, Cell> cells;
  std::map<std::string, int> numbers;
  std::vector<std::string> names;
  std::set<std::pair<std::pair<int, int>, std::pair<int, int>>> reported;
};

Detector& detector() {
  static Detector all;
  return all;
}

uint64_t at(const Clock& clock, int stream) {
  const auto i = static_cast<size_t>(stream);
  return i < clock.size() ? clock[i] : 0;
}

void join(Clock& clock, const Clock& other) {
  if (clock.size() < other.size()) clock.resize(other.size());
  for (size_t i = 0; i < other.size(); ++i) clock[i] = std::max(clock[i], other[i]);
}

int index_of(uintptr_t handle) {
  Detector& all = detector();
  const auto [found, anew] = all.index.try_emplace(handle, static_cast<int>(all.streams.size()));
  if (anew) {
    Stream stream;
    if (handle == kHost)
      stream.name = "the host";
    else if (handle == kDefaultStream)
      stream.name = "the default stream";
    else
      stream.name = "stream " + std::to_string(handle);
    all.streams.push_back(std::move(stream));
  }
  return found->second;
}

int number_of(const std::string& name) {
  Detector& all = detector();
  const auto [found, anew] = all.numbers.try_emplace(name, static_cast<int>(all.names.size()));
  if (anew) all.names.push_back(name);
  return found->second;
}

bool comes_after(const Clock& clock, const Access& access) {
  return access.stream < 0 || at(clock, access.stream) >= access.position;
}

std::string said(const Access& access) {
  const Detector& all = detector();
  return all.names[access.name] + " on " + all.streams[access.stream].name + " (its operation " +
         std::to_string(access.position) + ")";
}

// Once for each pair of names on a pair of streams.
void report(const Access& one, const Access& other, const std::string& text) {
  if (detector().reported.insert({{one.stream, one.name}, {other.stream, other.name}}).second)
    violation(text);
}

void check(const Access& earlier, const Access& now) {
  if (earlier.stream == now.stream || comes_after(detector().streams[now.stream].clock, earlier))
    return;
  report(earlier, now,
         said(earlier) + " and " + said(now) + " touch the same memory and nothing orders them");
}

void split(uintptr_t place) {
  auto& cells = detector().cells;
  auto found = cells.upper_bound(place);
  if (found == cells.begin()) return;
  --found;
  if (found->first == place || found->second.end <= place) return;
  Cell rest = found->second;
  found->second.end = place;
  cells.emplace(place, std::move(rest));
}

using Cells = std::map<uintptr_t, Cell>;

std::pair<Cells::iterator, Cells::iterator> cells_of(Range memory) {
  split(memory.begin);
  split(memory.end);
  auto& cells = detector().cells;
  return {cells.lower_bound(memory.begin), cells.lower_bound(memory.end)};
}

void write(Range memory, const Access& now) {
  const auto [first, last] = cells_of(memory);
  for (auto cell = first; cell != last; ++cell) {
    check(cell->second.written, now);
    for (const Access& read : cell->second.read) check(read, now);
  }
  detector().cells.erase(first, last);
  detector().cells[memory.begin] = {memory.end, now, {}};
}

void read(Range memory, const Access& now) {
  const auto [first, last] = cells_of(memory);
  uintptr_t place = memory.begin;
  std::vector<Range> gaps;
  for (auto cell = first; cell != last; ++cell) {
    if (place < cell->first) gaps.push_back({place, cell->first});
    place = cell->second.end;
    check(cell->second.written, now);
    auto& readers = cell->second.read;
    const auto same = std::find_if(readers.begin(), readers.end(), [&](const Access& reader) {
      return reader.stream == now.stream;
    });
    if (same == readers.end())
      readers.push_back(now);
    else
      *same = now;
  }
  if (place < memory.end) gaps.push_back({place, memory.end});
  for (const Range& gap : gaps) detector().cells[gap.begin] = {gap.end, {}, {now}};
}

}  // namespace

void watch(bool on) {
  detector() = Detector();
  detector().on = on;
  index_of(kHost);
  index_of(kDefaultStream);
}

bool watching() { return detector().on; }

void name_stream(uintptr_t stream, const std::string& name) {
  if (watching()) detector().streams[index_of(stream)].name = "'" + name + "'";
}

void record(uintptr_t event, uintptr_t stream) {
  if (!watching()) return;
  Clock clock = detector().streams[index_of(stream)].clock;
  join(clock, detector().streams[index_of(kHost)].clock);
  detector().events[event] = std::move(clock);
}

void wait(uintptr_t stream, uintptr_t event) {
  if (watching()) join(detector().streams[index_of(stream)].clock, detector().events[event]);
}

void host_waited_for_stream(uintptr_t stream) {
  if (!watching()) return;
  const int waited = index_of(stream);
  join(detector().streams[index_of(kHost)].clock, detector().streams[waited].clock);
}

void host_waited_for_event(uintptr_t event) {
  if (watching()) join(detector().streams[index_of(kHost)].clock, detector().events[event]);
}

bool allocated(Range memory, uintptr_t owner) {
  if (!watching()) return false;
  Detector& all = detector();
  const auto next = all.blocks.lower_bound(memory.begin);
  if (next != all.blocks.end() && next->first < memory.end) return false;
  if (next != all.blocks.begin() && std::prev(next)->second.end > memory.begin) return false;
  const int index = index_of(owner);
  all.blocks[memory.begin] = {memory.end, index};
  // What the allocator hands out may just have been used by its stream: other streams must come
  // after that too.
  const uint64_t used = all.streams[index].reusable;
  if (used > 0)
    all.cells[memory.begin] = {
        memory.end, {index, used, number_of("the last use of memory that was given back")}, {}};
  return true;
}

void given_back(uintptr_t begin) {
  if (!watching()) return;
  Detector& all = detector();
  const auto found = all.blocks.find(begin);
  if (found == all.blocks.end()) return;
  const auto [end, index] = found->second;
  all.blocks.erase(found);
  Stream& owner = all.streams[index];
  Clock known = owner.clock;
  join(known, all.streams[index_of(kHost)].clock);
  const auto consider = [&, index = index](const Access& access) {
    if (access.stream < 0) return;
    owner.reusable =
        std::max(owner.reusable, access.stream == index ? access.position : at(owner.clock, index));
    if (access.stream != index && !comes_after(known, access))
      report(access, {index, 0, number_of("allocation")},
             "memory of " + owner.name + " was given back while " + said(access) +
                 " may still use it");
  };
  const auto [first, last] = cells_of({begin, end});
  for (auto cell = first; cell != last; ++cell) {
    consider(cell->second.written);
    for (const Access& reader : cell->second.read) consider(reader);
  }
  all.cells.erase(first, last);
}

bool is_known(Range memory) {
  auto& blocks = detector().blocks;
  const auto next = blocks.upper_bound(memory.begin);
  return next != blocks.begin() && std::prev(next)->second.end >= memory.end;
}

void touch(uintptr_t stream, const std::vector<Range>& reads, const std::vector<Range>& writes,
           const std::string& name) {
  if (!watching()) return;
  const int index = index_of(stream);
  Clock& clock = detector().streams[index].clock;
  join(clock, detector().streams[index_of(kHost)].clock);
  if (clock.size() <= static_cast<size_t>(index)) clock.resize(static_cast<size_t>(index) + 1);
  const Access now{index, ++clock[static_cast<size_t>(index)], number_of(name)};
  for (const Range& memory : reads)
    if (memory.begin < memory.end && is_known(memory)) read(memory, now);
  for (const Range& memory : writes)
    if (memory.begin < memory.end && is_known(memory)) write(memory, now);
}

void must_be_known(const std::string& name, uintptr_t stream, Range memory) {
  if (!watching() || memory.begin >= memory.end || is_known(memory)) return;
  const Access now{index_of(stream), 0, number_of(name)};
  report(now, now,
         name + " on " + detector().streams[now.stream].name +
             " touches memory of a device that nobody allocated, or that was given back");
}

}  // namespace stand_in::races
