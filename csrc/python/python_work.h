// Works that are Python callables, and what holding and releasing the GIL around them takes.
//
// The GIL is released wherever the host may wait for a stream or join its thread, because an action
// may be a Python callable that needs it.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <utility>

#include "../action.h"
#include "../forks.h"

namespace fdg {

namespace py = pybind11;

// Python ends threads that want the GIL once it is shutting down, in the midst of C++ frames, which
// takes the process down. So the end of the interpreter waits until no native call is without the
// GIL and no scheduler is left; from then on calls keep it. Touched with the GIL only. A child of a
// fork has one of its own: it has none of the threads that are counted in its parent's.
//
// A fit in another thread (or another use of stages that runs the model) ends by an error then. But
// what it called of torch takes the GIL too, and so does freeing its tensors, a little later.
struct AtExit {
  using Clock = std::chrono::steady_clock;

  bool begun = false;
  bool ended = false;
  int calls_without_gil = 0;
  std::atomic<int> schedulers{0};
  // Numbers of Python's thread states: an operating system's thread may get the name of a dead one.
  std::multiset<uint64_t> fits;
  std::map<uint64_t, Clock::time_point> left;  // of threads, their last fit, when it was
};
AtExit& at_exit();

class GilRelease {
 public:
  GilRelease() {
    if (at_exit().ended) return;
    forks_ = forks();
    ++at_exit().calls_without_gil;
    saved_ = PyEval_SaveThread();
  }
  ~GilRelease() {
    if (!saved_) return;
    PyEval_RestoreThread(saved_);
    if (forks_ == forks()) --at_exit().calls_without_gil;
  }
  GilRelease(const GilRelease&) = delete;
  GilRelease& operator=(const GilRelease&) = delete;

 private:
  PyThreadState* saved_ = nullptr;
  int forks_ = 0;
};

// Called with the batch's number. Destroyed with the GIL, wherever the last reference is dropped.
class PythonWork final : public Work {
 public:
  explicit PythonWork(py::function function) : function_(std::move(function)) {}
  ~PythonWork() override;
  void run(Stream& stream, const Invocation& at) override;

  // Whether this thread is inside of one, as a stream.
  static bool is_running();

 private:
  py::function function_;
};

// A function, a native work or None (null). Throws TypeError for anything else.
std::shared_ptr<Work> as_work(const py::object& work);

// Keeps one Python thread state for a worker's whole life: making one anew for every callable costs
// more than an empty callable, and would lose the thread's Python-side state.
class ThreadState {
 public:
  ThreadState()
      : acquired_(std::make_unique<py::gil_scoped_acquire>()), saved_(PyEval_SaveThread()) {}
  ~ThreadState() {
    PyEval_RestoreThread(saved_);
    acquired_.reset();
  }
  ThreadState(const ThreadState&) = delete;
  ThreadState& operator=(const ThreadState&) = delete;

 private:
  std::unique_ptr<py::gil_scoped_acquire> acquired_;
  PyThreadState* saved_;
};

}  // namespace fdg
