// The fused update against a plain loop over the formula, bit for bit.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include "check.h"
#include "cpu/sgd_update.h"
#include "tools.h"

namespace fdg::testing {
namespace {

using cpu::FlatSgd;

template <class T>
constexpr Dtype kDtype = sizeof(T) == 4 ? Dtype::float32 : Dtype::float64;

// Flat memory aligned as the runtime aligns it.
template <class T>
class Flat {
 public:
  static constexpr int64_t kAlignment = 64 / sizeof(T);  // elements

  explicit Flat(int64_t size) : memory_(static_cast<size_t>(size + kAlignment)), size_(size) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    start_ = (64 - address % 64) % 64 / sizeof(T);
  }
  T* data() { return memory_.data() + start_; }
  uintptr_t address() { return reinterpret_cast<uintptr_t>(data()); }
  // Numbers in [-2, 2) that begin anew after a prime number of them: big arrays fill fast.
  void fill(uint64_t& state) {
    constexpr int64_t kPeriod = 4099;
    T* const values = data();
    for (int64_t i = 0; i < std::min(size_, kPeriod); ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      values[i] = static_cast<T>(static_cast<int64_t>(state) >> 11) / (int64_t{1} << 51);
    }
    for (int64_t i = kPeriod; i < size_; i += kPeriod)
      std::memcpy(values + i, values, std::min(kPeriod, size_ - i) * sizeof(T));
  }
  std::vector<T> values() { return {data(), data() + size_}; }

 private:
  std::vector<T> memory_;
  int64_t size_;
  size_t start_;
};

// Where the first difference in bits is, "" for none.
template <class T>
std::string first_difference(const T* got, const std::vector<T>& wanted) {
  if (wanted.empty() || std::memcmp(got, wanted.data(), wanted.size() * sizeof(T)) == 0) return "";
  for (size_t i = 0; i < wanted.size(); ++i)
    if (std::memcmp(&got[i], &wanted[i], sizeof(T)) != 0)
      return "element " + std::to_string(i) + " of " + std::to_string(wanted.size()) + " is " +
             check::show_any(got[i]) + ", wanted " + check::show_any(wanted[i]);
  return "";
}

struct Layout {
  std::vector<Segment> segments;
  std::vector<bool> has_gradient;
  int64_t size = 0;
};

// Gaps after every segment: at least `gap`, as far as the next aligned element if `align`.
Layout layout(const std::vector<int64_t>& sizes, int64_t gap, bool align,
              const std::vector<size_t>& without_gradient = {}) {
  Layout made;
  made.size = align ? 0 : 3;
  for (const int64_t size : sizes) {
    made.segments.push_back({made.size, size});
    made.has_gradient.push_back(true);
    made.size += size + gap;
    if (align) made.size = (made.size + 15) / 16 * 16;
  }
  for (const size_t segment : without_gradient) made.has_gradient[segment] = false;
  return made;
}

constexpr int kCopies = 3;
constexpr int kStages = 3;
constexpr int kStage = 1;
constexpr int kRows = 2;

// One stage's flat memory with the update over it, and a reference that follows along.
template <class T>
struct Bench {
  Bench(const Layout& layout, int threads, uint64_t seed = 1, int groups = 1)
      : layout(layout), groups(groups), momentum(layout.size) {
    for (int i = 0; i < kCopies; ++i) {
      weights.emplace_back(layout.size);
      weights.back().fill(seed);
    }
    momentum.fill(seed);
    for (size_t i = 0; i < layout.segments.size(); ++i) {
      gradients.emplace_back(layout.segments[i].size);
      gradients.back().fill(seed);
      table.push_back(layout.has_gradient[i] ? gradients.back().address() : 0);
    }
    // Of three groups the second has no momentum and the third is Nesterov's.
    for (int row = 0; row < kRows; ++row)
      for (int group = 0; group < groups; ++group)
        for (const double value :
             {0.1 / (row + 1 + group), group == 1 ? 0.0 : 0.9 - row * 0.2, 5e-4 * (row + 1 - group),
              group == 2 ? 1.0 : 0.0, 0.7, 0.49 + 0.1 * group, 1.0})
          hyper.push_back(value);
    for (auto& copy : weights) expected_weights.push_back(copy.values());
    expected_momentum = momentum.values();
    sgd = std::make_shared<FlatSgd>(parameters(), threads);
  }

