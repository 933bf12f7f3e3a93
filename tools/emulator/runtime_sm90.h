// What prim_sm90.cuh asks of the emulator (sm90_*.cpp).
#pragma once

#pragma GCC visibility push(default)
namespace emulator {

// One product of a warpgroup: m64, n, k32. Its left operand lies in registers (e4m3) or, described by `a`, in shared memory (s8).
struct Product {
  Kind kind;
  int n;
  void* c;                    // n / 2 words
  const uint32_t* registers;  // 4 words
  uint64_t a, b;
  bool accumulate;
};

// Registers that a fence or a wait names.
struct Named {
  const void* start;
  int bytes;
};

void barrier_init(uint32_t barrier, int arrivals, Site at);
void barrier_publish();
void barrier_arrive(uint32_t barrier, int bytes, Site at);
void barrier_wait(uint32_t barrier, int parity, Site at);
void bulk_copy(uint32_t shared, const void* global, int bytes, uint32_t barrier, Site at);
void fence_async();
// The three that meet at a hardware barrier; returns whether any thread of an any_thread gave true.
bool meet_threads(Kind kind, int id, int threads, bool value, Site at);
void set_registers(Kind kind, int count, Site at);
void wgmma_fence(const Named* named, int count);
void wgmma_commit();
void wgmma_wait(int pending, const Named* named, int count);
void multiply(const Product& product, Site at);
// Where a matrix of such rows may start.
void check_start(uint32_t shared, int row_bytes, Site at);

}  // namespace emulator
#pragma GCC visibility pop
