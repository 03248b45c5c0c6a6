// The cuda backend's part of the extension module.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../python/extension.h"
#include "../python/python_work.h"
#include "copy_work.h"
#include "cuda_sgd.h"
#include "cuda_stream.h"
#include "graph_work.h"
#include "peer.h"

namespace fdg::cuda {
namespace {

std::unique_ptr<Backend> make_cuda_backend(const BackendOptions& options) {
  Options cuda;
  cuda.devices = options.devices;
  cuda.handles = options.handles;
  cuda.delay_seed = options.delay_seed;
  cuda.max_delay_us = options.max_delay_us;
  return std::make_unique<CudaBackend>(std::move(cuda));
}

using PyWord = std::pair<uintptr_t, int64_t>;  // address, rows

Word as_word(const PyWord& word) {
  return {reinterpret_cast<const uint64_t*>(word.first), word.second};
}

std::shared_ptr<CudaSgd> make_sgd(const std::string& dtype, const std::string& gradient_dtype,
                                  int stage, const PySegments& segments,
                                  std::vector<uintptr_t> weights, uintptr_t momentum,
                                  uintptr_t gradients, const PyHyperTable& hyper, uintptr_t gain,
                                  uintptr_t progress, int device, int slots, int ticks_in_flight) {
  SgdOptions options;
  options.device = device;
  options.slots = slots;
  options.ticks_in_flight = ticks_in_flight;
  if (gradient_dtype == "bfloat16")
    options.gradient_dtype = GradientDtype::bfloat16;
  else if (gradient_dtype == "float16")
    options.gradient_dtype = GradientDtype::float16;
  else if (gradient_dtype != dtype)
    throw std::invalid_argument(
        "gradient_dtype must be 'bfloat16', 'float16' or that of the "
        "weights, got '" +
        gradient_dtype + "'");
  FlatParameters parameters = make_flat_parameters(dtype, stage, segments, std::move(weights),
                                                   momentum, gradients, hyper, gain, progress);
  if (options.gradient_dtype != GradientDtype::as_weights && parameters.dtype != Dtype::float32)
    throw std::invalid_argument("gradients of half precision go with float32 weights, got " +
                                dtype);
  return std::make_shared<CudaSgd>(std::move(parameters), options);
}

void bind(py::module_& m) {
  m.def("cuda_peer_copies_work", &peer_copies_work, py::arg("source"), py::arg("target"),
        py::call_guard<GilRelease>());

  py::class_<CudaSgd, std::shared_ptr<CudaSgd>>(m, "CudaSgd")
      .def(py::init(&make_sgd), py::kw_only(), py::arg("dtype"), py::arg("gradient_dtype"),
           py::arg("stage"), py::arg("segments"), py::arg("weights"), py::arg("momentum"),
           py::arg("gradients"), py::arg("hyper"), py::arg("gain"), py::arg("progress"),
           py::arg("device"), py::arg("slots"), py::arg("ticks_in_flight"))
      .def("update", &CudaSgd::update, py::arg("source"), py::arg("target"), py::arg("slot"))
      .def("copy", &CudaSgd::copy, py::arg("source"), py::arg("target"))
      .def(
          "run_update",
          [](CudaSgd& self, int source, int target, int slot, int64_t batch, uintptr_t stream) {
            self.run_update(source, target, slot, batch, reinterpret_cast<cudaStream_t>(stream));
          },
          py::kw_only(), py::arg("source"), py::arg("target"), py::arg("slot"), py::arg("batch"),
          py::arg("stream"));

  py::class_<CopyWork, Work, std::shared_ptr<CopyWork>>(m, "CudaCopy")
      .def(py::init([](const PyWord& source, int source_device, const PyWord& target,
                       int target_device, const PyWord& bytes) {
             return std::make_shared<CopyWork>(as_word(source), source_device, as_word(target),
                                               target_device, as_word(bytes));
           }),
           py::kw_only(), py::arg("source"), py::arg("source_device"), py::arg("target"),
           py::arg("target_device"), py::arg("bytes"));
  m.attr("CUDA_HOST") = kHost;

  py::class_<GraphWork, Work, std::shared_ptr<GraphWork>>(m, "CudaGraphWork")
      .def(py::init([](const py::object& eager, uintptr_t regular, int64_t rows) {
             return std::make_shared<GraphWork>(as_work(eager),
                                                reinterpret_cast<const uint8_t*>(regular), rows);
           }),
           py::kw_only(), py::arg("eager"), py::arg("regular"), py::arg("rows"))
      .def(
          "prepare_with",
          [](GraphWork& self, const py::object& prepare) { self.prepare_with(as_work(prepare)); },
          py::arg("prepare"))
      .def(
          "use_graph",
          [](GraphWork& self, uintptr_t graph, const py::object& replay,
             const std::vector<std::tuple<uintptr_t, uint64_t, uint64_t, uintptr_t>>& intakes,
             const std::vector<std::pair<uintptr_t, std::vector<uint64_t>>>& words) {
            std::vector<GraphWork::Intake> copies;
            for (const auto& [source, target, bytes, sent] : intakes)
              copies.push_back({reinterpret_cast<const uint64_t*>(source), target, bytes,
                                reinterpret_cast<const uint64_t*>(sent)});
            std::vector<GraphWork::Words> restored;
            for (const auto& [place, values] : words)
              restored.push_back({reinterpret_cast<uint64_t*>(place), values});
            self.use_graph(graph, as_work(replay), std::move(copies), std::move(restored));
          },
          py::kw_only(), py::arg("graph"), py::arg("replay"), py::arg("intakes"), py::arg("words"))
      .def("drop_graph", &GraphWork::drop_graph)
      .def_property_readonly("has_graph", &GraphWork::has_graph);
}

struct Register {
  Register() {
    Extension::get().backends["cuda"] = &make_cuda_backend;
    Extension::get().bindings.push_back(&bind);
  }
} const registered;

}  // namespace
}  // namespace fdg::cuda
