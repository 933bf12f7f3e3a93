// Block-sparse flash attention with mma.sync: INT8 Q K^T, P V in INT8 (unsigned P), FP8 or fp16. sm_80 and above; FP8 on sm_89 and sm_120.
//
// A block of 256 threads owns one query block of 128 rows of one head; a warp owns 16 of them. Registers: the warp's Q fragments, the scores of one
// tile, O in fp32. Shared memory: kStages tiles of K and V, filled by cp.async while earlier ones are used. A tile is 64 keys at E = 128 and two kept
// blocks that follow each other in the list at E = 64, so that both have 128 matrix instructions per warp; an odd last block stays alone in its tile.
// The online softmax is fp32 in log2 units. Every tile has fresh P V accumulators, added to O in fp32: FP8 accumulators keep too few bits for long
// sums, and INT8 ones are exact within a tile only.
//   INT8: P is rounded against the row's maximum in the tile, so that small tiles keep all their bits; the row sum is that of the unrounded P.
//   FP8: P is offset by 2^8; the row sum is that of the rounded P, from one more product with ones.
//   fp16: P as it is; the row sum is that of the unrounded P.
// When no row of a warp reaches pvthreshd under its running maximum, the warp drops the tile: no exp, no P V, nothing in the denominator, and the
// maxima stay. Skipped blocks' pooled state (compensation) enters after the loop. Rows go back to the caller's order on their way out.
#pragma once
#include <prim.cuh>
#include <layout.cuh>

constexpr int kDim = SPARGE_DIM;
constexpr int kPv = SPARGE_PV;
constexpr bool kMasked = SPARGE_MASKED;
constexpr int kThreads = 256;
constexpr int kStages = 3;
constexpr int kTileBlocks = kDim == 64 ? 2 : 1;
constexpr int kBlockTiles = kBlockK / 8;                            // accumulators of 16 x 8 per key block
constexpr int kKeyTiles = kBlockTiles * kTileBlocks;
constexpr int kGroupKeys = kPv == kPvHalf ? 16 : 32;                // keys of one P V instruction
constexpr int kGroups = kBlockK * kTileBlocks / kGroupKeys;
constexpr int kBlockBytesK = kBlockK * kDim;
constexpr int kBlockBytesV = kBlockK * kDim * (kPv == kPvHalf ? 2 : 1);
constexpr int kStageBytes = kTileBlocks * (kBlockBytesK + kBlockBytesV);
constexpr int kRowBytesV = kPv == kPvHalf ? 2 * kDim : kBlockK;     // fp16: a key's channels; 8 bit: a channel's keys
constexpr float kNone = kNothingSkipped;                            // running maximum before the first tile
constexpr float kLog2Of255 = 7.99435344f;
constexpr float kOffset = kPv == kPvFp8 ? 8.0f : 0.0f;              // log2 of what FP8's P, sum and O are multiplied by

// Byte offset of a 16-byte chunk in a tile whose rows have kRowBytes.
template <int kRowBytes>
DEVICE uint32_t swizzled(int row, int chunk) {
  return row * kRowBytes + (chunk_of(kRowBytes, row, chunk) << 4);
}

template <int kBytes>
DEVICE void copy_block(uint32_t shared, const char* global) {
  UNROLL for (int i = 0; i < kBytes; i += 16 * kThreads) copy_async_16(shared + i + 16 * thread_id(), global + i + 16 * thread_id());
}

// What a thread knows of its two rows, g and g + 8 of the warp's sixteen.
struct Rows {
  float top[2];    // running maximum, log2 units; only tiles that were not dropped move it
  float sum[2];    // INT8, fp16: this thread's part; FP8: the whole
  bool real[2];    // rows past S_q have no say in what is dropped
};

struct Tile {
  int64_t first_key[kTileBlocks];  // of each block
  int blocks;                      // 1 or kTileBlocks
};

// Scores as fp32 in place of the integers, -inf where a key is masked, past the end, behind the causal edge or in the missing half.
DEVICE void mask_scores(const AttentionParams& p, int (&acc)[kKeyTiles][4], const float (&factor)[kTileBlocks][2], const Tile& tile, const float* bias2,
                        int64_t row) {
  UNROLL for (int j = 0; j < kKeyTiles; j++) {
    int block = j / kBlockTiles;
    bool missing = block >= tile.blocks;
    UNROLL for (int e = 0; e < 4; e++) {
      int64_t key = tile.first_key[block] + (j % kBlockTiles) * 8 + (lane_id() & 3) * 2 + (e & 1);
      bool out = missing || key >= p.s_k || (p.causal && key > row + (e >> 1) * 8 + p.causal_offset);
      float score = to_float(acc[j][e]) * factor[block][e >> 1];
      if (kMasked && !out) score += bias2[key];
      acc[j][e] = (int)as_bits(out ? -infinity() : score);
    }
  }
}

