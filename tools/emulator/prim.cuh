// The instructions of kernels/cuda/src/prim.cuh for the CPU: the same functions, found first on the include path. Their comments stand there;
// here stands only what differs. Where a comment there sets a condition ("must lie in", "exact for"), breaking it is an error here;
// so is a lane, mask or delta outside 0..31, which the device would wrap.
#pragma once

typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;

#include "runtime.h"

// The build defines __CUDA_ARCH__, and EMULATOR_SALT: not 0 where approximations are to be off (emulator.py, Configuration).

// The thread's function takes the struct by reference: const for all threads, as a grid constant is.
#define KERNEL(name, threads, Params)                                                                                            \
  static void name##_thread(const Params& p);                                                                                    \
  static void name##_entry(const void* params) { name##_thread(*static_cast<const Params*>(params)); }                           \
  extern "C" __attribute__((visibility("default"))) const emulator::Kernel name = {#name, name##_entry, threads, sizeof(Params)}; \
  static void name##_thread(const Params& p)
#define DEVICE inline __attribute__((unused))
#define UNROLL
// Last parameter of every function at which threads meet or which can refuse its arguments: the line of the kernel that calls it.
#define SITE emulator::Site at = {__builtin_FILE(), __builtin_LINE()}

struct alignas(16) Bytes16 {
  uint32_t word[4];
};
struct alignas(8) Bytes8 {
  uint32_t word[2];
};

// ---- where am I --------------------------------------------------------------------------------------------------------------------------------

DEVICE int thread_id() { return emulator::current->thread; }
DEVICE int lane_id() { return emulator::current->thread & 31; }
DEVICE int warp_id() { return emulator::current->thread >> 5; }
DEVICE int64_t cta_id() { return emulator::cta_id(); }
DEVICE int64_t grid_size() { return emulator::grid_size(); }

DEVICE char* shared_memory() { return emulator::shared_memory(); }
DEVICE uint32_t shared_address(const void* pointer) { return emulator::shared_address(pointer); }

// ---- arithmetic --------------------------------------------------------------------------------------------------------------------------------

DEVICE float as_float(uint32_t bits) {
  float y;
  __builtin_memcpy(&y, &bits, 4);
  return y;
}
DEVICE float as_float(int bits) { return as_float((uint32_t)bits); }
DEVICE uint32_t as_bits(float value) {
  uint32_t y;
  __builtin_memcpy(&y, &value, 4);
  return y;
}
DEVICE float infinity() { return __builtin_inff(); }
DEVICE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
DEVICE float max_of(float a, float b) {
  if (a != a) return b;
  if (b != b) return a;
  return a == b ? as_float(as_bits(a) & as_bits(b)) : a > b ? a : b;  // the larger of 0 and -0 is 0
}
DEVICE float min_of(float a, float b) {
  if (a != a) return b;
  if (b != b) return a;
  return a == b ? as_float(as_bits(a) | as_bits(b)) : a < b ? a : b;
}
DEVICE int max_of(int a, int b) { return a > b ? a : b; }
DEVICE int min_of(int a, int b) { return a < b ? a : b; }
DEVICE uint32_t max_of(uint32_t a, uint32_t b) { return a > b ? a : b; }
DEVICE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
DEVICE float absolute(float a) { return as_float(as_bits(a) & 0x7fffffffu); }
DEVICE float floor_of(float a) { return __builtin_floorf(a); }
DEVICE float root(float a) { return __builtin_sqrtf(a); }

namespace emulator {
// y = f(x) as an approximation might have it: up to `steps` steps off, always by the same for one x. The values that are no approximations stay.
DEVICE float approximate(float y, float x, int steps, float step) {
  if (!EMULATOR_SALT || y == 0.0f || y - y != 0.0f || x == 0.0f) return y;
  uint32_t hash = (as_bits(x) ^ EMULATOR_SALT * 0x9e3779b9u) * 0x85ebca6bu;
  hash = (hash ^ hash >> 13) * 0xc2b2ae35u;
  hash = (hash ^ hash >> 16) % (2 * steps + 1);
  return step == 0.0f ? as_float(as_bits(y) + hash - steps) : y + step * ((int)hash - steps);
}
constexpr float kLastPlace = 0.0f;  // a step of a unit in the last place
}  // namespace emulator

// Of an approximation's error the PTX ISA has: exp2, and log2 outside of (0.5, 2), 2 ** -22 relative; log2 inside, 2 ** -22 absolute; rsqrt
// 2 ** -22.9 relative. Off by 4 units in the last place is one to two times the first, off by four steps of 2 ** -23 twice the second.
DEVICE float inverse_root(float a) { return emulator::approximate(1.0f / __builtin_sqrtf(a), a, 4, emulator::kLastPlace); }
DEVICE float divide(float a, float b) { return a / b; }
DEVICE int count_bits(uint32_t a) { return __builtin_popcount(a); }
DEVICE float exp2_of(float a) {
  float y = emulator::approximate(__builtin_exp2f(a), a, 4, emulator::kLastPlace);
  return y < 1.17549435e-38f ? 0.0f : y;
}
DEVICE float log2_of(float a) {
  return emulator::approximate(__builtin_log2f(a), a, 4, a > 0.5f && a < 2.0f ? 0x1p-23f : emulator::kLastPlace);
}
DEVICE float to_float(int a, SITE) {
  if (a < -(1 << 22) || a >= (1 << 22)) emulator::refuse("to_float is exact below 2 ** 22 only", a, at);
#if __CUDA_ARCH__ == 800
  return as_float(a + 0x4b400000) - 12582912.0f;
#else
  return (float)a;
#endif
}

// ---- number formats ----------------------------------------------------------------------------------------------------------------------------

DEVICE float half_to_float(uint16_t a) {
  uint32_t magnitude = (uint32_t)(a & 0x7fff) << 13;
  float y = magnitude >= 0x0f800000u ? as_float(magnitude | 0x7f800000u) : as_float(magnitude) * 0x1p112f;
  return as_float(as_bits(y) | (uint32_t)(a & 0x8000) << 16);
}
DEVICE uint16_t float_to_half(float a) {
  uint32_t bits = as_bits(a), sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return 0x7fff;  // every NaN becomes this one
  if (bits >= 0x477ff000u) return sign | 0x7c00;
  if (bits < 0x38800000u) return sign | (as_bits(as_float(bits) + 0.5f) - 0x3f000000u);  // subnormal: the addition rounds
  return sign | (((bits + 0xfff + (bits >> 13 & 1)) >> 13) - 0x1c000);
}
DEVICE float bfloat_to_float(uint16_t a) { return as_float((uint32_t)a << 16); }
DEVICE uint32_t pack_half(float low, float high) { return float_to_half(low) | (uint32_t)float_to_half(high) << 16; }
DEVICE uint32_t pack_bfloat(float low, float high) {
  uint32_t y[2], bits[2] = {as_bits(low), as_bits(high)};
  for (int i = 0; i < 2; i++) y[i] = (bits[i] & 0x7fffffffu) > 0x7f800000u ? 0x7fff : (bits[i] + 0x7fff + (bits[i] >> 16 & 1)) >> 16;
  return y[0] | y[1] << 16;
}
DEVICE uint32_t pack_int8(float a, float b, float c, float d) {
  float x[4] = {a, b, c, d};
  uint32_t y = 0;
  for (int i = 0; i < 4; i++) {
    float r = x[i] != x[i] ? 0.0f : __builtin_rintf(min_of(max_of(x[i], -128.0f), 127.0f));
    y |= (uint32_t)(uint8_t)(int)r << 8 * i;
  }
  return y;
}
// NaN gives 255, as on the device.
DEVICE uint32_t pack_uint8(float a, float b, float c, float d, SITE) {
  float x[4] = {a, b, c, d};
  uint32_t y = 0;
  for (int i = 0; i < 4; i++) {
    float r = x[i] != x[i] ? 255.0f : __builtin_rintf(x[i]);
    if (r < 0.0f || r > 255.0f) emulator::refuse("pack_uint8 takes values in [0, 255]", x[i], at);
    y |= (uint32_t)r << 8 * i;
  }
  return y;
}
// NaN gives the NaN 0x7f; infinity saturates.
DEVICE uint32_t pack_e4m3(float a, float b, float c, float d, SITE) {
#if __CUDA_ARCH__ < 890
  emulator::refuse("pack_e4m3 needs sm_89", __CUDA_ARCH__ / 10, at);
#endif
  float x[4] = {a, b, c, d};
  uint32_t y = 0;
  for (int i = 0; i < 4; i++) {
    uint32_t bits = as_bits(x[i]), sign = bits >> 24 & 0x80, byte;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) {
      sign = 0, byte = 0x7f;
    } else if (bits >= 0x43e00000u) {  // 448
      byte = 0x7e;
    } else if (bits < 0x3c800000u) {  // 2 ** -6: subnormal in steps of 2 ** -9, which the addition rounds to
      byte = as_bits(as_float(bits) + 0x1p14f) - 0x46800000u;
    } else {
      byte = ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3);
    }
    y |= (sign | byte) << 8 * i;
  }
  return y;
}

