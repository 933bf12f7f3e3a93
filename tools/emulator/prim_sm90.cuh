// The instructions of kernels/cuda/src/prim_sm90.cuh for the CPU: the same functions, found first on the include path. Their comments stand there;
// here stands only what differs. Every condition named there is checked.
#pragma once

#include <prim.cuh>

#include "runtime_sm90.h"

DEVICE int thread_id_again() { return thread_id(); }

// ---- barriers and bulk copies ------------------------------------------------------------------------------------------------------------------

DEVICE void barrier_init(uint32_t barrier, int arrivals, SITE) { emulator::barrier_init(barrier, arrivals, at); }
DEVICE void barrier_publish() { emulator::barrier_publish(); }
DEVICE void barrier_arrive(uint32_t barrier, SITE) { emulator::barrier_arrive(barrier, 0, at); }
DEVICE void barrier_arrive_expect(uint32_t barrier, int bytes, SITE) { emulator::barrier_arrive(barrier, bytes, at); }
DEVICE void barrier_wait(uint32_t barrier, int parity, SITE) { emulator::barrier_wait(barrier, parity, at); }
DEVICE void bulk_copy(uint32_t shared, const void* global, int bytes, uint32_t barrier, SITE) {
  emulator::bulk_copy(shared, global, bytes, barrier, at);
}
DEVICE void fence_async() { emulator::fence_async(); }

// ---- hardware barriers, registers --------------------------------------------------------------------------------------------------------------

DEVICE void sync_threads(int id, int threads, SITE) { emulator::meet_threads(emulator::kSyncThreads, id, threads, false, at); }
DEVICE void arrive_threads(int id, int threads, SITE) { emulator::meet_threads(emulator::kArriveThreads, id, threads, false, at); }
DEVICE bool any_thread(int id, int threads, bool value, SITE) {
  return emulator::meet_threads(emulator::kAnyThread, id, threads, value, at);
}
// The registers of the kernel are taken to be as many per thread as its size allows: 168 of 384 threads.
template <int kCount>
DEVICE void keep_registers(SITE) {
  emulator::set_registers(emulator::kKeepRegisters, kCount, at);
}
template <int kCount>
DEVICE void take_registers(SITE) {
  emulator::set_registers(emulator::kTakeRegisters, kCount, at);
}

// ---- matrix products of a warpgroup ------------------------------------------------------------------------------------------------------------
// Exact, each k32 summed in fp32 before it is added to c; the device's e4m3 sums drop bits of the smaller terms.
// `c` and `a` are found by their address until wgmma_wait lets go of the product: they must be variables that live that long.

template <int kRowBytes>
DEVICE uint64_t matrix_descriptor(uint32_t shared, SITE) {
  static_assert(kRowBytes == 64 || kRowBytes == 128, "rows of 64 or 128 bytes");
  emulator::check_start(shared, kRowBytes, at);
  return (shared & 0x3ffff) >> 4 | 1ul << 16 | (uint64_t)(8 * kRowBytes >> 4) << 32 | (kRowBytes == 128 ? 1ul : 2ul) << 62;
}
DEVICE uint64_t at_byte(uint64_t descriptor, int bytes, SITE) {
  emulator::check_start(((uint32_t)(descriptor & 0x3fff) << 4) + (uint32_t)bytes, descriptor >> 62 == 1 ? 128 : 64, at);
  return descriptor + (uint64_t)(bytes >> 4);
}
// The names are checked at every product and every wait; what is done to a register in spite of them is only seen where it changes what it holds.
template <class... Registers>
DEVICE void wgmma_fence(Registers&... c_and_a) {
  const emulator::Named named[] = {{&c_and_a, sizeof c_and_a}..., {}};
  emulator::wgmma_fence(named, sizeof...(c_and_a));
}
DEVICE void wgmma_commit() { emulator::wgmma_commit(); }
template <int kPending, class... Registers>
DEVICE void wgmma_wait(Registers&... c) {
  const emulator::Named named[] = {{&c, sizeof c}..., {}};
  emulator::wgmma_wait(kPending, named, sizeof...(c));
}
template <int kN>
DEVICE void wgmma_s8(int (&c)[kN / 8][4], uint64_t a, uint64_t b, bool accumulate, SITE) {
  static_assert(kN >= 8 && kN <= 256 && (kN <= 32 || kN % 16 == 0 ? kN % 8 == 0 : false), "a width that the instruction has");
  emulator::multiply({emulator::kWgmmaS8, kN, c, nullptr, a, b, accumulate}, at);
}
template <int kN>
DEVICE void wgmma_e4m3(float (&c)[kN / 8][4], const uint32_t (&a)[4], uint64_t b, bool accumulate, SITE) {
  static_assert(kN >= 8 && kN <= 256 && kN % 8 == 0, "a width that the instruction has");
  emulator::multiply({emulator::kWgmmaE4m3, kN, c, a, 0, b, accumulate}, at);
}
