// Small kernels for the tests of the emulator's sm_90: right ones, and ones with a fault of each kind.
#include <prim_sm90.cuh>

struct SampleParams {
  const void *a, *b, *c;
  void* out;
  int32_t n, which;
};

// Where thread t of a warpgroup has element e of tile j of a product of n columns.
DEVICE int place_in_product(int t, int j, int e, int n) {
  return ((t >> 5) * 16 + (t % 32 >> 2) + 8 * (e >> 1)) * n + 8 * j + 2 * (t & 3) + (e & 1);
}

DEVICE void copy_plainly(void* to, const void* from, int bytes, int threads) {
  for (int i = thread_id(); i < bytes / 16; i += threads) ((Bytes16*)to)[i] = ((const Bytes16*)from)[i];
}

template <class Element, int kTiles>
DEVICE void load_product(Element (&x)[kTiles][4], const void* from) {
  for (int j = 0; j < kTiles; j++)
    for (int e = 0; e < 4; e++) x[j][e] = ((const Element*)from)[place_in_product(thread_id(), j, e, 8 * kTiles)];
}
template <class Element, int kTiles>
DEVICE void store_product(void* to, const Element (&x)[kTiles][4]) {
  for (int j = 0; j < kTiles; j++)
    for (int e = 0; e < 4; e++) ((Element*)to)[place_in_product(thread_id(), j, e, 8 * kTiles)] = x[j][e];
}

// out (64, kN) = a (64, kRowBytes) b (kN, kRowBytes)^T, plus c where there is one. What was written plainly is told to the products, by `which`:
// 1 not; 2 by one thread for all; 3 too early; 4 before one more byte is written.
template <int kN, int kRowBytes>
DEVICE void whole_product_s8(const SampleParams& p) {
  char* memory = shared_memory();
  if (p.which == 3) fence_async();
  copy_plainly(memory, p.a, 64 * kRowBytes, 128);
  copy_plainly(memory + 64 * kRowBytes, p.b, kN * kRowBytes, 128);
  if (p.which == 2) sync_cta();
  if (p.which == 0 || p.which == 4 || (p.which == 2 && thread_id() == 77)) fence_async();
  if (p.which == 4 && thread_id() == 50) memory[64 * kRowBytes + 16 * 50 + 9] = 1;
  sync_cta();
  int sum[kN / 8][4];
  if (p.c) load_product(sum, p.c);
  const uint32_t a = shared_address(memory), b = a + 64 * kRowBytes;
  wgmma_fence(sum);
  for (int k = 0; k < kRowBytes; k += 32)
    wgmma_s8<kN>(sum, matrix_descriptor<kRowBytes>(a + k), at_byte(matrix_descriptor<kRowBytes>(b), k), k > 0 || p.c);
  wgmma_commit();
  wgmma_wait<0>(sum);
  store_product(p.out, sum);
}
KERNEL(product_s8, 128, SampleParams) {
  if (p.n == 64 * 1000 + 64) whole_product_s8<64, 64>(p);
  if (p.n == 64 * 1000 + 128) whole_product_s8<64, 128>(p);
  if (p.n == 128 * 1000 + 64) whole_product_s8<128, 64>(p);
  if (p.n == 128 * 1000 + 128) whole_product_s8<128, 128>(p);
  if (p.n == 192 * 1000 + 64) whole_product_s8<192, 64>(p);
  if (p.n == 192 * 1000 + 128) whole_product_s8<192, 128>(p);
}

// The same of e4m3, a in registers, rows of 64 bytes.
template <int kN>
DEVICE void whole_product_e4m3(const SampleParams& p) {
  char* memory = shared_memory();
  copy_plainly(memory, p.b, kN * 64, 128);
  fence_async();
  sync_cta();
  float sum[kN / 8][4];
  uint32_t a[2][4];
  const int row = warp_id() * 16 + lane_id() / 4, word = lane_id() % 4;
  for (int k = 0; k < 2; k++)
    for (int i = 0; i < 4; i++) a[k][i] = ((const uint32_t*)p.a)[(row + i % 2 * 8) * 16 + k * 8 + i / 2 * 4 + word];
  if (p.c) load_product(sum, p.c);
  wgmma_fence(sum, a);
  for (int k = 0; k < 2; k++) wgmma_e4m3<kN>(sum, a[k], matrix_descriptor<64>(shared_address(memory) + 32 * k), k > 0 || p.c);
  wgmma_commit();
  wgmma_wait<0>(sum);
  store_product(p.out, sum);
}
KERNEL(product_e4m3, 128, SampleParams) {
  if (p.n == 32) whole_product_e4m3<32>(p);
  if (p.n == 40) whole_product_e4m3<40>(p);
  if (p.n == 64) whole_product_e4m3<64>(p);
  if (p.n == 72) whole_product_e4m3<72>(p);
  if (p.n == 128) whole_product_e4m3<128>(p);
  if (p.n == 136) whole_product_e4m3<136>(p);
}

