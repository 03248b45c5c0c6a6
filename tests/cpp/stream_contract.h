// The contract of csrc/stream.h, written once for every backend.
//
// A contract is a short program and the pairs of its actions that are ordered, or free:
//
//   run(0, 'a')     stream 0 runs action a          ordered "ab"  a ends before b begins
//   record(0, 'e')  stream 0 records event e        free "ab"     b may begin while a still runs
//   wait(1, 'e')    stream 1 waits for event e      (a is enqueued before b in both)
//
// A judge says of a pair whether it is ordered on its backend.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "action.h"
#include "stream.h"

namespace fdg::testing {

constexpr int kStreams = 4;

enum class Verb { run, record, wait };

struct Step {
  Verb verb;
  int stream;
  char name;  // of the action, or of the event
};
inline Step run(int stream, char action) { return {Verb::run, stream, action}; }
inline Step record(int stream, char event) { return {Verb::record, stream, event}; }
inline Step wait(int stream, char event) { return {Verb::wait, stream, event}; }

struct Contract {
  std::string name;
  std::vector<Step> steps;
  std::vector<std::string> ordered;
  std::vector<std::string> free;
};

const std::vector<Contract>& contracts();

// Enqueues the steps, making the events as they are first named. `flush_always` after every step,
// else once at the end.
void enqueue(const Contract& contract, std::map<char, Action>& actions,
             std::vector<std::unique_ptr<Stream>>& streams, Backend& backend,
             std::map<char, std::unique_ptr<Event>>& events, bool flush_always);

class Judge {
 public:
  virtual ~Judge() = default;
  virtual bool is_ordered(const Contract& contract, char first, char second) = 0;
  virtual bool is_free(const Contract& contract, char first, char second) = 0;
};

void check_contract(Judge& judge, const Contract& contract);

}  // namespace fdg::testing
