// Pooled scores to lists of kept key blocks: the rules of kernels/selection.py.
//
// A CTA (256 threads) takes one task after another: (batch, head, 16 query blocks), that is 64 query pools against all key blocks.
// First the scores, on the tensor cores: warps 0..3 hold 16 pool means each, warps 4..7 the squares of the same, as fp16 pairs in registers;
// tiles of key pools (mean and variance, fp16 pairs) stream through two buffers in shared memory. high * high + high * low + low * high, summed in
// fp32, is as good as an fp32 product. The variance warps pass their term to the mean warps through shared memory, which write the scores
// to this CTA's 64 rows of global scratch and keep each pool's softmax statistics. Then one warp per query block, without the others:
// it ranks its row (in shared memory, over the tile buffers, or in scratch), finds the cut by bisection on the ordered integer form of fp32, and
// writes the list. Compensation, where asked for, repeats the product with other outputs and pools what was not kept.
// Everything but the products' operands is fp32. Minimum arch: sm_80.
//
// Shared memory in bytes: kFixed + max(2 * kStage, row_in_shared ? 8 * 4 * N_k : 0), with kStage = 16384 and kFixed = 5168 for kDim 128, 9648 for 64
// (config.select_shared).
#include <prim.cuh>
#include <layout.cuh>