// ---- together ----------------------------------------------------------------------------------------------------------------------------------

namespace emulator {
DEVICE uint32_t exchange(Kind kind, uint32_t value, int with, Site at) {
  current->operands[0] = value;
  current->operands[1] = (uint32_t)with;
  collective(kind, at);
  return current->results[0];
}
template <class Element>
DEVICE void multiply(Kind kind, Element (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site at) {
  uint32_t* operands = current->operands;
  __builtin_memcpy(operands, a, 16);
  operands[4] = b0;
  operands[5] = b1;
  __builtin_memcpy(operands + 6, c, 16);
  collective(kind, at);
  __builtin_memcpy(c, current->results, 16);
}
DEVICE void load(Kind kind, uint32_t (&out)[4], uint32_t shared, Site at) {
  current->operands[0] = shared;
  collective(kind, at);
  __builtin_memcpy(out, current->results, 16);
}
}  // namespace emulator

DEVICE void sync_cta(SITE) { emulator::sync_cta(at); }
DEVICE void sync_warp(SITE) { emulator::collective(emulator::kSyncWarp, at); }
DEVICE float shuffle_xor(float value, int mask, SITE) { return as_float(emulator::exchange(emulator::kShuffleXor, as_bits(value), mask, at)); }
DEVICE int shuffle_xor(int value, int mask, SITE) { return (int)emulator::exchange(emulator::kShuffleXor, (uint32_t)value, mask, at); }
DEVICE uint32_t shuffle_xor(uint32_t value, int mask, SITE) { return emulator::exchange(emulator::kShuffleXor, value, mask, at); }
DEVICE float shuffle(float value, int lane, SITE) { return as_float(emulator::exchange(emulator::kShuffle, as_bits(value), lane, at)); }
DEVICE int shuffle(int value, int lane, SITE) { return (int)emulator::exchange(emulator::kShuffle, (uint32_t)value, lane, at); }
DEVICE int shuffle_up(int value, int delta, SITE) { return (int)emulator::exchange(emulator::kShuffleUp, (uint32_t)value, delta, at); }
DEVICE bool any_lane(bool value, SITE) { return emulator::exchange(emulator::kAnyLane, value, 0, at) != 0; }
DEVICE uint32_t vote(bool value, SITE) { return emulator::exchange(emulator::kVote, value, 0, at); }
DEVICE int atomic_add(int* address, int value) { return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST); }

