// sparge_statistics and sparge_prepass: all that lies between the caller's q, k, v and the kernels that select blocks and attend to them. sm_80 and
// above (e4m3: sm_89). Compile-time: SPARGE_DIM = E (64 or 128), SPARGE_INPUT = type of q, k and v. 256 threads.
//
// A thread holds 8 channels of a row, so 16 (E = 128) or 8 (E = 64) lanes share a row, and 16-byte loads of 16-bit input are coalesced.
// A CTA of the statistics owns one split of the keys of a head: running sums and maxima stay in registers, shared memory only joins the warps.
// A CTA of the pre-pass owns a query block or a key block of a head, gathered in plan order. A query row is done as soon as it is loaded: pooled,
// scaled, rounded, stored; shared memory joins the pools of the warps. Key rows stay in registers until their block's scale is known; 8-bit V is
// transposed through shared memory. All arithmetic is fp32 but for maxima of magnitudes, which compare bits, so that NaN and infinity reach the
// scales. Every sum has a fixed order.
//
// Bytes per token and channel with 16-bit input and 8-bit V, q, k and v alike in size: statistics read V 2 and K 2/16; the pre-pass reads 3 x 2 and
// writes q8 + k8 + v8 3, pools of q 8/32 and of k 8/64, in all 11.5; with scales, order and masks less than 12. Key blocks also read the partial sums
// of all splits, splits/8 bytes per token and channel, out of L2: keep splits at 16 or so.
#include <prim.cuh>

#include <layout.cuh>

constexpr int kDim = SPARGE_DIM;
constexpr int kInput = SPARGE_INPUT;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kChannels = 8;                     // of a thread
constexpr int kLanes = kDim / kChannels;         // threads that share a row
constexpr int kSlots = kThreads / kLanes;        // rows that the CTA holds side by side
constexpr int kKeyRows = kBlockK / kSlots;       // rows of a thread in a key block
constexpr int kWarpRows = kBlockQ / kWarps;      // consecutive rows of a warp in a query block; two warps make a pool
constexpr int kStep = 32 / kLanes;               // rows that a warp holds side by side
constexpr int kColumns = kDim / 32;              // channels of a lane where a whole warp holds one row
constexpr int kElementBytes = kInput == kFloat ? 4 : 2;
constexpr int kBatch = 8 / kElementBytes;        // rows a thread asks for before it uses the first: 64 bytes
constexpr int kWords = kChannels * kElementBytes / 4;
constexpr uint32_t kMagnitude = 0x7fffffffu;
constexpr uint32_t kInfinity = 0x7f800000u;
constexpr float kSmallestNormal = 1.17549435e-38f;  // 2 ** -126

static_assert(kWarpRows % (kStep * kBatch) == 0 && 2 * kWarpRows == kPoolQ, "a warp does its rows in whole batches");

// ---- rows of the caller's tensors ----------------------------------------------------------------------------------------------------------------

// The 8 channels of a thread as they came; zero past the end of a row.
struct Chunk {
  uint32_t word[kWords];
};

DEVICE const char* at(const void* tensor, int64_t element) { return (const char*)tensor + element * kElementBytes; }

// Whether every row of a head can be read in 16-byte loads.
DEVICE bool is_wide(const char* head, int64_t token_stride, int dim) {
  return (((uint64_t)head | (uint64_t)(token_stride * kElementBytes)) & 15) == 0 && dim % kChannels == 0;
}

DEVICE Chunk load_chunk(const char* row, int channel, int dim, bool wide) {
  const char* from = row + channel * kElementBytes;
  const int left = dim - channel;
  Chunk chunk = {};
  if (wide) {
    if (left > 0) {
      UNROLL for (int i = 0; i < kWords; i += 4) {
        const Bytes16 part = *(const Bytes16*)(from + 4 * i);
        UNROLL for (int j = 0; j < 4; j++) chunk.word[i + j] = part.word[j];
      }
    }
  } else {
    UNROLL for (int i = 0; i < kChannels; i++) {
      if constexpr (kInput == kFloat) {
        chunk.word[i] = i < left ? ((const uint32_t*)from)[i] : 0;
      } else {
        chunk.word[i / 2] |= i < left ? (uint32_t)((const uint16_t*)from)[i] << (16 * (i & 1)) : 0;
      }
    }
  }
  return chunk;
}

