// What the files of the runtime share: the state of a block, and how its threads wait for each other.
#pragma once
#include <setjmp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <mutex>
#include <string>
#include <vector>

#include "prim.cuh"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define SANITIZED 1
#else
#define SANITIZED 0
#endif

#if defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)
#define REGISTER_SWITCH 1
#else  // any other processor: ten times slower, for a system call at every switch
#define REGISTER_SWITCH 0
#include <ucontext.h>
#endif

namespace emulator {

constexpr int kPoison = 0x7f;         // large as an integer, 3e38 as fp32, NaN as fp16 and e4m3
constexpr int kRedzone = 0xc3;
constexpr int kMaxThreads = 1024;
constexpr int kMaxCopies = 256;       // under way at once, per thread
constexpr int kLongestStill = 20;     // a thread stands still for fewer turns than two to the power of this
constexpr size_t kPage = 4096;
constexpr size_t kStack = 256 << 10;  // per thread, of which the lowest page is the guard
constexpr size_t kSharedLimit = 227 << 10;
constexpr size_t kSharedPages = (kSharedLimit + kPage - 1) / kPage * kPage;
constexpr size_t kGuard = 256 << 10;  // before and after these: a place that is off by the whole of shared memory is told too

struct Async;  // sm90.h: barriers, bulk copies and products under way

enum State : uint8_t { kRunning, kWaiting, kEnded };

struct Copy {
  uint32_t shared;
  int group;
  const void* global;
};

struct Fiber {
  Thread api;
  State state;
  Kind kind;  // what it waits in
  Site site;
#if REGISTER_SWITCH
  void* stack_pointer;
#else
  ucontext_t context;
#endif
  char* stack;
  void* fake_stack;  // AddressSanitizer's
  int copies, group, first_group;
  Copy copy[kMaxCopies];
  bool fenced;             // wgmma_fence since the last wgmma_wait
  int products, let_go;    // groups of products: the open one's number; those below `let_go` were waited for
};

struct Warp {
  uint32_t ready, waiting, ended;  // lanes; waiting: in a collective of the warp
  uint32_t at_barrier;
  uint32_t order;                  // lanes go in the order i ^ order
  int slice;                       // collectives before another warp may have its turn
  Kind kind;
  Site site;
  uint32_t operands[32][kOperands];
  uint32_t results[32][kResults];
};

// What a host thread needs to run blocks; kept between launches.
struct Machine {
  char* stacks = nullptr;
  char* shared_pages = nullptr;  // kGuard, kSharedPages, kGuard
  char* signal_stack = nullptr;
  bool left_midway = false;  // the last block failed
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Async* async = nullptr;  // of the last block that had one
};

struct Launch {
  const Kernel* kernel;
  int64_t grid, shared;
  int threads;
  const void* params;
  uint64_t seed;
  double limit;
  std::vector<int64_t> order;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::mutex mutex;
  std::string error;
};

struct Block {
  Launch* launch;
  Machine* machine;
  int64_t id;
  char* shared;
  uint64_t random;
  int slice;  // 0: a warp goes as far as it can
  bool late;  // copies land as late as they may
  int slow;  // the warp of those who may stand still; -1: none
  uint32_t still;  // its lanes that are passed over until turn `still_until`, or until nobody else can go on
  int64_t turn, still_until;
  Async* async;  // null until the first use
  uint32_t ready_warps;
  int arrived, ended;
  Site barrier_site;
  sigjmp_buf escape;
  char error[4096];
#if REGISTER_SWITCH
  void* host_stack_pointer;
#else
  ucontext_t host_context;
#endif
  const void* host_stack;
  size_t host_stack_size;
  void* host_fake_stack;
};

extern __thread Block* block;

inline uint64_t draw() {
  uint64_t z = block->random += 0x9e3779b97f4a7c15ull;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ z >> 27) * 0x94d049bb133111ebull;
  return z ^ z >> 31;
}
extern const char* const kNames[kKinds];
const char* base_name(const char* path);
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);
// The same from a signal's handler.
[[noreturn]] __attribute__((format(printf, 1, 2))) void escape(const char* format, ...);

inline Fiber& fiber_of(Thread* t) { return *reinterpret_cast<Fiber*>(t); }
inline Fiber& self() { return fiber_of(current); }

// Runs the threads of a block to their end, or to the first error, which the launch keeps.
void run_block(Launch& launch, Machine& machine, int64_t id);

// Gives the processor to another thread that can go on, and returns when this one may.
void yield(Fiber& me, int warp, bool turn_over);
void make_ready(int warp, uint32_t lanes);
void wait(Fiber& me, Kind kind, Site at);

// What the lanes of a warp have come together for: from their operands to their results.
void complete(Warp& w, Kind kind);
float e4m3_to_float(uint8_t a);
typedef float Eight __attribute__((vector_size(32)));

// Only where block->async is set:
void async_turn();              // at a change of threads: something under way may come to its end
bool async_stuck();             // no thread can go on: something under way comes to its end; false: nothing is under way
void async_thread_ends();
void async_block_ends();
void async_describe(char* text, size_t size);  // what threads wait for
void issue(int warp);  // a product that the lanes of a warp have come to

}  // namespace emulator