namespace choice {

constexpr int kDim = SPARGE_DIM;
constexpr int kSteps = kDim / 16;           // of one matrix instruction's depth
constexpr int kColumns = 2048 / kDim;       // key blocks of a tile: what makes a tile 16 KB
constexpr int kAcross = kColumns / 8;       // matrix instructions beside each other in a tile
constexpr int kGroup = 16;                  // query blocks of a task
constexpr int kRows = kGroup * kPools;      // pools of a task
constexpr int kRowBytes = 2 * kDim * 2;     // one key pool: high, low
constexpr int kStage = 2 * kColumns * kRowBytes;
constexpr float kLowest = -1e30f;           // of a visible block: scores that are NaN or smaller
constexpr uint32_t kHidden = 0, kForced = 0xffffffffu;  // ranks outside those of any float but NaN

// What a CTA works on; in shared memory, for want of registers.
struct Task {
  int b, h;
  int first;          // query block
  int n_q, n_k;
  int end;            // key blocks that any row of the task may see
  int64_t q_row;      // first pool of the head; rows of q_mean and its like
  int64_t k_row;      // first key block of the kv head
  float* scratch;
};

struct Shared {
  Task task;
  float variance[4][4 * kAcross][32];  // 16 pools, register, lane: from the variance warp to the mean warp of the same pools
  float log_weight[2][kColumns];       // log2 of the block's weight / 64; -inf where every key is masked
  float scale[2][2][kColumns];         // buffer, kind
  float top[kRows], sum[kRows];        // softmax statistics of each pool over the visible blocks, log2 units
  int end[kGroup];                     // visible_end of each query block, 0 past the last
  float edge[kGroup];                  // log_weight of a query block's last visible key block, counting the keys that its last row may see
};
constexpr int kFixed = sizeof(Shared);
static_assert(kFixed % 16 == 0 && kFixed == (kDim == 128 ? 5168 : 9648), "as said above and in config.py");

// What is scored.
enum Form { kSubblock, kMean, kMoments };

DEVICE float total(float x) {
  UNROLL for (int mask = 16; mask > 0; mask >>= 1) x += shuffle_xor(x, mask);
  return x;
}
DEVICE int total(int x) {
  UNROLL for (int mask = 16; mask > 0; mask >>= 1) x += shuffle_xor(x, mask);
  return x;
}

DEVICE int rows_of(const SelectParams& p, int query_block) { return max_of(0, min_of(kBlockQ, p.s_q - query_block * kBlockQ)); }

// Keys that the last row of a query block may see, as far as the causal edge goes.
DEVICE int keys_before_edge(const SelectParams& p, int query_block) {
  if (!p.causal) return p.s_k;
  int64_t edge = (int64_t)query_block * kBlockQ + rows_of(p, query_block) + p.causal_offset;
  return edge < 0 ? 0 : (int)min_of(edge, (int64_t)p.s_k);
}
DEVICE int visible_end(const SelectParams& p, int query_block) { return (keys_before_edge(p, query_block) + kBlockK - 1) / kBlockK; }

// The causal edge hides keys of the block from some rows of the query block.
DEVICE bool cut_by_edge(const SelectParams& p, int query_block, int key_block) {
  int last_key = min_of(key_block * kBlockK + kBlockK, p.s_k) - 1;
  return p.causal && last_key > (int64_t)query_block * kBlockQ + p.causal_offset;
}

// Any key of one of `parts` equal parts of a key block is valid. The block's weight alone cannot tell: exp(bias) may have underflowed.
DEVICE bool any_key(const SelectParams& p, int64_t block, int part, int parts) {
  if (p.k_weight[block] > 0.0f) return true;
  if (p.bias2 == nullptr) return false;
  bool any = false;
  for (int i = part; i < kBlockK / 4; i += parts) {
    Bytes16 bias = *(const Bytes16*)(p.bias2 + block * kBlockK + i * 4);
    UNROLL for (int e = 0; e < 4; ++e) any |= as_float(bias.word[e]) > -infinity();
  }
  return any;
}

// log2 of the weight of the keys of the query block's last visible key block that its last row may see, over 64. By a whole warp.
DEVICE float edge_weight(const SelectParams& p, const Task& t, int query_block, int lane) {
  int edge = keys_before_edge(p, query_block);
  int start = (edge - 1) / kBlockK * kBlockK;
  float weight = 0.0f;
  for (int key = start + lane; key < edge; key += 32)
    weight += p.bias2 == nullptr ? 1.0f : exp2_of(p.bias2[(int64_t)t.b * t.n_k * kBlockK + key]);
  return log2_of(total(weight) * (1.0f / kBlockK));
}

// ---- scores ------------------------------------------------------------------------------------------------------------------------------------

// Starts the copies of a tile. Pools past the end are those of the last key block: what they give is thrown away.
DEVICE void copy_tile(const SelectParams& p, const Task& t, uint32_t stage, int tile, int kinds) {
  constexpr int kChunks = kRowBytes / 16, kAtOnce = 256 / kChunks;  // of 16 bytes a pool; pools that 256 threads copy at once
  static_assert(2 * kAtOnce == kColumns && kAtOnce % 8 == 0, "each thread copies twice per kind, to rows of one swizzle");
  int chunk = thread_id() % kChunks, key = thread_id() / kChunks;
  // The eight rows that load_matrix reads at once lie in different banks.
  uint32_t to = stage + key * kRowBytes + ((chunk ^ (key & 7)) * 16);
  UNROLL for (int half = 0; half < 2; ++half) {
    int64_t from = (t.k_row + min_of(tile * kColumns + half * kAtOnce + key, t.n_k - 1)) * 2 * kDim + chunk * 8;
    copy_async_16(to + half * kAtOnce * kRowBytes, p.k_mean + from);
    if (kinds == 2) copy_async_16(to + (kColumns + half * kAtOnce) * kRowBytes, p.k_variance + from);
  }
}

// Weight and scales of the tile's key pools, by the variance warps.
DEVICE void describe_tile(const SelectParams& p, const Task& t, Shared& shared, int tile) {
  constexpr int kParts = 128 / kColumns;
  int column = (thread_id() - 128) / kParts, part = thread_id() % kParts;
  int key_block = tile * kColumns + column, known = min_of(key_block, t.n_k - 1);
  int64_t block = (int64_t)t.b * t.n_k + known;
  int visible = key_block < t.n_k && any_key(p, block, part, kParts);
  UNROLL for (int mask = 1; mask < kParts; mask *= 2) visible |= shuffle_xor(visible, mask);
  if (part == 0) shared.log_weight[tile & 1][column] = visible ? max_of(log2_of(p.k_weight[block] * (1.0f / kBlockK)), kLowest) : -infinity();
  if (part < 2) shared.scale[tile & 1][part][column] = p.k_pool_scale[(t.k_row + known) * 2 + part];
}

// The scores of the task, log2 units, into scratch; -inf where nothing is visible.
//   kSubblock: row r of scratch is pool r. kMean: row 4i is query block i, from the mean of its rows.
//   kMoments: row 4i holds the score of query block i from the mean of its rows without the keys' weight, row 4i + 1 half its variance (natural
//   units, not capped). Only where visible_end reaches.
template <Form kForm>
DEVICE void score(const SelectParams& p, const Task& t, Shared& shared, char* buffers) {
  int warp = warp_id(), lane = lane_id(), column_pair = 2 * (lane & 3), row = 16 * (warp & 3) + (lane >> 2);
  int kind = warp >> 2;
  int kinds = kForm == kSubblock || (kForm == kMoments && p.shift) ? 2 : 1;
  int tiles = (t.end + kColumns - 1) / kColumns;
  uint32_t base = shared_address(buffers);

  const uint16_t* pools = kind && kinds == 2 ? p.q_square : p.q_mean;
  uint32_t a[2][kSteps][4];
  float factor[2], share[2];
  UNROLL for (int half = 0; half < 2; ++half) {
    int pool = t.first * kPools + row + 8 * half;
    int64_t place = t.q_row + min_of(pool, t.n_q * kPools - 1);  // pools past the end: thrown away
    const uint16_t* from = pools + place * 2 * kDim + column_pair;
    UNROLL for (int level = 0; level < 2; ++level)
      UNROLL for (int step = 0; step < kSteps; ++step)
        UNROLL for (int right = 0; right < 2; ++right)
          a[level][step][2 * right + half] = *(const uint32_t*)(from + level * kDim + step * 16 + right * 8);
    factor[half] = p.q_pool_scale[place * 2 + kind] * (kind ? 0.5f * p.scale * p.scale : p.scale * kLog2E);
    share[half] = (float)max_of(0, min_of(kPoolQ, p.s_q - pool * kPoolQ)) / (float)max_of(1, rows_of(p, pool / kPools));
  }
  float top[2] = {kLowest, kLowest}, sum[2] = {0.0f, 0.0f};

  copy_tile(p, t, base, 0, kinds);
  copy_async_commit();
  if (kind == 1) describe_tile(p, t, shared, 0);
  for (int tile = 0; tile < tiles; ++tile) {
    int buffer = tile & 1;
    if (tile + 1 < tiles) copy_tile(p, t, base + (buffer ^ 1) * kStage, tile + 1, kinds);
    copy_async_commit();
    copy_async_wait<1>();
    sync_cta();

    float dot[kAcross][4] = {}, rest[kAcross][4] = {};  // apart, so that the small products are not rounded at the size of the large ones
    if (kind < kinds) {
      int key = (lane & 7) + (lane >> 4) * 8, right = (lane >> 3) & 1;
      uint32_t from = base + buffer * kStage + (kind * kColumns + key) * kRowBytes;
      UNROLL for (int step = 0; step < kSteps; ++step)
        UNROLL for (int n = 0; n < kAcross; n += 2) {
          uint32_t high[4], low[4];
          int chunk = 2 * step + right;
          load_matrix(high, from + n * 8 * kRowBytes + ((chunk ^ (lane & 7)) * 16));
          load_matrix(low, from + n * 8 * kRowBytes + (((kDim / 8 + chunk) ^ (lane & 7)) * 16));
          UNROLL for (int i = 0; i < 2; ++i) {
            mma_half(dot[n + i], a[0][step], high[2 * i], high[2 * i + 1]);
            mma_half(rest[n + i], a[0][step], low[2 * i], low[2 * i + 1]);
            mma_half(rest[n + i], a[1][step], high[2 * i], high[2 * i + 1]);
          }
        }
    }
    UNROLL for (int n = 0; n < kAcross; ++n)
      UNROLL for (int e = 0; e < 4; ++e) {
        float x = (dot[n][e] + rest[n][e]) * factor[e >> 1] * shared.scale[buffer][kind][n * 8 + column_pair + (e & 1)];
        if (kForm != kSubblock) {  // the mean over the rows of the query block
          x *= share[e >> 1];
          x += shuffle_xor(x, 4);
          x += shuffle_xor(x, 8);
        } else if (kind == 1) {
          shared.variance[warp & 3][n * 4 + e][lane] = min_of(x, kVarianceCap) * kLog2E;
        }
        dot[n][e] = x;
      }
    if (kind == 1 && tile + 1 < tiles) describe_tile(p, t, shared, tile + 1);
    sync_cta();
    if (kForm == kMoments ? kind >= kinds : kind == 1) continue;

    UNROLL for (int half = 0; half < 2; ++half) {
      int local = row + 8 * half, block = local / kPools, end = shared.end[block];
      bool writes = kForm == kSubblock || local % kPools == 0;
      float* to = t.scratch + (local + (kForm == kMoments ? kind : 0)) * p.scratch_stride;
      float best = top[half];
      UNROLL for (int n = 0; n < kAcross; ++n)
        UNROLL for (int e = 0; e < 2; ++e) {
          int column = n * 8 + column_pair + e, key_block = tile * kColumns + column;
          float& x = dot[n][2 * half + e];
          if (kForm != kMoments) {
            if (kForm == kSubblock) x += shared.variance[warp & 3][n * 4 + 2 * half + e][lane];
            float weight = shared.log_weight[buffer][column];
            bool visible = weight > -infinity() && key_block < end;
            if (p.causal && key_block == end - 1) weight = shared.edge[block];
            x = visible ? min_of(max_of(x + weight, kLowest), -kLowest) : -infinity();
            best = max_of(best, x);
          }
          if (writes && key_block < end) to[key_block] = x;
        }
      if (kForm != kMoments) {
        sum[half] *= exp2_of(top[half] - best);
        UNROLL for (int n = 0; n < kAcross; ++n)
          UNROLL for (int e = 0; e < 2; ++e) sum[half] += exp2_of(dot[n][2 * half + e] - best);
        top[half] = best;
      }
    }
  }
  copy_async_wait<0>();
  if (kForm != kMoments && kind == 0)
    UNROLL for (int half = 0; half < 2; ++half) {
      float best = max_of(top[half], shuffle_xor(top[half], 1));
      best = max_of(best, shuffle_xor(best, 2));
      float z = sum[half] * exp2_of(top[half] - best);
      z += shuffle_xor(z, 1);
      z += shuffle_xor(z, 2);
      if ((lane & 3) == 0) shared.top[row + 8 * half] = best, shared.sum[row + 8 * half] = z;
    }
  sync_cta();
}

// ---- the choice, by one warp -------------------------------------------------------------------------------------------------------------------

// Integers in the order of the floats.
DEVICE uint32_t rank_of(float x) {
  uint32_t bits = as_bits(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
DEVICE float value_of(uint32_t rank) { return as_float(rank & 0x80000000u ? rank ^ 0x80000000u : ~rank); }

// The ranks of one query block. Every lane reads and writes only its own elements lane, lane + 32, ...
struct Row {
  float* rank;
  int end;
  bool score;         // values are scores (log2 units), not probabilities
  float top, inverse; // of the softmax, for scores
};

DEVICE float mass_of(const Row& row, float value) { return row.score ? exp2_of(value - row.top) * row.inverse : value; }

// A number of best free blocks: those of rank > `above`, and the first `ties` of rank == above.
struct Cut {
  uint32_t above;
  int ties;
};

// The smallest number of best free blocks that is at least `wanted`, or, by mass, whose mass is at least `wanted`; there must be one. `low` and `high`
// bracket the ranks: low <= all < high.
template <bool kByMass>
DEVICE Cut find_cut(const Row& row, uint32_t low, uint32_t high, int n_free, float wanted) {
  int count_low = n_free, count_high = 0;  // blocks of rank >= low, >= high
  float mass_high = 0.0f;
  while (high - low > 1 && count_low - count_high > 1 && (kByMass || (float)count_low != wanted)) {
    uint32_t middle = low + (high - low) / 2;
    int count = 0;
    float mass = 0.0f;
    for (int j = lane_id(); j < row.end; j += 32) {
      uint32_t rank = as_bits(row.rank[j]);
      bool within = rank >= middle && rank != kForced;
      count += within;
      if (kByMass && within) mass += mass_of(row, value_of(rank));
    }
    count = total(count);
    if (kByMass) mass = total(mass);
    if (kByMass ? mass >= wanted : (float)count >= wanted) {
      low = middle, count_low = count;
    } else {
      high = middle, count_high = count, mass_high = mass;
    }
  }
  int tied = count_low - count_high;
  float needed = kByMass ? -floor_of(-divide(wanted - mass_high, mass_of(row, value_of(low)))) : wanted - (float)count_high;
  // All of them, or the ranks from low to high are one and the same.
  if (tied == 1 || !(needed < (float)tied)) return {low - 1, 0};
  return {low, max_of(1, (int)needed)};
}

// Writes the list of one query block, and its marks in the third of its scratch rows where compensating.
DEVICE void choose(const SelectParams& p, const Task& t, const Shared& shared, float* shared_row, int local) {
  int lane = lane_id(), query_block = t.first + local, end = shared.end[local];
  float* scores = t.scratch + local * kPools * p.scratch_stride;
  int64_t head = (int64_t)t.b * p.heads + t.h, place = head * t.n_q + query_block;
  Row row{p.row_in_shared ? shared_row : scores, end, !p.subblock, 0.0f, 0.0f};
  int n_visible = 0;
  Cut cut{0, 0};  // everything

  if (p.block_map != nullptr) {
    const uint8_t* map = p.block_map + t.b * p.map_batch + t.h * p.map_head + (int64_t)query_block * t.n_k;
    for (int j = lane; j < end; j += 32) {
      bool visible = any_key(p, (int64_t)t.b * t.n_k + j, 0, 1);
      n_visible += visible;
      row.rank[j] = as_float(!visible ? kHidden : map[j] ? kForced : 1u);
    }
    n_visible = total(n_visible);
    cut.above = 1;
  } else {
    int used = p.subblock ? (rows_of(p, query_block) + kPoolQ - 1) / kPoolQ : 1;
    float top[kPools], inverse[kPools];
    UNROLL for (int u = 0; u < kPools; ++u) {
      top[u] = shared.top[local * kPools + u];
      // A pool whose scores are all unusable predicts nothing.
      inverse[u] = u < used && top[u] > kLowest ? 1.0f / (shared.sum[local * kPools + u] * (float)used) : 0.0f;
    }
    row.top = top[0], row.inverse = inverse[0];
    float sim = p.sim_heads != nullptr ? p.sim_heads[t.h] : p.sim;
    bool judged = sim > 0.0f && p.q_sim != nullptr;
    bool all = (p.forced_q != nullptr && p.forced_q[query_block]) || (judged && p.q_sim[place] < sim);
    int n_forced = 0;
    float forced_mass = 0.0f, free_mass = 0.0f;
    uint32_t lowest = kForced, highest = kHidden;
    for (int j = lane; j < end; j += 32) {
      float value = scores[j];
      uint32_t rank = kHidden;
      if (value > -infinity()) {
        if (p.subblock) {
          value = exp2_of(value - top[0]) * inverse[0];
          UNROLL for (int u = 1; u < kPools; ++u)
            if (u < used) value += exp2_of(scores[u * p.scratch_stride + j] - top[u]) * inverse[u];
        }
        float mass = mass_of(row, value);
        ++n_visible;
        if (all || (p.forced_k != nullptr && p.forced_k[j]) || cut_by_edge(p, query_block, j) || (judged && p.k_sim[t.k_row + j] < sim)) {
          rank = kForced;
          forced_mass += mass;
          ++n_forced;
        } else {
          rank = rank_of(value);
          free_mass += mass;
          lowest = rank < lowest ? rank : lowest;
          highest = max_of(highest, rank);
        }
      }
      row.rank[j] = as_float(rank);
    }
    n_visible = total(n_visible), n_forced = total(n_forced);
    forced_mass = total(forced_mass), free_mass = total(free_mass);
    UNROLL for (int mask = 16; mask > 0; mask >>= 1) {
      uint32_t other = shuffle_xor(lowest, mask);
      lowest = other < lowest ? other : lowest;
      highest = max_of(highest, shuffle_xor(highest, mask));
    }
    int n_free = n_visible - n_forced;
    float topk = p.topk_heads != nullptr ? p.topk_heads[t.h] : p.topk, cdf = p.cdf_heads != nullptr ? p.cdf_heads[t.h] : p.cdf;
    if (n_free > 0 && cdf < 1.0f) {  // at 1 every visible block stays
      cut = {kForced, 0};
      if (topk >= 0.0f) {
        // The product is rounded before one half is added, as in the PyTorch form: with + 0 it is not contracted with what follows.
        float count = max_of(1.0f, floor_of(fused(topk, (float)n_free, 0.0f) + 0.5f));
        cut = find_cut<false>(row, lowest, highest + 1, n_free, min_of(count, (float)n_free));
      }
      float wanted = cdf - forced_mass;
      if (cdf >= 0.0f && wanted > 0.0f) {
        Cut other{0, 0};
        if (free_mass >= wanted) other = find_cut<true>(row, lowest, highest + 1, n_free, wanted);
        // Both are the best of one order: the union is the larger.
        if (other.above < cut.above || (other.above == cut.above && other.ties > cut.ties)) cut = other;
      }
    }
  }

  uint16_t* list = p.lists + place * p.capacity;
  float* marks = scores + 2 * p.scratch_stride;
  uint32_t before = (1u << lane) - 1;
  int count = 0, ties = 0;
  for (int start = 0; start < end; start += 32) {
    int j = start + lane;
    uint32_t rank = j < end ? as_bits(row.rank[j]) : kHidden;
    bool tie = rank == cut.above && rank != kForced && rank != kHidden;
    uint32_t tied = vote(tie);
    bool kept = rank > cut.above || rank == kForced || (tie && ties + count_bits(tied & before) < cut.ties);
    uint32_t all_kept = vote(kept);
    int position = count + count_bits(all_kept & before);
    kept = kept && position < p.capacity;
    if (kept) list[position] = (uint16_t)j;
    if (p.state != nullptr && j < end) marks[j] = rank != kHidden && !kept && !cut_by_edge(p, query_block, j) ? 1.0f : 0.0f;
    count += count_bits(all_kept);
    ties += count_bits(tied);
  }
  if (lane == 0) {
    p.counts[place] = min_of(count, p.capacity);
    if (t.h == 0) p.visible[(int64_t)t.b * t.n_q + query_block] = n_visible;
  }
}

// ---- compensation ------------------------------------------------------------------------------------------------------------------------------

// The weights of the blocks that one query block pools, into the fourth of its scratch rows, and the head of its state. By one warp, after
// score<kMoments>.
DEVICE void pooled_weights(const SelectParams& p, const Task& t, const Shared& shared, int local) {
  int lane = lane_id(), query_block = t.first + local, end = shared.end[local];
  const float* scores = t.scratch + local * kPools * p.scratch_stride;
  const float *half_variance = scores + p.scratch_stride, *marks = scores + 2 * p.scratch_stride;
  float* weights = t.scratch + (local * kPools + 3) * p.scratch_stride;
  float top = kNothingPooled;
  for (int j = lane; j < end; j += 32) {
    float exponent = -infinity();
    if (marks[j] != 0.0f) {
      float variance = p.shift ? min_of(half_variance[j], kVarianceCap) : 0.0f;
      exponent = scores[j] + variance * kLog2E + log2_of(p.k_weight[(int64_t)t.b * t.n_k + j]);
      top = max_of(top, exponent);
    }
    weights[j] = exponent;
  }
  UNROLL for (int mask = 16; mask > 0; mask >>= 1) top = max_of(top, shuffle_xor(top, mask));
  float sum = 0.0f, shift_sum = 0.0f;
  for (int j = lane; j < t.end; j += 32) {
    float weight = 0.0f;
    if (j < end && marks[j] != 0.0f) {
      weight = exp2_of(weights[j] - top);
      sum += weight;
      shift_sum += p.shift ? weight * root(divide(kVarianceCap, max_of(half_variance[j], kVarianceCap))) : weight;
    }
    weights[j] = weight;
  }
  sum = total(sum), shift_sum = total(shift_sum);
  float* state = p.state + (((int64_t)t.b * p.heads + t.h) * t.n_q + query_block) * (4 + kDim);
  if (lane == 0) state[0] = top, state[1] = sum, state[2] = shift_sum, state[3] = 0.0f;
}

// The weighted sums of the value means: a thread has one channel of kGroup * kDim / 256 query blocks.
DEVICE void pool_values(const SelectParams& p, const Task& t) {
  constexpr int kParts = 256 / kDim, kEach = kGroup / kParts;
  int channel = thread_id() % kDim, first = thread_id() / kDim * kEach, blocks = min_of(kGroup, t.n_q - t.first);
  float sums[kEach] = {};
  for (int j = 0; j < t.end; ++j) {
    float value = p.v_mean[(t.k_row + j) * kDim + channel];
    UNROLL for (int i = 0; i < kEach; ++i) {
      float weight = first + i < blocks ? t.scratch[((first + i) * kPools + 3) * p.scratch_stride + j] : 0.0f;
      if (weight != 0.0f) sums[i] = fused(weight, value, sums[i]);  // what is not pooled may hold NaN
    }
  }
  UNROLL for (int i = 0; i < kEach; ++i)
    if (first + i < blocks)
      p.state[(((int64_t)t.b * p.heads + t.h) * t.n_q + t.first + first + i) * (4 + kDim) + 4 + channel] = sums[i];
}

}  // namespace choice

KERNEL(sparge_select, 256, SelectParams) {
  using namespace choice;
  char* memory = shared_memory();
  Shared& shared = *(Shared*)memory;
  char* buffers = memory + kFixed;
  int warp = warp_id(), lane = lane_id();
  Task& t = shared.task;
  int n_q = (p.s_q + kBlockQ - 1) / kBlockQ, groups = (n_q + kGroup - 1) / kGroup;
  int64_t tasks = (int64_t)p.batch * p.heads * groups;
  for (int64_t task = cta_id(); task < tasks; task += grid_size()) {
    if (thread_id() == 0) {
      int64_t head = task / groups;
      t.b = (int)(head / p.heads), t.h = (int)(head % p.heads), t.first = (int)(task % groups) * kGroup;
      t.n_q = n_q, t.n_k = (p.s_k + kBlockK - 1) / kBlockK;
      t.q_row = head * n_q * kPools, t.k_row = ((int64_t)t.b * p.kv_heads + t.h / (p.heads / p.kv_heads)) * t.n_k;
      t.end = visible_end(p, min_of(t.first + kGroup, n_q) - 1);
      t.scratch = p.scratch + cta_id() * kRows * p.scratch_stride;
      if (t.first == 0) p.pv_tiles[head * 2] = p.pv_tiles[head * 2 + 1] = 0;
      if (task == 0 && p.counter != nullptr) *p.counter = 0;
    }
    if (thread_id() < kGroup) {
      int block = (int)(task % groups) * kGroup + thread_id();
      shared.end[thread_id()] = block < n_q ? visible_end(p, block) : 0;
    }
    sync_cta();
    int blocks = min_of(kGroup, n_q - t.first);
    if (p.block_map == nullptr) {
      if (p.causal)
        for (int i = warp; i < blocks; i += 8) {
          float weight = shared.end[i] > 0 ? edge_weight(p, t, t.first + i, lane) : 0.0f;
          if (lane == 0) shared.edge[i] = weight;
        }
      if (p.subblock)
        score<kSubblock>(p, t, shared, buffers);
      else
        score<kMean>(p, t, shared, buffers);
    }
    float* row = (float*)buffers + (p.row_in_shared ? (int64_t)warp * t.n_k : 0);
    for (int i = warp; i < blocks; i += 8) choose(p, t, shared, row, i);
    if (p.state != nullptr) {
      sync_cta();
      score<kMoments>(p, t, shared, buffers);
      for (int i = warp; i < blocks; i += 8) pooled_weights(p, t, shared, i);
      sync_cta();
      pool_values(p, t);
    }
    sync_cta();  // shared memory and scratch are free for the next task
  }
}

// One CTA per head: each thread finds the ranks of some query blocks by looking at all others, which no sort beats at a few hundred.
KERNEL(sparge_sequence, 256, SequenceParams) {
  int n_q = (p.s_q + kBlockQ - 1) / kBlockQ;
  const int32_t* counts = p.counts + cta_id() * n_q;
  for (int i = thread_id(); i < n_q; i += 256) {
    int count = counts[i], rank = 0;
    for (int j = 0; j < n_q; ++j) rank += counts[j] >= count + (j <= i);
    p.sequence[cta_id() * n_q + rank] = (uint16_t)i;
  }
}