DEVICE float from_16_bits(uint32_t bits) { return kInput == kHalf ? half_to_float((uint16_t)bits) : bfloat_to_float((uint16_t)bits); }

DEVICE float channel_of(const Chunk& chunk, int i) {
  if constexpr (kInput == kFloat) {
    return as_float(chunk.word[i]);
  } else {
    return from_16_bits(chunk.word[i / 2] >> (16 * (i & 1)) & 0xffffu);
  }
}

// Whether softmax sees key `token` of the caller's order.
template <class Params>
DEVICE bool attends(const Params& p, int batch, int token) {
  const int64_t key = (int64_t)batch * p.s_k + token;
  if (p.key_valid) return p.key_valid[key] != 0;
  return !p.key_bias || p.key_bias[key] > -infinity();
}

// ---- sums across lanes ---------------------------------------------------------------------------------------------------------------------------

// Over the threads of a row.
DEVICE float sum_of_row(float x) {
  UNROLL for (int mask = 1; mask < kLanes; mask *= 2) x += shuffle_xor(x, mask);
  return x;
}
DEVICE uint32_t max_of_row(uint32_t x) {
  UNROLL for (int mask = 1; mask < kLanes; mask *= 2) x = max_of(x, shuffle_xor(x, mask));
  return x;
}
// Over the rows that a warp holds side by side.
DEVICE float sum_of_rows(float x) {
  UNROLL for (int mask = kLanes; mask < 32; mask *= 2) x += shuffle_xor(x, mask);
  return x;
}
DEVICE uint32_t max_of_rows(uint32_t x) {
  UNROLL for (int mask = kLanes; mask < 32; mask *= 2) x = max_of(x, shuffle_xor(x, mask));
  return x;
}
DEVICE float sum_of_warp(float x) {
  UNROLL for (int mask = 1; mask < 32; mask *= 2) x += shuffle_xor(x, mask);
  return x;
}
DEVICE uint32_t max_of_warp(uint32_t x) {
  UNROLL for (int mask = 1; mask < 32; mask *= 2) x = max_of(x, shuffle_xor(x, mask));
  return x;
}

// What the warps add to a row of kDim sums.
typedef float Partial[kWarps][kDim];

// The rows of this warp summed; the first lanes store them.
DEVICE void store_partial(Partial& partial, const float (&x)[kChannels]) {
  const int lane = lane_id();
  UNROLL for (int i = 0; i < kChannels; i++) {
    const float sum = sum_of_rows(x[i]);
    if (lane < kLanes) partial[warp_id()][lane * kChannels + i] = sum;
  }
}

// The columns of this lane, summed over `warps` warps from `first` on.
DEVICE void load_partial(const Partial& partial, int first, int warps, float (&x)[kColumns]) {
  UNROLL for (int i = 0; i < kColumns; i++) x[i] = 0;
  for (int warp = first; warp < first + warps; warp++) {
    UNROLL for (int i = 0; i < kColumns; i++) x[i] += partial[warp][lane_id() * kColumns + i];
  }
}

// ---- 8 bits --------------------------------------------------------------------------------------------------------------------------------------

// Scale of values whose largest magnitude has these bits. What is too small for a normal scale counts as zero, so that 1 / scale is finite.
DEVICE float scale_of(uint32_t absmax, float levels) {
  const float scale = divide(as_float(absmax), levels);
  return scale < kSmallestNormal ? 0 : scale;
}
// 0 also for NaN and infinity: those reach the result through the scale.
DEVICE float inverse_of(float scale) { return scale > 0 ? divide(1, scale) : 0; }

