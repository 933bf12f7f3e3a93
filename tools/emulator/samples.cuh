// Small kernels for the emulator's own tests: right ones, and ones with a fault of each kind.
#include <prim.cuh>

struct SampleParams {
  const void *a, *b, *c;
  void* out;
  int32_t n, which;
};

// 256 values reversed through shared memory; `which` 1 leaves out the barrier.
KERNEL(reverse, 256, SampleParams) {
  int* memory = (int*)shared_memory();
  int t = thread_id();
  memory[t] = ((const int*)p.a)[cta_id() * 256 + t];
  if (p.which != 1) sync_cta();
  ((int*)p.out)[cta_id() * 256 + t] = memory[255 - t];
}

// The same within each warp; `which` 1 leaves out the barrier.
KERNEL(reverse_warp, 256, SampleParams) {
  int* memory = (int*)shared_memory() + warp_id() * 32;
  memory[lane_id()] = ((const int*)p.a)[thread_id()];
  if (p.which != 1) sync_warp();
  ((int*)p.out)[thread_id()] = memory[31 - lane_id()];
}

// Everything that lanes tell each other: 9 words per thread.
KERNEL(lanes, 64, SampleParams) {
  int lane = lane_id(), value = ((const int*)p.a)[thread_id()];
  uint32_t* out = (uint32_t*)p.out + 9 * thread_id();
  out[0] = shuffle_xor(value, 5);
  out[1] = as_bits(shuffle_xor((float)value, lane));  // all from lane 0
  out[2] = shuffle_xor((uint32_t)value, 31);
  out[3] = shuffle(value, (lane * 7 + 3) % 32);
  out[4] = as_bits(shuffle((float)value, 9));
  out[5] = shuffle_up(value, 3);
  out[6] = vote(value % 3 == 0);
  out[7] = any_lane(value == p.n);
  out[8] = any_lane(false);
}

// Counts in one word across the grid; every thread keeps the number it drew.
KERNEL(count, 256, SampleParams) { ((int*)p.out)[1 + cta_id() * 256 + thread_id()] = atomic_add((int*)p.out, 1); }

// n rounds of 4096 bytes through a buffer of two stages. `which`: 1 no wait, 2 a wait that leaves the copy under way, 3 no barrier after the wait,
// 4 no barrier before the buffer is filled again.
KERNEL(pipeline, 256, SampleParams) {
  int t = thread_id();
  char* memory = shared_memory();
  auto fetch = [&](int round) {
    if (round < p.n) copy_async_16(shared_address(memory + round % 2 * 4096 + t * 16), (const char*)p.a + round * 4096 + t * 16);
    copy_async_commit();
  };
  fetch(0);
  for (int round = 0; round < p.n; round++) {
    if (p.which != 4) sync_cta();
    fetch(round + 1);
    if (p.which == 2) {
      copy_async_wait<2>();
    } else if (p.which != 1) {
      copy_async_wait<1>();
    }
    if (p.which != 3) sync_cta();
    ((Bytes16*)p.out)[round * 256 + t] = ((Bytes16*)(memory + round % 2 * 4096))[255 - t];
  }
}

// Threads that do not meet.
KERNEL(strangers, 256, SampleParams) {
  int t = thread_id(), value = t;
  if (p.which == 0) {  // two shuffles
    if (t % 32 < 16)
      value = shuffle_xor(t, 1);
    else
      value = shuffle_xor(t, 2);
  } else if (p.which == 1) {  // a shuffle and a vote
    value = t % 32 == 7 ? (int)vote(true) : shuffle_xor(t, 1);
  } else if (p.which == 2) {  // a shuffle and the block's barrier
    if (t == 100) sync_cta();
    value = shuffle_xor(t, 1);
  } else if (p.which == 3) {  // one thread ends, the others wait for it in the barrier
    if (t == 200) return;
    sync_cta();
  } else if (p.which == 4) {  // one lane ends, its warp shuffles
    if (t == 200) return;
    value = shuffle_xor(t, 1);
  } else if (p.which == 5) {  // warps in different barriers
    if (t < 128)
      sync_cta();
    else
      sync_cta();
  } else if (p.which == 6) {  // waits for a value that nobody writes
    volatile int* flag = (volatile int*)shared_memory();
    sync_cta();
    while (*flag != 1) {
    }
  }
  ((int*)p.out)[t] = value;
}

// Places and values that the device would not accept, or would accept and go wrong.
KERNEL(trespass, 256, SampleParams) {
  char* memory = shared_memory();
  uint32_t matrix[4];
  int t = thread_id();
  if (p.which == 0) copy_async_16(shared_address(memory) + 8, p.a);
  if (p.which == 1) copy_async_16(shared_address(memory), (const char*)p.a + 8);
  if (p.which == 2) copy_async_16(shared_address(memory) + p.n, p.a);
  if (p.which == 3) load_matrix(matrix, shared_address(memory) + 2 * (t % 32));
  if (p.which == 4) load_matrix_transposed(matrix, shared_address(memory) + p.n - 16 * (t % 32));
  if (p.which == 5) memory[p.n] = 1;
  if (p.which == 6) memory[p.n + 4096] = 1;
  if (p.which == 7) memory[-1] = 1;
  if (p.which == 8) ((volatile char*)p.out)[0] = shuffle(1, lane_id() + 1);
  if (p.which == 9) ((volatile float*)p.out)[0] = to_float(1 << 22);
  if (p.which == 10) ((volatile int*)p.out)[0] = pack_uint8(0, 1, 255.7f, 2);
  if (p.which == 11) ((char*)p.out)[p.n] = 1;
  if (p.which == 12) ((volatile int*)p.out)[0] = 1 << (p.n & 63);
  if (p.which == 13) ((volatile int*)p.out)[0] = *(const int*)((const char*)p.a + 2);
  if (p.which == 14) ((volatile char*)p.out)[0] = ((const char*)p.a)[p.n];
  if (p.which == 15) shared_address(p.a);
}

