// ForkJoin: every part once, on a thread of its own, and everything done when run() returns.
#include <set>
#include <thread>

#include "check.h"
#include "cpu/fork_join.h"
#include "tools.h"

namespace fdg::testing {
namespace {

using cpu::ForkJoin;

TEST("fork join: every part runs once a round, seen by the caller and by the next round") {
  for (int threads = 1; threads <= 4; ++threads) {
    ForkJoin team(threads);
    CHECK(team.threads() == threads);
    std::vector<int64_t> counts(static_cast<size_t>(threads), 0);  // plain memory
    constexpr int kRounds = 1500;
    for (int round = 0; round < kRounds; ++round) {
      const int64_t shift = round;  // on the caller's stack: gone when run() returns
      team.run([&counts, &shift, threads](int part) {
        // Everyone's part moves to another thread every round.
        counts[static_cast<size_t>((part + shift) % threads)] += 1 + shift;
      });
      if (round % 100 == 0)
        for (const int64_t count : counts) CHECK(count == counts[0]);
    }
    for (const int64_t count : counts) CHECK(count == kRounds * (kRounds + int64_t{1}) / 2);
  }
}

TEST("fork join: part 0 is the caller's, the others have threads of their own") {
  ForkJoin team(4);
  std::vector<std::thread::id> ids(4);
  team.run([&](int part) { ids[static_cast<size_t>(part)] = std::this_thread::get_id(); });
  CHECK((ids[0] == std::this_thread::get_id()));
  CHECK(std::set<std::thread::id>(ids.begin(), ids.end()).size() == 4u);
}

TEST("fork join: a helper that is late is waited for") {
  ForkJoin team(3);
  for (int late = 0; late < 3; ++late) {
    bool done[3] = {false, false, false};
    team.run([&](int part) {
      if (part == late) std::this_thread::sleep_for(milliseconds(5));
      done[part] = true;
    });
    CHECK((done[0] && done[1] && done[2]));
  }
}

TEST("fork join: teams begin and end, used or not") {
  for (int repetition = 0; repetition < 100; ++repetition) {
    ForkJoin team(1 + repetition % 4);
    int sum[4] = {0, 0, 0, 0};
    for (int round = 0; round < repetition % 3; ++round)
      team.run([&sum](int part) { ++sum[part]; });
    for (int part = 0; part < team.threads(); ++part) CHECK(sum[part] == repetition % 3);
  }
}

}  // namespace
}  // namespace fdg::testing