// x / scale, rounded like a division: one correction by the exact remainder of x * inverse. A third of a division's instructions. Where the remainder
// underflows (scale under 2 ** -69) the last bit may differ.
DEVICE float quotient(float x, float scale, float inverse) {
  const float estimate = x * inverse;
  return fused(fused(-estimate, scale, x), inverse, estimate);
}

DEVICE uint32_t pack_value(bool fp8, float a, float b, float c, float d) {
  if (fp8) return pack_e4m3(a, b, c, d);
  return pack_int8(a, b, c, d);
}

// Byte offset of a channel of q8 or k8 in its row.
DEVICE int byte_of(int row, int channel) { return chunk_of(kDim, row, channel / 16) * 16 + channel % 16; }

// 8 channels of a row. No value passes 127: none is larger than 127 scale by more than one rounding.
DEVICE void store_int8(int8_t* to, const float (&x)[kChannels], float scale) {
  const float inverse = inverse_of(scale);
  float y[kChannels];
  UNROLL for (int i = 0; i < kChannels; i++) y[i] = quotient(x[i], scale, inverse);
  *(Bytes8*)to = {{pack_int8(y[0], y[1], y[2], y[3]), pack_int8(y[4], y[5], y[6], y[7])}};
}

DEVICE uint32_t absmax_of(const float (&x)[kChannels]) {
  uint32_t top = 0;
  UNROLL for (int i = 0; i < kChannels; i++) top = max_of(top, as_bits(x[i]) & kMagnitude);
  return top;
}

// unit += weight * x / |x|; a row of zeros, or one that holds NaN, adds nothing.
DEVICE void add_unit(float (&unit)[kChannels], const float (&x)[kChannels], float weight) {
  float square = 0;
  UNROLL for (int i = 0; i < kChannels; i++) square = fused(x[i], x[i], square);
  square = sum_of_row(square);
  const float factor = weight * inverse_root(square);
  UNROLL for (int i = 0; i < kChannels; i++) unit[i] = square > 0 ? fused(factor, x[i], unit[i]) : unit[i];
}

// ---- fp16 pairs ----------------------------------------------------------------------------------------------------------------------------------

// One row, held by a whole warp: high and low parts to `to`, the power of two to `scale`. The largest magnitude lands in [2 ** 14, 2 ** 15); it
// stays smaller where that would take a scale that is no normal number. A row of zeros has scale 1.
DEVICE void store_pair(const float (&x)[kColumns], uint16_t* to, float* scale) {
  uint32_t top = 0;
  UNROLL for (int i = 0; i < kColumns; i++) top = max_of(top, as_bits(x[i]) & kMagnitude);
  top = max_of_warp(top);
  const uint32_t exponent = top == 0 ? 127 : max_of(top >> 23, 15u) - 14;
  const float inverse = as_float((254 - exponent) << 23);
  uint32_t* high = (uint32_t*)(to + lane_id() * kColumns);
  uint32_t* low = high + kDim / 2;
  UNROLL for (int i = 0; i < kColumns; i += 2) {
    const float a = x[i] * inverse, b = x[i + 1] * inverse;
    const uint32_t word = pack_half(a, b);
    high[i / 2] = word;
    low[i / 2] = pack_half(a - half_to_float((uint16_t)word), b - half_to_float((uint16_t)(word >> 16)));
  }
  if (lane_id() == 0) *scale = as_float(exponent << 23);
}

// Squared norm of a row of means.
DEVICE void store_norm(const float (&x)[kColumns], float share, float* to) {
  float square = 0;
  UNROLL for (int i = 0; i < kColumns; i++) square = fused(x[i] * share, x[i] * share, square);
  square = sum_of_warp(square);
  if (lane_id() == 0) *to = square;
}

// ---- statistics ----------------------------------------------------------------------------------------------------------------------------------