// What memory holds before anything was written.
KERNEL(unwritten, 256, SampleParams) {
  uint32_t local[2];
  if (p.n > 0) local[0] = 1;
  ((uint32_t*)p.out)[2 * thread_id()] = ((uint32_t*)shared_memory())[thread_id()];
  ((uint32_t*)p.out)[2 * thread_id() + 1] = local[1];
}

// One conversion over n words of a (and b); `which` says which.
KERNEL(convert, 256, SampleParams) {
  const uint32_t *a = (const uint32_t*)p.a, *b = (const uint32_t*)p.b;
  uint32_t* out = (uint32_t*)p.out;
  for (int i = thread_id(); i < p.n; i += 256) {
    float x = as_float(a[i]), y = b ? as_float(b[i]) : 0.0f;
    switch (p.which) {
      case 0: out[i] = as_bits(half_to_float((uint16_t)a[i])); break;
      case 1: out[i] = float_to_half(x); break;
      case 2: out[i] = pack_half(x, y); break;
      case 3: out[i] = as_bits(bfloat_to_float((uint16_t)a[i])); break;
      case 4: out[i] = pack_bfloat(x, y); break;
      case 5: out[i] = pack_e4m3(x, y, -x, 1.0f); break;
      case 6: out[i] = pack_int8(x, y, -x, 1.0f); break;
      case 7: out[i] = pack_uint8(x, y, 0.5f, 1.5f); break;
      case 8: out[i] = as_bits(exp2_of(x)); break;
      case 9: out[i] = as_bits(log2_of(x)); break;
      case 10: out[i] = as_bits(max_of(x, y)); break;
      case 11: out[i] = as_bits(min_of(x, y)); break;
      case 12: out[i] = as_bits(divide(x, y)); break;
      case 13: out[i] = as_bits(fused(x, y, -x)); break;
      case 14: out[i] = as_bits(root(x)); break;
      case 15: out[i] = as_bits(to_float((int)a[i])); break;
      case 16: out[i] = as_bits(inverse_root(x)); break;
      case 17: out[i] = as_bits(x * y - x); break;
    }
  }
}

// out (16 x 8) = c + a (16 x K, rows) b (8 x K, columns): one warp. `which`: 0 s8 s8, 1 u8 s8, 2 half.
KERNEL(matrix_product, 32, SampleParams) {
  int g = lane_id() / 4, t = lane_id() % 4, words = 8;  // 32 bytes a row: K = 32 of 8 bits or 16 of 16
  const uint32_t *a = (const uint32_t*)p.a, *b = (const uint32_t*)p.b;
  uint32_t fragment[4] = {a[g * words + t], a[(g + 8) * words + t], a[g * words + t + 4], a[(g + 8) * words + t + 4]};
  uint32_t b0 = b[g * words + t], b1 = b[g * words + t + 4];
  int at[4] = {g * 8 + 2 * t, g * 8 + 2 * t + 1, (g + 8) * 8 + 2 * t, (g + 8) * 8 + 2 * t + 1};
  if (p.which < 2) {
    int sum[4];
    for (int i = 0; i < 4; i++) sum[i] = ((const int*)p.c)[at[i]];
    if (p.which == 0) mma_s8s8(sum, fragment, b0, b1);
    if (p.which == 1) mma_u8s8(sum, fragment, b0, b1);
    for (int i = 0; i < 4; i++) ((int*)p.out)[at[i]] = sum[i];
  } else {
    float sum[4];
    for (int i = 0; i < 4; i++) sum[i] = ((const float*)p.c)[at[i]];
    mma_half(sum, fragment, b0, b1);
    for (int i = 0; i < 4; i++) ((float*)p.out)[at[i]] = sum[i];
  }
}

// a: 32 rows of 16 bytes; b: which row every lane names. out: 4 words per lane, plain or (`which` 1) transposed.
KERNEL(matrix_load, 32, SampleParams) {
  Bytes16* memory = (Bytes16*)shared_memory();
  memory[lane_id()] = ((const Bytes16*)p.a)[lane_id()];
  sync_warp();
  uint32_t found[4], row = shared_address(memory + ((const int*)p.b)[lane_id()]);
  if (p.which)
    load_matrix_transposed(found, row);
  else
    load_matrix(found, row);
  for (int i = 0; i < 4; i++) ((uint32_t*)p.out)[4 * lane_id() + i] = found[i];
}
