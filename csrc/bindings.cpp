// The extension module fdg_cuda._core. Everything here is called with the GIL held.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <iterator>
#include <memory>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "action.h"
#include "cpu/allocator.h"
#include "cpu/cpu_stream.h"
#include "cpu/openmp.h"
#include "cpu/sgd_update.h"
#include "flat_parameters.h"
#include "forks.h"
#include "python/extension.h"
#include "python/python_work.h"
#include "scheduler.h"
#include "span.h"
#include "trace/happens_before.h"
#include "trace/simulation.h"
#include "trace/trace_stream.h"

namespace py = pybind11;

namespace {

using fdg::at_exit;
using fdg::AtExit;
using fdg::GilRelease;
using fdg::cpu::FlatSgd;
using fdg::trace::Extent;
using fdg::trace::PeriodicProgram;
using fdg::trace::PeriodicStep;
using fdg::trace::RingAccess;
using fdg::trace::Simulation;

// How long the host waits before it looks whether a signal (Ctrl-C) came in: less than the two
// ticks within which training stops, but for nets so small that nobody would notice.
constexpr std::chrono::milliseconds kSignalInterval{2};

// At the end of the interpreter, for a fit in another thread to end, and behind one for its thread.
constexpr std::chrono::seconds kFitPatience{10};
constexpr std::chrono::seconds kFreeingPatience{1};

void refuse_at_exit() {
  if (at_exit().begun) throw std::runtime_error("the interpreter is ending");
}

void flush_output() {
  try {
    for (const char* name : {"stdout", "stderr"})
      py::module_::import("sys").attr(name).attr("flush")();
  } catch (const py::error_already_set&) {  // closed: nothing to flush
  }
}

// What a signal's handler raised while the interpreter's end waits: there is nobody left whom an
// exception would stop, so Ctrl-C and sys.exit() end the process here.
void end_process_or_say(py::error_already_set error) {
  if (error.matches(PyExc_KeyboardInterrupt)) {
    flush_output();
    std::signal(SIGINT, SIG_DFL);
    std::raise(SIGINT);
  } else if (error.matches(PyExc_SystemExit)) {
    const py::object code = error.value().attr("code");
    flush_output();
    std::_Exit(py::isinstance<py::int_>(code) ? code.cast<int>() : !code.is_none());
  } else {
    error.discard_as_unraisable("at exit");
  }
}

uint64_t fit_begins() {
  refuse_at_exit();
  return *at_exit().fits.insert(PyThreadState_GetID(PyThreadState_Get()));
}

void fit_ends(uint64_t thread) {
  const auto found = at_exit().fits.find(thread);
  if (found == at_exit().fits.end()) {
    if (fdg::went_through_fork()) return;  // in the midst of the parent's
    throw std::logic_error("no such fit has begun");
  }
  at_exit().fits.erase(found);
  const auto now = AtExit::Clock::now();
  auto& left = at_exit().left;
  for (auto each = left.begin(); each != left.end();) {
    each = each->second + kFreeingPatience < now ? left.erase(each) : std::next(each);
  }
  left[thread] = now;
}

// Freed memory is kept until this is closed; in the process that made it, children of a fork keep
// nothing. Its destructor is no Python, in which a signal would be delivered and lost.
class FreedMemory {
 public:
  FreedMemory() { fdg::cpu::keep_freed_memory(); }
  ~FreedMemory() { close(); }
  FreedMemory(const FreedMemory&) = delete;
  FreedMemory& operator=(const FreedMemory&) = delete;

  void close() {
    if (!std::exchange(keeps_, false) || forks_ != fdg::forks()) return;
    GilRelease no_gil;
    fdg::cpu::return_freed_memory();
  }

