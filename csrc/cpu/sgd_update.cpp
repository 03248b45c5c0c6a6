#include "sgd_update.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../sgd.h"
#include "openmp.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fdg::cpu {
namespace {

// New weights on their way past the cache are gathered in blocks so small that their stores
// alternate with the loads of the next; in large blocks the two come in bursts.
constexpr int kBlock = 64;
constexpr int64_t kPiece = 256 * kBlock;
// A cache line of the smallest element. Threads share no line.
constexpr int64_t kLine = 16;
// Above this size the new weights would push everything else out of the cache before the forward
// reads them, so they are stored past it; an ordinary store would also read the line first.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

template <class T>
struct Span {
  const T* weights;
  const T* gradients;
  T* momentum;
  T* out;
  int64_t size;
};

#if defined(__x86_64__)
// `bytes` is a multiple of 16 and `to` is aligned to 16. An ordinary store would read the line
// first.
inline void store_past_cache(void* to, const void* from, size_t bytes) {
  auto* out = static_cast<__m128i*>(to);
  const auto* in = static_cast<const __m128i*>(from);
  for (size_t i = 0; i < bytes / 16; ++i) _mm_stream_si128(out + i, _mm_load_si128(in + i));
}
void finish_stores() { _mm_sfence(); }
#else
inline void store_past_cache(void* to, const void* from, size_t bytes) {
  std::memcpy(to, from, bytes);
}
void finish_stores() {}
#endif

// Elements [begin, end), the new weights to `to[0]` and on. `to` may be the weights themselves: an
// element is read before it is written and touched by no other, so no iteration depends on another.
template <bool nesterov, bool remembers, class T>
inline __attribute__((always_inline)) void update_range(const Span<T>& s,
                                                        const SgdCoefficients<T>& coefficients,
                                                        int64_t begin, int64_t end, T* to) {
  // Locals, which no store through `to` can change.
  const SgdCoefficients<T> c = coefficients;
  const T* const w = s.weights + begin;
  const T* const g = s.gradients + begin;
  T* const v = s.momentum + begin;
  const int64_t size = end - begin;
#if defined(__clang__)
#pragma clang loop vectorize(assume_safety)
#else
#pragma GCC ivdep
#endif
  for (int64_t i = 0; i < size; ++i) {
    T velocity = v[i];
    to[i] = sgd_step<nesterov, remembers>(w[i], g[i], velocity, c);
    if (remembers) v[i] = velocity;
  }
}

template <bool nesterov, bool remembers, class T>
inline __attribute__((always_inline)) void update_span(const Span<T>& s,
                                                       const SgdCoefficients<T>& c,
                                                       bool past_cache) {
  int64_t done = 0;
  if (past_cache && reinterpret_cast<uintptr_t>(s.out) % 16 == 0)
    for (; done + kBlock <= s.size; done += kBlock) {
      alignas(64) T block[kBlock];
      update_range<nesterov, remembers>(s, c, done, done + kBlock, block);
      store_past_cache(s.out + done, block, sizeof block);
    }
  update_range<nesterov, remembers>(s, c, done, s.size, s.out + done);
}

template <class T>
inline __attribute__((always_inline)) void update_by_rule(const Span<T>& s, bool nesterov,
                                                          const SgdCoefficients<T>& c,
                                                          bool past_cache) {
  if (c.momentum == T(0))
    update_span<false, false>(s, c, past_cache);
  else if (nesterov)
    update_span<true, true>(s, c, past_cache);
  else
    update_span<false, true>(s, c, past_cache);
}

// What a parameter group's hyper-parameters ask of one batch's update.
template <class T>
struct GroupRule {
  SgdCoefficients<T> coefficients;
  bool nesterov;
};

template <class T>
using UpdateFunction = void (*)(const Span<T>&, bool, const SgdCoefficients<T>&, bool);

template <class T>
void update_baseline(const Span<T>& s, bool nesterov, const SgdCoefficients<T>& c,
                     bool past_cache) {
  update_by_rule(s, nesterov, c, past_cache);
}

#if defined(__x86_64__)
template <class T>
__attribute__((target("avx2,fma"))) void update_avx2(const Span<T>& s, bool nesterov,
                                                     const SgdCoefficients<T>& c, bool past_cache) {
  update_by_rule(s, nesterov, c, past_cache);
}
#endif

template <class T>
UpdateFunction<T> best_update() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return update_avx2<T>;
#endif
  return update_baseline<T>;
}

class UpdateWork final : public Work {
 public:
  UpdateWork(std::shared_ptr<FlatSgd> sgd, int from, int to)
      : sgd_(std::move(sgd)), from_(from), to_(to) {}
  void run(Stream&, const Invocation& at) override { sgd_->run_update(from_, to_, at.batch); }

 private:
  const std::shared_ptr<FlatSgd> sgd_;
  const int from_;
  const int to_;
};

class CopyWork final : public Work {
 public:
  CopyWork(std::shared_ptr<FlatSgd> sgd, int from, int to)
      : sgd_(std::move(sgd)), from_(from), to_(to) {}
  void run(Stream&, const Invocation&) override { sgd_->run_copy(from_, to_); }

