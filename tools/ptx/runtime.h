// What the files of the runtime share: the state of a launch, of its blocks, warps and threads, and how errors are told.
#pragma once
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "machine.h"

namespace ptx {

constexpr u32 kAllLanes = 0xffffffffu;
constexpr u32 kBarriers = 16;
constexpr u32 kMostPending = (1u << 20) - 1;  // arrivals, and bytes, that an mbarrier can count
constexpr u16 kMbarrierByte = 0xffff;         // in Block::writer

enum State : u8 { kReady, kInWarp, kAtBarrier, kAtMbarrier, kForRegisters, kEnded };
enum Copies : s32 { kAtOnce, kAtRandom, kLate };

struct Schedule {
  u64 seed;
  s32 copies, preempt, resident, ulps, stall;
};

// Addresses from `first` up to `last`, which is outside.
struct Range {
  u64 first, last;
};

struct Request {
  const Kernel* kernel;
  const u8* params;
  u32 params_size, grid, threads, shared;
  u32 registers;  // per thread, that the kernel is launched with
  const Range* tensors;
  u32 tensor_count;
  Schedule schedule;
  double limit;  // seconds
};

struct AsyncCopy {
  u32 to, bytes;
  u64 from;
};

struct SharedBytes {
  u32 at, bytes;  // offset in shared memory
};

struct Warp;
struct Block;
struct Fiber : Thread {
  Block* home;
  Warp* warp;
  void* stack_pointer;
  char* stack;
  State state;
  u32 lane;
  int line;  // where it waits, or waited last
  // In a collective of the warp:
  Kind kind;
  const u32* settings;
  const u32* in;
  u32* out;
  // At a barrier of the block, or an mbarrier:
  u32 barrier;
  bool barrier_value;
  u32 mbarrier, parity;
  std::vector<AsyncCopy> copies;  // of the group that is open
  std::deque<std::vector<AsyncCopy>> copy_groups;
  // Through the generic proxy since the last fence; only where the kernel uses the other one as well.
  std::vector<SharedBytes> reads, writes;
};

// What a wgmma reads of shared memory.
struct Product {
  int line;
  u64 hash;
  std::vector<u32> chunks;  // offsets of 16 bytes each
};

struct Warp {
  u32 index;
  Fiber* lanes;
  u32 waiting;    // lanes in a collective
  u32 registers;  // per thread
  bool fenced;    // wgmma.fence since the last wait for all products
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;
  std::vector<u64> issued;  // what all warps of a warpgroup must do alike
};

struct Barrier {
  u32 arrived, count;
  bool any;
  std::vector<u32> lanes;  // that have come, by warp
  std::vector<Fiber*> waiting;
};

struct Mbarrier {
  u32 count, pending, phase;
  s64 bytes;        // outstanding
  u32 initialiser;  // 1 + the thread that initialised it and has not fenced since; 0: the asynchronous proxy may use it
};

struct BulkCopy {
  u32 to, bytes, mbarrier;
  u64 from;
  int line;
};

struct Block {
  Block(u32 index);
  ~Block();

  u32 index, live;
  u32 free_registers = 0;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barriers[kBarriers] = {};
  std::map<u32, Mbarrier> mbarriers;  // by shared address
  std::vector<BulkCopy> bulk;         // under way
  char* shared;
  std::vector<u16> writer;  // per byte: 1 + the thread that wrote it through the generic proxy without a fence since; 0: none
};

extern const Request* request;
extern bool failed;

inline Fiber& fiber(Thread& me) { return static_cast<Fiber&>(me); }
inline u32 offset_of(u32 address) { return address - kSharedBase; }

u32 draw();                 // 32 random bits
inline u32 draw(u32 below) { return draw() % below; }
void suspend(Fiber& me);    // until the scheduler resumes it

// Tells an error, at a line of the PTX (0: at none); the launch ends at the next change of threads.
__attribute__((format(printf, 2, 3))) void complain(int line, const char* format, ...);
// The same, and the thread does not go on.
[[noreturn]] __attribute__((format(printf, 3, 4))) void refuse(Thread& me, int line, const char* format, ...);
bool in_tensor(u64 address, u32 bytes);
bool in_shared(u64 address, u32 bytes);

// collectives.cpp
void run_collective(Block& block, Warp& warp);
// async.cpp
void run_async_collective(Block& block, Warp& warp);
void note_read(Fiber& me, u32 offset, u32 bytes, int line);
void note_write(Fiber& me, u32 offset, u32 bytes, int line);
bool mbarrier_passed(Block& block, u32 address, u32 parity);
void land_some(Block& block);  // one of the bulk copies under way
void wake_for_registers(Block& block);
void check_block_end(Block& block);

}  // namespace ptx