 private:
  bool keeps_ = true;
  const int forks_ = fdg::forks();
};

class PyScheduler {
 public:
  PyScheduler(const std::string& backend, const std::vector<std::string>& streams,
              int max_ticks_in_flight, const fdg::BackendOptions& options) {
    refuse_at_exit();
    std::unique_ptr<fdg::Scheduler> scheduler;
    {
      GilRelease no_gil;
      scheduler = std::make_unique<fdg::Scheduler>(make_backend(backend, options), streams,
                                                   max_ticks_in_flight);
    }
    ++at_exit().schedulers;
    scheduler_ = {scheduler.release(), &PyScheduler::end};
    all().insert(this);
  }
  PyScheduler(const PyScheduler&) = delete;
  PyScheduler& operator=(const PyScheduler&) = delete;

  ~PyScheduler() {
    all().erase(this);
    close();
  }

  // Returns when the streams' threads have ended; but where another Python thread is inside a call,
  // or this is called from a stream, they end soon after.
  void close() {
    const auto closed = std::exchange(scheduler_, nullptr);
    if (!closed) return;
    if (forks_ == fdg::forks()) return closed->cancel();
    // A child of a fork: its threads are the parent's, and would be waited for. Never destroyed.
    new std::shared_ptr<fdg::Scheduler>(closed);
  }

