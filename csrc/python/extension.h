// How parts of the extension that are built only where their toolkit is (cuda/) make themselves
// known to it: each registers itself, and nothing that is always built names them.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../flat_parameters.h"
#include "../stream.h"

namespace fdg {

// What a backend may be asked for; each takes what concerns it.
struct BackendOptions {
  std::vector<int> devices;        // [stream] ordinals
  std::vector<uintptr_t> handles;  // [stream] the backend's own handle to adopt, 0: make one
  uint64_t delay_seed = 0;
  int max_delay_us = 0;
};

using PySegments = std::vector<std::tuple<int64_t, int64_t, int32_t>>;  // offset, size, group
using PyHyperTable = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;  // address, shape

// The flat memory of a stage from what Python knows of it: addresses as integers. Throws
// std::invalid_argument for an unknown dtype.
inline FlatParameters make_flat_parameters(const std::string& dtype, int stage,
                                           const PySegments& segments,
                                           std::vector<uintptr_t> weights, uintptr_t momentum,
                                           uintptr_t gradients, const PyHyperTable& hyper,
                                           uintptr_t gain, uintptr_t progress) {
  FlatParameters parameters;
  if (dtype == "float32")
    parameters.dtype = Dtype::float32;
  else if (dtype == "float64")
    parameters.dtype = Dtype::float64;
  else
    throw std::invalid_argument("dtype must be 'float32' or 'float64', got '" + dtype + "'");
  parameters.stage = stage;
  for (const auto& [offset, size, group] : segments)
    parameters.segments.push_back({offset, size, group});
  parameters.weights = std::move(weights);
  parameters.momentum = momentum;
  parameters.gradients = reinterpret_cast<const uint64_t*>(gradients);
  const auto& [table, rows, groups, columns] = hyper;
  parameters.hyper = {reinterpret_cast<const double*>(table), rows, columns, groups};
  parameters.gain = gain;
  parameters.progress = reinterpret_cast<int64_t*>(progress);
  return parameters;
}

struct Extension {
  std::map<std::string, std::function<std::unique_ptr<Backend>(const BackendOptions&)>> backends;
  std::vector<void (*)(pybind11::module_&)> bindings;

  static Extension& get() {
    static Extension all;
    return all;
  }
};

}  // namespace fdg
