// What the hardware allows an attention kernel on Hopper: matrix products of warpgroups and nothing else, copies to shared memory and nothing else.
// Every block does `rounds` of the same work; bench/bench_ceilings.py knows how much a round is.
#include <prim_sm90.cuh>

#include <ceilings_prim.cuh>

constexpr int kSteps = 4;                    // products of depth 32 that share a commit
constexpr int kOperands = 2 * 8192 + 16384;  // of two warpgroups: 64 rows each, and the 128 rows of the other side; 128 bytes a row

// The operands, at an address aligned to 1024.
DEVICE uint32_t bring_operands(const CeilingParams& p) {
  uint32_t start = shared_address(shared_memory());
  uint32_t aligned = (start + 1023) & ~1023u;
  Bytes16* to = (Bytes16*)(shared_memory() + (aligned - start));
  for (int i = thread_id(); i < kOperands / 16; i += 256) to[i] = ((const Bytes16*)p.data)[i];
  fence_async();
  sync_cta();
  return aligned;
}

// Both operands in shared memory, as Q K^T. A round of a block: 2 * kSteps products of 64 x 128 x 32.
KERNEL(ceiling_s8, 256, CeilingParams) {
  uint32_t a = bring_operands(p), b = a + 2 * 8192;
  a += (warp_id() / 4) * 8192;
  int c[16][4] = {};
  int64_t start = start_rounds();
  for (int round = 0; round < p.rounds; ++round) {
    wgmma_fence(c);
    UNROLL for (int i = 0; i < kSteps; ++i) wgmma_s8<128>(c, matrix_descriptor<128>(a + 32 * i), matrix_descriptor<128>(b + 32 * i), true);
    wgmma_commit();
    wgmma_wait<0>(c);
  }
  end_rounds(p, start);
  int sum = 0;
  UNROLL for (int j = 0; j < 16; ++j) UNROLL for (int e = 0; e < 4; ++e) sum += c[j][e];
  atomic_add(p.out + cta_id(), sum);
}

// One operand in registers, as P V. A round as above.
KERNEL(ceiling_e4m3, 256, CeilingParams) {
  uint32_t b = bring_operands(p) + 2 * 8192;
  uint32_t a[kSteps][4];
  UNROLL for (int i = 0; i < kSteps; ++i) UNROLL for (int e = 0; e < 4; ++e) a[i][e] = ((const uint32_t*)p.data)[(i * 4 + e) * 256 + thread_id()];
  float c[16][4] = {};
  int64_t start = start_rounds();
  for (int round = 0; round < p.rounds; ++round) {
    wgmma_fence(c, a);
    UNROLL for (int i = 0; i < kSteps; ++i) wgmma_e4m3<128>(c, a[i], matrix_descriptor<128>(b + 32 * i), true);
    wgmma_commit();
    wgmma_wait<0>(c);
  }
  end_rounds(p, start);
  float sum = 0.0f;
  UNROLL for (int j = 0; j < 16; ++j) UNROLL for (int e = 0; e < 4; ++e) sum += c[j][e];
  atomic_add(p.out + cta_id(), (int)sum);
}

// One thread keeps kInFlight copies of p.copy bytes under way. A round of a block: one copy.
constexpr int kInFlight = 8;
KERNEL(ceiling_copy, 32, CeilingParams) {
  uint32_t start = shared_address(shared_memory());
  uint32_t barriers = (start + 127) & ~127u, places = barriers + 128;
  if (thread_id() == 0) {
    for (int i = 0; i < kInFlight; ++i) barrier_init(barriers + 8 * i, 1);
    barrier_publish();
  }
  sync_cta();
  if (thread_id() > 0) return;
  int64_t pieces = p.bytes / p.copy, piece = cta_id() * 7 % pieces;
  int64_t began = cycles_now();
  for (int i = 0; i < p.rounds + kInFlight; ++i) {
    uint32_t barrier = barriers + 8 * (i % kInFlight);
    if (i >= kInFlight) barrier_wait(barrier, (i / kInFlight - 1) & 1);
    if (i < p.rounds) {
      barrier_arrive_expect(barrier, p.copy);
      bulk_copy(places + i % kInFlight * p.copy, p.data + piece * p.copy, p.copy, barrier);
      piece = piece + 1 < pieces ? piece + 1 : 0;
    }
  }
  p.cycles[cta_id()] = cycles_now() - began;
  atomic_add(p.out + cta_id(), p.rounds);
}
