// How a host thread goes from one stack to another on x86-64: both the emulator and the executor of tools/ptx run the device's threads in turns so.
// For one unit of a library.
#pragma once
#include <stdint.h>

// Leaves the registers on the stack at hand and the place where they lie in `from`, and goes on where `to` was left.
extern "C" void switch_stack(void** from, void* to);
asm(R"(
.text
.local switch_stack
.type switch_stack, @function
switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size switch_stack, .-switch_stack
)");

// Where to go on with a stack that ends at `top`: at the beginning of `start`, which must not return.
inline void* place_to_start(char* top, void (*start)()) {
  void** place = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(top) & ~uintptr_t(15)) - 8);
  *place = nullptr;  // where `start` would return to
  *--place = reinterpret_cast<void*>(start);
  for (int i = 0; i < 6; i++) *--place = nullptr;  // the registers
  return place;
}
