#include "simulation.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace fdg::trace {
namespace {

void require(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(message);
}

}  // namespace

Simulation::Simulation(const PeriodicProgram& program, const Extent& extent) : extent_(extent) {
  require(extent.batches >= 0 && extent.ticks >= 0,
          "there cannot be " + std::to_string(extent.batches) + " batches in " +
              std::to_string(extent.ticks) + " ticks");
  require(!extent.max_ticks_in_flight || *extent.max_ticks_in_flight >= 1,
          "max_ticks_in_flight must be at least 1, got " +
              std::to_string(extent.max_ticks_in_flight.value_or(1)));
  require(program.streams >= 1,
          "a program needs at least one stream, got " + std::to_string(program.streams));
  int64_t cells = 0;
  for (const int64_t size : program.rings) {
    require(size >= 1, "a ring needs at least one buffer, got " + std::to_string(size));
    rings_.push_back({size, cells, 0});
    cells += size;
  }
  cells_.resize(static_cast<size_t>(cells));
  free_.resize(static_cast<size_t>(program.streams));
  runs_.resize(program.steps.size());
  for (const PeriodicStep& step : program.steps) {
    const size_t index = steps_.size();
    const std::string name = "step " + std::to_string(index);
    require(step.stream >= 0 && step.stream < program.streams,
            name + " names stream " + std::to_string(step.stream) + "; there are streams 0 to " +
                std::to_string(program.streams - 1));
    require(std::isfinite(step.duration_s) && step.duration_s >= 0,
            name + " must last 0 seconds or more, got " + std::to_string(step.duration_s));
    require(step.every >= 1,
            name + " must occur once in at least 1 batch, got " + std::to_string(step.every));
    Step made{step.stream, step.duration_s, step.offset, step.every, accesses_.size(), 0, 0};
    add_accesses(index, step.reads);
    made.writes = accesses_.size();
    add_accesses(index, step.writes);
    made.end = accesses_.size();
    steps_.push_back(made);
  }
  tick_ends_.reserve(static_cast<size_t>(extent.ticks));
}

void Simulation::add_accesses(size_t step, const std::vector<RingAccess>& accesses) {
  for (const auto& [ring, shift] : accesses) {
    const std::string name = "step " + std::to_string(step);
    require(ring >= 0 && ring < static_cast<int>(rings_.size()),
            name + " names ring " + std::to_string(ring) + ", which there is not");
    require(shift >= 0 && shift < rings_[ring].size, name + " names buffer " +
                                                         std::to_string(shift) + " of a ring of " +
                                                         std::to_string(rings_[ring].size));
    accesses_.push_back({ring, shift});
  }
}

bool Simulation::advance(int64_t actions) {
  for (int64_t done = 0; tick_ < extent_.ticks && done < actions;) done += run_tick();
  return tick_ < extent_.ticks;
}

std::vector<double> Simulation::stream_busy_s() const {
  std::vector<double> busy(free_.size(), 0.0);
  for (size_t i = 0; i < steps_.size(); ++i)
    busy[steps_[i].stream] += static_cast<double>(runs_[i]) * steps_[i].duration;
  return busy;
}

bool Simulation::occurs(const Step& step) const {
  const int64_t batch = tick_ - step.offset;
  if (batch < 0) return false;
  if (batch < extent_.batches) return step.every == 1 || (batch + 1) % step.every == 0;
  return batch == extent_.batches && extent_.batches % step.every != 0;
}

Simulation::Cell& Simulation::cell(const Access& access) {
  const Ring& ring = rings_[access.ring];
  const int64_t place = ring.position + access.shift;
  return cells_[ring.first + (place < ring.size ? place : place - ring.size)];
}

// As Scheduler::wait_for_room.
void Simulation::make_room() {
  if (!extent_.max_ticks_in_flight) return;
  const int64_t most = *extent_.max_ticks_in_flight;
  if (tick_ - finished_ < most) return;
  while (tick_ - finished_ > most / 2) enqueued_ = std::max(enqueued_, tick_ends_[finished_++]);
}

int64_t Simulation::run_tick() {
  make_room();
  const bool kept = extent_.window_begin <= tick_ && tick_ < extent_.window_end;
  double last = enqueued_;
  int64_t ran = 0;
  for (size_t i = 0; i < steps_.size(); ++i) {
    const Step& step = steps_[i];
    if (!occurs(step)) continue;
    double begin = std::max(free_[step.stream], enqueued_);
    for (size_t a = step.reads; a < step.writes; ++a)
      begin = std::max(begin, cell(accesses_[a]).written);
    for (size_t a = step.writes; a < step.end; ++a)
      begin = std::max(begin, cell(accesses_[a]).used);
    const double end = begin + step.duration;
    for (size_t a = step.reads; a < step.writes; ++a) {
      Cell& read = cell(accesses_[a]);
      read.used = std::max(read.used, end);
    }
    // Whatever used it before has ended.
    for (size_t a = step.writes; a < step.end; ++a) cell(accesses_[a]) = {end, end};
    free_[step.stream] = end;
    last = std::max(last, end);
    ++runs_[i];
    ++ran;
    if (kept) spans_.emplace_back(static_cast<int>(i), tick_, begin, end);
  }
  tick_ends_.push_back(last);
  ++tick_;
  for (Ring& ring : rings_)
    if (++ring.position == ring.size) ring.position = 0;
  return ran;
}

}  // namespace fdg::trace
