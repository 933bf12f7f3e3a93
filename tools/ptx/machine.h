// What a translated kernel sees: its thread, the arithmetic of PTX, and what the runtime does for it (runtime.cpp, collectives.cpp, async.cpp).
#pragma once
#include "arithmetic.h"

#pragma GCC visibility push(default)  // the runtime is a library of its own, shared by those of the kernels
namespace ptx {

// Where dynamic shared memory starts in the shared window: the first KB is the system's, as on sm_90.
constexpr u32 kSharedBase = 1024;

struct Thread {
  u32 thread, threads, block, blocks;
  int fuel;  // places at which this thread may be suspended, until it is
};

// What a kernel is, for the launch.
struct Kernel {
  const char* name;
  void (*run)(Thread&);
  u32 threads;      // at most
  u32 params_size;
  bool async_proxy;  // it has bulk copies or wgmma: accesses through the generic proxy are kept in mind
};

// What 32 lanes do together.
enum Kind {
  kShuffleButterfly,
  kShuffleIndex,
  kShuffleUp,
  kShuffleDown,
  kVoteAny,
  kVoteAll,
  kVoteBallot,
  kSyncWarp,
  kLoadMatrix,
  kLoadMatrixTransposed,
  kMmaS8S8,
  kMmaU8S8,
  kMmaF16,
  kWgmmaS8,
  kWgmmaE4m3,
  kWgmmaFence,
  kWgmmaCommit,
  kWgmmaWait,
  kRegistersDown,
  kRegistersUp,
};

// ---- memory: where the bytes of an access lie, once it is known to be a right one -----------------------------------------------------------------
char* global(Thread& me, u64 address, u32 bytes, int line);
const char* shared_to_read(Thread& me, u64 address, u32 bytes, int line);
char* shared_to_write(Thread& me, u64 address, u32 bytes, int line);
const char* generic_to_read(Thread& me, u64 address, u32 bytes, int line);
char* generic_to_write(Thread& me, u64 address, u32 bytes, int line);
const char* param(Thread& me, u64 offset, u32 bytes, int line);
u64 generic_of_shared(Thread& me, u64 address);
u32 atomic_add(Thread& me, u64 address, u32 value, int line);

template <class T>
inline T load(const char* at) {
  T value;
  memcpy(&value, at, sizeof value);
  return value;
}
template <class T>
inline void store(char* at, T value) {
  memcpy(at, &value, sizeof value);
}

// ---- arithmetic that is an approximation on the device, or may fail -------------------------------------------------------------------------------
u32 exp2_ftz(u32 a);
u32 log2_approx(u32 a);
u32 rsqrt_approx(u32 a);
u64 divisor(Thread& me, u64 b, int line);  // b, once it is known not to be 0

// ---- threads together -----------------------------------------------------------------------------------------------------------------------------
void pause(Thread& me);
// Once every memory access and backward branch.
inline void tick(Thread& me) {
  if (--me.fuel <= 0) pause(me);
}
// Waits until the 32 lanes of the warp have come; `settings` are the same for all lanes, `in` and `out` the lane's own words.
void meet(Thread& me, Kind kind, int line, const u32* settings, const u32* in, u32* out);
void need_all_lanes(Thread& me, u32 mask, int line);
bool barrier_sync(Thread& me, u32 id, u32 count, bool aligned, bool value, int line);  // whether `value` holds for any of them
void barrier_arrive(Thread& me, u32 id, u32 count, int line);
[[noreturn]] void trap(Thread& me, int line);

// ---- asynchronous copies, mbarriers, the asynchronous proxy ---------------------------------------------------------------------------------------
void copy_async(Thread& me, u64 to, u64 from, u32 bytes, int line);
void copy_async_commit(Thread& me);
void copy_async_wait(Thread& me, u32 pending);
void bulk_copy(Thread& me, u64 to, u64 from, u32 bytes, u64 mbarrier, int line);
void mbarrier_init(Thread& me, u64 address, u32 count, int line);
void mbarrier_arrive(Thread& me, u64 address, u32 expected_bytes, int line);
bool mbarrier_try_wait(Thread& me, u64 address, u32 parity, int line);
void fence_proxy_async(Thread& me);
void fence_mbarrier_init(Thread& me);

}  // namespace ptx
#pragma GCC visibility pop