struct StatisticsShared {
  Partial sum;
  uint32_t absmax[kWarps][kDim];
  float count[kWarps];
};

// The rows token_at(0), token_at(1), ... of a head; nothing of those that are past the end or masked. Returns how many there were.
template <class TokenAt>
DEVICE int load_batch(const StatisticsParams& p, Chunk (&chunk)[kBatch], const char* head, int64_t stride, bool wide, int batch, int end,
                      TokenAt token_at) {
  int count = 0;
  UNROLL for (int i = 0; i < kBatch; i++) {
    const int token = token_at(i);
    chunk[i] = {};
    if (token < end && attends(p, batch, token)) {
      chunk[i] = load_chunk(head + token * stride * kElementBytes, thread_id() % kLanes * kChannels, p.dim, wide);
      count++;
    }
  }
  return count;
}

KERNEL(sparge_statistics, 256, StatisticsParams) {
  StatisticsShared& shared = *(StatisticsShared*)shared_memory();
  const int thread = thread_id(), slot = thread / kLanes;
  const int id = (int)cta_id(), row = id / p.splits, head = row % p.kv_heads, batch = row / p.kv_heads;
  const int start = id % p.splits * p.split_length, end = min_of(start + p.split_length, p.s_k);
  const char* k = at(p.k, batch * p.k_stride.batch + head * p.k_stride.head);
  const char* v = at(p.v, batch * p.v_stride.batch + head * p.v_stride.head);
  const bool wide_k = is_wide(k, p.k_stride.token, p.dim), wide_v = is_wide(v, p.v_stride.token, p.dim);

  float sum[kChannels] = {};
  int count = 0;
  for (int first = start + slot * kCentreGroup; first < end; first += kBatch * kSlots * kCentreGroup) {  // start is a multiple of the group
    Chunk chunk[kBatch];
    count += load_batch(p, chunk, k, p.k_stride.token, wide_k, batch, end, [&](int i) { return sampled_token(first + i * kSlots * kCentreGroup); });
    UNROLL for (int j = 0; j < kBatch; j++) {
      UNROLL for (int i = 0; i < kChannels; i++) sum[i] += channel_of(chunk[j], i);
    }
  }
  // Magnitudes of 16-bit numbers, NaN and infinity among them, are ordered like their bits: half a word each, compared in place.
  uint32_t absmax[kChannels] = {};
  for (int first = start + slot; first < end; first += kBatch * kSlots) {
    Chunk chunk[kBatch];
    load_batch(p, chunk, v, p.v_stride.token, wide_v, batch, end, [&](int i) { return first + i * kSlots; });
    UNROLL for (int j = 0; j < kBatch; j++) {
      UNROLL for (int i = 0; i < kChannels; i++) {
        const uint32_t bits = kInput == kFloat ? chunk[j].word[i] & kMagnitude : chunk[j].word[i / 2] & (i & 1 ? 0x7fff0000u : 0x7fffu);
        absmax[i] = max_of(absmax[i], bits);
      }
    }
  }

  store_partial(shared.sum, sum);
  const float warp_count = sum_of_rows((float)count);
  if (lane_id() == 0) shared.count[warp_id()] = warp_count;
  UNROLL for (int i = 0; i < kChannels; i++) {
    const uint32_t bits = kInput == kFloat ? absmax[i] : as_bits(from_16_bits(i & 1 ? absmax[i] >> 16 : absmax[i]));
    const uint32_t top = max_of_rows(bits);
    if (lane_id() < kLanes) shared.absmax[warp_id()][lane_id() * kChannels + i] = top;
  }
  sync_cta();
  if (thread < kDim) {
    float total = 0;
    uint32_t top = 0;
    UNROLL for (int warp = 0; warp < kWarps; warp++) {
      total += shared.sum[warp][thread];
      top = max_of(top, shared.absmax[warp][thread]);
    }
    p.k_sum[(int64_t)id * kDim + thread] = total;
    p.v_absmax[(int64_t)id * kDim + thread] = top;
  }
  if (thread == 0) {
    float total = 0;
    UNROLL for (int warp = 0; warp < kWarps; warp++) total += shared.count[warp];
    p.k_count[id] = total;
  }
}

