// What the ceilings need beyond the kernels' own primitives, each behind a named function as in kernels/cuda/src/prim.cuh. The second form of each is
// the one for the CPU.
#pragma once
#include <prim.cuh>

struct CeilingParams {
  const char* data;  // random operands, in any order, or the region that copies read
  int32_t* out;      // one number per block, so that nothing can be left out
  int64_t* cycles;   // one number per block: what its rounds took
  int64_t bytes;     // of the region that copies read
  int32_t rounds, copy;
};

#ifdef __CUDACC__
#define ROLLED _Pragma("unroll 1")
// Cycles of this multiprocessor so far. Memory accesses and meetings stay on their side of it.
DEVICE int64_t cycles_now() {
  int64_t now;
  asm volatile("mov.u64 %0, %%clock64;" : "=l"(now)::"memory");
  return now;
}
// a as float, by the conversion instruction on every arch.
DEVICE float converted(int a) { return __int2float_rn(a); }
// mma_half with sums in fp16: c[0] holds row g, columns 2t and 2t+1, c[1] row g + 8.
DEVICE void mma_half_short(uint32_t (&c)[2], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0,%1},{%2,%3,%4,%5},{%6,%7},{%0,%1};"
      : "+r"(c[0]), "+r"(c[1])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#else
#define ROLLED
DEVICE int64_t cycles_now() {  // every look is one cycle
  static int64_t now = 0;
  return __atomic_add_fetch(&now, 1, __ATOMIC_SEQ_CST);
}
DEVICE float converted(int a) { return (float)a; }
DEVICE void mma_half_short(uint32_t (&c)[2], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  float wide[4];
  for (int e = 0; e < 4; ++e) wide[e] = half_to_float((uint16_t)(c[e / 2] >> e % 2 * 16));
  mma_half(wide, a, b0, b1);
  c[0] = pack_half(wide[0], wide[1]);
  c[1] = pack_half(wide[2], wide[3]);
}
#endif

// Around the rounds of a block: `start = start_rounds()`, then `end_rounds(p, start)`; all threads.
DEVICE int64_t start_rounds() {
  sync_cta();
  return cycles_now();
}
DEVICE void end_rounds(const CeilingParams& p, int64_t start) {
  sync_cta();
  if (thread_id() == 0) p.cycles[cta_id()] = cycles_now() - start;
}