  FlatParameters parameters() {
    FlatParameters made;
    made.dtype = kDtype<T>;
    made.stage = kStage;
    made.segments = layout.segments;
    for (size_t i = 0; i < made.segments.size(); ++i)
      made.segments[i].group = static_cast<int32_t>(i % static_cast<size_t>(groups));
    for (auto& copy : weights) made.weights.push_back(copy.address());
    made.momentum = momentum.address();
    made.gradients = table.data();
    made.hyper = {hyper.data(), kRows, HyperTable::first_shrink + kStages, groups};
    made.gain = reinterpret_cast<uintptr_t>(gain);
    made.progress = progress;
    return made;
  }

  void set_nesterov(bool on) {
    for (int row = 0; row < kRows; ++row) row_of(row)[HyperTable::nesterov] = on;
  }
  double* row_of(int64_t batch, size_t group = 0) {
    const auto block = static_cast<size_t>(batch % kRows * groups) + group;
    return hyper.data() + block * (HyperTable::first_shrink + kStages);
  }

  // g' = s*g + wd*w;  v = mu*v + g';  w = w - lr*v, or w - lr*(g' + mu*v)
  // and w = w - lr*g', v as it was, where mu is 0.
  void expect_update(int from, int to, int64_t batch) {
    for (size_t segment = 0; segment < layout.segments.size(); ++segment) {
      const double* row = row_of(batch, segment % static_cast<size_t>(groups));
      const T lr = static_cast<T>(row[0]), mu = static_cast<T>(row[1]), wd = static_cast<T>(row[2]);
      const T shrink = static_cast<T>(row[4 + kStage]) * (gain ? static_cast<T>(*gain) : T(1));
      const bool nesterov = row[3] != 0;
      const int64_t offset = layout.segments[segment].offset;
      const int64_t size = layout.segments[segment].size;
      if (!layout.has_gradient[segment]) {
        expect_copy_of(layout.segments[segment], from, to);
        continue;
      }
      const T* const source = expected_weights[from].data() + offset;
      T* const target = expected_weights[to].data() + offset;
      T* const momenta = expected_momentum.data() + offset;
      const T* const slopes = gradients[segment].data();
      for (int64_t i = 0; i < size; ++i) {
        const T scaled = shrink * slopes[i];
        const T gradient = std::fma(wd, source[i], scaled);
        T direction = gradient;
        if (mu != 0) {
          const T decayed = mu * momenta[i];
          momenta[i] = decayed + gradient;
          direction = nesterov ? std::fma(mu, momenta[i], gradient) : momenta[i];
        }
        target[i] = std::fma(-lr, direction, source[i]);
      }
    }
  }
  void expect_copy_of(const Segment& segment, int from, int to) {
    if (from == to || segment.size == 0) return;
    std::memcpy(expected_weights[to].data() + segment.offset,
                expected_weights[from].data() + segment.offset, segment.size * sizeof(T));
  }
  void expect_copy(int from, int to) {
    for (const Segment& segment : layout.segments) expect_copy_of(segment, from, to);
  }
  // Everything, so gaps, other copies and the gradients' neighbours too.
  void check() {
    for (int copy = 0; copy < kCopies; ++copy) {
      const check::Note note("weight copy " + std::to_string(copy));
      CHECK(first_difference(weights[copy].data(), expected_weights[copy]) == "");
    }
    const check::Note note("momentum");
    CHECK(first_difference(momentum.data(), expected_momentum) == "");
  }
  void update_and_check(int from, int to, int64_t batch) {
    const check::Note note("update of copy " + std::to_string(from) + " to " + std::to_string(to));
    const int64_t updates = progress[1];
    sgd->run_update(from, to, batch);
    expect_update(from, to, batch);
    check();
    CHECK(progress[0] == to);
    CHECK(progress[1] == updates + 1);
  }

