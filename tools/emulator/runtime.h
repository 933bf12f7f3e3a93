// What prim.cuh asks of the emulator (runtime.cpp). Header-free like the device code, so that no host name can stand in for a missing one.
#pragma once

#pragma GCC visibility push(default)  // the runtime is a library of its own, shared by those of the kernels
namespace emulator {

// Where in a kernel's source a thread waits.
struct Site {
  const char* file;
  int line;
};

enum Kind : int {
  kSyncBlock,
  kSyncWarp,
  kShuffleXor,
  kShuffle,
  kShuffleUp,
  kAnyLane,
  kVote,
  kLoadMatrix,
  kLoadMatrixTransposed,
  kMmaS8S8,
  kMmaU8S8,
  kMmaHalf,
  // sm_90 (runtime_sm90.h)
  kBarrierWait,
  kSyncThreads,
  kArriveThreads,
  kAnyThread,
  kKeepRegisters,
  kTakeRegisters,
  kWgmmaS8,
  kWgmmaE4m3,
  kWgmmaFence,
  kWgmmaCommit,
  kWgmmaWait,
  kKinds
};

// A kernel's entry in the library's symbol table: KERNEL defines one under the kernel's name.
struct Kernel {
  const char* name;
  void (*thread)(const void* params);
  int threads;
  int64_t params_size;
};

constexpr int kOperands = 10, kResults = 4;

// What the running thread needs often. One per thread of the block.
struct Thread {
  int thread;
  uint32_t* operands;       // kOperands words that the warp's collective reads
  const uint32_t* results;  // kResults words that it wrote
};

extern __thread Thread* current;

int64_t cta_id();
int64_t grid_size();
char* shared_memory();
uint32_t shared_address(const void* pointer);
void sync_cta(Site at);
// Waits until the 32 lanes of the warp have come here with their operands; then every lane finds its results.
void collective(Kind kind, Site at);
void copy_async(uint32_t shared, const void* global, Site at);
void copy_async_commit();
void copy_async_wait(int pending);
// Stops the launch with an error that names the kernel, the block and the thread.
[[noreturn]] void refuse(const char* rule, double value, Site at);

}  // namespace emulator
#pragma GCC visibility pop
