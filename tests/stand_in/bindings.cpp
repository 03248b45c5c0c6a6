// What the tests ask the stand-in for, as functions of the extension module.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "cudart.h"
#include "python/extension.h"
#include "races.h"

namespace {

namespace py = pybind11;

// The program calls it without the GIL.
std::function<void()> with_gil(py::function function) {
  const auto shared =
      std::shared_ptr<py::function>(new py::function(std::move(function)), [](py::function* held) {
        py::gil_scoped_acquire gil;
        delete held;
      });
  return [shared] {
    py::gil_scoped_acquire gil;
    (*shared)();
  };
}

void bind(py::module_& m) {
  using stand_in::State;
  py::class_<State>(m, "StandInState")
      .def_readwrite("fail_at", &State::fail_at)
      .def_readwrite("fail_in", &State::fail_in)
      .def_readwrite("lost", &State::lost)
      .def_readwrite("peers_reachable", &State::peers_reachable)
      .def_readwrite("peers_corrupt", &State::peers_corrupt)
      .def_readonly("failed", &State::failed)
      .def_readonly("calls", &State::calls)
      .def_readonly("calls_of", &State::calls_of)
      .def_readonly("violations", &State::violations)
      .def_readonly("alive", &State::alive)
      .def("fail_with",
           [](State& self, int code) { self.fail_code = static_cast<cudaError_t>(code); })
      .def("reset", &State::reset);
  m.def("stand_in_state", &stand_in::state, py::return_value_policy::reference);
  m.def("stand_in_check_stream",
        [](uintptr_t stream) { stand_in::check_stream("work of torch", stream); });
  m.def("stand_in_make_stream", &stand_in::make_stream, py::arg("device"));
  m.def("stand_in_destroy_stream", &stand_in::destroy_stream);
  m.def("stand_in_set_device", &stand_in::set_device);
  m.def("stand_in_current_device", &stand_in::current_device);
  m.def("stand_in_make_graph",
        [](py::function replay) { return stand_in::make_graph(with_gil(std::move(replay))); });
  m.def("stand_in_destroy_graph", &stand_in::destroy_graph);

  namespace races = stand_in::races;
  m.attr("STAND_IN_HOST") = races::kHost;
  m.attr("STAND_IN_DEFAULT_STREAM") = races::kDefaultStream;
  m.def("stand_in_watch_for_races", &races::watch);
  m.def("stand_in_name_stream", &races::name_stream);
  m.def("stand_in_synchronize", &stand_in::synchronize);
  m.def("stand_in_host_waited_for_stream", &races::host_waited_for_stream);
  m.def("stand_in_allocated", [](uintptr_t begin, uintptr_t bytes, uintptr_t owner) {
    return races::allocated({begin, begin + bytes}, owner);
  });
  m.def("stand_in_given_back", &races::given_back);
  using Ranges = std::vector<std::pair<uintptr_t, uintptr_t>>;
  m.def("stand_in_touch",
        [](uintptr_t stream, const Ranges& reads, const Ranges& writes, const std::string& name) {
          const auto as_ranges = [](const Ranges& pairs) {
            std::vector<races::Range> ranges;
            for (const auto& [begin, end] : pairs) ranges.push_back({begin, end});
            return ranges;
          };
          races::touch(stream, as_ranges(reads), as_ranges(writes), name);
        });
}

struct Register {
  Register() { fdg::Extension::get().bindings.push_back(&bind); }
} const registered;

}  // namespace