  const Layout layout;
  const int groups;
  const double* gain = nullptr;  // to be set before `sgd` is made anew
  std::vector<Flat<T>> weights;
  Flat<T> momentum;
  std::vector<Flat<T>> gradients;
  std::vector<uint64_t> table;
  std::vector<double> hyper;
  int64_t progress[2] = {0, 0};
  std::vector<std::vector<T>> expected_weights;
  std::vector<T> expected_momentum;
  std::shared_ptr<FlatSgd> sgd;
};

template <class T>
void check_layout(const Layout& layout, int threads) {
  const check::Note note(std::to_string(threads) + " threads, " + std::to_string(layout.size) +
                         " elements of " + std::to_string(sizeof(T)) + " bytes");
  for (const bool nesterov : {false, true}) {
    const check::Note which(nesterov ? "nesterov" : "plain momentum");
    Bench<T> bench(layout, threads);
    bench.set_nesterov(nesterov);
    bench.update_and_check(0, 1, 0);
    bench.update_and_check(1, 1, 1);
    bench.update_and_check(1, 2, 2);
    bench.update_and_check(2, 0, 3);
  }
}

template <class T>
void check_layouts() {
  const std::vector<Layout> layouts{
      layout({}, 0, true),
      layout({1}, 0, true),
      layout({7, 1, 0, 33}, 5, true, {1}),
      layout({7, 1, 0, 33}, 1, false),
      layout({1023, 1025, 2}, 0, false, {0}),
      layout({20001, 3, 16384, 16385}, 13, true, {2}),
      layout({0, 0}, 4, true),
      layout({5, 6, 7}, 2, true, {0, 1, 2}),
  };
  for (int threads = 1; threads <= 4; ++threads)
    for (const auto& one : layouts) check_layout<T>(one, threads);
}

TEST("flat sgd: float32, bit for bit") { check_layouts<float>(); }
TEST("flat sgd: float64, bit for bit") { check_layouts<double>(); }

// More than 8 MiB, most of it without gradient: there new weights are stored past the cache.
template <class T>
void check_past_cache(const std::vector<int64_t>& sizes, int threads, bool nesterov) {
  Bench<T> bench(layout(sizes, 1, false, {1}), threads);
  bench.set_nesterov(nesterov);
  bench.row_of(1)[HyperTable::momentum] = 0;
  bench.update_and_check(0, 1, 0);
  bench.update_and_check(1, 2, 1);
}

TEST("flat sgd: above the threshold of streaming stores, bit for bit") {
  constexpr int64_t kMega = int64_t{1} << 20;
  check_past_cache<float>({100003, 2 * kMega, 77777, 3}, 3, true);
  check_past_cache<double>({50005, kMega, 33333}, 1, false);
}

template <class T>
void check_without_momentum() {
  for (const bool nesterov : {false, true})
    for (int threads = 1; threads <= 2; ++threads) {
      Bench<T> bench(layout({7, 1, 0, 3000}, 5, true, {1}), threads);
      bench.set_nesterov(nesterov);
      bench.expected_momentum[0] = bench.momentum.data()[0] = INFINITY;  // 0 times it is no number
      const std::vector<T> momentum = bench.momentum.values();
      for (int row = 0; row < kRows; ++row) bench.row_of(row)[HyperTable::momentum] = 0;
      bench.update_and_check(0, 1, 0);
      bench.update_and_check(1, 1, 1);
      CHECK(first_difference(bench.momentum.data(), momentum) == "");
    }
}

TEST("flat sgd: without momentum the momentum is neither used nor changed") {
  check_without_momentum<float>();
  check_without_momentum<double>();
}

TEST("flat sgd: zeros, infinities and the smallest numbers, bit for bit") {
  Bench<float> bench(layout({64}, 0, true), 1);
  const float values[] = {0.0f, -0.0f, 1e-45f, -1e-42f, 3.4e38f, -3.4e38f, INFINITY, 1.0f};
  for (int i = 0; i < 64; ++i) {
    bench.gradients[0].data()[i] = values[i % 8];
    bench.expected_weights[0][static_cast<size_t>(i)] = bench.weights[0].data()[i] =
        values[i / 8] == INFINITY ? 1.0f : values[i / 8];
    bench.expected_momentum[static_cast<size_t>(i)] = bench.momentum.data()[i] = 0.0f;
  }
  bench.update_and_check(0, 1, 0);
}

TEST("flat sgd: the gradient table and the hyper-parameters are read when the work runs") {
  Bench<float> bench(layout({100}, 0, true), 2);
  bench.row_of(0)[HyperTable::lr] = 0.25;
  std::vector<float> elsewhere = bench.gradients[0].values();
  for (float& value : elsewhere) value *= 3;
  std::memcpy(bench.gradients[0].data(), elsewhere.data(), 100 * sizeof(float));
  Flat<float> moved(101);  // a dense gradient is aligned to its elements only
  std::memcpy(moved.data() + 1, elsewhere.data(), 100 * sizeof(float));
  bench.table[0] = moved.address() + sizeof(float);
  bench.update_and_check(0, 2, 4);
}

template <class T>
void check_groups() {
  for (int threads = 1; threads <= 3; ++threads) {
    // Segments of several pieces, of none, and without gradient, in each group.
    Bench<T> bench(layout({7, 40000, 33, 0, 5000, 20001, 3}, 5, true, {4}), threads, 1, 3);
    bench.update_and_check(0, 1, 0);
    bench.update_and_check(1, 1, 1);
    bench.update_and_check(1, 2, 2);
  }
}

TEST("flat sgd: every segment has the hyper-parameters of its group, bit for bit") {
  check_groups<float>();
  check_groups<double>();
}

template <class T>
void check_gain() {
  for (int threads = 1; threads <= 2; ++threads) {
    Bench<T> bench(layout({7, 20000, 3}, 5, true, {2}), threads, 1, 2);
    double gain = 1.0;
    bench.gain = &gain;
    bench.sgd = std::make_shared<FlatSgd>(bench.parameters(), threads);
    bench.update_and_check(0, 1, 0);
    gain = 0.3;  // read when the update runs
    bench.update_and_check(1, 2, 1);
    gain = 0;
    bench.update_and_check(2, 2, 2);
  }
}

TEST("flat sgd: gradients are multiplied by shrink times gain, bit for bit") {
  check_gain<float>();
  check_gain<double>();
}

TEST("flat sgd: a gain of 1 changes no bit") {
  const Layout sizes = layout({7, 20000, 3}, 5, true);
  Bench<float> with(sizes, 2), without(sizes, 2);
  const double one = 1.0;
  with.gain = &one;
  with.sgd = std::make_shared<FlatSgd>(with.parameters(), 2);
  for (auto* bench : {&with, &without}) bench->sgd->run_update(0, 1, 0);
  CHECK(first_difference(with.weights[1].data(), without.weights[1].values()) == "");
  CHECK(first_difference(with.momentum.data(), without.momentum.values()) == "");
}

TEST("flat sgd: with a gain that is not finite only the weights move on") {
  for (const double gain : {static_cast<double>(NAN), static_cast<double>(INFINITY)})
    for (const int to : {0, 2}) {
      Bench<double> bench(layout({7, 20000, 3}, 5, true, {2}), 2, 1, 2);
      bench.gain = &gain;
      bench.sgd = std::make_shared<FlatSgd>(bench.parameters(), 2);
      bench.sgd->run_update(0, to, 0);
      bench.expect_copy(0, to);
      bench.check();
      CHECK(bench.progress[0] == to);
      CHECK(bench.progress[1] == 1);
    }
}

template <class T>
void check_copy(const Layout& layout, int threads) {
  Bench<T> bench(layout, threads);
  bench.sgd->run_copy(0, 2);
  bench.expect_copy(0, 2);
  bench.check();
  CHECK(bench.progress[0] == 2);
  CHECK(bench.progress[1] == 0);  // a copy is no update
  bench.sgd->run_copy(2, 2);
  bench.check();
  CHECK(bench.progress[0] == 2);
}

TEST("flat sgd: copy fills a copy and nothing else") {
  for (int threads = 1; threads <= 4; ++threads) {
    check_copy<float>(layout({7, 1, 0, 33, 50000}, 5, false, {1}), threads);
    check_copy<double>(layout({7, 1, 0, 33, 50000}, 5, true), threads);
  }
}

// Two stages with two threads each, on two streams at once; the host looks when all is idle.
TEST("flat sgd: as works of a scheduler") {
  Bench<float> first(layout({5000, 77}, 3, true, {}), 2, 1);
  Bench<double> second(layout({3000}, 0, true), 2, 2);
  {
    cpu::Options options;
    options.max_delay_us = 30;
    Rig rig(2, 2, options);
    std::vector<std::pair<int, int64_t>> actions;
    for (int from = 0; from < kCopies; ++from) {
      const int to = (from + 1) % kCopies;
      for (int stream = 0; stream < 2; ++stream) {
        const auto update =
            stream == 0 ? first.sgd->update(from, to) : second.sgd->update(from, to);
        actions.emplace_back(rig.scheduler.add_action(action(stream, {}, {}, update, "U")), from);
      }
    }
    actions.emplace_back(rig.scheduler.add_action(action(1, {}, {}, second.sgd->copy(0, 1), "C")),
                         0);
    const int tick = rig.scheduler.add_tick(actions);
    for (int64_t i = 0; i < 40; ++i) {
      CHECK(rig.wait_for_room());
      rig.scheduler.submit(tick, i);
      for (int from = 0; from < kCopies; ++from) {
        first.expect_update(from, (from + 1) % kCopies, i + from);
        second.expect_update(from, (from + 1) % kCopies, i + from);
      }
      second.expect_copy(0, 1);
    }
    CHECK(rig.wait_idle());
    first.check();
    second.check();
    CHECK(first.progress[0] == 0);
    CHECK(first.progress[1] == 120);
    CHECK(second.progress[0] == 1);
    CHECK(second.progress[1] == 120);
  }
}

TEST("flat sgd: a work keeps the update alive") {
  Bench<float> bench(layout({10}, 0, true), 3);
  const auto update = bench.sgd->update(0, 1);
  const std::weak_ptr<FlatSgd> watched = bench.sgd;
  bench.sgd.reset();
  CHECK(!watched.expired());
  Rig rig(1);
  const int id = rig.scheduler.add_action(action(0, {}, {}, update));
  rig.scheduler.submit(rig.tick({id}), 0);
  CHECK(rig.wait_idle());
  bench.expect_update(0, 1, 0);
  bench.check();
}

// ---- arguments

TEST("flat sgd: what cannot be right is refused in words") {
  Bench<float> bench(layout({8, 8}, 8, true), 1);
  const auto refuses = [&bench](const std::string& part, auto change) {
    FlatParameters parameters = bench.parameters();
    change(parameters);
    CHECK_THROWS(std::invalid_argument, part, FlatSgd(parameters, 2));
  };
  refuses("must not overlap; one begins at 7, before 8", [](auto& p) { p.segments[1].offset = 7; });
  refuses("must be in order", [](auto& p) { std::swap(p.segments[0], p.segments[1]); });
  refuses("before 0", [](auto& p) { p.segments[0].offset = -1; });
  refuses("segments", [](auto& p) { p.segments[1].size = -8; });
  refuses("is null", [](auto& p) { p.weights[1] = 0; });
  refuses("is null", [](auto& p) { p.weights.clear(); });
  refuses("is null", [](auto& p) { p.momentum = 0; });
  refuses("is null", [](auto& p) { p.gradients = nullptr; });
  refuses("is null", [](auto& p) { p.hyper.data = nullptr; });
  refuses("is null", [](auto& p) { p.progress = nullptr; });
  refuses("no column for stage 1", [](auto& p) { p.hyper.rows = 0; });
  refuses("no column for stage 1", [](auto& p) { p.hyper.columns = 5; });
  refuses("no column for stage 3", [](auto& p) { p.stage = 3; });
  refuses("parameter group 1; there are 1", [](auto& p) { p.segments[1].group = 1; });
  refuses("parameter group -1", [](auto& p) { p.segments[0].group = -1; });
  for (const int copy : {-1, kCopies}) {
    const std::string message =
        "weight copy " + std::to_string(copy) + " does not exist; there are 3";
    CHECK_THROWS(std::invalid_argument, message, bench.sgd->update(copy, 0));
    CHECK_THROWS(std::invalid_argument, message, bench.sgd->update(0, copy));
    CHECK_THROWS(std::invalid_argument, message, bench.sgd->copy(copy, 0));
    CHECK_THROWS(std::invalid_argument, message, bench.sgd->copy(0, copy));
  }
}

TEST("flat sgd: a negative stage is refused") {
  Bench<float> bench(layout({8}, 8, true), 1);
  FlatParameters parameters = bench.parameters();
  parameters.stage = -5;  // its shrinking factor would be read before the table
  CHECK_THROWS(std::invalid_argument, "stage -5", FlatSgd(parameters, 1));
}

TEST("flat sgd: run_update refuses copies that do not exist") {
  Bench<float> bench(layout({8}, 8, true), 1);
  CHECK_THROWS(std::invalid_argument, "weight copy 3", bench.sgd->run_update(0, kCopies, 0));
  CHECK_THROWS(std::invalid_argument, "weight copy -1", bench.sgd->run_copy(-1, 0));
}

}  // namespace
}  // namespace fdg::testing
