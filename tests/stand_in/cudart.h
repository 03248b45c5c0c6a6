// A stand-in for the CUDA runtime, for machines without a GPU: it checks and counts every call, and
// does at once, in host memory, what was enqueued. The order of enqueuing is an order in which the
// program may run, so the numbers are those a device would give. Whether another order could give
// others is for the race detector (races.h) to say.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace stand_in {

constexpr int kDevices = 3;

// What the tests ask for and look at.
struct State {
  // The call with this number (the next one is 1) fails with `fail_code`; 0: none. With `fail_in`
  // only calls of that name count. `lost`: so does every later one, as those of a device that was
  // lost.
  int64_t fail_at = 0;
  std::string fail_in;
  cudaError_t fail_code = cudaSuccess;
  bool lost = false;
  std::string failed;          // the name of the first call that was made to fail
  bool switch_failed = false;  // of the current device, so that calls are made with a wrong one
  bool peers_reachable = true;
  bool peers_corrupt = false;  // what is copied between devices arrives wrong

  int64_t calls = 0;
  std::map<std::string, int64_t> calls_of;
  std::vector<std::string> violations;
  std::map<std::string, int64_t> alive;  // handles and memory by kind

  void reset();
};

State& state();

// Counts the call; what it is to return.
cudaError_t enter(const char* name);
void violation(const std::string& text);

// Whoever enqueues on `stream` must have made its device the current one.
void check_stream(const char* call, uintptr_t stream);
// The host waits for all that was enqueued on the device.
void synchronize(int device);
void set_device(int device);
int current_device();

uintptr_t make_stream(int device);
void destroy_stream(uintptr_t stream);
uintptr_t make_graph(std::function<void()> replay);
void destroy_graph(uintptr_t graph);

}  // namespace stand_in