// Maxima, decision and P of one tile. kEdge: acc holds fp32 scores (mask_scores), else integers. Returns whether the warp keeps the tile; then
// `decay` is what O is multiplied by, `gain` what the tile's P V is multiplied by, `weights` P as the operand of the second product.
template <bool kEdge>
DEVICE bool softmax(const int (&acc)[kKeyTiles][4], const float (&factor)[kTileBlocks][2], float threshold, Rows& rows, uint32_t (&weights)[kGroups][4],
                    float (&decay)[2], float (&gain)[2]) {
  float tile_top[2];
  bool needed = false;
  UNROLL for (int h = 0; h < 2; h++) {
    float top = -infinity();
    UNROLL for (int block = 0; block < kTileBlocks; block++) {
      if (kEdge) {
        UNROLL for (int j = 0; j < kBlockTiles; j++) {
          top = max_of(top, max_of(as_float(acc[block * kBlockTiles + j][2 * h]), as_float(acc[block * kBlockTiles + j][2 * h + 1])));
        }
      } else {  // the factor is not negative: the largest integer is the largest score
        int most = acc[block * kBlockTiles][2 * h];
        UNROLL for (int j = 0; j < kBlockTiles; j++) {
          most = max_of(most, max_of(acc[block * kBlockTiles + j][2 * h], acc[block * kBlockTiles + j][2 * h + 1]));
        }
        float score = to_float(most) * factor[block][h];
        top = block == 0 ? score : max_of(top, score);
      }
    }
    top = max_of(top, shuffle_xor(top, 1));
    tile_top[h] = max_of(top, shuffle_xor(top, 2));
    // Written so that NaN objects; a row that sees nothing here (-inf) does not.
    needed |= rows.real[h] && !(tile_top[h] <= rows.top[h] - threshold);
  }
  if (!any_lane(needed)) return false;

  float base[2];
  UNROLL for (int h = 0; h < 2; h++) {
    float own = max_of(tile_top[h], kNone);
    float top = max_of(rows.top[h], own);
    decay[h] = exp2_of(rows.top[h] - top);
    rows.top[h] = top;
    // What rounding the two sums of large scores may add must not take P past 255, where its byte would wrap.
    float slack = max_of(absolute(own) - 8192.0f, 0.0f) * (1.0f / 2097152.0f);
    base[h] = kPv == kPvInt8 ? kLog2Of255 - own - slack : kOffset - top;
    gain[h] = kPv == kPvInt8 ? exp2_of(own - top) * (1.0f / 255.0f) : 1.0f;
  }
  float sum[2] = {0.0f, 0.0f};
  UNROLL for (int g = 0; g < kGroups; g++) {
    constexpr int kTilesHere = kGroupKeys / 8;
    float w[kTilesHere][4];
    UNROLL for (int i = 0; i < kTilesHere; i++) {
      int j = g * kTilesHere + i;
      UNROLL for (int e = 0; e < 4; e++) {
        int h = e >> 1;
        w[i][e] = exp2_of(kEdge ? as_float(acc[j][e]) + base[h] : fused(to_float(acc[j][e]), factor[j / kBlockTiles][h], base[h]));
        if (kPv != kPvFp8) sum[h] += w[i][e];
      }
    }
    if constexpr (kPv == kPvHalf) {
      weights[g][0] = pack_half(w[0][0], w[0][1]);
      weights[g][1] = pack_half(w[0][2], w[0][3]);
      weights[g][2] = pack_half(w[1][0], w[1][1]);
      weights[g][3] = pack_half(w[1][2], w[1][3]);
    } else {
      UNROLL for (int half = 0; half < 2; half++) {
        UNROLL for (int h = 0; h < 2; h++) {
          float a = w[2 * half][2 * h], b = w[2 * half][2 * h + 1], c = w[2 * half + 1][2 * h], d = w[2 * half + 1][2 * h + 1];
          if constexpr (kPv == kPvInt8) {
            weights[g][2 * half + h] = pack_uint8(a, b, c, d);
          } else {
            weights[g][2 * half + h] = pack_e4m3(a, b, c, d);
          }
        }
      }
    }
  }
  if (kPv != kPvFp8) {
    UNROLL for (int h = 0; h < 2; h++) rows.sum[h] = fused(rows.sum[h], decay[h], sum[h] * gain[h]);
  }
  return true;
}

