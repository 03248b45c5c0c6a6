#include "api.h"

namespace fdg::cuda {
namespace {

// The remedy, for errors that have one.
const char* remedy(cudaError_t code) {
  switch (code) {
    case cudaErrorMemoryAllocation:
      return "The device is out of memory: use more stages, backward_weights='current', or a "
             "smaller batch.";
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
      return "fdg_cuda was built by an nvcc that does not know this GPU: build it again with a "
             "newer CUDA toolkit, or with FDG_CUDA_ARCHS set to the GPU's compute capability "
             "(80, 90, ...).";
    case cudaErrorInsufficientDriver:
      return "The NVIDIA driver is older than the CUDA toolkit fdg_cuda was built with: update the "
             "driver, or build with an older toolkit.";
    case cudaErrorNoDevice:
      return "No CUDA device is visible: check nvidia-smi and CUDA_VISIBLE_DEVICES, or name 'cpu' "
             "once per stage.";
    case cudaErrorInvalidDevice:
      return "Check the devices you named against nvidia-smi and CUDA_VISIBLE_DEVICES.";
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchFailure:
    case cudaErrorAssert:
    case cudaErrorDevicesUnavailable:
    case cudaErrorECCUncorrectable:
    case cudaErrorUnknown:
      return "The device can no longer be used by this process: start it again from the last saved "
             "weights. CUDA_LAUNCH_BLOCKING=1 shows which operation was at fault.";
    default:
      return "";
  }
}

}  // namespace

std::string explain(cudaError_t code, const char* call, const std::string& doing) {
  std::string text =
      "CUDA error " + std::string(cudaGetErrorName(code)) + " (" + cudaGetErrorString(code) + ")";
  if (!doing.empty()) text += " where it " + doing;
  text += ", from " + std::string(call) + ".";
  const std::string todo = remedy(code);
  return todo.empty() ? text : text + " " + todo;
}

}  // namespace fdg::cuda
