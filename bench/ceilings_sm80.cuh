// What the hardware allows, one kernel for each unit that the kernels lean on: mma.sync products with operands in registers, exponentials,
// conversions, 16-byte copies out of the L2 cache, and a kernel that does nothing. sm_80 and above; e4m3: sm_89.
// One block of 256 threads (two warps a scheduler) for each multiprocessor does `rounds` of the same work; bench/bench_ceilings.py knows how
// much a round is. Registers only: data come once from p.data, sums go once to p.out.
#include <ceilings_prim.cuh>

constexpr int kThreads = 256;
constexpr int kRepeats = 4;  // of everything in a round, so that the loop's own instructions do not count
constexpr int kSums = 8;     // accumulators of a warp that do not wait for each other
constexpr int kChains = 8;   // values of a thread that do not wait for each other

KERNEL(ceiling_empty, 32, CeilingParams) {}

// ---- matrix products ---------------------------------------------------------------------------------------------------------------------------
// A round of a block: 8 warps * kRepeats * kSums products. The operands are the same in every round: a from the first 4 words a thread, b from the
// 2 * kSums words after them, word w of thread i being word w * kThreads + i.

DEVICE uint32_t operand(const CeilingParams& p, int word) { return ((const uint32_t*)p.data)[word * kThreads + thread_id()]; }

// What a thread adds to p.out: whole numbers exactly, fp32 cut to a whole number once.
struct Total {
  uint32_t whole = 0;
  float rest = 0.0f;
};
DEVICE void add(Total& total, int sum) { total.whole += (uint32_t)sum; }
DEVICE void add(Total& total, float sum) { total.rest += sum; }
DEVICE void add(Total& total, uint32_t pair) { total.rest += half_to_float((uint16_t)pair) + half_to_float((uint16_t)(pair >> 16)); }

template <class Sum, int kWidth, class Product>
DEVICE void multiply_rounds(const CeilingParams& p, Product product) {
  uint32_t a[4], b[kSums][2];
  UNROLL for (int i = 0; i < 4; ++i) a[i] = operand(p, i);
  UNROLL for (int j = 0; j < kSums; ++j) UNROLL for (int i = 0; i < 2; ++i) b[j][i] = operand(p, 4 + 2 * j + i);
  Sum c[kSums][kWidth] = {};
  int64_t start = start_rounds();
  ROLLED for (int round = 0; round < p.rounds; ++round) {
    UNROLL for (int i = 0; i < kRepeats; ++i) UNROLL for (int j = 0; j < kSums; ++j) product(c[j], a, b[j][0], b[j][1]);
  }
  end_rounds(p, start);
  Total total;
  UNROLL for (int j = 0; j < kSums; ++j) UNROLL for (int e = 0; e < kWidth; ++e) add(total, c[j][e]);
  atomic_add(p.out + cta_id(), (int)(total.whole + (uint32_t)(int)total.rest));
}

#define PRODUCTS(name, Sum, kWidth) \
  KERNEL(ceiling_##name, kThreads, CeilingParams) { \
    multiply_rounds<Sum, kWidth>(p, [](Sum(&c)[kWidth], const uint32_t(&a)[4], uint32_t b0, uint32_t b1) { name(c, a, b0, b1); }); \
  }
PRODUCTS(mma_s8s8, int, 4)
PRODUCTS(mma_u8s8, int, 4)
PRODUCTS(mma_half, float, 4)
PRODUCTS(mma_half_short, uint32_t, 2)

// ---- exponentials and conversions --------------------------------------------------------------------------------------------------------------
// A round of a thread: kRepeats * kChains results. Every result is an operand of the next round, so none can be left out.

template <class Step>
DEVICE void repeat_rounds(const CeilingParams& p, Step step) {
  uint32_t x[kChains];
  UNROLL for (int i = 0; i < kChains; ++i) x[i] = operand(p, i);
  int64_t start = start_rounds();
  ROLLED for (int round = 0; round < p.rounds; ++round) {
    UNROLL for (int i = 0; i < kRepeats; ++i) UNROLL for (int j = 0; j < kChains; ++j) x[j] = step(as_float(x[j]));
  }
  end_rounds(p, start);
  uint32_t all = 0;
  UNROLL for (int i = 0; i < kChains; ++i) all += x[i];
  atomic_add(p.out + cta_id(), (int)all);
}

// 2 ** -x tends to 0.64: no value leaves the range in which the instruction works.
KERNEL(ceiling_exp2, kThreads, CeilingParams) {
  repeat_rounds(p, [](float x) { return as_bits(exp2_of(-x)); });
}
// The bits of a float, taken for a whole number, give a float of 2 ** 29 to 2 ** 31, and that one again.
KERNEL(ceiling_to_float, kThreads, CeilingParams) {
  repeat_rounds(p, [](float x) { return as_bits(converted((int)as_bits(x))); });
}
// Four values a word in two instructions, each of which has one new operand. sm_80 converts to int8 one by one: there this would count too many.
#if __CUDA_ARCH__ >= 860
KERNEL(ceiling_pack_int8, kThreads, CeilingParams) {
  float y = as_float(operand(p, kChains));
  repeat_rounds(p, [=](float x) { return pack_int8(x, y, y, x); });
}
#endif
#if __CUDA_ARCH__ >= 890
KERNEL(ceiling_pack_e4m3, kThreads, CeilingParams) {
  float y = as_float(operand(p, kChains));
  repeat_rounds(p, [=](float x) { return pack_e4m3(x, y, y, x); });
}
#endif

// ---- copies ------------------------------------------------------------------------------------------------------------------------------------

// 16-byte copies from global to shared memory, kInFlight groups under way. A round of a block: one piece of kPiece bytes.
constexpr int kInFlight = 4, kPiece = 16384;
KERNEL(ceiling_load, kThreads, CeilingParams) {
  uint32_t places = shared_address(shared_memory());
  int64_t pieces = p.bytes / kPiece, piece = cta_id() * 7 % pieces;
  int64_t start = start_rounds();
  for (int round = 0; round < p.rounds; ++round) {
    uint32_t to = places + round % kInFlight * kPiece;
    const char* from = p.data + piece * kPiece;
    UNROLL for (int i = 0; i < kPiece; i += 16 * kThreads) copy_async_16(to + i + 16 * thread_id(), from + i + 16 * thread_id());
    copy_async_commit();
    copy_async_wait<kInFlight - 1>();
    piece = piece + 1 < pieces ? piece + 1 : 0;
  }
  copy_async_wait<0>();
  end_rounds(p, start);
  uint32_t all = 0;
  for (int i = 0; i < min_of(p.rounds, kInFlight) * kPiece; i += 16 * kThreads) all += ((const Bytes16*)(shared_memory() + i))[thread_id()].word[0];
  atomic_add(p.out + cta_id(), (int)all);
}
