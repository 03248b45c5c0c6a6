#include "python_work.h"

#include <string>

namespace fdg {
namespace {

thread_local int python_work_depth = 0;

}  // namespace

AtExit& at_exit() {
  static auto* state = new AtExit();  // never destroyed: daemon threads may outlive statics
  static int made_at = forks();
  // A child of a fork, which is here before it can start a thread of ours.
  if (made_at != forks()) {
    made_at = forks();
    state = new AtExit();
  }
  return *state;
}

PythonWork::~PythonWork() {
  py::gil_scoped_acquire gil;
  function_ = py::function();
}

void PythonWork::run(Stream&, const Invocation& at) {
  py::gil_scoped_acquire gil;
  struct Depth {
    Depth() { ++python_work_depth; }
    ~Depth() { --python_work_depth; }
  } const depth;
  function_(at.batch);
}

bool PythonWork::is_running() { return python_work_depth > 0; }

std::shared_ptr<Work> as_work(const py::object& work) {
  if (work.is_none()) return nullptr;
  if (py::isinstance<Work>(work)) return work.cast<std::shared_ptr<Work>>();
  if (py::isinstance<py::function>(work))
    return std::make_shared<PythonWork>(work.cast<py::function>());
  throw py::type_error("work must be a function, a native work or None, got " +
                       py::repr(work).cast<std::string>());
}

}  // namespace fdg