  static void close_all() {
    at_exit().begun = true;
    is_closing_all = true;
    const auto begin = AtExit::Clock::now();
    while (true) {
      const std::set<PyScheduler*> known = all();
      for (PyScheduler* scheduler : known)
        if (all().count(scheduler) > 0) scheduler->close();
      const auto now = AtExit::Clock::now();
      if (at_exit().schedulers == 0 && at_exit().calls_without_gil == 0 &&
          !is_fit_awaited(begin, now))
        break;
      if (PyErr_CheckSignals() != 0) end_process_or_say(py::error_already_set());
      py::gil_scoped_release no_gil;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    at_exit().ended = true;
  }

  // Held by every call for as long as it lasts: another Python thread may close the scheduler.
  std::shared_ptr<fdg::Scheduler> open() const {
    if (!scheduler_) throw std::runtime_error("this scheduler is closed");
    if (forks_ != fdg::forks())
      throw std::runtime_error("this scheduler's threads are in the process that forked this one");
    return scheduler_;
  }

  int add_action(std::string code, int stage, int slot, int stream, std::vector<int> reads,
                 std::vector<int> writes, const py::object& work) {
    fdg::Action action{std::move(code),   stage, slot, stream, std::move(reads), std::move(writes),
                       fdg::as_work(work)};
    return open()->add_action(std::move(action));
  }

  void submit(int tick_id, int64_t tick) {
    const auto scheduler = open();
    wait(*scheduler, [&] { return scheduler->wait_for_room(kSignalInterval); });
    GilRelease no_gil;
    scheduler->submit(tick_id, tick);
  }

  void synchronize() {
    const auto scheduler = open();
    wait(*scheduler, [&] { return scheduler->wait_idle(kSignalInterval); });
  }

  // Of a scheduler that has failed or was cancelled too.
  std::vector<fdg::Span> take_spans() {
    const auto scheduler = open();
    wait_for(*scheduler, [&] { return scheduler->drain(kSignalInterval); });
    return scheduler->take_spans();
  }

  std::shared_ptr<fdg::trace::Log> log() const {
    if (!log_) throw std::runtime_error("only the trace backend keeps a log");
    return log_;
  }

 private:
  // Those that exist. Touched with the GIL only, and never destroyed, as AtExit.
  static std::set<PyScheduler*>& all() {
    static auto* const schedulers = new std::set<PyScheduler*>();
    return *schedulers;
  }

  std::unique_ptr<fdg::Backend> make_backend(const std::string& name,
                                             const fdg::BackendOptions& options) {
    if (name == "trace") {
      log_ = std::make_shared<fdg::trace::Log>();
      return std::make_unique<fdg::trace::TraceBackend>(log_);
    }
    const auto& backends = fdg::Extension::get().backends;
    const auto found = backends.find(name);
    if (found != backends.end()) return found->second(options);
    std::string known = "'trace'";
    for (const auto& entry : backends) known += ", '" + entry.first + "'";
    throw std::invalid_argument("unknown backend '" + name + "'; this build has " + known);
  }

  // Whether a thread still has a fit, which ends soon once its scheduler was closed, or frees what
  // it had. Neither is waited for for ever: it may hang, or go on with something else.
  static bool is_fit_awaited(AtExit::Clock::time_point begin, AtExit::Clock::time_point now) {
    for (PyThreadState* state = PyInterpreterState_ThreadHead(PyInterpreterState_Get());
         state != nullptr; state = PyThreadState_Next(state)) {
      const uint64_t thread = PyThreadState_GetID(state);
      if (at_exit().fits.count(thread) > 0 && now < begin + kFitPatience) return true;
      const auto found = at_exit().left.find(thread);
      if (found != at_exit().left.end() && now < found->second + kFreeingPatience) return true;
    }
    return false;
  }

  // A Python error can be handed back to Python only once, so after that a plain one is thrown.
  template <class Ready>
  void wait(const fdg::Scheduler& scheduler, const Ready& ready) {
    if (failed_) throw std::runtime_error("this scheduler has failed before; make a new one");
    wait_for(scheduler, [&] {
      try {
        return ready();
      } catch (...) {
        failed_ = true;
        throw;
      }
    });
  }

  template <class Ready>
  void wait_for(const fdg::Scheduler& scheduler, const Ready& ready) {
    while (!without_gil(ready))
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (scheduler_.get() != &scheduler)
      throw std::runtime_error("this scheduler was closed by another thread");
  }

  template <class Function>
  static auto without_gil(const Function& function) {
    GilRelease no_gil;
    return function();
  }

  // Joins the streams' threads, which may be waiting for the GIL; not on one of them, nor where the
  // interpreter's end waits, which looks whether a signal came in.
  static void end(fdg::Scheduler* scheduler) {
    const auto join = [scheduler] {
      delete scheduler;
      --at_exit().schedulers;
    };
    GilRelease no_gil;
    if (fdg::PythonWork::is_running() || is_closing_all)
      std::thread(join).detach();
    else
      join();
  }

  static thread_local bool is_closing_all;

  bool failed_ = false;
  const int forks_ = fdg::forks();
  std::shared_ptr<fdg::trace::Log> log_;
  std::shared_ptr<fdg::Scheduler> scheduler_;
};

thread_local bool PyScheduler::is_closing_all = false;

// Between two looks whether a signal (Ctrl-C) came in: some milliseconds.
constexpr int64_t kActionsSimulatedAtOnce = 100'000;

std::unique_ptr<Simulation> simulate(const PeriodicProgram& program, const Extent& extent) {
  auto simulation = std::make_unique<Simulation>(program, extent);
  const auto goes_on = [&] {
    GilRelease no_gil;
    return simulation->advance(kActionsSimulatedAtOnce);
  };
  while (goes_on())
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  return simulation;
}

std::shared_ptr<FlatSgd> make_flat_sgd(const std::string& dtype, int stage,
                                       const fdg::PySegments& segments,
                                       std::vector<uintptr_t> weights, uintptr_t momentum,
                                       uintptr_t gradients, const fdg::PyHyperTable& hyper,
                                       uintptr_t gain, uintptr_t progress, int threads) {
  if (threads < 1)
    throw std::invalid_argument("threads must be at least 1, got " + std::to_string(threads));
  return std::make_shared<FlatSgd>(
      fdg::make_flat_parameters(dtype, stage, segments, std::move(weights), momentum, gradients,
                                hyper, gain, progress),
      threads);
}

std::unique_ptr<fdg::Backend> make_cpu_backend(const fdg::BackendOptions& options) {
  fdg::cpu::Options cpu;
  cpu.on_thread_start = [] { return std::make_shared<fdg::ThreadState>(); };
  cpu.delay_seed = options.delay_seed;
  cpu.max_delay_us = options.max_delay_us;
  return std::make_unique<fdg::cpu::CpuBackend>(std::move(cpu));
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "The C++ core of fdg_cuda: streams, events, scheduler and fused updates.";
  fdg::Extension::get().backends["cpu"] = &make_cpu_backend;
  py::list backends;
  backends.append("trace");
  for (const auto& entry : fdg::Extension::get().backends) backends.append(entry.first);
  m.attr("backends") = py::tuple(backends);

  py::module_::import("atexit").attr("register")(py::cpp_function(&PyScheduler::close_all));

  m.def("fit_begins", &fit_begins);
  m.def("fit_ends", &fit_ends, py::arg("thread"));
  m.def("keeps_blocks", &fdg::cpu::keeps_blocks);
  m.def("kept_bytes", &fdg::cpu::kept_bytes);
  m.def("keep_freed_memory", &fdg::cpu::keep_freed_memory);
  m.def("openmp_threads", &fdg::cpu::openmp_threads);
  m.def("set_openmp_threads", &fdg::cpu::set_openmp_threads, py::arg("threads"));
  m.def("end_idle_openmp_threads", &fdg::cpu::end_idle_openmp_threads,
        py::call_guard<GilRelease>());
  py::class_<FreedMemory>(m, "FreedMemory").def(py::init<>()).def("close", &FreedMemory::close);

  py::class_<fdg::Work, std::shared_ptr<fdg::Work>>(m, "Work");

  py::class_<FlatSgd, std::shared_ptr<FlatSgd>>(m, "FlatSgd")
      .def(py::init(&make_flat_sgd), py::kw_only(), py::arg("dtype"), py::arg("stage"),
           py::arg("segments"), py::arg("weights"), py::arg("momentum"), py::arg("gradients"),
           py::arg("hyper"), py::arg("gain"), py::arg("progress"), py::arg("threads"))
      .def("update", &FlatSgd::update, py::arg("source"), py::arg("target"))
      .def("copy", &FlatSgd::copy, py::arg("source"), py::arg("target"))
      .def("run_update", &FlatSgd::run_update, py::arg("source"), py::arg("target"),
           py::arg("batch"), py::call_guard<GilRelease>());

  py::class_<PyScheduler>(m, "Scheduler")
      .def(py::init([](const std::string& backend, const std::vector<std::string>& streams,
                       int max_ticks_in_flight, std::vector<int> devices,
                       std::vector<uintptr_t> handles, uint64_t delay_seed, int max_delay_us) {
             return std::make_unique<PyScheduler>(
                 backend, streams, max_ticks_in_flight,
                 fdg::BackendOptions{std::move(devices), std::move(handles), delay_seed,
                                     max_delay_us});
           }),
           py::arg("backend"), py::arg("streams"), py::kw_only(),
           py::arg("max_ticks_in_flight") = 4, py::arg("devices") = std::vector<int>(),
           py::arg("handles") = std::vector<uintptr_t>(), py::arg("delay_seed") = 0,
           py::arg("max_delay_us") = 0)
      .def(
          "add_buffer",
          [](PyScheduler& self, std::string name, bool shared) {
            return self.open()->add_buffer(std::move(name), shared);
          },
          py::arg("name"), py::kw_only(), py::arg("shared"))
      .def("add_action", &PyScheduler::add_action, py::kw_only(), py::arg("code"), py::arg("stage"),
           py::arg("slot"), py::arg("stream"), py::arg("reads"), py::arg("writes"), py::arg("work"))
      .def(
          "add_tick",
          [](PyScheduler& self, std::vector<std::pair<int, int64_t>> actions) {
            return self.open()->add_tick(std::move(actions));
          },
          py::arg("actions"))
      .def("submit", &PyScheduler::submit, py::arg("tick_id"), py::arg("tick"))
      .def("synchronize", &PyScheduler::synchronize)
      .def("cancel", [](PyScheduler& self) { self.open()->cancel(); })
      .def("close", &PyScheduler::close)
      .def(
          "stream_handle",
          [](PyScheduler& self, int stream) { return self.open()->stream_handle(stream); },
          py::arg("stream"))
      .def(
          "record_spans", [](PyScheduler& self, bool on) { self.open()->record_spans(on); },
          py::arg("on"))
      .def("take_spans", &PyScheduler::take_spans)
      .def("busy_seconds", [](PyScheduler& self) { return self.open()->busy_seconds(); })
      .def_property_readonly("ticks_in_flight",
                             [](PyScheduler& self) {
                               const auto scheduler = self.open();
                               scheduler->retire();
                               return scheduler->ticks_in_flight();
                             })
      .def_property_readonly("buffer_names",
                             [](PyScheduler& self) { return self.open()->buffer_names(); })
      .def("operations", [](const PyScheduler& self) { return self.log()->operations; });

  py::class_<fdg::Span>(m, "Span")
      .def_readonly("code", &fdg::Span::code)
      .def_readonly("stage", &fdg::Span::stage)
      .def_readonly("slot", &fdg::Span::slot)
      .def_readonly("stream", &fdg::Span::stream)
      .def_readonly("tick", &fdg::Span::tick)
      .def_readonly("batch", &fdg::Span::batch)
      .def_readonly("begin_s", &fdg::Span::begin_s)
      .def_readonly("end_s", &fdg::Span::end_s);

  using fdg::trace::Operation;
  using fdg::trace::OperationKind;
  py::enum_<OperationKind>(m, "OperationKind")
      .value("run", OperationKind::run)
      .value("record", OperationKind::record)
      .value("wait", OperationKind::wait);
  py::class_<Operation>(m, "Operation")
      .def(py::init<>())
      .def_readwrite("kind", &Operation::kind)
      .def_readwrite("stream", &Operation::stream)
      .def_readwrite("code", &Operation::code)
      .def_readwrite("stage", &Operation::stage)
      .def_readwrite("slot", &Operation::slot)
      .def_readwrite("tick", &Operation::tick)
      .def_readwrite("batch", &Operation::batch)
      .def_readwrite("reads", &Operation::reads)
      .def_readwrite("writes", &Operation::writes)
      .def_readwrite("event", &Operation::event)
      .def_readwrite("ticket", &Operation::ticket)
      .def("__repr__", &Operation::describe);
  py::class_<fdg::trace::Report>(m, "HappensBeforeReport")
      .def_readonly("races", &fdg::trace::Report::races)
      .def_readonly("deadlocks", &fdg::trace::Report::deadlocks)
      .def_readonly("reads_from", &fdg::trace::Report::reads_from)
      .def_property_readonly("clean", &fdg::trace::Report::clean);
  m.def("check_happens_before", &fdg::trace::check_happens_before, py::arg("operations"),
        py::call_guard<GilRelease>());

  py::class_<PeriodicStep>(m, "PeriodicStep")
      .def(py::init([](int stream, double duration_s, int64_t offset, int64_t every,
                       std::vector<RingAccess> reads, std::vector<RingAccess> writes) {
             return PeriodicStep{stream, duration_s,       offset,
                                 every,  std::move(reads), std::move(writes)};
           }),
           py::kw_only(), py::arg("stream"), py::arg("duration_s"), py::arg("offset"),
           py::arg("every"), py::arg("reads"), py::arg("writes"));
  py::class_<Simulation>(m, "SimulatedTimes")
      .def_property_readonly("tick_ends_s", &Simulation::tick_ends_s)
      .def_property_readonly("stream_busy_s", &Simulation::stream_busy_s)
      .def_property_readonly("spans", &Simulation::spans);
  m.def(
      "simulate",
      [](std::vector<PeriodicStep> steps, std::vector<int64_t> rings, int streams, int64_t batches,
         int64_t ticks, std::optional<int> max_ticks_in_flight,
         std::pair<int64_t, int64_t> window) {
        return simulate({streams, std::move(rings), std::move(steps)},
                        {batches, ticks, max_ticks_in_flight, window.first, window.second});
      },
      py::arg("steps"), py::kw_only(), py::arg("rings"), py::arg("streams"), py::arg("batches"),
      py::arg("ticks"), py::arg("max_ticks_in_flight"), py::arg("window"));

  for (const auto bind : fdg::Extension::get().bindings) bind(m);
}