// O = O * decay + gain * P V for one tile; FP8 also takes the row sums.
DEVICE void add_values(const uint32_t (&weights)[kGroups][4], uint32_t shared_v, const float (&decay)[2], const float (&gain)[2], Rows& rows,
                       float (&o)[kDim / 8][4]) {
  int lane = lane_id();
  UNROLL for (int d = 0; d < kDim / 16; d++) {
    if constexpr (kPv == kPvHalf) {
      UNROLL for (int x = 0; x < 2; x++) {
        UNROLL for (int e = 0; e < 4; e++) o[2 * d + x][e] *= decay[e >> 1];
      }
      UNROLL for (int g = 0; g < kGroups; g++) {
        uint32_t b[4];
        load_matrix_transposed(b, shared_v + swizzled<kRowBytesV>(g * 16 + (lane & 15), d * 2 + (lane >> 4)));
        mma_half(o[2 * d], weights[g], b[0], b[1]);
        mma_half(o[2 * d + 1], weights[g], b[2], b[3]);
      }
    } else if constexpr (kPv == kPvInt8) {
      int product[2][4] = {};
      UNROLL for (int g = 0; g < kGroups; g++) {
        uint32_t b[4];
        load_matrix(b, shared_v + (g / 2) * kBlockBytesV +
                           swizzled<kRowBytesV>(d * 16 + (lane & 7) + ((lane >> 4) << 3), (g % 2) * 2 + ((lane >> 3) & 1)));
        mma_u8s8(product[0], weights[g], b[0], b[1]);
        mma_u8s8(product[1], weights[g], b[2], b[3]);
      }
      UNROLL for (int x = 0; x < 2; x++) {
        UNROLL for (int e = 0; e < 4; e++) {
          o[2 * d + x][e] = fused(o[2 * d + x][e], decay[e >> 1], to_float(product[x][e]) * gain[e >> 1]);
        }
      }
    } else {
      float product[2][4] = {};
      UNROLL for (int g = 0; g < kGroups; g++) {
        uint32_t b[4];
        load_matrix(b, shared_v + (g / 2) * kBlockBytesV +
                           swizzled<kRowBytesV>(d * 16 + (lane & 7) + ((lane >> 4) << 3), (g % 2) * 2 + ((lane >> 3) & 1)));
        mma_e4m3(product[0], weights[g], b[0], b[1]);
        mma_e4m3(product[1], weights[g], b[2], b[3]);
      }
      UNROLL for (int x = 0; x < 2; x++) {
        UNROLL for (int e = 0; e < 4; e++) o[2 * d + x][e] = fused(o[2 * d + x][e], decay[e >> 1], product[x][e]);
      }
    }
  }
  if constexpr (kPv == kPvFp8) {
    float product[4] = {};
    UNROLL for (int g = 0; g < kGroups; g++) mma_e4m3(product, weights[g], 0x38383838u, 0x38383838u);  // ones
    UNROLL for (int h = 0; h < 2; h++) rows.sum[h] = fused(rows.sum[h], decay[h], product[2 * h]);
  }
}

// Four consecutive channels of one row of the output.
DEVICE void store_four(const AttentionParams& p, int64_t at, int column, bool wide, const float (&value)[4]) {
  if (p.out_type == kFloat) {
    float* out = (float*)p.out + at;
    UNROLL for (int i = 0; i < 4; i++) {
      if (column + i < p.dim) out[column + i] = value[i];
    }
    return;
  }
  uint16_t* out = (uint16_t*)p.out + at;
  Bytes8 words;
  UNROLL for (int i = 0; i < 2; i++) {
    words.word[i] = p.out_type == kHalf ? pack_half(value[2 * i], value[2 * i + 1]) : pack_bfloat(value[2 * i], value[2 * i + 1]);
  }
  if (wide) {
    if (column < p.dim) *(Bytes8*)(out + column) = words;
    return;
  }
  UNROLL for (int i = 0; i < 4; i++) {
    if (column + i < p.dim) out[column + i] = (uint16_t)(words.word[i / 2] >> (16 * (i & 1)));
  }
}