// Items drawn from a counter: out[item] (2, 64, 64) = the sum over n rounds of a[warpgroup] (64, 64) times b[item][round] (64, 64)^T, squared element
// by element, so that a round must have been right by itself. A producer and three stages; a product is under way while the one before it is squared.
// Faults by `which`: 1 tiles are used before they have landed; 2 they are replaced before they were used; 3 a stage is given back early; 4 only
// half of the bytes is announced; 5 another item's number is read; 6 the round before is squared too early; 7 barriers are used before they exist;
// 8 a warp gives a stage back for its whole warpgroup.
KERNEL(squares, 384, SampleParams) {
  constexpr int kStages = 3, kBytes = 64 * 64;
  char* memory = shared_memory();
  const uint32_t start = shared_address(memory);
  struct Control {
    uint64_t full[kStages], empty[kStages], given, taken;
    int item;
  };
  Control* control = (Control*)(memory + (2 + kStages) * kBytes);
  auto name = [&](uint64_t& barrier) { return shared_address(&barrier); };
  int* counter = (int*)p.c;
  if (thread_id() == 0) {
    for (int i = 0; i < kStages; i++) {
      barrier_init(name(control->full[i]), 1);
      barrier_init(name(control->empty[i]), 8);
    }
    barrier_init(name(control->given), 1);
    barrier_init(name(control->taken), 256);
    barrier_publish();
  }
  copy_plainly(memory, p.a, 2 * kBytes, 384);
  fence_async();
  if (p.which != 7) sync_cta();
  const int t = thread_id() - 128, items = (int)grid_size() * 2;
  int at = 0, parity = 0;
  auto advance = [&]() {
    if (++at == kStages) at = 0, parity ^= 1;
  };
  if (t < 0) {
    keep_registers<24>();
    if (thread_id() > 0) return;
    for (int turn = 0;; turn++) {
      barrier_wait(name(control->taken), ~turn & 1);
      int item = atomic_add(counter, 1);
      control->item = item;
      barrier_arrive(name(control->given));
      if (item >= items) return;
      for (int i = 0; i < p.n; i++) {
        if (p.which != 2) barrier_wait(name(control->empty[at]), parity ^ 1);
        const uint32_t full = name(control->full[at]), stage = start + (2 + at) * kBytes;
        const char* from = (const char*)p.b + (item * p.n + i) * kBytes;
        barrier_arrive_expect(full, p.which == 4 ? kBytes / 2 : kBytes);
        bulk_copy(stage, from, kBytes / 2, full);
        bulk_copy(stage + kBytes / 2, from + kBytes / 2, kBytes / 2, full);
        advance();
      }
    }
  }
  take_registers<240>();
  const int group = t / 128;
  for (int turn = 0;; turn++) {
    barrier_wait(name(control->given), turn & 1);
    const int item = control->item;
    barrier_arrive(name(control->taken));
    if (item >= items) return;
    uint32_t sum[8][4] = {};
    int product[2][8][4];
    auto square = [&](int (&x)[8][4]) {
      for (int j = 0; j < 8; j++)
        for (int e = 0; e < 4; e++) sum[j][e] += (uint32_t)x[j][e] * (uint32_t)x[j][e];
    };
    auto give_back = [&](int stage) {
      if (p.which == 8) {
        for (int i = 0; i < 4 && t % 128 == 0; i++) barrier_arrive(name(control->empty[stage]));
      } else if (lane_id() == 0) {
        barrier_arrive(name(control->empty[stage]));
      }
    };
    int last = 0;
    for (int i = 0; i < p.n; i++) {
      if (p.which != 1) barrier_wait(name(control->full[at]), parity);
      wgmma_fence(product[i % 2]);
      for (int k = 0; k < 64; k += 32) {
        uint64_t left = matrix_descriptor<64>(start + group * kBytes + k), right = matrix_descriptor<64>(start + (2 + at) * kBytes + k);
        wgmma_s8<64>(product[i % 2], left, right, k > 0);
      }
      wgmma_commit();
      if (p.which == 3) give_back(at);
      if (p.which == 6)
        wgmma_wait<2>();
      else
        wgmma_wait<1>(product[(i + 1) % 2]);
      if (i > 0) {
        if (p.which != 3) give_back(last);
        square(product[(i - 1) % 2]);
      }
      last = at;
      advance();
    }
    wgmma_wait<0>(product);
    if (p.which != 3) give_back(last);
    square(product[(p.n - 1) % 2]);
    uint32_t* out = (uint32_t*)p.out + ((p.which == 5 ? control->item % items : item) * 2 + group) * 4096;
    for (int j = 0; j < 8; j++)
      for (int e = 0; e < 4; e++) out[place_in_product(t % 128, j, e, 64)] = sum[j][e];
  }
}

