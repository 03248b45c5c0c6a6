// When everything would begin and end: a periodic program, with durations in place of work.
//
// An action begins when its stream is free and when all earlier accesses to its buffers that it
// conflicts with have ended: a read waits for the last write, a write for that and for the reads
// since. A Scheduler's streams and events make it wait for just that, so the times are those that a
// backend would show whose host enqueues in no time. Nothing has to know which waits imply others,
// hence there are no vector clocks, and a run takes time in proportion to the accesses.
//
// A program is the steps of one tick far from either end of an epoch. In tick t a step works on
// batch t - offset, and it occurs where there is such a batch; so fill and drain follow. The
// buffers of which several take turns with the batches are a ring: then nothing repeats only after
// the least common multiple of all their numbers, which for many stages is beyond any number of
// ticks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace fdg::trace {

// In tick t buffer (t + shift) mod size of the ring; 0 <= shift < size.
using RingAccess = std::pair<int, int64_t>;  // ring, shift

struct PeriodicStep {
  int stream = 0;
  double duration_s = 0;
  int64_t offset = 0;  // ticks from the entry of a batch until it is worked on
  // Above 1: it is done once for so many batches, with the last of them. What is left over when the
  // batches end is done one tick behind the last batch.
  int64_t every = 1;
  std::vector<RingAccess> reads;
  std::vector<RingAccess> writes;
};

struct PeriodicProgram {
  int streams = 0;
  std::vector<int64_t> rings;       // [ring] how many buffers; 1 for one that is alone
  std::vector<PeriodicStep> steps;  // of a tick, in the order of enqueuing
};

struct Extent {
  int64_t batches = 0;
  int64_t ticks = 0;
  // As a Scheduler's, whose host waits before it enqueues; nothing: the host never waits.
  std::optional<int> max_ticks_in_flight;
  // Of these ticks, the second excluded, spans are kept.
  int64_t window_begin = 0;
  int64_t window_end = 0;
};

class Simulation {
 public:
  using Span = std::tuple<int, int64_t, double, double>;  // step, tick, begin and end in seconds

  // Throws std::invalid_argument for a program that cannot be.
  Simulation(const PeriodicProgram& program, const Extent& extent);

  // Runs whole ticks until there were so many actions, or no tick is left; then it returns false.
  bool advance(int64_t actions);

  // [tick] when its last action ended. A tick without any ends when it is enqueued.
  const std::vector<double>& tick_ends_s() const { return tick_ends_; }
  // [stream] how long it was at work.
  std::vector<double> stream_busy_s() const;
  // Of the window, in the order of enqueuing.
  const std::vector<Span>& spans() const { return spans_; }

 private:
  struct Access {
    int ring;
    int64_t shift;
  };
  struct Step {
    int stream;
    double duration;
    int64_t offset;
    int64_t every;
    size_t reads;   // where its accesses begin
    size_t writes;  // where its writes begin, behind its reads
    size_t end;     // where they end
  };
  struct Ring {
    int64_t size;
    int64_t first;     // its first cell
    int64_t position;  // tick mod size
  };
  // One buffer: when its last write, and when its last access of either kind, ended.
  struct Cell {
    double written = 0;
    double used = 0;
  };

  void add_accesses(size_t step, const std::vector<RingAccess>& accesses);
  bool occurs(const Step& step) const;
  Cell& cell(const Access& access);
  void make_room();
  int64_t run_tick();

  const Extent extent_;
  std::vector<Step> steps_;
  std::vector<Access> accesses_;  // of all steps, one after the other
  std::vector<Ring> rings_;
  std::vector<Cell> cells_;    // of all rings, one after the other
  std::vector<double> free_;   // [stream] when it has done what was enqueued so far
  std::vector<int64_t> runs_;  // [step] how often it occurred
  int64_t tick_ = 0;
  int64_t finished_ = 0;  // ticks the host has waited for
  double enqueued_ = 0;   // when the host enqueues the tick at hand
  std::vector<double> tick_ends_;
  std::vector<Span> spans_;
};

}  // namespace fdg::trace
