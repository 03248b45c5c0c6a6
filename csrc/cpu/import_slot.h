// Where a loaded library keeps the address of a function of another one: its import slot. What
// stands there is what its calls reach, so that they can be led elsewhere without touching any
// other library's.
#pragma once

namespace fdg::cpu {

// Lets the calls that the library `library` ("libc10.so") makes to `function` reach `replacement`,
// which must be of its type, from now on and for good. False if there is no such library or slot in
// it, or the slot cannot be written.
bool redirect_import(const char* library, const char* function, void* replacement);

}  // namespace fdg::cpu
