// Where a loaded library keeps the address of a function of another one: its import slots. What
// stands there is what its calls reach, so that they can be led elsewhere without touching any
// other library's.
#pragma once

#include <vector>

namespace fdg::cpu {

// Whether calls of a function by this name, from any library, reach `function`. A program that is
// not position independent may lend an entry of its own as the function's address, from which calls
// go on: where those lead is looked at then.
bool calls_lead_to(const char* name, void* function);

// A function of another library; `now` is where calls lead, `replacement` where they are to lead.
struct Import {
  const char* name;
  void* now;
  void* replacement;
};

// Leads the calls that the library `library` ("libc10.so") makes to `imports` to their
// replacements, from now on and for good. All or none: false if there is no such library, one of
// them has no slot in it, calls lead elsewhere than to `now` already, or a slot cannot be written.
bool redirect_imports(const char* library, const std::vector<Import>& imports);

}  // namespace fdg::cpu
