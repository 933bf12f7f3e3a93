// Every instruction that is not plain C++, each behind a named function: the only file with inline assembly or compiler intrinsics.
//
// It needs no header, neither the host's nor CUDA's, so that NVRTC compiles it anywhere. The tests compile the kernels for the CPU against another
// file of this name with the same functions (tools/emulator/prim.cuh): what a function does is written here once, in its comment.
// Minimum arch: sm_80. A few functions exist only above (their comment says so).
#pragma once

typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
#if defined(__CUDACC_RTC__) || defined(_WIN32)
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else  // nvcc on Linux, whose host headers say long
typedef long int64_t;
typedef unsigned long uint64_t;
#endif

// A kernel is declared KERNEL(name, threads, Params) { ... } and finds its one argument, a struct by value, as `p`.
#define KERNEL(name, threads, Params) extern "C" __global__ void __launch_bounds__(threads) name(const __grid_constant__ Params p)
#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")

struct alignas(16) Bytes16 {
  uint32_t word[4];
};
struct alignas(8) Bytes8 {
  uint32_t word[2];
};

// ---- where am I --------------------------------------------------------------------------------------------------------------------------------

DEVICE int thread_id() { return threadIdx.x; }
DEVICE int lane_id() { return threadIdx.x & 31; }
DEVICE int warp_id() { return threadIdx.x >> 5; }
DEVICE int64_t cta_id() { return blockIdx.x; }
DEVICE int64_t grid_size() { return gridDim.x; }

// The dynamic shared memory of the CTA, aligned to 1024 bytes.
DEVICE char* shared_memory() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}
// The 32-bit address that copy_async_16 and load_matrix take for a pointer into shared memory.
DEVICE uint32_t shared_address(const void* pointer) { return (uint32_t)__cvta_generic_to_shared(pointer); }

// ---- together ----------------------------------------------------------------------------------------------------------------------------------

DEVICE void sync_cta() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE int shuffle_xor(int value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE uint32_t shuffle_xor(uint32_t value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE float shuffle(float value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
DEVICE int shuffle(int value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
// Value of lane - delta; the lane's own where that does not exist.
DEVICE int shuffle_up(int value, int delta) { return __shfl_up_sync(0xffffffffu, value, delta); }
DEVICE bool any_lane(bool value) { return __any_sync(0xffffffffu, value); }
DEVICE uint32_t vote(bool value) { return __ballot_sync(0xffffffffu, value); }
DEVICE int atomic_add(int* address, int value) { return atomicAdd(address, value); }

// ---- arithmetic --------------------------------------------------------------------------------------------------------------------------------

DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
DEVICE float as_float(int bits) { return __int_as_float(bits); }
DEVICE uint32_t as_bits(float value) { return __float_as_uint(value); }
DEVICE float infinity() { return __uint_as_float(0x7f800000u); }
DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }  // a * b + c, rounded once
// These two return the other operand where one is NaN.
DEVICE float max_of(float a, float b) { return fmaxf(a, b); }
DEVICE float min_of(float a, float b) { return fminf(a, b); }
DEVICE int max_of(int a, int b) { return max(a, b); }
DEVICE int min_of(int a, int b) { return min(a, b); }
DEVICE uint32_t max_of(uint32_t a, uint32_t b) { return max(a, b); }
DEVICE int64_t min_of(int64_t a, int64_t b) { return min(a, b); }
DEVICE float absolute(float a) { return fabsf(a); }
DEVICE float floor_of(float a) { return floorf(a); }
DEVICE float root(float a) { return __fsqrt_rn(a); }
DEVICE float inverse_root(float a) { return rsqrtf(a); }
DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }  // correctly rounded
DEVICE int count_bits(uint32_t a) { return __popc(a); }
// 2 ** a; subnormal results are zero; exp2(-inf) = 0. Relative error 2 ** -22.
DEVICE float exp2_of(float a) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(a));
  return y;
}
// log2(a); log2(0) = -inf.
DEVICE float log2_of(float a) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(a));
  return y;
}
// a as float; exact for |a| < 2 ** 22, which every sum of the kernels is. On sm_80 the conversion instruction runs at a quarter of the rate.
DEVICE float to_float(int a) {
#if __CUDA_ARCH__ == 800
  return __int_as_float(a + 0x4b400000) - 12582912.0f;
#else
  return __int2float_rn(a);
#endif
}