// ---- memory ------------------------------------------------------------------------------------------------------------------------------------

DEVICE void copy_async_16(uint32_t shared, const void* global, SITE) { emulator::copy_async(shared, global, at); }
DEVICE void copy_async_commit() { emulator::copy_async_commit(); }
template <int kPending>
DEVICE void copy_async_wait() {
  emulator::copy_async_wait(kPending);
}
DEVICE void load_matrix(uint32_t (&out)[4], uint32_t shared, SITE) { emulator::load(emulator::kLoadMatrix, out, shared, at); }
DEVICE void load_matrix_transposed(uint32_t (&out)[4], uint32_t shared, SITE) { emulator::load(emulator::kLoadMatrixTransposed, out, shared, at); }

// ---- matrix products ---------------------------------------------------------------------------------------------------------------------------
// The products are exact and summed in fp32 before c is added; the device sums in an order and with a rounding of its own.

DEVICE void mma_s8s8(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SITE) {
  emulator::multiply(emulator::kMmaS8S8, c, a, b0, b1, at);
}
DEVICE void mma_u8s8(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SITE) {
  emulator::multiply(emulator::kMmaU8S8, c, a, b0, b1, at);
}
DEVICE void mma_half(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SITE) {
  emulator::multiply(emulator::kMmaHalf, c, a, b0, b1, at);
}
