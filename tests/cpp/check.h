// A few lines of test framework: checks that count their failures, tests that have names.
// What a check expands to is kept small: there are hundreds, and sanitizers make each one bigger.
#pragma once

#include <exception>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__clang__)
#pragma clang diagnostic ignored "-Woverloaded-shift-op-parentheses"
#endif

namespace check {

struct Test {
  const char* name;
  void (*run)();
};

std::vector<Test>& tests();

struct Registration {
  Registration(const char* name, void (*run)());
};

int failures();

// What the checks inside its scope are about ("seed 7"); printed with a failure.
class Note {
 public:
  explicit Note(std::string text);
  ~Note();
  Note(const Note&) = delete;
  Note& operator=(const Note&) = delete;
};

struct Site {
  const char* file;
  int line;
  const char* text;  // the checked expression
};

// May be called from any thread.
void fail(const Site& site, const std::string& message);

std::string show(bool value);
std::string show(long long value);
std::string show(unsigned long long value);
std::string show(double value);
std::string show(const std::string& value);

template <class T>
std::string show_any(const T& value) {
  if constexpr (std::is_same_v<T, bool>)
    return show(value);
  else if constexpr (std::is_floating_point_v<T>)
    return show(static_cast<double>(value));
  else if constexpr (std::is_integral_v<T> && std::is_signed_v<T>)
    return show(static_cast<long long>(value));
  else if constexpr (std::is_integral_v<T>)
    return show(static_cast<unsigned long long>(value));
  else if constexpr (std::is_convertible_v<const T&, std::string>)
    return show(std::string(value));
  else
    return "(not printable)";
}

template <class T>
std::string show_any(const std::vector<T>& values) {
  std::string text;
  for (const auto& value : values) text += (text.empty() ? "" : ", ") + show_any(value);
  return "{" + text + "}";
}

// The left side of a comparison, caught before it is compared: `site << a == b`.
template <class L>
struct Left {
  const Site& site;
  const L& value;
};

template <class L>
Left<L> operator<<(const Site& site, const L& value) {
  return {site, value};
}

struct Done {};

#define CHECK_COMPARISON(op)                                                        \
  template <class L, class R>                                                       \
  __attribute__((noinline)) Done operator op(const Left<L>& left, const R& right) { \
    if (!(left.value op right))                                                     \
      fail(left.site, show_any(left.value) + " " #op " " + show_any(right));        \
    return {};                                                                      \
  }
CHECK_COMPARISON(==)
CHECK_COMPARISON(!=)
CHECK_COMPARISON(<)
CHECK_COMPARISON(<=)
CHECK_COMPARISON(>)
CHECK_COMPARISON(>=)
#undef CHECK_COMPARISON

inline void finish(Done) {}
template <class L>
void finish(const Left<L>& left) {
  if (!left.value) fail(left.site, show_any(left.value));
}

void expect_throw(const Site& site, bool (*is_wanted)(const std::exception&),
                  const std::string& part, void (*call)(void*), void* expression);

template <class E, class Expression>
void expect_throw(const Site& site, const std::string& part, Expression expression) {
  expect_throw(
      site, [](const std::exception& error) { return dynamic_cast<const E*>(&error) != nullptr; },
      part, [](void* it) { (*static_cast<Expression*>(it))(); }, &expression);
}

}  // namespace check

#define CHECK_JOIN_(a, b) a##b
#define CHECK_JOIN(a, b) CHECK_JOIN_(a, b)

#define CHECK(...) \
  ::check::finish(::check::Site{__FILE__, __LINE__, "CHECK(" #__VA_ARGS__ ")"} << __VA_ARGS__)

// The expression throws a `type`, and the message contains `part`.
#define CHECK_THROWS(type, part, ...)                                                            \
  ::check::expect_throw<type>({__FILE__, __LINE__, "CHECK_THROWS(" #type ", " #__VA_ARGS__ ")"}, \
                              part, [&] { (void)(__VA_ARGS__); })

#define TEST(name)                                                        \
  static void CHECK_JOIN(test_, __LINE__)();                              \
  static const ::check::Registration CHECK_JOIN(registration_, __LINE__){ \
      name, CHECK_JOIN(test_, __LINE__)};                                 \
  static void CHECK_JOIN(test_, __LINE__)()
