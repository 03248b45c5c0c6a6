// The checker itself: programs written by hand, and random ones judged by brute force as well.
#include <algorithm>
#include <random>
#include <string>

#include "check.h"
#include "tools.h"
#include "trace/happens_before.h"

namespace fdg::testing {
namespace {

using trace::check_happens_before;
using trace::Operation;
using trace::OperationKind;
using trace::Report;

using Program = std::vector<Operation>;

Operation run(int stream, std::vector<BufferId> reads, std::vector<BufferId> writes,
              int64_t batch = 0) {
  Operation operation;
  operation.kind = OperationKind::run;
  operation.stream = stream;
  operation.code = "F";
  operation.stage = stream;
  operation.batch = batch;
  operation.reads = std::move(reads);
  operation.writes = std::move(writes);
  return operation;
}
Operation event_operation(OperationKind kind, int stream, int event, uint64_t ticket) {
  Operation operation;
  operation.kind = kind;
  operation.stream = stream;
  operation.event = event;
  operation.ticket = ticket;
  return operation;
}
Operation record(int stream, int event, uint64_t ticket = 1) {
  return event_operation(OperationKind::record, stream, event, ticket);
}
Operation wait(int stream, int event, uint64_t ticket = 1) {
  return event_operation(OperationKind::wait, stream, event, ticket);
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

void check_one_race(const Program& program, const std::string& first, const std::string& second,
                    int buffer) {
  const Report report = check_happens_before(program);
  CHECK(report.races.size() == 1u);
  CHECK(report.deadlocks.empty());
  CHECK(!report.clean());
  for (const auto& race : report.races) {
    const check::Note note(race);
    CHECK(contains(race, first));
    CHECK(contains(race, second));
    CHECK(race.find(first) < race.find(second));
    CHECK(contains(race, "buffer " + std::to_string(buffer)));
  }
}

TEST("happens before: every kind of race is reported") {
  check_one_race({run(0, {}, {3}, 5), run(1, {3}, {}, 6)}, "0F5", "1F6", 3);  // read after write
  check_one_race({run(0, {3}, {}, 5), run(1, {}, {3}, 6)}, "0F5", "1F6", 3);  // write after read
  check_one_race({run(0, {}, {3}, 5), run(1, {}, {3}, 6)}, "0F5", "1F6", 3);  // write after write
}

TEST("happens before: what conflicts with nothing is no race") {
  CHECK(check_happens_before({}).clean());
  CHECK(check_happens_before({run(0, {1}, {}), run(1, {1}, {}), run(2, {1}, {2})}).clean());
  CHECK(check_happens_before({run(0, {1}, {2}), run(1, {1}, {3})}).clean());
  CHECK(check_happens_before({run(0, {1}, {1}), run(0, {1}, {1})}).clean());
}

TEST("happens before: a record and a wait order, in the right place only") {
  const Operation writes = run(0, {}, {0}, 1);
  const Operation reads = run(1, {0}, {}, 1);
  CHECK(check_happens_before({writes, record(0, 7), wait(1, 7), reads}).clean());
  check_one_race({record(0, 7), writes, wait(1, 7), reads}, "0F1", "1F1", 0);  // recorded too early
  check_one_race({writes, record(0, 7), reads, wait(1, 7)}, "0F1", "1F1", 0);  // waited too late
  check_one_race({writes, record(0, 7), wait(2, 7), reads}, "0F1", "1F1", 0);  // on another stream
  check_one_race({writes, record(2, 7), wait(1, 7), reads}, "0F1", "1F1", 0);  // of another stream
  check_one_race({writes, record(0, 7), wait(1, 7, 0), reads}, "0F1", "1F1", 0);  // of no record
  // The first record of the event is not the second.
  check_one_race({record(0, 7, 1), writes, record(0, 7, 2), wait(1, 7, 1), reads}, "0F1", "1F1", 0);
  CHECK(check_happens_before({record(0, 7, 1), writes, record(0, 7, 2), wait(1, 7, 2), reads})
            .clean());
}

TEST("happens before: order is transitive, also through a stream without runs") {
  CHECK(check_happens_before(
            {run(0, {}, {0}), record(0, 1), wait(1, 1), record(1, 2), wait(2, 2), run(2, {}, {0})})
            .clean());
}

TEST("happens before: all readers since the last write must come before the next") {
  const Program program{run(0, {}, {0}, 1), record(0, 1),       wait(1, 1),
                        wait(2, 1),         run(1, {0}, {}, 2), run(2, {0}, {}, 3),
                        record(1, 2),       wait(0, 2),         run(0, {}, {0}, 4)};
  check_one_race(program, "2F3", "0F4", 0);
}

TEST("happens before: a wait for a record that never comes is a deadlock") {
  for (const Operation& missing : {wait(1, 4), wait(1, 4, 2)}) {
    const Report report =
        check_happens_before({run(0, {}, {0}), missing, run(1, {0}, {}), record(0, 5)});
    CHECK(report.deadlocks.size() == 1u);
    for (const auto& deadlock : report.deadlocks)
      CHECK(contains(deadlock, "wait of record " + std::to_string(missing.ticket) +
                                   " of event 4 on stream 1 never ends"));
    CHECK(report.races.empty());  // what never runs races with nothing
    CHECK(!report.clean());
  }
}

TEST("happens before: waits that cross are a deadlock of both streams") {
  const Report report = check_happens_before({wait(0, 2), run(0, {}, {}), record(0, 1), wait(1, 1),
                                              run(1, {}, {}), record(1, 2), run(2, {}, {})});
  CHECK(report.deadlocks.size() == 2u);
  // The same four, one of them in time.
  CHECK(check_happens_before(
            {run(0, {}, {}), record(0, 1), wait(0, 2), wait(1, 1), run(1, {}, {}), record(1, 2)})
            .clean());
}

TEST("happens before: a stream that waits for itself stands still") {
  CHECK(check_happens_before({wait(0, 1), record(0, 1)}).deadlocks.size() == 1u);
  CHECK(check_happens_before({record(0, 1), wait(0, 1)}).clean());
}

TEST("happens before: reads_from names the last writer of each buffer read") {
  const Report report = check_happens_before({
      run(0, {0}, {0, 1}),    // 0: reads what nobody wrote
      record(0, 1),           // 1
      run(0, {1, 0, 2}, {}),  // 2
      wait(1, 1),             // 3
      run(1, {1}, {1}),       // 4
      run(1, {1, 1}, {}),     // 5
      run(2, {}, {3}),        // 6
  });
  const std::vector<std::vector<int>> wanted{{-1}, {0, 0, -1}, {0}, {4, 4}, {}};
  CHECK(report.reads_from == wanted);
}

TEST("happens before: reads_from has an entry for every run") {
  const Program program{wait(0, 1), run(0, {5}, {}), run(1, {}, {6}), run(1, {6}, {})};
  const std::vector<std::vector<int>> wanted{{}, {}, {2}};
  CHECK(check_happens_before(program).reads_from == wanted);
}

TEST("happens before: an operation on stream -1 is refused") {
  CHECK_THROWS(std::invalid_argument, "-1", check_happens_before({run(-1, {}, {})}));
}

// ---- brute force

// Reachability over the edges a program means: along each stream, and from records to their waits.
struct BruteForce {
  explicit BruteForce(const Program& program) : program(program) {
    const size_t n = program.size();
    before.assign(n, std::vector<bool>(n, false));
    ends.assign(n, false);
    for (bool changed = true; changed;) {
      changed = false;
      for (size_t i = 0; i < n; ++i)
        if (!ends[i] && may_end(i)) changed = ends[i] = true;
    }
    for (size_t i = 0; i < n; ++i)
      for (size_t j = 0; j < n; ++j)
        before[i][j] = (i < j && program[i].stream == program[j].stream) || meets(i, j);
    for (size_t k = 0; k < n; ++k)
      for (size_t i = 0; i < n; ++i)
        for (size_t j = 0; j < n; ++j)
          if (before[i][k] && before[k][j]) before[i][j] = true;
  }

  bool meets(size_t from, size_t to) const {
    return program[from].kind == OperationKind::record && program[to].kind == OperationKind::wait &&
           program[from].event == program[to].event && program[from].ticket == program[to].ticket;
  }
  bool may_end(size_t i) const {
    bool met = program[i].kind != OperationKind::wait || program[i].ticket == 0;
    for (size_t j = 0; j < program.size(); ++j) {
      if (j < i && program[j].stream == program[i].stream && !ends[j]) return false;
      if (meets(j, i) && ends[j]) met = true;
    }
    return met;
  }
  bool deadlocked() const { return std::find(ends.begin(), ends.end(), false) != ends.end(); }
  bool racy() const {
    for (size_t i = 0; i < program.size(); ++i)
      for (size_t j = i + 1; j < program.size(); ++j)
        if (ends[i] && ends[j] && conflict(program[i], program[j]) && !before[i][j]) return true;
    return false;
  }
  static bool conflict(const Operation& a, const Operation& b) {
    const auto overlap = [](const std::vector<int>& left, const std::vector<int>& right) {
      return std::find_first_of(left.begin(), left.end(), right.begin(), right.end()) != left.end();
    };
    return overlap(a.writes, b.writes) || overlap(a.writes, b.reads) || overlap(a.reads, b.writes);
  }

  const Program& program;
  std::vector<std::vector<bool>> before;
  std::vector<bool> ends;
};

Program random_operations(uint64_t seed) {
  std::mt19937_64 engine(seed);
  const auto draw = [&engine](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(engine);
  };
  const int streams = draw(1, 3);
  const int events = 3;
  std::vector<uint64_t> recorded(events, 0);
  Program program;
  for (int i = draw(2, 16); i > 0; --i) {
    const int stream = draw(0, streams - 1);
    const int event = draw(0, events - 1);
    switch (draw(0, 3)) {
      case 0:
        program.push_back(record(stream, event, ++recorded[event]));
        break;
      case 1:  // now and then for a record that comes later, or never
        program.push_back(wait(stream, event, recorded[event] + (draw(0, 19) == 0 ? 1 : 0)));
        break;
      default: {
        const auto some = [&] { return std::vector<BufferId>(draw(0, 1), draw(0, 2)); };
        const auto reads = some();
        program.push_back(run(stream, reads, some()));
      }
    }
  }
  return program;
}

TEST("happens before: brute force agrees on random programs") {
  int racy = 0;
  int deadlocked = 0;
  int clean = 0;
  for (uint64_t seed = 0; seed < 1500; ++seed) {
    const check::Note note("seed " + std::to_string(seed));
    const Program program = random_operations(seed);
    const Report report = check_happens_before(program);
    const BruteForce expected(program);
    CHECK(report.races.empty() == !expected.racy());
    CHECK(report.deadlocks.empty() == !expected.deadlocked());
    racy += expected.racy();
    deadlocked += expected.deadlocked();
    clean += !expected.racy() && !expected.deadlocked();
  }
  CHECK(racy > 200);
  CHECK(deadlocked > 50);
  CHECK(clean > 200);
}

}  // namespace
}  // namespace fdg::testing