 private:
  const std::shared_ptr<FlatSgd> sgd_;
  const int from_;
  const int to_;
};

}  // namespace

FlatSgd::FlatSgd(FlatParameters parameters, int threads) : parameters_(std::move(parameters)) {
  parameters_.check();
  const int64_t end = parameters_.size();
  stream_stores_ = end * item_size(parameters_.dtype) > kStreamBytes;

  threads = std::max(1, threads);
  pieces_.resize(static_cast<size_t>(threads));
  // Divided by place, so that the bounds between threads fall on lines.
  int64_t share = (end + threads - 1) / threads;
  share = std::max(kLine, (share + kLine - 1) / kLine * kLine);
  for (size_t segment = 0; segment < parameters_.segments.size(); ++segment)
    for (int64_t begin = 0; begin < parameters_.segments[segment].size;) {
      const int64_t place = parameters_.segments[segment].offset + begin;
      const auto thread = static_cast<size_t>(place / share);
      const int64_t left_of_share = (static_cast<int64_t>(thread) + 1) * share - place;
      const int64_t size =
          std::min({kPiece, parameters_.segments[segment].size - begin, left_of_share});
      pieces_[thread].push_back({segment, begin, size});
      begin += size;
    }
}

std::shared_ptr<Work> FlatSgd::update(int from, int to) {
  parameters_.check_copy(from);
  parameters_.check_copy(to);
  return std::make_shared<UpdateWork>(shared_from_this(), from, to);
}

std::shared_ptr<Work> FlatSgd::copy(int from, int to) {
  parameters_.check_copy(from);
  parameters_.check_copy(to);
  return std::make_shared<CopyWork>(shared_from_this(), from, to);
}

template <class T>
void FlatSgd::update_typed(int from, int to, int64_t batch) {
  const double gain = parameters_.gain ? *reinterpret_cast<const double*>(parameters_.gain) : 1.0;
  if (!std::isfinite(gain)) {
    copy_weights(from, to);
    return;
  }
  std::vector<GroupRule<T>> rules;
  for (int64_t group = 0; group < parameters_.hyper.groups; ++group) {
    const double* block = parameters_.hyper.block(batch, group);
    const T shrink = static_cast<T>(block[HyperTable::first_shrink + parameters_.stage]);
    rules.push_back({{
                         shrink * static_cast<T>(gain),
                         static_cast<T>(block[HyperTable::weight_decay]),
                         static_cast<T>(block[HyperTable::momentum]),
                         static_cast<T>(block[HyperTable::lr]),
                     },
                     block[HyperTable::nesterov] != 0});
  }
  const auto* source = reinterpret_cast<const T*>(parameters_.weights[from]);
  auto* target = reinterpret_cast<T*>(parameters_.weights[to]);
  auto* momentum = reinterpret_cast<T*>(parameters_.momentum);
  const bool past_cache = stream_stores_ && from != to;
  static const UpdateFunction<T> update = best_update<T>();
  run_on_team(static_cast<int>(pieces_.size()), [&](int thread) {
    for (const Piece& piece : pieces_[thread]) {
      const Segment& segment = parameters_.segments[piece.segment];
      const int64_t at = segment.offset + piece.begin;
      const GroupRule<T>& rule = rules[static_cast<size_t>(segment.group)];
      const auto* gradient = reinterpret_cast<const T*>(parameters_.gradients[piece.segment]);
      if (gradient)
        update({source + at, gradient + piece.begin, momentum + at, target + at, piece.size},
               rule.nesterov, rule.coefficients, past_cache);
      else if (from != to)
        std::memcpy(target + at, source + at, static_cast<size_t>(piece.size) * sizeof(T));
    }
    if (past_cache) finish_stores();
  });
}

void FlatSgd::run_update(int from, int to, int64_t batch) {
  parameters_.check_copy(from);
  parameters_.check_copy(to);
  if (parameters_.dtype == Dtype::float32)
    update_typed<float>(from, to, batch);
  else
    update_typed<double>(from, to, batch);
  parameters_.progress[0] = to;
  ++parameters_.progress[1];
}

void FlatSgd::run_copy(int from, int to) {
  parameters_.check_copy(from);
  parameters_.check_copy(to);
  if (from == to) return;
  copy_weights(from, to);
  parameters_.progress[0] = to;
}

void FlatSgd::copy_weights(int from, int to) {
  if (from == to) return;
  const int64_t item = item_size(parameters_.dtype);
  const auto* source = reinterpret_cast<const char*>(parameters_.weights[from]);
  auto* target = reinterpret_cast<char*>(parameters_.weights[to]);
  run_on_team(static_cast<int>(pieces_.size()), [&](int thread) {
    for (const Piece& piece : pieces_[thread]) {
      const int64_t at = (parameters_.segments[piece.segment].offset + piece.begin) * item;
      std::memcpy(target + at, source + at, static_cast<size_t>(piece.size * item));
    }
  });
}

}  // namespace fdg::cpu
