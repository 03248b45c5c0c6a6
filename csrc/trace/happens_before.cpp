#include "happens_before.h"

#include <algorithm>
#include <map>
#include <stdexcept>
#include <utility>

namespace fdg::trace {
namespace {

using Clock = std::vector<uint64_t>;

struct Access {
  int operation = -1;
  int stream = -1;
  uint64_t position = 0;
};

class Checker {
 public:
  explicit Checker(const std::vector<Operation>& operations) : operations_(operations) {
    size_t streams = 0;
    for (const auto& operation : operations) {
      if (operation.stream < 0)
        throw std::invalid_argument(operation.describe() + ": streams are numbered from 0");
      streams = std::max(streams, static_cast<size_t>(operation.stream) + 1);
    }
    queues_.resize(streams);
    for (size_t i = 0; i < operations.size(); ++i)
      queues_[operations[i].stream].push_back(static_cast<int>(i));
    clocks_.assign(streams, Clock(streams, 0));
    run_clocks_.resize(operations.size());
  }

  Report check() {
    replay();
    compare_accesses();
    return std::move(report_);
  }

 private:
  void replay() {
    std::vector<size_t> next(queues_.size(), 0);
    for (bool progress = true; progress;) {
      progress = false;
      for (size_t stream = 0; stream < queues_.size(); ++stream)
        while (next[stream] < queues_[stream].size() && step(queues_[stream][next[stream]])) {
          ++next[stream];
          progress = true;
        }
    }
    for (size_t stream = 0; stream < queues_.size(); ++stream)
      if (next[stream] < queues_[stream].size())
        report_.deadlocks.push_back(operations_[queues_[stream][next[stream]]].describe() +
                                    " never ends");
  }

  // False when the operation has to wait for a record that has not run yet.
  bool step(int index) {
    const Operation& operation = operations_[index];
    Clock& clock = clocks_[operation.stream];
    switch (operation.kind) {
      case OperationKind::run:
        ++clock[operation.stream];
        run_clocks_[index] = clock;
        return true;
      case OperationKind::record:
        records_[{operation.event, operation.ticket}] = clock;
        return true;
      case OperationKind::wait: {
        if (operation.ticket == 0) return true;  // CUDA: an event never recorded is complete
        const auto found = records_.find({operation.event, operation.ticket});
        if (found == records_.end()) return false;
        for (size_t i = 0; i < clock.size(); ++i) clock[i] = std::max(clock[i], found->second[i]);
        return true;
      }
    }
    return true;
  }

  void compare_accesses() {
    std::map<BufferId, Access> writer;
    std::map<BufferId, std::vector<Access>> readers;  // since the last write
    for (size_t i = 0; i < operations_.size(); ++i) {
      const Operation& operation = operations_[i];
      if (operation.kind != OperationKind::run) continue;
      if (run_clocks_[i].empty()) {  // never ends
        report_.reads_from.emplace_back();
        continue;
      }
      const Access access{static_cast<int>(i), operation.stream, run_clocks_[i][operation.stream]};
      std::vector<int> sources;
      for (const BufferId buffer : operation.reads) {
        sources.push_back(writer[buffer].operation);
        expect_before(writer[buffer], access, buffer);
      }
      report_.reads_from.push_back(std::move(sources));
      for (const BufferId buffer : operation.writes) {
        expect_before(writer[buffer], access, buffer);
        for (const Access& reader : readers[buffer]) expect_before(reader, access, buffer);
      }
      for (const BufferId buffer : operation.reads) readers[buffer].push_back(access);
      for (const BufferId buffer : operation.writes) {
        writer[buffer] = access;
        readers[buffer].clear();
      }
    }
  }

  void expect_before(const Access& earlier, const Access& later, BufferId buffer) {
    if (earlier.operation < 0 || earlier.operation == later.operation) return;
    if (run_clocks_[later.operation][earlier.stream] >= earlier.position) return;
    report_.races.push_back(operations_[earlier.operation].describe() + " and " +
                            operations_[later.operation].describe() + " both use buffer " +
                            std::to_string(buffer) + " and nothing orders them");
  }

  const std::vector<Operation>& operations_;
  std::vector<std::vector<int>> queues_;
  std::vector<Clock> clocks_;
  std::vector<Clock> run_clocks_;  // [operation] what a run comes after, itself included
  std::map<std::pair<int, uint64_t>, Clock> records_;
  Report report_;
};

}  // namespace

Report check_happens_before(const std::vector<Operation>& operations) {
  return Checker(operations).check();
}

}  // namespace fdg::trace
