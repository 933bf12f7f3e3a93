// The online softmax of one tile, shared by the attention kernels: masks, maxima, decision, P. fp32, in log2 units.
//
// A thread holds rows g and g + 8 of its warp's sixteen (g = lane / 4): acc[j][0], acc[j][1] are columns 8 j + 2 t and the next of row g, acc[j][2],
// acc[j][3] those of row g + 8 (t = lane % 4), which is how mma.sync and wgmma leave their sums.
// The kernel that includes this file says before: kDim, kPv, kMasked, kTileBlocks, kSumRounded (the row sum is that of the rounded P, taken by the
// kernel) and kPolynomial (every how many-th exponential goes to the FMA pipe; 0: none).
#pragma once
#include <prim.cuh>
#include <layout.cuh>

constexpr int kBlockTiles = kBlockK / 8;                            // accumulators of 8 columns per key block
constexpr int kKeyTiles = kBlockTiles * kTileBlocks;
constexpr int kGroupKeys = kPv == kPvHalf ? 16 : 32;                // keys of one P V instruction
constexpr int kGroups = kBlockK * kTileBlocks / kGroupKeys;
constexpr float kNone = kNothingPooled;                            // running maximum before the first tile
constexpr float kLog2Of255 = 7.99435344f;
constexpr float kOffset = kPv == kPvFp8 ? 8.0f : 0.0f;              // log2 of what FP8's P, sum and O are multiplied by

// What a thread knows of its two rows.
struct Rows {
  float top[2];    // running maximum, log2 units; tiles whose P V is skipped do not move it
  float sum[2];    // kSumRounded: the whole; else this thread's part
  bool real[2];    // false past S_q: such rows have no say in what is skipped
};

struct Tile {
  int first_key[kTileBlocks];  // of each key block
  int blocks;                  // 1 to kTileBlocks
};

// Whether some score of the tile must not count: no mask_scores otherwise. `first_row`: the lowest row that shares the answer.
DEVICE bool has_edge(const AttentionParams& p, const Tile& tile, int first_row) {
  bool edge = kMasked || tile.blocks < kTileBlocks;
  UNROLL for (int i = 0; i < kTileBlocks; i++) {
    int last_key = tile.first_key[i] + kBlockK - 1;
    edge |= last_key >= p.s_k || (p.causal && last_key > first_row + p.causal_offset);
  }
  return edge;
}

// Scores as fp32 in place of the integers, -inf where a key is masked, past the end, after the causal edge or in a missing block.
DEVICE void mask_scores(const AttentionParams& p, int (&acc)[kKeyTiles][4], const float (&factor)[kTileBlocks][2], const Tile& tile, const float* bias2,
                        int row) {
  UNROLL for (int j = 0; j < kKeyTiles; j++) {
    int block = j / kBlockTiles;
    bool missing = block >= tile.blocks;
    UNROLL for (int e = 0; e < 4; e++) {
      int key = tile.first_key[block] + (j % kBlockTiles) * 8 + (lane_id() & 3) * 2 + (e & 1);
      bool out = missing || key >= p.s_k || (p.causal && key > row + (e >> 1) * 8 + p.causal_offset);
      float score = to_float(acc[j][e]) * factor[block][e >> 1];
      if (kMasked && !out) score += bias2[key];
      acc[j][e] = (int)as_bits(out ? -infinity() : score);
    }
  }
}

// The rows' maxima in the tile. Returns whether this thread's rows want the tile: one of them comes nearer than `threshold` to its running maximum.
// kEdge: acc holds fp32 scores (mask_scores), else integers.
template <bool kEdge>
DEVICE bool tile_maxima(const int (&acc)[kKeyTiles][4], const float (&factor)[kTileBlocks][2], float threshold, const Rows& rows, float (&tile_top)[2]) {
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
    // Negated, so that a row with NaN needs the tile; one that sees nothing here (-inf) does not.
    needed |= rows.real[h] && !(tile_top[h] <= rows.top[h] - threshold);
  }
  return needed;
}

// 2 ** a for a <= 16 without the special-function pipe; 0 below 2 ** -126. Relative error 1.1e-4, which e4m3 does not see.
DEVICE float exp2_polynomial(float power) {
  float a = max_of(power, -126.0f);
  float shifted = a + 12582912.0f, rest = a - (shifted - 12582912.0f);
  float y = fused(fused(fused(0.0555054f, rest, 0.2402265f), rest, 0.6931472f), rest, 1.0f);
  return power < -126.0f ? 0.0f : as_float(as_bits(y) + (as_bits(shifted) << 23));
}

// P of a tile whose P V is not skipped, as the operand of the second product. O is multiplied by `decay`, then `gain` times the tile's P V is added.
template <bool kEdge>
DEVICE void softmax_weights(const int (&acc)[kKeyTiles][4], const float (&factor)[kTileBlocks][2], const float (&tile_top)[2], Rows& rows,
                            uint32_t (&weights)[kGroups][4], float (&decay)[2], float (&gain)[2]) {
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
        float power = kEdge ? as_float(acc[j][e]) + base[h] : fused(to_float(acc[j][e]), factor[j / kBlockTiles][h], base[h]);
        bool polynomial = kPolynomial > 0 && (i * 4 + e) % (kPolynomial > 0 ? kPolynomial : 1) == kPolynomial - 1;
        w[i][e] = polynomial ? exp2_polynomial(power) : exp2_of(power);
        if (!kSumRounded) sum[h] += w[i][e];
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
  if (!kSumRounded) {
    UNROLL for (int h = 0; h < 2; h++) rows.sum[h] = fused(rows.sum[h], decay[h], sum[h] * gain[h]);
  }
}