// ---- pre-pass ------------------------------------------------------------------------------------------------------------------------------------

// Channel of the vector that is subtracted from the keys of a head.
DEVICE float centre_of(const PrepassParams& p, int kv_row, int channel) {
  if (!p.smooth_k) return 0;
  float sum = 0, count = 0;
  for (int split = 0; split < p.splits; split++) {
    const int64_t i = (int64_t)kv_row * p.splits + split;
    sum += p.k_sum[i * kDim + channel];
    count += p.k_count[i];
  }
  return divide(sum, max_of(count, 1.0f));
}

struct QueryShared {
  Partial sum;
  Partial unit;
  float centre[kDim];
};

DEVICE void query_block(const PrepassParams& p, int id, int n_q) {
  QueryShared& shared = *(QueryShared*)shared_memory();
  const int warp = warp_id(), lane = lane_id(), channel = lane % kLanes * kChannels;
  const int block = id % n_q, head = id / n_q % p.heads, batch = id / n_q / p.heads;
  const int rows = min_of(p.s_q - block * kBlockQ, kBlockQ);
  const char* q = at(p.q, batch * p.q_stride.batch + head * p.q_stride.head);
  const bool wide = is_wide(q, p.q_stride.token, p.dim);
  const float to_score = p.scale * kLog2E;

  if (p.lse_shift) {
    const int kv_row = batch * p.kv_heads + head / (p.heads / p.kv_heads);
    if (thread_id() < kDim) shared.centre[thread_id()] = centre_of(p, kv_row, thread_id());
    sync_cta();
  }
  float sum[kChannels] = {}, unit[kChannels] = {};
  for (int done = 0; done < kWarpRows; done += kStep * kBatch) {  // rolled up, for the registers
    const int first = warp * kWarpRows + done + lane / kLanes;
    Chunk chunk[kBatch];
    UNROLL for (int j = 0; j < kBatch; j++) {
      const int row = first + j * kStep;
      chunk[j] = {};
      if (row < rows) {
        const int position = block * kBlockQ + row;
        const int64_t token = p.perm ? p.perm[position] : position;
        chunk[j] = load_chunk(q + token * p.q_stride.token * kElementBytes, channel, p.dim, wide);
      }
    }
    UNROLL for (int j = 0; j < kBatch; j++) {
      const int row = first + j * kStep;
      const int64_t stored = (int64_t)id * kBlockQ + row;
      float x[kChannels];
      UNROLL for (int i = 0; i < kChannels; i++) {
        x[i] = channel_of(chunk[j], i);
        sum[i] += x[i];
      }
      if (p.q_sim) add_unit(unit, x, 1);
      if (p.lse_shift) {
        float dot = 0;
        UNROLL for (int i = 0; i < kChannels; i++) dot = fused(x[i], shared.centre[channel + i], dot);
        dot = sum_of_row(dot) * p.scale;
        if (channel == 0 && row < rows) p.lse_shift[(int64_t)(id / n_q) * p.s_q + block * kBlockQ + row] = dot;
      }
      const float scale = scale_of(max_of_row(absmax_of(x)), 127);
      store_int8(p.q8 + stored * kDim + byte_of(row, channel), x, scale);
      if (channel == 0) p.q_scale[stored] = scale * to_score;
    }
  }
  store_partial(shared.sum, sum);
  if (p.q_sim) store_partial(shared.unit, unit);
  sync_cta();
  // One of 4 pools x (mean, square) per warp.
  const int pool = warp / 2, square = warp % 2;
  const int pool_rows = min_of(rows - pool * kPoolQ, kPoolQ);
  const float share = pool_rows > 0 ? divide(1, (float)pool_rows) : 0;
  float x[kColumns];
  load_partial(shared.sum, 2 * pool, 2, x);
  UNROLL for (int i = 0; i < kColumns; i++) {
    x[i] *= share;
    if (square) x[i] *= x[i];
  }
  const int64_t stored = (int64_t)id * kPools + pool;
  store_pair(x, (square ? p.q_square : p.q_mean) + stored * 2 * kDim, p.q_pool_scale + stored * 2 + square);
  if (p.q_sim && warp == 0) {
    load_partial(shared.unit, 0, kWarps, x);
    store_norm(x, divide(1, (float)rows), p.q_sim + id);
  }
}