// out[t] = the sum over n rounds of a[round][t], 128 words that thread 128 has copied to one place, round after round. What a thread does with its
// word, by `which`: 0 reads and fences; 1 reads; 2 fences and reads; 3 reads, and the first lane fences; 4 reads, fences and clears; 5 reads, clears
// and fences.
KERNEL(rounds, 160, SampleParams) {
  uint32_t* memory = (uint32_t*)shared_memory();
  const uint32_t start = shared_address(memory), full = start + 512, empty = start + 520;
  const int t = thread_id(), w = p.which;
  if (t == 0) {
    barrier_init(full, 1);
    barrier_init(empty, 128);
    barrier_publish();
  }
  sync_cta();
  uint32_t sum = 0;
  for (int i = 0; i < p.n; i++) {
    if (t == 128) {
      barrier_wait(empty, ~i & 1);
      barrier_arrive_expect(full, 512);
      bulk_copy(start, (const uint32_t*)p.a + 128 * i, 512, full);
    } else if (t < 128) {
      barrier_wait(full, i & 1);
      if (w == 2) fence_async();
      sum += memory[t];
      if (w == 5) memory[t] = 0;
      if (w == 0 || w == 4 || w == 5 || (w == 3 && t % 32 == 0)) fence_async();
      if (w == 4) memory[t] = 0;
      barrier_arrive(empty);
    }
  }
  if (t < 128) ((uint32_t*)p.out)[t] = sum;
}

// Four warps each do n products and write their number into the next place of out every time that one is done.
KERNEL(apart, 128, SampleParams) {
  char* memory = shared_memory();
  copy_plainly(memory, p.a, 8192, 128);
  fence_async();
  sync_cta();
  const uint32_t start = shared_address(memory);
  int sum[8][4];
  for (int i = 0; i < p.n; i++) {
    wgmma_fence(sum);
    wgmma_s8<64>(sum, matrix_descriptor<64>(start), matrix_descriptor<64>(start + 4096), false);
    wgmma_commit();
    wgmma_wait<0>(sum);
    if (lane_id() == 0) ((int*)p.out)[atomic_add((int*)p.c, 1)] = warp_id();
  }
}

// Warpgroup 0 gives registers away, the others take them. `which` 1: too many; 2: only once the others have theirs; 3: after the others asked.
KERNEL(registers, 384, SampleParams) {
  const int group = thread_id() / 128;
  if (group == 0) {
    if (p.which == 2) sync_threads(1, 384);
    if (p.which == 3) sync_threads(2, 384);
    keep_registers<24>();
  } else {
    if (p.which == 3) arrive_threads(2, 384);
    if (p.which == 1)
      take_registers<248>();
    else
      take_registers<240>();
    if (p.which == 2) arrive_threads(1, 384);
  }
  ((int*)p.out)[thread_id()] = group;
}

// Descriptors of n starts of each kind and of what lies inside. A test has the functions of the device stand in.
#define DESCRIPTOR matrix_descriptor
#define INSIDE at_byte
KERNEL(descriptors, 128, SampleParams) {
  uint64_t(*out)[4] = (uint64_t(*)[4])p.out;
  for (int i = thread_id(); i < p.n; i += 128) {
    out[i][0] = DESCRIPTOR<64>(512 * i + i % 2 * 32);
    out[i][1] = DESCRIPTOR<128>(1024 * i + i % 4 * 32);
    out[i][2] = INSIDE(DESCRIPTOR<64>(0), 512 * i + i % 2 * 32);
    out[i][3] = INSIDE(DESCRIPTOR<128>(1024), 1024 * i + i % 4 * 32);
  }
}

