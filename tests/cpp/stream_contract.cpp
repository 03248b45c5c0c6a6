#include "stream_contract.h"

#include "check.h"

namespace fdg::testing {

const std::vector<Contract>& contracts() {
  static const std::vector<Contract> all{
      {"a stream is a FIFO", {run(0, 'a'), run(0, 'b'), run(0, 'c')}, {"ab", "bc", "ac"}, {}},
      {"streams know nothing of one another", {run(0, 'a'), run(1, 'b')}, {}, {"ab"}},
      {"what follows a wait comes after what precedes the record",
       {run(0, 'a'), run(0, 'b'), record(0, 'e'), wait(1, 'e'), run(1, 'c'), run(1, 'd')},
       {"ac", "bc", "ad", "bd"},
       {}},
      {"what follows the record is not waited for",
       {run(0, 'a'), record(0, 'e'), run(0, 'b'), wait(1, 'e'), run(1, 'c')},
       {"ac"},
       {"bc"}},
      {"a record on an idle stream is complete",
       {record(0, 'e'), run(0, 'a'), wait(1, 'e'), run(1, 'b')},
       {},
       {"ab"}},
      {"a wait captures the record that is there: a later one does not delay it",
       {run(0, 'a'), record(0, 'e'), wait(1, 'e'), run(0, 'x'), record(0, 'e'), run(1, 'b')},
       {"ab"},
       {"xb"}},
      {"a wait captures the most recent record",
       {run(0, 'a'), record(0, 'e'), run(0, 'b'), record(0, 'e'), wait(1, 'e'), run(1, 'c')},
       {"ac", "bc"},
       {}},
      {"a later record on another stream neither delays nor meets an earlier wait",
       {run(0, 'a'), record(0, 'e'), wait(2, 'e'), run(1, 'x'), record(1, 'e'), run(2, 'b')},
       {"ab"},
       {"xb"}},
      {"the most recent record may be another stream's",
       {run(0, 'a'), record(0, 'e'), run(1, 'x'), record(1, 'e'), wait(2, 'e'), run(2, 'b')},
       {"xb"},
       {"ab"}},
      {"two waits capture two records of one event",
       {run(0, 'a'), record(0, 'e'), wait(1, 'e'), run(0, 'b'), record(0, 'e'), wait(2, 'e'),
        run(1, 'c'), run(2, 'd')},
       {"ac", "ad", "bd"},
       {"bc"}},
      {"an event not recorded yet is not waited for",
       {wait(1, 'e'), run(0, 'a'), record(0, 'e'), run(1, 'b')},
       {},
       {"ab"}},
      {"an event never recorded is not waited for",
       {run(0, 'a'), wait(1, 'e'), run(1, 'b')},
       {},
       {"ab"}},
      {"a wait orders only what is enqueued later",
       {run(0, 'a'), record(0, 'e'), run(1, 'b'), wait(1, 'e'), run(1, 'c')},
       {"ac", "bc"},
       {"ab"}},
      {"a wait orders only its own stream",
       {run(0, 'a'), record(0, 'e'), wait(1, 'e'), run(1, 'b'), run(2, 'c')},
       {"ab"},
       {"ac"}},
      {"a wait for the stream's own record changes nothing",
       {run(0, 'a'), record(0, 'e'), wait(0, 'e'), run(0, 'b'), run(1, 'c')},
       {"ab"},
       {"ac", "bc"}},
      {"several may wait for one record, and more than once",
       {run(0, 'a'), record(0, 'e'), wait(1, 'e'), wait(1, 'e'), wait(2, 'e'), run(1, 'b'),
        run(2, 'c')},
       {"ab", "ac"},
       {"bc"}},
      {"order is transitive over three streams",
       {run(0, 'a'), record(0, 'e'), wait(1, 'e'), run(1, 'b'), record(1, 'f'), wait(2, 'f'),
        run(2, 'c')},
       {"ab", "bc", "ac"},
       {}},
      {"order passes through a stream that runs nothing",
       {run(0, 'a'), record(0, 'e'), wait(1, 'e'), record(1, 'f'), wait(2, 'f'), run(2, 'c'),
        run(1, 'd')},
       {"ac", "ad"},
       {"cd"}},
      {"a diamond",
       {run(0, 'a'), record(0, 'e'), wait(1, 'e'), run(1, 'b'), record(1, 'f'), wait(2, 'e'),
        run(2, 'c'), record(2, 'g'), wait(3, 'f'), wait(3, 'g'), run(3, 'd')},
       {"ab", "ac", "bd", "cd", "ad"},
       {"bc"}},
      {"to and fro, with the same two events recorded again",
       {run(0, 'a'), record(0, 'e'), wait(1, 'e'), run(1, 'b'), record(1, 'f'), wait(0, 'f'),
        run(0, 'c'), record(0, 'e'), wait(1, 'e'), run(1, 'd'), record(1, 'f'), wait(0, 'f'),
        run(0, 'g')},
       {"ab", "bc", "cd", "dg", "ag"},
       {}},
  };
  return all;
}

void enqueue(const Contract& contract, std::map<char, Action>& actions,
             std::vector<std::unique_ptr<Stream>>& streams, Backend& backend,
             std::map<char, std::unique_ptr<Event>>& events, bool flush_always) {
  for (const auto& [verb, stream, name] : contract.steps) {
    if (verb == Verb::run) {
      actions[name].stream = stream;
      streams[stream]->run(actions[name], {});
    } else {
      auto& event = events[name];
      if (!event) event = backend.make_event();
      if (verb == Verb::record)
        streams[stream]->record(*event);
      else
        streams[stream]->wait(*event);
    }
    if (flush_always) streams[stream]->flush();
  }
  for (auto& stream : streams) stream->flush();
}

void check_contract(Judge& judge, const Contract& contract) {
  const check::Note note(contract.name);
  for (const auto& pair : contract.ordered) {
    const check::Note which("ordered " + pair);
    CHECK(judge.is_ordered(contract, pair[0], pair[1]));
  }
  for (const auto& pair : contract.free) {
    const check::Note which("free " + pair);
    CHECK(judge.is_free(contract, pair[0], pair[1]));
  }
}

}  // namespace fdg::testing