// ---- number formats ----------------------------------------------------------------------------------------------------------------------------

DEVICE float half_to_float(uint16_t a) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(a));
  return y;
}
DEVICE uint16_t float_to_half(float a) {
  uint16_t y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(a));
  return y;
}
DEVICE float bfloat_to_float(uint16_t a) { return __uint_as_float((uint32_t)a << 16); }
// Two values in one word, `low` in the low half; rounded to nearest even.
DEVICE uint32_t pack_half(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
DEVICE uint32_t pack_bfloat(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
// Four values in one word, `a` in the lowest byte.
// To nearest even, saturating at -128 and 127; NaN gives 0.
DEVICE uint32_t pack_int8(float a, float b, float c, float d) {
  int ia = __float2int_rn(a), ib = __float2int_rn(b), ic = __float2int_rn(c), id = __float2int_rn(d);
  uint32_t y;
  asm("{.reg .u32 t; cvt.pack.sat.s8.s32.b32 t, %4, %3, 0; cvt.pack.sat.s8.s32.b32 %0, %2, %1, t;}" : "=r"(y) : "r"(ia), "r"(ib), "r"(ic), "r"(id));
  return y;
}
// To nearest even; the arguments must lie in [0, 255]. The integer lands in the low byte of the sum with 1.5 * 2 ** 23.
DEVICE uint32_t pack_uint8(float a, float b, float c, float d) {
  uint32_t ab = __byte_perm(__float_as_uint(a + 12582912.0f), __float_as_uint(b + 12582912.0f), 0x0040);
  uint32_t cd = __byte_perm(__float_as_uint(c + 12582912.0f), __float_as_uint(d + 12582912.0f), 0x0040);
  return __byte_perm(ab, cd, 0x5410);
}
// e4m3, to nearest even, saturating at 448. Needs sm_89.
DEVICE uint32_t pack_e4m3(float a, float b, float c, float d) {
  uint16_t low = 0, high = 0;
#if __CUDA_ARCH__ >= 890
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
#else
  __trap();
#endif
  return (uint32_t)low | ((uint32_t)high << 16);
}

// ---- memory ------------------------------------------------------------------------------------------------------------------------------------

// 16 bytes from global to shared memory, both aligned to 16. They land at some time before copy_async_wait lets go of their group.
DEVICE void copy_async_16(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(__cvta_generic_to_global(global)) : "memory");
}
// Closes the group of this thread's copies so far (it may be empty).
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's groups are still under way.
template <int kPending>
DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
// Four 8x8 matrices of 16-bit elements. Lanes 8i..8i+7 give the addresses of matrix i's rows (16 bytes each); lane l gets elements 2*(l%4) and
// 2*(l%4)+1 of row l/4 of every matrix i in out[i].
DEVICE void load_matrix(uint32_t (&out)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared)
               : "memory");
}
// The same with every matrix transposed: lane l gets rows 2*(l%4) and 2*(l%4)+1 of column l/4.
DEVICE void load_matrix_transposed(uint32_t (&out)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared)
               : "memory");
}

// ---- matrix products ---------------------------------------------------------------------------------------------------------------------------
// c (16 x 8) += a (16 x K) b (K x 8). With g = lane / 4, t = lane % 4:
// c[0], c[1]: row g, columns 2t, 2t+1; c[2], c[3]: row g + 8.
// 8-bit, K = 32: a[0]: row g, k 4t..4t+3; a[1]: row g + 8; a[2], a[3]: the same with k + 16. b0: column g, k 4t..4t+3; b1: k + 16.
// 16-bit, K = 16: a[0]: row g, k 2t, 2t+1; a[1]: row g + 8; a[2], a[3]: the same with k + 8. b0: column g, k 2t, 2t+1; b1: k + 8.

DEVICE void mma_s8s8(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void mma_u8s8(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void mma_half(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