// Words go from warpgroup 1 to warpgroup 0 and back through 128 words, n times, in turns kept by two hardware barriers; then both vote on each word.
// `which` 1: nobody waits for the turn.
KERNEL(turns, 256, SampleParams) {
  int *memory = (int*)shared_memory(), *out = (int*)p.out;
  const int group = thread_id() / 128, t = thread_id() % 128;
  if (group == 1) {
    memory[t] = ((const int*)p.a)[t];
    arrive_threads(1, 256);
  }
  for (int i = 0; i < p.n; i++) {
    if (p.which != 1) sync_threads(1 + group, 256);
    int value = memory[127 - t];
    sync_threads(3 + group, 128);
    memory[t] = value + 1 + group;
    if (i + 1 < p.n || group == 0) arrive_threads(2 - group, 256);
  }
  if (group == 0) sync_threads(6, 256);
  if (group == 1) {
    out[t] = memory[t];
    arrive_threads(6, 256);
  }
  out[128 + thread_id()] = any_thread(5, 256, p.n == thread_id());
  out[384 + thread_id()] = any_thread(5, 256, thread_id() == 300) + 2 * any_thread(7 + group, 128, thread_id() == 200);
}

// What the device would not accept, or would not forgive. 256 threads, 16384 bytes of shared memory.
KERNEL(misuse_barriers, 256, SampleParams) {
  const uint32_t start = shared_address(shared_memory()), barrier = start + 8192;
  const int t = thread_id(), w = p.which;
  if (t == 0 && w != 0) {
    barrier_init(w == 8 ? barrier + 4 : barrier, w == 16 ? 0 : 1);
    if (w == 1) barrier_init(barrier, 1);
    if (w != 3 && w != 4) barrier_publish();
  }
  sync_cta();
  if (t == 1 && (w == 0 || w == 3)) barrier_arrive(barrier);
  if (t == 0 && w == 4) bulk_copy(start, p.a, 16, barrier);
  if (t == 7 && w == 2) ((volatile int*)shared_memory())[2049] = 1;
  sync_cta();
  if (t == 0 && w == 2 && p.n) barrier_arrive(barrier);
  if (t == 0 && w == 5) {
    barrier_arrive_expect(barrier, 16);
    barrier_arrive(barrier);
  }
  if (t == 0 && w == 6) {
    barrier_arrive_expect(barrier, 32);
    bulk_copy(start, p.a, 16, barrier);
  }
  if (t == 0 && w == 7) bulk_copy(start, p.a, 16, barrier);
  if (t == 0 && w == 9) bulk_copy(start + 8, p.a, 16, barrier);
  if (t == 0 && w == 10) bulk_copy(start, (const char*)p.a + 8, 16, barrier);
  if (t == 0 && w == 11) bulk_copy(start, p.a, 24, barrier);
  if (t == 0 && w == 12) bulk_copy(start + 16384 - 16, p.a, 32, barrier);
  if (t == 0 && w == 13) {
    barrier_arrive_expect(barrier, 96);
    bulk_copy(start, p.a, 64, barrier);
    bulk_copy(start + 48, p.a, 32, barrier);
  }
  if (w == 14) {
    if (t == 0) barrier_arrive_expect(barrier, 64);
    if (t >= 128) barrier_wait(barrier, 0);
  }
  if (w == 15) barrier_wait(barrier, 2);
  if (t == 0 && w == 17) barrier_arrive_expect(barrier, -16);
}

KERNEL(misuse_hardware, 256, SampleParams) {
  const int t = thread_id(), w = p.which;
  if (w == 0) sync_threads(0, 256);
  if (w == 1) sync_threads(16, 256);
  if (w == 2) sync_threads(1, 40);
  if (w == 3) sync_threads(1, 512);
  if (w == 4) sync_threads(1, t < 128 ? 256 : 128);
  if (w == 5 && t < 128) {
    arrive_threads(1, 256);
    arrive_threads(1, 256);
  }
  if (w == 6) {
    if (t < 128)
      any_thread(1, 256, true);
    else
      sync_threads(1, 256);
  }
  if (w == 7 && t % 2) sync_threads(1, 64);
  if (w == 8 && t < 128) sync_threads(1, 256);
  if (w == 16 && t >= 128) arrive_threads(1, 256);
  if (w == 9) keep_registers<20>();
  if (w == 10) keep_registers<36>();
  if (w == 11) keep_registers<256>();
  if (w == 12) take_registers<24>();
  if (w == 13) take_registers<256>();
  if (w == 14 && t != 5) keep_registers<24>();
  if (w == 15) {
    if (t % 128 < 64)
      keep_registers<24>();
    else
      keep_registers<24>();
  }
}

