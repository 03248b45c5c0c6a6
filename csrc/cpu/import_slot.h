// Where a loaded library keeps the address of a function of another one: its import slots. What
// stands there is what its calls reach, so that they can be led elsewhere without touching any
// other library's.
#pragma once

#include <vector>

namespace fdg::cpu {

// A function of another library; `now` is where calls lead, `replacement` where they are to lead.
struct Import {
  const char* name;
  void* now;
  void* replacement;
};

// Leads the calls that the library `library` ("libc10.so") makes to `imports` to their
// replacements, from now on and for good. All or none: false if there is no such library, one of
// them has no slot in it, something else than `now` stands in a slot already, or a slot cannot be
// written.
bool redirect_imports(const char* library, const std::vector<Import>& imports);

}  // namespace fdg::cpu
