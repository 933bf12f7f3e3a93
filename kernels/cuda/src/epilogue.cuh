// What the attention kernels do with a query block's list before the first tile and with its sums after the last one.
#pragma once
#include <softmax.cuh>

// One query block of one head.
struct Item {
  int64_t head_of_batch, batch, head, kv, block_q;
  int64_t list;  // its row of lists, counts and state
};

DEVICE Item item_at(const AttentionParams& p, int64_t head_of_batch, int64_t block_q) {
  Item item;
  item.head_of_batch = head_of_batch;
  item.batch = head_of_batch / p.heads;
  item.head = head_of_batch % p.heads;
  item.kv = item.batch * p.kv_heads + item.head / (p.heads / p.kv_heads);
  item.block_q = block_q;
  item.list = head_of_batch * ((p.s_q + kBlockQ - 1) / kBlockQ) + block_q;
  return item;
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

// Writes the thread's two rows (`row` and row + 8, plan order) to where the caller has them, with the pooled state of the blocks that were not kept
// (compensation) and the log-sum-exp. All lanes of a warp come here together.
DEVICE void write_rows(const AttentionParams& p, const Item& item, int64_t row, const Rows& rows, const float (&o)[kDim / 8][4]) {
  const int lane = lane_id();
  const float* state = p.state ? p.state + item.list * (4 + kDim) : nullptr;
  const float* v_scale = p.v_scale + item.kv * kDim;
  const int width = p.out_type == kFloat ? 4 : 2;
  const bool wide = ((int64_t)p.out % 8 | p.out_stride.batch * width % 8 | p.out_stride.head * width % 8 | p.out_stride.token * width % 8 | p.dim % 4) == 0;
  UNROLL for (int h = 0; h < 2; h++) {
    int64_t here = row + h * 8;
    int64_t token = p.perm && rows.real[h] ? p.perm[here] : here;
    float sum = rows.sum[h], pooled = 0.0f, top = rows.top[h];
    if (!kSumRounded) {
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
      float shift = p.lse_shift[item.head_of_batch * p.s_q + here] + (p.top ? p.top[item.batch] : 0.0f);
      p.lse[item.head_of_batch * p.s_q + token] = sum == 0.0f ? -infinity() : (top + log2_of(sum)) * kLn2 + shift;
    }
    float inverse = sum == 0.0f ? 0.0f : divide(1.0f, sum);
    int64_t at = item.batch * p.out_stride.batch + item.head * p.out_stride.head + token * p.out_stride.token;
    const float* shift = state && p.row_shift && rows.real[h] ? p.row_shift + (item.head_of_batch * p.s_q + token) * p.dim : nullptr;
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
          float value_of_pooled = state[4 + column + i] + (shift && column + i < p.dim ? state[2] * shift[column + i] : 0.0f);
          value[i] = fused(value_of_pooled, pooled, value[i]);
        }
        value[i] *= inverse;
      }
      if (rows.real[h]) store_four(p, at, column, wide, value);
    }
  }
}
