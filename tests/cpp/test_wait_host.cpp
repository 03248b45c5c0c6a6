// What the host sees of an event: the part of csrc/stream.h's contract that needs a host.
#include <array>
#include <chrono>
#include <memory>

#include "check.h"
#include "cpu/cpu_stream.h"
#include "tools.h"
#include "trace/trace_stream.h"

namespace fdg::testing {
namespace {

// One stream and one event of a backend, and the host waiting for it.
struct Host {
  explicit Host(Backend& backend)
      : event(backend.make_event()), stream(backend.make_stream("s", failure)) {}
  void record_after(const Action& action) {
    stream->run(action, {});
    stream->record(*event);
    stream->flush();
  }
  Failure failure;
  std::unique_ptr<Event> event;
  std::unique_ptr<Stream> stream;
};

void check_host_sees_completion(Backend& backend) {
  Host host(backend);
  CHECK(host.event->wait_host(milliseconds(0)));  // never recorded
  bool ran = false;
  const Action action = testing::action(0, [&] { ran = true; });
  for (int i = 0; i < 3; ++i) {
    host.record_after(action);
    CHECK(host.event->wait_host(kPatience));
    CHECK(host.event->wait_host(milliseconds(0)));  // complete stays complete
  }
}

TEST("contract: the host sees completion, trace") {
  trace::TraceBackend backend(std::make_shared<trace::Log>());
  check_host_sees_completion(backend);
}

TEST("contract: the host sees completion, cpu") {
  cpu::CpuBackend backend({});
  check_host_sees_completion(backend);
}

TEST("contract: the host's wait ends with its timeout, cpu") {
  cpu::CpuBackend backend({});
  std::array<Gate, 2> gates;
  int plain = 0;
  std::array<Action, 2> actions;
  for (size_t i = 0; i < 2; ++i)
    actions[i] = action(0, [&, i] {
      gates[i].wait();
      plain = static_cast<int>(i) + 1;
    });
  Host host(backend);
  host.record_after(actions[0]);
  CHECK(!host.event->wait_host(milliseconds(0)));
  CHECK(!host.event->wait_host(milliseconds(5)));
  gates[0].open();
  CHECK(host.event->wait_host(kPatience));
  CHECK(plain == 1);
  host.record_after(actions[1]);  // the host waits for the most recent record
  CHECK(!host.event->wait_host(milliseconds(5)));
  gates[1].open();
  CHECK(host.event->wait_host(kPatience));
  CHECK(plain == 2);
}

TEST("contract: an event recorded on two streams never goes back, cpu") {
  cpu::CpuBackend backend({});
  Failure failure;
  const auto event = backend.make_event();
  Gate gate;
  const Action held = action(0, [&] { gate.wait(); });
  const auto behind = backend.make_event();
  const auto slow = backend.make_stream("slow", failure);
  const auto fast = backend.make_stream("fast", failure);
  slow->run(held, {});
  slow->record(*event);
  slow->flush();
  fast->record(*event);
  fast->flush();
  CHECK(event->wait_host(kPatience));
  gate.open();
  // Behind the slow record on the same stream: when it is complete, both records of `event` are.
  slow->record(*behind);
  slow->flush();
  CHECK(behind->wait_host(kPatience));
  CHECK(event->wait_host(milliseconds(200)));
}

// For the sanitizers: what completes a record must not look at an event that is gone.
TEST("contract: an event may go when the host has seen it complete, cpu") {
  cpu::CpuBackend backend({});
  Failure failure;
  const auto stream = backend.make_stream("s", failure);
  for (int i = 0; i < 300; ++i) {
    const auto event = backend.make_event();
    stream->record(*event);
    stream->flush();
    CHECK(event->wait_host(kPatience));
  }
}

}  // namespace
}  // namespace fdg::testing