struct KeyShared {
  Partial sum;
  Partial square;
  Partial unit;
  Partial value;
  Bytes16 tile[kDim * kBlockK / 16];  // 8-bit V, as it will be stored but for the order of its chunks
  float centre[kDim];
  float v_scale[kDim];
  float v_inverse[kDim];
  float weight[kBlockK];              // exp(bias); 0 where masked or past the end, and only there
  uint32_t absmax[kWarps];
};
static_assert(sizeof(KeyShared) <= 204 * kDim + 288 && sizeof(QueryShared) <= sizeof(KeyShared) && sizeof(StatisticsShared) <= sizeof(KeyShared),
              "prepass_shared() of kernels/config.py tells how much to ask for");

// Where chunk i of the transposed tile lies: lanes that write the same key of channels 8 apart meet different banks.
DEVICE int chunk_place(int i) { return i ^ (i / 32 & 7); }

DEVICE float v_scale_of(const PrepassParams& p, int kv_row, int channel) {
  uint32_t top = 0;
  for (int split = 0; split < p.splits; split++) top = max_of(top, p.v_absmax[((int64_t)kv_row * p.splits + split) * kDim + channel]);
  if (p.pv != kPvHalf) return scale_of(top, p.pv == kPvInt8 ? 127 : 448);
  if (top >= kInfinity) return as_float(top);
  // The smallest 2 ** n with absmax <= 2 ** (n + 15): small values would be subnormal in fp16, large ones infinite.
  const uint32_t ceiling = (top + 0x7fffffu) >> 23;
  return top == 0 ? 1.0f : as_float((max_of(ceiling, 16u) - 15) << 23);
}

// The thread's rows of a key block of k or v: the keys of neighbouring positions of transposed V.
DEVICE void load_keys(const PrepassParams& p, Chunk (&chunk)[kKeyRows], const void* tensor, const Strides& stride, int batch, int kv_head,
                      int block) {
  const char* head = at(tensor, batch * stride.batch + kv_head * stride.head);
  const bool wide = is_wide(head, stride.token, p.dim);
  UNROLL for (int j = 0; j < kKeyRows; j++) {
    const int position = block * kBlockK + key_at_position(thread_id() / kLanes * kKeyRows + j);
    chunk[j] = {};
    if (position < p.s_k) {
      const int64_t token = p.perm ? p.perm[position] : position;
      chunk[j] = load_chunk(head + token * stride.token * kElementBytes, thread_id() % kLanes * kChannels, p.dim, wide);
    }
  }
}

