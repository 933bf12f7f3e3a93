// The instructions that only Hopper (sm_90a) has, each behind a named function, as in prim.cuh: barriers in shared memory, bulk copies, registers
// handed from one warpgroup to another, and matrix products of a warpgroup (four warps, the first one's number a multiple of four).
// The tests have a file of this name for the CPU (tools/emulator/prim_sm90.cuh).
#pragma once
#include <prim.cuh>

// ---- barriers in shared memory -----------------------------------------------------------------------------------------------------------------
// Eight bytes, aligned to 8, named by their shared address. A barrier goes through phases 0, 1, 2, ...; a phase is over when `arrivals` threads have
// arrived and every byte that they announced has been copied. What an arriving thread wrote before is visible to whoever waited for the phase.

DEVICE void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// By the thread that initialised, before a sync_cta: now other threads and copies may use the barriers.
DEVICE void barrier_publish() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void barrier_arrive(uint32_t barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }
// Announces `bytes` of copies and arrives.
DEVICE void barrier_arrive_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits for the end of the youngest phase whose number has this parity; a new barrier counts as if the phase before 0 were over.
DEVICE void barrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{.reg .pred over;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@!over bra again;}" ::"r"(barrier), "r"(parity)
      : "memory");
}
// From global to shared memory, both aligned to 16, `bytes` a multiple of 16. They land at some time before the barrier's phase is over.
DEVICE void bulk_copy(uint32_t shared, const void* global, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
               "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(barrier)
               : "memory");
}
// What this thread wrote to shared memory itself becomes visible to matrix products and bulk copies (of other threads after the next meeting), and what
// it read itself may be overwritten by bulk copies (after it has arrived at the barrier that they wait for).
DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- where am I --------------------------------------------------------------------------------------------------------------------------------

// thread_id(), read anew each time: the compiler holds no register for it.
DEVICE int thread_id_again() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// ---- together ----------------------------------------------------------------------------------------------------------------------------------
// Hardware barriers 1 to 15 (0 is sync_cta's). `threads`, a multiple of 32, counts those that wait and those that only arrive.

