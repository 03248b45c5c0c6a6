#include "cudart.h"

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <set>

#include "races.h"

namespace stand_in {
namespace {

struct Stream {
  int device;
};
struct Event {
  int device;
  bool recorded = false;
  std::chrono::steady_clock::time_point recorded_at = {};
};

int device_now = 0;
uintptr_t next_handle = 0x1000;
std::map<uintptr_t, Stream> streams;
std::map<uintptr_t, Event> events;
std::map<uintptr_t, std::function<void()>> graphs;
std::set<void*> device_memory;
std::map<void*, void*> pinned_memory;  // from, to
std::set<std::pair<int, int>> peers;
std::vector<char> scratch;

template <class Handle>
uintptr_t number(Handle handle) {
  return reinterpret_cast<uintptr_t>(handle);
}

void copy(const char* call, void* to, const void* from, size_t bytes) {
  if (!to || !from) {
    violation(std::string(call) + " of " + std::to_string(bytes) + " bytes from or to nowhere");
    return;
  }
  std::memmove(to, from, bytes);
}

// For the race detector: `kind` says which side is a device's, which must be memory somebody
// allocated. The host's side is looked at if it is page-locked.
void touch_copied(const char* call, uintptr_t stream, void* to, const void* from, size_t bytes,
                  cudaMemcpyKind kind) {
  const races::Range target = races::range(to, bytes);
  const races::Range source = races::range(from, bytes);
  if (kind != cudaMemcpyDeviceToHost) races::must_be_known(call, stream, target);
  if (kind != cudaMemcpyHostToDevice) races::must_be_known(call, stream, source);
  races::touch(stream, {source}, {target}, call);
}

bool is_in_pinned_memory(const void* place) {
  const auto next = pinned_memory.upper_bound(const_cast<void*>(place));
  return next != pinned_memory.begin() && std::prev(next)->second > place;
}

Event* find_event(const char* call, cudaEvent_t event) {
  const auto found = events.find(number(event));
  if (found == events.end()) {
    violation(std::string(call) + " of an event that does not exist (any more)");
    return nullptr;
  }
  return &found->second;
}

}  // namespace

State& state() {
  static State all;
  return all;
}

void State::reset() {
  const auto kept = alive;
  *this = State();
  alive = kept;
  device_now = 0;
}

void violation(const std::string& text) { state().violations.push_back(text); }

cudaError_t enter(const char* name) {
  State& now = state();
  ++now.calls;
  ++now.calls_of[name];
  if (now.fail_at == 0 || (!now.fail_in.empty() && now.fail_in != name)) return cudaSuccess;
  const int64_t number = now.fail_in.empty() ? now.calls : now.calls_of[name];
  if (number < now.fail_at || (number > now.fail_at && !now.lost)) return cudaSuccess;
  if (now.failed.empty()) now.failed = name;
  if (std::string(name) == "cudaSetDevice" || std::string(name) == "cudaGetDevice")
    now.switch_failed = true;
  return now.fail_code;
}

void check_stream(const char* call, uintptr_t stream) {
  const auto found = streams.find(stream);
  if (found == streams.end())
    violation(std::string(call) + " on a stream that does not exist (any more)");
  else if (found->second.device != device_now && !state().switch_failed)
    violation(std::string(call) + " on a stream of device " + std::to_string(found->second.device) +
              " while device " + std::to_string(device_now) + " is current");
}

void synchronize(int device) {
  races::host_waited_for_stream(races::kDefaultStream);
  for (const auto& [handle, stream] : streams)
    if (stream.device == device) races::host_waited_for_stream(handle);
}

void set_device(int device) { device_now = device; }
int current_device() { return device_now; }

uintptr_t make_stream(int device) {
  ++state().alive["stream"];
  streams[++next_handle] = {device};
  return next_handle;
}

void destroy_stream(uintptr_t stream) {
  if (streams.erase(stream) == 0) violation("an adopted stream was destroyed");
  --state().alive["stream"];
}

uintptr_t make_graph(std::function<void()> replay) {
  ++state().alive["graph"];
  graphs[++next_handle] = std::move(replay);
  return next_handle;
}

void destroy_graph(uintptr_t graph) {
  if (graphs.erase(graph) == 0) violation("a graph was destroyed twice");
  --state().alive["graph"];
}

}  // namespace stand_in

using namespace stand_in;

#define ENTER(name)                                  \
  const cudaError_t entered = stand_in::enter(name); \
  if (entered != cudaSuccess) return entered