KERNEL(misuse_products, 256, SampleParams) {
  char* memory = shared_memory();
  const int t = thread_id(), w = p.which;
  copy_plainly(memory, p.a, 8192, 256);
  fence_async();
  sync_cta();
  const uint32_t start = shared_address(memory);
  int sum[8][4] = {};
  float other[8][4] = {};
  uint32_t left[4] = {1, 2, 3, (uint32_t)p.n};
  uint64_t a = matrix_descriptor<64>(start), b = matrix_descriptor<64>(start + 4096);
  if (w == 0) wgmma_s8<64>(sum, a, b, false);
  if (w == 1) {
    wgmma_fence(sum);
    wgmma_s8<64>(sum, a, b, false);
    wgmma_commit();
    wgmma_wait<0>(sum);
    wgmma_s8<64>(sum, a, b, true);
  }
  if (w == 9) matrix_descriptor<64>(start + 16);
  if (w == 10) matrix_descriptor<128>(start + 512);
  if (w == 16) at_byte(b, 48);
  if (w == 17) {
    wgmma_fence(other, left);
    wgmma_s8<64>(sum, a, b, false);
  }
  if (w == 18) {
    wgmma_fence(sum, other);
    wgmma_e4m3<64>(other, left, b, false);
  }
  wgmma_fence(sum, other, left);
  if (w == 2) {
    if (t % 128 < 32)
      wgmma_s8<64>(sum, a, b, false);
    else
      wgmma_s8<64>(sum, a, b, false);
  }
  if (w == 3) wgmma_s8<64>(sum, a, t % 128 < 32 ? b : a, false);
  if (w == 4) wgmma_s8<64>(sum, a, b, t % 128 == 77);
  if (w >= 2 && w <= 4) {
    wgmma_commit();
    wgmma_wait<0>(sum);
  }
  if (w == 5) {
    wgmma_s8<64>(sum, a, b, false);
    wgmma_commit();
    sum[t / 64][1] = 5;
    wgmma_wait<0>(sum);
  }
  if (w == 6) {
    wgmma_e4m3<64>(other, left, b, false);
    wgmma_commit();
    left[2] += t == 100;
    wgmma_wait<0>(other);
  }
  if (w == 7) {
    wgmma_s8<64>(sum, a, b, false);
    wgmma_s8<32>((int(&)[4][4])sum, a, b, false);
  }
  if (w == 8) wgmma_s8<64>(sum, a & ~(3ul << 62), b, false);
  if (w == 11) {
    wgmma_s8<64>(sum, a, matrix_descriptor<64>(start + 16384 - 2048), false);
    wgmma_commit();
    wgmma_wait<0>(sum);
  }
  if (w == 12) wgmma_s8<64>(sum, a, b, false);
  if (w == 13) {
    wgmma_s8<64>(sum, a, b, false);
    wgmma_wait<0>();  // of no group
  }
  if (w == 14) {
    wgmma_s8<64>(sum, a, b, false);
    if (t % 128 < 32) wgmma_commit();
    wgmma_s8<64>(sum, a, b, true);
    wgmma_commit();
    wgmma_wait<0>(sum);
  }
  if (w == 15) {
    if (t != 130) wgmma_s8<64>(sum, a, b, false);
    wgmma_commit();
    wgmma_wait<0>(sum);
  }
  if (w == 19 || w == 20) {
    wgmma_s8<64>(sum, a, b, false);
    wgmma_commit();
    wgmma_e4m3<64>(other, left, b, false);
    wgmma_commit();
    if (w == 19) wgmma_wait<1>();
    if (w == 20) wgmma_wait<1>(sum, other[t % 8]);
  }
  if (w >= 21 && w <= 26) {
    const uint64_t wrong[] = {b + (1ul << 16), b | 1ul << 46, b | 1ul << 14, b | 2ul << 49, b + (1ul << 32), b + 1};
    wgmma_s8<64>(sum, a, wrong[w - 21], false);
  }
  if (w == 27) {
    wgmma_s8<64>(sum, a, b, false);
    wgmma_commit();
    if (t == 9) ((volatile char*)memory)[4100] = 1;
    wgmma_wait<0>(sum);
  }
  if (w == 31) {
    if (t == 9) ((volatile char*)memory)[4100] = 1;
    wgmma_s8<64>(sum, a, b, false);
    wgmma_commit();
    fence_async();
    wgmma_wait<0>(sum);
  }
  if (w == 28) {
    wgmma_s8<64>(sum, a, b, false);
    wgmma_commit();
    if (t % 128 < 32)
      wgmma_wait<0>(sum);
    else
      wgmma_wait<1>();
  }
  if (w == 29 && t % 128 >= 32) wgmma_fence(sum);
  if (w == 30) {
    if (t == 40) return;
    wgmma_s8<64>(sum, a, b, false);
    wgmma_commit();
    wgmma_wait<0>(sum);
  }
  ((volatile int*)p.out)[t] = sum[0][0] + (int)other[0][0];
}