DEVICE void sync_threads(int id, int threads) { asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
DEVICE void arrive_threads(int id, int threads) { asm volatile("barrier.cta.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
// Whether `value` holds in any of the threads; all of them wait.
DEVICE bool any_thread(int id, int threads, bool value) {
  int any;
  asm volatile(
      "{.reg .pred in, out; setp.ne.b32 in, %3, 0; barrier.cta.red.or.pred out, %1, %2, in; selp.b32 %0, 1, 0, out;}"
      : "=r"(any)
      : "r"(id), "r"(threads), "r"((int)value)
      : "memory");
  return any != 0;
}
// A warpgroup gives back registers down to kCount per thread, or waits until it has kCount. A multiple of 8 in 24..256.
template <int kCount>
DEVICE void keep_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// ---- matrix products of a warpgroup ------------------------------------------------------------------------------------------------------------
// c (64 x N) = a (64 x 32) b (N x 32)^T, plus c where `accumulate`. Warp w of the four has rows 16 w to 16 w + 15; with g = lane / 4, t = lane % 4:
// c[j][0], c[j][1]: row g of the warp's, columns 8 j + 2 t and the next; c[j][2], c[j][3]: row g + 8. Operands in registers: as for mma.sync, K = 32.
// A product is under way until wgmma_wait lets go of its group: until then its c and a must not be touched and what it reads in shared memory must
// stay.

// An operand in shared memory: rows of 64 or 128 bytes, one after the other from an address aligned to 8 rows, their 16-byte chunks permuted as
// layout.cuh says.
template <int kRowBytes>
DEVICE uint64_t matrix_descriptor(uint32_t shared) {
  static_assert(kRowBytes == 64 || kRowBytes == 128, "rows of 64 or 128 bytes");
  return (uint64_t)((shared >> 4) + (1 << 16)) | (uint64_t)(8 * kRowBytes >> 4) << 32 | (uint64_t)(kRowBytes == 128 ? 1 : 2) << 62;
}
// The operand `bytes` further on: whole groups of 8 rows, and a multiple of 32 for the k-step. All must lie in the first 256 KB of shared memory.
DEVICE uint64_t at_byte(uint64_t descriptor, int bytes) { return descriptor >> 32 << 32 | ((uint32_t)descriptor + (bytes >> 4)); }
namespace detail {
// The compiler knows nothing of what fences and waits mean for a product's registers, and would move work on them across. Here it must have finished
// what was done to them before, and may not have begun what comes after; no instruction comes of it.
DEVICE void pin(int& x) { asm volatile("" : "+r"(x)::"memory"); }
DEVICE void pin(uint32_t& x) { asm volatile("" : "+r"(x)::"memory"); }
DEVICE void pin(float& x) { asm volatile("" : "+f"(x)::"memory"); }
template <class Part, int kParts>
DEVICE void pin(Part (&x)[kParts]) {
  UNROLL for (int i = 0; i < kParts; i++) pin(x[i]);
}
}  // namespace detail

// Before the first product and before the first one after a wait. Names, as arrays of any shape, every c and a of the products up to the next wait: an
// operand that is written after the fence makes the compiler wait for products in between.
template <class... Registers>
DEVICE void wgmma_fence(Registers&... c_and_a) {
  (detail::pin(c_and_a), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// Closes the group of the products so far (it may be empty).
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most kPending groups are under way. Names every c that it lets go of, and none that is still under way.
template <int kPending, class... Registers>
DEVICE void wgmma_wait(Registers&... c) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  (detail::pin(c), ...);
  // Where a loop ends with this, NVRTC 12.8 without it keeps one register more over the loop: 11 instructions a tile more at D 128, and 8 bytes spilled.
  asm volatile("" ::: "memory");
}

template <int kN>
DEVICE void wgmma_s8(int (&c)[kN / 8][4], uint64_t a, uint64_t b, bool accumulate);
template <int kN>
DEVICE void wgmma_e4m3(float (&c)[kN / 8][4], const uint32_t (&a)[4], uint64_t b, bool accumulate);

#define SPARGE_ROW(form, j) form(c[j][0]), form(c[j][1]), form(c[j][2]), form(c[j][3])
#define SPARGE_ROWS_4(form, j) SPARGE_ROW(form, j), SPARGE_ROW(form, j + 1), SPARGE_ROW(form, j + 2), SPARGE_ROW(form, j + 3)
#define SPARGE_ROWS_8(form, j) SPARGE_ROWS_4(form, j), SPARGE_ROWS_4(form, j + 4)

template <>
DEVICE void wgmma_s8<64>(int (&c)[8][4], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
      "}, %32, %33, p;}"
      : SPARGE_ROWS_8("+r", 0)
      : "l"(a), "l"(b), "r"((int)accumulate));
}
template <>
DEVICE void wgmma_s8<128>(int (&c)[16][4], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, %64, %65, p;}"
      : SPARGE_ROWS_8("+r", 0), SPARGE_ROWS_8("+r", 8)
      : "l"(a), "l"(b), "r"((int)accumulate));
}
template <>
DEVICE void wgmma_s8<192>(int (&c)[24][4], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %98, 0; wgmma.mma_async.sync.aligned.m64n192k32.s32.s8.s8 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
      "}, %96, %97, p;}"
      : SPARGE_ROWS_8("+r", 0), SPARGE_ROWS_8("+r", 8), SPARGE_ROWS_8("+r", 16)
      : "l"(a), "l"(b), "r"((int)accumulate));
}
template <>
DEVICE void wgmma_e4m3<32>(float (&c)[4][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %21, 0; wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
      "}, {%16, %17, %18, %19}, %20, p, 1, 1;}"
      : SPARGE_ROWS_4("+f", 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)accumulate));
}
template <>
DEVICE void wgmma_e4m3<40>(float (&c)[5][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %25, 0; wgmma.mma_async.sync.aligned.m64n40k32.f32.e4m3.e4m3 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19"
      "}, {%20, %21, %22, %23}, %24, p, 1, 1;}"
      : SPARGE_ROWS_4("+f", 0), SPARGE_ROW("+f", 4)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)accumulate));
}
template <>
DEVICE void wgmma_e4m3<64>(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
      "}, {%32, %33, %34, %35}, %36, p, 1, 1;}"
      : SPARGE_ROWS_8("+f", 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)accumulate));
}
template <>
DEVICE void wgmma_e4m3<72>(float (&c)[9][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %41, 0; wgmma.mma_async.sync.aligned.m64n72k32.f32.e4m3.e4m3 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35"
      "}, {%36, %37, %38, %39}, %40, p, 1, 1;}"
      : SPARGE_ROWS_8("+f", 0), SPARGE_ROW("+f", 8)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)accumulate));
}
template <>
DEVICE void wgmma_e4m3<128>(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %69, 0; wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, {%64, %65, %66, %67}, %68, p, 1, 1;}"
      : SPARGE_ROWS_8("+f", 0), SPARGE_ROWS_8("+f", 8)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)accumulate));
}
template <>
DEVICE void wgmma_e4m3<136>(float (&c)[17][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %73, 0; wgmma.mma_async.sync.aligned.m64n136k32.f32.e4m3.e4m3 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67"
      "}, {%68, %69, %70, %71}, %72, p, 1, 1;}"
      : SPARGE_ROWS_8("+f", 0), SPARGE_ROWS_8("+f", 8), SPARGE_ROW("+f", 16)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)accumulate));
}
#undef SPARGE_ROW
#undef SPARGE_ROWS_4
#undef SPARGE_ROWS_8
