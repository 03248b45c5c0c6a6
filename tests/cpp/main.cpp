// Runs the tests whose names contain the argument, all without one.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <mutex>

#include "check.h"

namespace check {
namespace {

std::mutex output_mutex;
std::vector<std::string> notes;
std::atomic<int> failure_count{0};

bool passes(const Test& test) {
  const int before = failure_count;
  const auto start = std::chrono::steady_clock::now();
  std::printf("[ run  ] %s\n", test.name);
  std::fflush(stdout);
  try {
    test.run();
  } catch (const std::exception& error) {
    fail({__FILE__, __LINE__, test.name}, std::string("the test threw: ") + error.what());
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  const bool ok = failure_count == before;
  std::printf("[ %s ] %s (%.2f s)\n", ok ? " ok " : "FAIL", test.name, seconds.count());
  std::fflush(stdout);
  return ok;
}

int run_tests(const std::string& filter) {
  int ran = 0;
  int failed = 0;
  for (const Test& test : tests()) {
    if (std::string(test.name).find(filter) == std::string::npos) continue;
    ++ran;
    failed += passes(test) ? 0 : 1;
  }
  std::printf("%d of %d tests failed, %d checks\n", failed, ran, failures());
  if (ran == 0) std::printf("no test has '%s' in its name\n", filter.c_str());
  return failed == 0 && ran > 0 ? 0 : 1;
}

}  // namespace

std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

Registration::Registration(const char* name, void (*run)()) { tests().push_back({name, run}); }

int failures() { return failure_count; }

Note::Note(std::string text) {
  std::lock_guard<std::mutex> lock(output_mutex);
  notes.push_back(std::move(text));
}

Note::~Note() {
  std::lock_guard<std::mutex> lock(output_mutex);
  notes.pop_back();
}

void fail(const Site& site, const std::string& message) {
  constexpr int kMostPrinted = 40;
  std::lock_guard<std::mutex> lock(output_mutex);
  if (++failure_count > kMostPrinted) return;
  std::printf("%s:%d: %s: %s", site.file, site.line, site.text, message.c_str());
  for (const auto& note : notes) std::printf(" [%s]", note.c_str());
  std::printf("\n");
  std::fflush(stdout);
}

std::string show(bool value) { return value ? "true" : "false"; }
std::string show(long long value) { return std::to_string(value); }
std::string show(unsigned long long value) { return std::to_string(value); }
std::string show(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.17g", value);
  return text;
}
std::string show(const std::string& value) { return "'" + value + "'"; }

void expect_throw(const Site& site, bool (*is_wanted)(const std::exception&),
                  const std::string& part, void (*call)(void*), void* expression) {
  try {
    call(expression);
  } catch (const std::exception& error) {
    const std::string message = error.what();
    if (!is_wanted(error))
      fail(site, "another exception came: '" + message + "'");
    else if (message.find(part) == std::string::npos)
      fail(site, "the message is '" + message + "', without '" + part + "'");
    return;
  } catch (...) {
    fail(site, "an exception came that is no std::exception");
    return;
  }
  fail(site, "no exception came");
}

}  // namespace check

int main(int argc, char** argv) { return check::run_tests(argc > 1 ? argv[1] : ""); }
