// Works that are Python callables, and what holding and releasing the GIL around them takes.
//
// The GIL is released wherever the host may wait for a stream or join its thread, because an action
// may be a Python callable that needs it.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <memory>
#include <set>
#include <utility>

#include "../action.h"

namespace fdg {

namespace py = pybind11;

// Python ends threads that want the GIL once it is shutting down, in the midst of C++ frames, which
// takes the process down. So the end of the interpreter waits until no native call is without the
// GIL and no scheduler is left; from then on calls keep it. Touched with the GIL only.
struct AtExit {
  bool ended = false;
  int calls_without_gil = 0;
  std::atomic<int> schedulers{0};
  // By thread: what a fit calls of torch gives up and takes the GIL too, as does freeing a tensor.
  bool begun = false;
  std::multiset<unsigned long> fits;
  std::set<unsigned long> leaving;  // whose fit ended since: what it held is freed a little later
};
AtExit& at_exit();

class GilRelease {
 public:
  GilRelease() {
    if (at_exit().ended) return;
    ++at_exit().calls_without_gil;
    saved_ = PyEval_SaveThread();
  }
  ~GilRelease() {
    if (!saved_) return;
    PyEval_RestoreThread(saved_);
    --at_exit().calls_without_gil;
  }
  GilRelease(const GilRelease&) = delete;
  GilRelease& operator=(const GilRelease&) = delete;

 private:
  PyThreadState* saved_ = nullptr;
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