extern "C" {

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorIllegalAddress:
      return "cudaErrorIllegalAddress";
    default:
      return "cudaErrorOfTheStandIn";
  }
}
const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }
cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaGetDevice(int* device) {
  ENTER("cudaGetDevice");
  *device = device_now;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  ENTER("cudaSetDevice");
  if (device < 0 || device >= kDevices) return cudaErrorInvalidDevice;
  device_now = device;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  ENTER("cudaDeviceGetAttribute");
  *value = 4;
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  ENTER("cudaDeviceCanAccessPeer");
  *can = state().peers_reachable ? 1 : 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned) {
  ENTER("cudaDeviceEnablePeerAccess");
  return peers.insert({device_now, peer}).second ? cudaSuccess : cudaErrorPeerAccessAlreadyEnabled;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  ENTER("cudaStreamCreateWithFlags");
  if (flags != cudaStreamNonBlocking) violation("a stream that waits for the default stream");
  streams[++next_handle] = {device_now};
  ++state().alive["stream"];
  *stream = reinterpret_cast<cudaStream_t>(next_handle);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  check_stream("cudaStreamSynchronize", number(stream));
  ENTER("cudaStreamSynchronize");
  races::host_waited_for_stream(number(stream));
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  if (streams.erase(number(stream)) == 0)
    violation("a stream was destroyed twice");
  else
    --state().alive["stream"];
  ENTER("cudaStreamDestroy");  // a real one releases, whatever it returns
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  check_stream("cudaStreamWaitEvent", number(stream));
  const Event* found = find_event("cudaStreamWaitEvent", event);
  if (found && !found->recorded) violation("a wait for an event that was never recorded");
  ENTER("cudaStreamWaitEvent");
  races::wait(number(stream), number(event));
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  ENTER("cudaEventCreateWithFlags");
  events[++next_handle] = {device_now};
  ++state().alive["event"];
  *event = reinterpret_cast<cudaEvent_t>(next_handle);
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  if (events.erase(number(event)) == 0)
    violation("an event was destroyed twice");
  else
    --state().alive["event"];
  ENTER("cudaEventDestroy");
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  check_stream("cudaEventRecord", number(stream));
  Event* found = find_event("cudaEventRecord", event);
  const auto on = streams.find(number(stream));
  if (found && on != streams.end() && found->device != on->second.device)
    violation("an event recorded on a stream of another device");
  ENTER("cudaEventRecord");
  if (found) {
    found->recorded = true;
    found->recorded_at = std::chrono::steady_clock::now();
  }
  races::record(number(event), number(stream));
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  const Event* found = find_event("cudaEventQuery", event);
  if (found && !found->recorded) violation("a query of an event that was never recorded");
  ENTER("cudaEventQuery");
  races::host_waited_for_event(number(event));
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  find_event("cudaEventSynchronize", event);
  ENTER("cudaEventSynchronize");
  races::host_waited_for_event(number(event));
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
  const Event* const first = find_event("cudaEventElapsedTime", from);
  const Event* const second = find_event("cudaEventElapsedTime", to);
  if (!first || !second || !first->recorded || !second->recorded)
    violation("the time between events that were not recorded");
  else if (first->device != second->device)
    violation("the time between events of two devices");
  ENTER("cudaEventElapsedTime");
  if (first && second)
    *milliseconds =
        std::chrono::duration<float, std::milli>(second->recorded_at - first->recorded_at).count();
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  ENTER("cudaMalloc");
  *memory = std::aligned_alloc(512, (bytes + 511) / 512 * 512);
  device_memory.insert(*memory);
  ++state().alive["device memory"];
  races::allocated(races::range(*memory, bytes), races::kHost);
  return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
  if (device_memory.erase(memory) == 0) {
    violation("device memory was freed twice");
  } else {
    // A real one waits for the whole device; only for what the default stream does may be relied on
    // that here.
    races::host_waited_for_stream(races::kDefaultStream);
    races::given_back(number(memory));
    std::free(memory);
    --state().alive["device memory"];
  }
  ENTER("cudaFree");
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  ENTER("cudaHostAlloc");
  *memory = std::malloc(bytes);
  pinned_memory[*memory] = static_cast<char*>(*memory) + bytes;
  ++state().alive["pinned memory"];
  races::allocated(races::range(*memory, bytes), races::kHost);
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* memory) {
  if (pinned_memory.erase(memory) == 0) {
    violation("pinned memory was freed twice");
  } else {
    races::given_back(number(memory));
    std::free(memory);
    --state().alive["pinned memory"];
  }
  ENTER("cudaFreeHost");
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  ENTER("cudaMemcpy");
  touch_copied("cudaMemcpy", races::kDefaultStream, to, from, bytes, kind);
  // What goes to a device may still be on its way when the call returns.
  if (kind == cudaMemcpyDeviceToHost) races::host_waited_for_stream(races::kDefaultStream);
  copy("cudaMemcpy", to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  check_stream("cudaMemcpyAsync", number(stream));
  ENTER("cudaMemcpyAsync");
  // Native code of the host has just written what it copies from page-locked memory of its own.
  if (kind == cudaMemcpyHostToDevice && is_in_pinned_memory(from))
    races::touch(races::kHost, {}, {races::range(from, bytes)}, "writing page-locked memory");
  touch_copied("cudaMemcpyAsync", number(stream), to, from, bytes, kind);
  copy("cudaMemcpyAsync", to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyPeerAsync(void* to, int to_device, const void* from, int from_device,
                                size_t bytes, cudaStream_t stream) {
  check_stream("cudaMemcpyPeerAsync", number(stream));
  if (to_device == from_device) violation("a copy between peers that are one device");
  ENTER("cudaMemcpyPeerAsync");
  touch_copied("cudaMemcpyPeerAsync", number(stream), to, from, bytes, cudaMemcpyDeviceToDevice);
  copy("cudaMemcpyPeerAsync", to, from, bytes);
  if (state().peers_corrupt && bytes > 0) static_cast<char*>(to)[bytes / 2] ^= 1;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream) {
  check_stream("cudaMemsetAsync", number(stream));
  ENTER("cudaMemsetAsync");
  races::must_be_known("cudaMemsetAsync", number(stream), races::range(memory, bytes));
  races::touch(number(stream), {}, {races::range(memory, bytes)}, "cudaMemsetAsync");
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  check_stream("cudaGraphLaunch", number(stream));
  ENTER("cudaGraphLaunch");
  const auto found = graphs.find(number(graph));
  if (found == graphs.end())
    violation("a graph was launched that does not exist (any more)");
  else
    found->second();
  return cudaSuccess;
}

}  // extern "C"
