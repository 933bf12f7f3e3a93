// Block-sparse flash attention with mma.sync: INT8 Q K^T, P V in INT8 (unsigned P) or fp16. sm_80 and above.
//
// A CTA of 256 threads owns one query block of 128 rows of one head; a warp owns 16 of them. Registers: the warp's Q fragments, the scores of one
// tile, O in fp32. Shared memory: kStages tiles of K and V, filled by cp.async while earlier ones are used. A tile is 64 keys at E = 128 and two kept
// blocks that follow each other in the list at E = 64, so that both have 128 matrix instructions per warp; an odd last block stays alone in its tile.
// The online softmax is fp32 in log2 units; the row sum is that of the unrounded P.
//   INT8: P is rounded against the row's maximum in the tile, so that small tiles keep all their bits; a tile's P V is a whole number, added to O in
//   fp32.
//   fp16: P as it is; its products add to O itself.
// When no row of a warp comes within pvthreshd of its running maximum, the warp skips the tile's P V: no exp, no product, nothing in the denominator,
// and the maxima stay. The pooled state of the blocks that were not kept (compensation) enters after the loop. Rows go back to the caller's order on
// their way out.
#pragma once
#include <prim.cuh>
#include <layout.cuh>

constexpr int kDim = SPARGE_DIM;
constexpr int kPv = SPARGE_PV;
static_assert(kPv == kPvInt8 || kPv == kPvHalf, "P and V in FP8 are for attention_sm90.cuh");
constexpr bool kMasked = SPARGE_MASKED;
constexpr int kTileBlocks = kDim == 64 ? 2 : 1;
constexpr bool kSumRounded = false;
constexpr int kPolynomial = 0;
#include <epilogue.cuh>

constexpr int kThreads = 256;
constexpr int kStages = 3;
constexpr int kBlockBytesK = kBlockK * kDim;
constexpr int kBlockBytesV = kBlockK * kDim * (kPv == kPvHalf ? 2 : 1);
constexpr int kStageBytes = kTileBlocks * (kBlockBytesK + kBlockBytesV);
constexpr int kRowBytesV = kPv == kPvHalf ? 2 * kDim : kBlockK;     // fp16: a key's channels; 8 bit: a channel's keys

// Byte offset of a 16-byte chunk in a tile whose rows have kRowBytes.
template <int kRowBytes>
DEVICE uint32_t swizzled(int row, int chunk) {
  return row * kRowBytes + (chunk_of(kRowBytes, row, chunk) << 4);
}

template <int kBytes>
DEVICE void copy_block(uint32_t shared, const char* global) {
  UNROLL for (int i = 0; i < kBytes; i += 16 * kThreads) copy_async_16(shared + i + 16 * thread_id(), global + i + 16 * thread_id());
}

// O = O * decay + gain * P V for one tile.
DEVICE void add_values(const uint32_t (&weights)[kGroups][4], uint32_t shared_v, const float (&decay)[2], const float (&gain)[2],
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
    } else {
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
    }
  }
}

KERNEL(sparge_attention_mma, kThreads, AttentionParams) {
  const int lane = lane_id(), group = lane >> 2;
  const int64_t blocks_q = (p.s_q + kBlockQ - 1) / kBlockQ, blocks_k = (p.s_k + kBlockK - 1) / kBlockK;
  const Item item = item_at(p, cta_id() / blocks_q, blocks_q - 1 - cta_id() % blocks_q);  // causal rows and text at the end keep the most: first
  const uint16_t* ids = p.lists + item.list * p.capacity;
  const int count = p.counts[item.list];
  const int tiles = (count + kTileBlocks - 1) / kTileBlocks;
  const int64_t row = item.block_q * kBlockQ + warp_id() * 16 + group;  // and row + 8
  const char* k8 = (const char*)p.k8 + item.kv * blocks_k * kBlockBytesK;
  const char* v8 = (const char*)p.v8 + item.kv * blocks_k * kBlockBytesV;
  const float* k_scale = p.k_scale + item.kv * blocks_k;
  const float* bias2 = kMasked ? p.bias2 + item.batch * blocks_k * kBlockK : nullptr;
  const uint32_t stages = shared_address(shared_memory());

  int id_ahead[kTileBlocks];  // key blocks of the next tile to load, read a tile early: else the load would wait for them
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
      } else if (kPv == kPvHalf) {  // the missing half: its P is zero, but zero times whatever lies there might be NaN
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
    int64_t at = item.head_of_batch * blocks_q * kBlockQ + row + h * 8;
    q_scale[h] = p.q_scale[at];
    const uint32_t* words = (const uint32_t*)(p.q8 + at * kDim) + (lane & 3);
    UNROLL for (int i = 0; i < kDim / 32; i++) {
      UNROLL for (int half = 0; half < 2; half++) q[i][h + 2 * half] = words[4 * chunk_of(kDim, group, 2 * i + half)];
    }
  }
  Rows rows = {{kNone, kNone}, {0.0f, 0.0f}, {row < p.s_q, row + 8 < p.s_q}};
  float o[kDim / 8][4] = {};
  const float threshold = p.pv_heads ? p.pv_heads[item.head] : p.pvthreshd;
  int skipped = 0;

  for (int t = 0; t < tiles; t++) {
    copy_async_wait<kStages - 2>();
    sync_cta();  // tile t is there for everybody, and everybody is done with tile t - 1, whose place the next load takes
    if (t + kStages - 1 < tiles) load(t + kStages - 1);
    copy_async_commit();
    const uint32_t stage = stages + (t % kStages) * kStageBytes;

    Tile tile;
    tile.blocks = min_of(kTileBlocks, count - t * kTileBlocks);
    float factor[kTileBlocks][2];
    UNROLL for (int i = 0; i < kTileBlocks; i++) {
      int64_t id = i < tile.blocks ? ids[t * kTileBlocks + i] : 0;
      tile.first_key[i] = id * kBlockK;
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
    float tile_top[2];
    const bool edge = has_edge(p, tile, item.block_q * kBlockQ);
    bool needed;
    if (edge) {
      mask_scores(p, acc, factor, tile, bias2, row);
      needed = any_lane(tile_maxima<true>(acc, factor, threshold, rows, tile_top));
      if (needed) softmax_weights<true>(acc, factor, tile_top, rows, weights, decay, gain);
    } else {
      needed = any_lane(tile_maxima<false>(acc, factor, threshold, rows, tile_top));
      if (needed) softmax_weights<false>(acc, factor, tile_top, rows, weights, decay, gain);
    }
    if (needed) {
      add_values(weights, stage + kTileBlocks * kBlockBytesK, decay, gain, o);
    } else {
      skipped++;
    }
  }

  if (lane == 0 && rows.real[0]) {  // lane 0 holds the warp's first row
    atomic_add(p.pv_tiles + 2 * item.head_of_batch, skipped);
    atomic_add(p.pv_tiles + 2 * item.head_of_batch + 1, tiles);
  }
  write_rows(p, item, row, rows, o);
}