KERNEL(sparge_attention_mma, kThreads, AttentionParams) {
  const int lane = lane_id(), group = lane >> 2;
  const int64_t blocks_q = (p.s_q + kBlockQ - 1) / kBlockQ, blocks_k = (p.s_k + kBlockK - 1) / kBlockK;
  const int64_t head_of_batch = block_id() / blocks_q;
  const int64_t block_q = blocks_q - 1 - block_id() % blocks_q;  // causal rows and text at the end keep the most: first
  const int64_t batch = head_of_batch / p.heads, head = head_of_batch % p.heads;
  const int64_t kv = batch * p.kv_heads + head / (p.heads / p.kv_heads);
  const int64_t list = head_of_batch * blocks_q + block_q;
  const uint16_t* ids = p.lists + list * p.capacity;
  const int count = p.counts[list];
  const int tiles = (count + kTileBlocks - 1) / kTileBlocks;
  const int64_t row = block_q * kBlockQ + warp_id() * 16 + group;  // and row + 8
  const char* k8 = (const char*)p.k8 + kv * blocks_k * kBlockBytesK;
  const char* v8 = (const char*)p.v8 + kv * blocks_k * kBlockBytesV;
  const float* k_scale = p.k_scale + kv * blocks_k;
  const float* bias2 = kMasked ? p.bias2 + batch * blocks_k * kBlockK : nullptr;
  const uint32_t stages = shared_address(shared_memory());

  int id_ahead[kTileBlocks];  // of the next tile to load: read a tile early, so that no load waits for its list
  auto look_ahead = [&](int t) {
    UNROLL for (int i = 0; i < kTileBlocks; i++) id_ahead[i] = t * kTileBlocks + i < count ? ids[t * kTileBlocks + i] : 0;
  };
  auto load = [&](int t) {
    uint32_t stage = stages + (t % kStages) * kStageBytes;
    UNROLL for (int i = 0; i < kTileBlocks; i++) {
      uint32_t to_v = stage + kTileBlocks * kBlockBytesK + i * kBlockBytesV;
      if (t * kTileBlocks + i < count) {
        int64_t id = id_ahead[i];
        copy_block<kBlockBytesK>(stage + i * kBlockBytesK, k8 + id * kBlockBytesK);
        copy_block<kBlockBytesV>(to_v, v8 + id * kBlockBytesV);
      } else if (kPv != kPvInt8) {  // the missing half: its P is zero, but zero times whatever lies there might be NaN
        char* zero = shared_memory() + (to_v - stages);
        for (int b = thread_id() * 16; b < kBlockBytesV; b += kThreads * 16) *(Bytes16*)(zero + b) = Bytes16{};
      }
    }
    look_ahead(t + 1);
  };
  look_ahead(0);
  UNROLL for (int t = 0; t < kStages - 1; t++) {
    if (t < tiles) load(t);
    copy_async_commit();
  }

  uint32_t q[kDim / 32][4];
  float q_scale[2];
  UNROLL for (int h = 0; h < 2; h++) {
    int64_t at = head_of_batch * blocks_q * kBlockQ + row + h * 8;
    q_scale[h] = p.q_scale[at];
    const uint32_t* words = (const uint32_t*)(p.q8 + at * kDim) + (lane & 3);
    UNROLL for (int i = 0; i < kDim / 32; i++) {
      UNROLL for (int half = 0; half < 2; half++) q[i][h + 2 * half] = words[4 * chunk_of(kDim, group, 2 * i + half)];
    }
  }
  Rows rows = {{kNone, kNone}, {0.0f, 0.0f}, {row < p.s_q, row + 8 < p.s_q}};
  float o[kDim / 8][4] = {};
  const float threshold = p.pv_heads ? p.pv_heads[head] : p.pvthreshd;
  int dropped = 0;

  for (int t = 0; t < tiles; t++) {
    copy_async_wait<kStages - 2>();
    sync_block();  // tile t is there for everybody, and everybody is done with tile t - 1, whose place the next load takes
    if (t + kStages - 1 < tiles) load(t + kStages - 1);
    copy_async_commit();
    const uint32_t stage = stages + (t % kStages) * kStageBytes;

    Tile tile;
    tile.blocks = min_of(kTileBlocks, count - t * kTileBlocks);
    float factor[kTileBlocks][2];
    bool edge = kMasked || tile.blocks < kTileBlocks;
    UNROLL for (int i = 0; i < kTileBlocks; i++) {
      int64_t id = i < tile.blocks ? ids[t * kTileBlocks + i] : 0;
      tile.first_key[i] = id * kBlockK;
      int64_t last_key = tile.first_key[i] + kBlockK - 1;
      edge |= last_key >= p.s_k || (p.causal && last_key > block_q * kBlockQ + p.causal_offset);
      UNROLL for (int h = 0; h < 2; h++) factor[i][h] = q_scale[h] * k_scale[id];
    }

    int acc[kKeyTiles][4] = {};
    UNROLL for (int i = 0; i < kDim / 32; i++) {
      UNROLL for (int j = 0; j < kKeyTiles / 2; j++) {
        uint32_t b[4];
        load_matrix(b, stage + swizzled<kDim>(j * 16 + (lane & 7) + ((lane >> 4) << 3), i * 2 + ((lane >> 3) & 1)));
        mma_s8s8(acc[2 * j], q[i], b[0], b[1]);
        mma_s8s8(acc[2 * j + 1], q[i], b[2], b[3]);
      }
    }
    uint32_t weights[kGroups][4];
    float decay[2], gain[2];
    bool kept;
    if (edge) {
      mask_scores(p, acc, factor, tile, bias2, row);
      kept = softmax<true>(acc, factor, threshold, rows, weights, decay, gain);
    } else {
      kept = softmax<false>(acc, factor, threshold, rows, weights, decay, gain);
    }
    if (kept) {
      add_values(weights, stage + kTileBlocks * kBlockBytesK, decay, gain, rows, o);
    } else {
      dropped++;
    }
  }

  if (lane == 0 && rows.real[0]) {  // lane 0 holds the warp's first row
    atomic_add(p.skips + 2 * head_of_batch, dropped);
    atomic_add(p.skips + 2 * head_of_batch + 1, tiles);
  }
  const float* state = p.state ? p.state + list * (4 + kDim) : nullptr;
  const float* v_scale = p.v_scale + kv * kDim;
  const int width = p.out_type == kFloat ? 4 : 2;
  const bool wide = ((int64_t)p.out % 8 | p.out_stride.batch * width % 8 | p.out_stride.head * width % 8 | p.out_stride.token * width % 8 | p.dim % 4) == 0;
  UNROLL for (int h = 0; h < 2; h++) {
    int64_t here = row + h * 8;
    int64_t token = p.perm && rows.real[h] ? p.perm[here] : here;
    float sum = rows.sum[h], pooled = 0.0f, top = rows.top[h];
    if (kPv != kPvFp8) {
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
    }
    sum *= exp2_of(-kOffset);
    float kept = exp2_of(-kOffset);
    if (state) {
      float joint = max_of(top, state[0]);
      pooled = exp2_of(state[0] - joint);
      kept *= exp2_of(top - joint);
      sum = fused(sum, exp2_of(top - joint), state[1] * pooled);
      top = joint;
    }
    if (p.lse && rows.real[h] && (lane & 3) == 0) {
      float value = sum == 0.0f ? -infinity() : (top + log2_of(sum)) * kLn2 + p.lse_shift[head_of_batch * p.s_q + here] + (p.top ? p.top[batch] : 0.0f);
      p.lse[head_of_batch * p.s_q + token] = value;
    }
    float inverse = sum == 0.0f ? 0.0f : divide(1.0f, sum);
    int64_t at = batch * p.out_stride.batch + head * p.out_stride.head + token * p.out_stride.token;
    const float* shift = state && p.row_shift && rows.real[h] ? p.row_shift + (head_of_batch * p.s_q + token) * p.dim : nullptr;
    UNROLL for (int j = 0; j < kDim / 8; j += 2) {
      // Lanes of a pair swap, so that each has four consecutive channels: the even one of tile j, the odd one of tile j + 1.
      bool odd = lane & 1;
      float value[4];
      UNROLL for (int e = 0; e < 2; e++) {
        float got = shuffle_xor(odd ? o[j][2 * h + e] : o[j + 1][2 * h + e], 1);
        value[e] = odd ? got : o[j][2 * h + e];
        value[e + 2] = odd ? o[j + 1][2 * h + e] : got;
      }
      int column = (j + odd) * 8 + (lane & 2) * 2;
      UNROLL for (int i = 0; i < 4; i++) {
        value[i] *= kept * v_scale[column + i];
        if (state) {
          float skipped = state[4 + column + i] + (shift && column + i < p.dim ? state[2] * shift[column + i] : 0.0f);
          value[i] = fused(skipped, pooled, value[i]);
        }
        value[i] *= inverse;
      }
      if (rows.real[h]) store_four(p, at, column, wide, value);
    }
  }
}
