// Work shared by a team: every part once, and everything done when run_on_team() returns.
#include <set>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/openmp.h"
#include "openmp_stand_in.h"
#include "tools.h"

namespace fdg::testing {
namespace {

using cpu::run_on_team;

struct Limit {
  explicit Limit(int threads) { thread_limit = threads; }
  ~Limit() { thread_limit = 1 << 20; }
};

TEST("openmp: every part runs once a round, seen by the caller and by the next round") {
  for (int limit = 1; limit <= 5; ++limit) {
    const Limit limited(limit);
    for (int parts = 1; parts <= 4; ++parts) {
      std::vector<int64_t> counts(static_cast<size_t>(parts), 0);  // plain memory
      constexpr int kRounds = 60;
      for (int round = 0; round < kRounds; ++round) {
        const int64_t shift = round;  // on the caller's stack: gone when it returns
        run_on_team(parts, [&counts, &shift, parts](int part) {
          // Everyone's part moves to another thread every round.
          counts[static_cast<size_t>((part + shift) % parts)] += 1 + shift;
        });
        for (const int64_t count : counts) CHECK(count == counts[0]);
      }
      CHECK(counts[0] == kRounds * (kRounds + int64_t{1}) / 2);
    }
  }
}

TEST("openmp: parts have threads of their own, the caller's among them") {
  std::vector<std::thread::id> ids(4);
  run_on_team(4, [&](int part) { ids[static_cast<size_t>(part)] = std::this_thread::get_id(); });
  CHECK((ids[0] == std::this_thread::get_id()));
  CHECK(std::set<std::thread::id>(ids.begin(), ids.end()).size() == 4u);
}

TEST("openmp: one part is the caller's, and takes no team") {
  const int before = teams;
  int count = 0;
  run_on_team(1, [&](int) { ++count; });
  CHECK(count == 1);
  CHECK(teams == before);
  run_on_team(2, [](int) {});
  CHECK(teams == before + 1);
}

TEST("openmp: a part that is late is waited for") {
  for (int late = 0; late < 3; ++late) {
    bool done[3] = {false, false, false};
    run_on_team(3, [&](int part) {
      if (part == late) std::this_thread::sleep_for(milliseconds(5));
      done[part] = true;
    });
    CHECK((done[0] && done[1] && done[2]));
  }
}

TEST("openmp: how many threads is the calling thread's own") {
  cpu::set_openmp_threads(3);
  CHECK(cpu::openmp_threads() == 3);
  cpu::set_openmp_threads(0);  // which no thread can have
  CHECK(cpu::openmp_threads() == 3);
  int others = 0;
  std::thread([&] { others = cpu::openmp_threads(); }).join();
  CHECK(others == 1);
  cpu::set_openmp_threads(1);
  const int before = pauses;
  cpu::end_idle_openmp_threads();
  CHECK(pauses == before + 1);
}

}  // namespace
}  // namespace fdg::testing