DEVICE void key_block(const PrepassParams& p, int id, int n_k) {
  KeyShared& shared = *(KeyShared*)shared_memory();
  const int thread = thread_id(), warp = warp_id(), lane = lane_id(), slot = thread / kLanes, channel = thread % kLanes * kChannels;
  const int block = id % n_k, kv_row = id / n_k, head = kv_row % p.kv_heads, batch = kv_row / p.kv_heads;
  const int rows = min_of(p.s_k - block * kBlockK, kBlockK);
  Chunk chunk[kKeyRows];
  load_keys(p, chunk, p.k, p.k_stride, batch, head, block);
  if (thread < kDim) {
    shared.centre[thread] = centre_of(p, kv_row, thread);
  } else if (thread < 2 * kDim) {
    const int c = thread - kDim;
    const float scale = v_scale_of(p, kv_row, c);
    shared.v_scale[c] = scale;
    shared.v_inverse[c] = inverse_of(scale);
    if (block == 0) p.v_scale[(int64_t)kv_row * kDim + c] = scale;
  }
  if (thread < kBlockK) {
    float bias = -infinity();
    if (thread < rows) {
      const int position = block * kBlockK + thread;
      const int token = p.perm ? (int)p.perm[position] : position;
      if (attends(p, batch, token)) bias = p.key_bias ? p.key_bias[(int64_t)batch * p.s_k + token] * kLog2E : 0;
    }
    // A key that is seen has some weight, however low its bias: else a block of such keys would count as masked.
    shared.weight[thread] = bias > -infinity() ? max_of(exp2_of(bias), kSmallestNormal) : 0;
    if (head == 0 && p.bias2) p.bias2[((int64_t)batch * n_k + block) * kBlockK + thread] = bias;
  }
  sync_cta();

  float x[kKeyRows][kChannels], weight[kKeyRows];
  UNROLL for (int j = 0; j < kKeyRows; j++) {
    weight[j] = shared.weight[key_at_position(kKeyRows * slot + j)];
    UNROLL for (int i = 0; i < kChannels; i++) x[j][i] = weight[j] > 0 ? channel_of(chunk[j], i) - shared.centre[channel + i] : 0;
  }
  {
    float sum[kChannels] = {}, square[kChannels] = {};
    UNROLL for (int j = 0; j < kKeyRows; j++) {
      UNROLL for (int i = 0; i < kChannels; i++) {
        const float weighted = weight[j] * x[j][i];
        sum[i] += weighted;
        square[i] = fused(weighted, x[j][i], square[i]);
      }
    }
    store_partial(shared.sum, sum);
    store_partial(shared.square, square);
  }
  if (p.k_sim) {
    float unit[kChannels] = {};
    UNROLL for (int j = 0; j < kKeyRows; j++) add_unit(unit, x[j], weight[j]);
    store_partial(shared.unit, unit);
  }
  uint32_t absmax = 0;
  UNROLL for (int j = 0; j < kKeyRows; j++) absmax = max_of(absmax, absmax_of(x[j]));
  absmax = max_of_warp(absmax);
  if (lane == 0) shared.absmax[warp] = absmax;
  sync_cta();

  absmax = 0;
  UNROLL for (int i = 0; i < kWarps; i++) absmax = max_of(absmax, shared.absmax[i]);
  const float scale = scale_of(absmax, 127);
  if (thread == 0) p.k_scale[id] = scale;
  const int64_t stored = (int64_t)id * kBlockK;
  UNROLL for (int j = 0; j < kKeyRows; j++) {
    const int key = key_at_position(kKeyRows * slot + j);
    // 32 bits inside the block: with a 64-bit offset per row the registers do not suffice for three CTAs a multiprocessor.
    store_int8(p.k8 + stored * kDim + (uint32_t)(key * kDim + byte_of(key, channel)), x[j], scale);
  }
  // V is loaded only now that K has left its registers, so that three CTAs fit on a multiprocessor: one loads while another computes.
  load_keys(p, chunk, p.v, p.v_stride, batch, head, block);
  UNROLL for (int j = 0; j < kKeyRows; j++) {
    if (shared.weight[key_at_position(kKeyRows * slot + j)] == 0) chunk[j] = {};
  }
  if (p.v_mean) {
    float value[kChannels] = {};
    UNROLL for (int j = 0; j < kKeyRows; j++) {
      const float of_row = shared.weight[key_at_position(kKeyRows * slot + j)];
      UNROLL for (int i = 0; i < kChannels; i++) value[i] = fused(of_row, channel_of(chunk[j], i), value[i]);
    }
    store_partial(shared.value, value);
  }
  if (p.pv == kPvHalf) {
    UNROLL for (int j = 0; j < kKeyRows; j++) {
      Bytes16 out;
      UNROLL for (int i = 0; i < kChannels; i += 2) {
        const float low = channel_of(chunk[j], i) * shared.v_inverse[channel + i];
        out.word[i / 2] = pack_half(low, channel_of(chunk[j], i + 1) * shared.v_inverse[channel + i + 1]);
      }
      const int key = key_at_position(kKeyRows * slot + j);
      *((Bytes16*)p.v8 + (stored + key) * (kDim / 8) + chunk_of(2 * kDim, key, channel / 8)) = out;
    }
  } else {
    constexpr int kPlaces = 16 / kKeyRows;  // threads that fill one chunk
    UNROLL for (int i = 0; i < kChannels; i++) {
      const float scale = shared.v_scale[channel + i], inverse = shared.v_inverse[channel + i];
      float z[4] = {};
      UNROLL for (int j = 0; j < kKeyRows; j++) z[j] = quotient(channel_of(chunk[j], i), scale, inverse);
      const uint32_t word = pack_value(p.pv == kPvFp8, z[0], z[1], z[2], z[3]);
      char* to = (char*)&shared.tile[chunk_place((channel + i) * (kBlockK / 16) + slot / kPlaces)] + slot % kPlaces * kKeyRows;
      if constexpr (kKeyRows == 4) {
        *(uint32_t*)to = word;
      } else {
        *(uint16_t*)to = (uint16_t)word;
      }
    }
  }
  sync_cta();

  if (p.pv != kPvHalf) {
    constexpr int kChunks = kBlockK / 16;  // of a channel
    UNROLL for (int i = thread; i < kDim * kChunks; i += kThreads) {
      const int row = i / kChunks, chunk = chunk_of(kBlockK, row, i % kChunks);
      *(Bytes16*)((char*)p.v8 + stored * kDim + 16 * i) = shared.tile[chunk_place(row * kChunks + chunk)];
    }
  }
  // Each of the first warps finishes one row of sums.
  const float total = sum_of_warp(shared.weight[lane] + shared.weight[lane + 32]);
  const float share = total > 0 ? divide(1, total) : 0;
  float mean[kColumns];
  if (warp < 2) {
    load_partial(shared.sum, 0, kWarps, mean);
    UNROLL for (int i = 0; i < kColumns; i++) mean[i] *= share;
    if (warp == 0) {
      store_pair(mean, p.k_mean + (int64_t)id * 2 * kDim, p.k_pool_scale + (int64_t)id * 2);
      if (lane == 0 && head == 0) p.k_weight[(int64_t)batch * n_k + block] = total;
    } else {
      float variance[kColumns];
      load_partial(shared.square, 0, kWarps, variance);
      UNROLL for (int i = 0; i < kColumns; i++) {
        variance[i] = variance[i] * share - mean[i] * mean[i];
        if (variance[i] < 0) variance[i] = 0;  // NaN stays
      }
      store_pair(variance, p.k_variance + (int64_t)id * 2 * kDim, p.k_pool_scale + (int64_t)id * 2 + 1);
    }
  } else if (warp == 2 && p.k_sim) {
    load_partial(shared.unit, 0, kWarps, mean);
    store_norm(mean, share, p.k_sim + id);
  } else if (warp == 3 && p.v_mean) {
    load_partial(shared.value, 0, kWarps, mean);
    UNROLL for (int i = 0; i < kColumns; i++) p.v_mean[(int64_t)id * kDim + lane * kColumns + i] = mean[i] * share;
  }
}

KERNEL(sparge_prepass, 256, PrepassParams) {
  const int n_q = (p.s_q + kBlockQ - 1) / kBlockQ, n_k = (p.s_k + kBlockK - 1) / kBlockK;
  const int id = (int)cta_id(), query_blocks = p.batch * p.heads * n_q;
  if (id < query_blocks) {
    query_block(p, id, n_q);
  } else {
    key_block(p, id - query_blocks, n_k);
  }
}
