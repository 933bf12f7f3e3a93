// Small kernels for the emulator's own tests: right ones, and ones with a fault of each kind.
#include <prim.cuh>

struct Sample {
  const void* in;
  void* out;
  int32_t n, which;
};

// A reversal of 256 values through shared memory; `which` 1 leaves out the barrier.
KERNEL(reverse, 256, Sample) {
  int* memory = (int*)shared_memory();
  int t = thread_id();
  memory[t] = ((const int*)p.in)[block_id() * 256 + t];
  if (p.which != 1) sync_block();
  ((int*)p.out)[block_id() * 256 + t] = memory[255 - t];
}
