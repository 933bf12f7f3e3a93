// What the kernels hand to each other and get from Python: constants, tensor layouts, and one parameter struct per kernel.
// kernels/cuda/params.py mirrors the structs; a test compares sizes and offsets.
//
// Letters: B batch, H query heads, H_kv key/value heads, S_q and S_k tokens, N_q and N_k blocks of 128 query and 64 key rows, D the caller's
// head_dim, E its padded form (64 or 128, compile-time kDim). A CTA is a device thread block; a "block" is a query block or a key block. Position p
// of plan order holds the caller's token perm[p] (p itself without a plan). All tensors that are not the caller's are contiguous and in plan order.
// Every offset is computed in 64 bits.
#pragma once

constexpr int kBlockQ = 128;
constexpr int kBlockK = 64;
constexpr int kPoolQ = 32;                   // query rows of one pool; a query block has four
constexpr int kPools = kBlockQ / kPoolQ;
constexpr int kCentreGroup = 16;             // one token of so many makes the centre of K: see sampled_token
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.69314718f;
constexpr float kVarianceCap = 8.0f;
constexpr float kNothingPooled = -1e30f;    // m0 of a compensation state that is empty; also the running maximum before the first tile

// Element types of the caller's tensors.
constexpr int kHalf = 0, kBfloat = 1, kFloat = 2;
// How P and V are held for the second product.
constexpr int kPvInt8 = 0, kPvFp8 = 1, kPvHalf = 2;

// In elements. The last dimension is contiguous.
struct Strides {
  int64_t batch, head, token;
};

// 8-bit V is stored per key block as [E][64 keys], the keys of every 16 permuted so that the accumulator of Q K^T is the operand of P V without a
// shuffle: position 4t + e of a group of 16 holds key 2t + (e & 1) + 8 (e >> 1).
DEVICE constexpr int key_at_position(int position) {
  return (position & ~15) | (2 * ((position & 15) >> 2)) | (position & 1) | (((position >> 1) & 1) << 3);
}

// The token of the caller's order that stands for the 16 from `first` on in the centre of K. Its place within the group changes with the square of the
// group's number: a fixed place would take the same columns of every video whose width shares a factor with 16, and one that moves with the number
// itself those of some other width. The factor was found to serve every width (kernels/centring.py, which says the same in PyTorch, tells how well).
// Token 0 is always one of them; that of the last group may lie past the end.
DEVICE constexpr int sampled_token(int first) {
  const uint32_t group = (uint32_t)first / kCentreGroup;
  return first + (int)(group * group * 1126333u >> 20 & (kCentreGroup - 1));
}

// In q8, k8 and v8 the 16-byte chunks of every row are swizzled, so that a plain copy of a block to shared memory is a tile in which eight chunks of
// neighbouring rows, which a matrix load reads together, lie in different banks. Chunk c of row r lies at chunk_of(bytes of a row, r, c) of that row,
// and what lies at c is found the same way. Two rows of 64 bytes share a line of all banks, and so their order.
DEVICE constexpr int chunk_of(int row_bytes, int row, int chunk) {
  return chunk ^ (row_bytes >= 128 ? row & 7 : (row >> 1) & 3);
}

// Partial sums over one split of the keys, in the caller's order. Grid: B * H_kv * splits, split fastest.
struct StatisticsParams {
  const void *k, *v;
  Strides k_stride, v_stride;
  const uint8_t* key_valid;  // (B, S_k) 0/1, or null. Caller's order
  const float* key_bias;     // (B, S_k) fp32, -inf where masked, relative to its largest value; or null. At most one of the two is given
  float* k_sum;              // (B, H_kv, splits, E) sum of the valid keys among the sampled tokens
  float* k_count;            // (B, H_kv, splits) how many those were
  uint32_t* v_absmax;        // (B, H_kv, splits, E) bits of the largest |v| over valid keys; integer maximum, so that NaN and infinity survive
  int32_t kv_heads, s_k, dim, splits;
  int32_t split_length;      // tokens, a multiple of 16
  int32_t batch;
};

// Grid: B * H * N_q query blocks, then B * H_kv * N_k key blocks.
struct PrepassParams {
  const void *q, *k, *v;
  Strides q_stride, k_stride, v_stride;
  const int64_t* perm;       // (S,) plan position -> the caller's token, and S_q = S_k; or null: they are the same
  const uint8_t* key_valid;  // as above
  const float* key_bias;     // as above
  const float* k_sum;        // as above
  const float* k_count;
  const uint32_t* v_absmax;
  int8_t* q8;                // (B, H, N_q * 128, E) swizzled; rows and channels past the end are zero
  float* q_scale;            // (B, H, N_q * 128) absmax / 127 * scale * log2(e): q8 k8 q_scale k_scale is the score in log2 units
  int8_t* k8;                // (B, H_kv, N_k * 64, E) swizzled, of K minus its centre; masked rows and what lies past the end are zero
  float* k_scale;            // (B, H_kv, N_k) absmax / 127
  void* v8;                  // swizzled. int8 and e4m3: (B, H_kv, N_k, E, 64) permuted as above; fp16: (B, H_kv, N_k * 64, E). Masked rows are zero
  float* v_scale;            // (B, H_kv, E): int8 absmax / 127; e4m3 absmax / 448; fp16 the power of two that brings absmax into (16384, 32768]
  float* bias2;              // (B, N_k * 64) key bias in log2 units, -inf where masked or past the end; null without a mask
  // Pools: fp16 pairs x = (high + low) * scale with a power of two per row, so that a product of three fp16 MMAs is as good as fp32.
  uint16_t* q_mean;          // (B, H, N_q * 4, 2, E) [high, low] means of 32 rows over the rows that exist; zero where none does
  uint16_t* q_square;        // (B, H, N_q * 4, 2, E) squares of those means
  float* q_pool_scale;       // (B, H, N_q * 4, 2) scale of q_mean, of q_square
  uint16_t* k_mean;          // (B, H_kv, N_k, 2, E) means weighted by exp(bias), K minus its centre
  uint16_t* k_variance;      // (B, H_kv, N_k, 2, E) mean square minus squared mean, at least 0
  float* k_pool_scale;       // (B, H_kv, N_k, 2)
  float* k_weight;           // (B, N_k) sum of exp(bias) over valid keys
  float* q_sim;              // (B, H, N_q) squared norm of the mean unit row; null when the judge is off
  float* k_sim;              // (B, H_kv, N_k); null when the judge is off
  float* v_mean;             // (B, H_kv, N_k, E) weighted means of v (unquantised); null unless compensating
  float* lse_shift;          // (B, H, S_q) natural log: scale * (q . centre); null unless an LSE is asked for
  float scale;               // softmax scale
  int32_t batch, heads, kv_heads, s_q, s_k, dim, splits;
  int32_t smooth_k;          // 0: the centre is zero
  int32_t pv;                // kPvInt8, kPvFp8 or kPvHalf
};

// One task is (batch, head, 16 query blocks). Grid: min(tasks, slots).
struct SelectParams {
  const uint16_t *q_mean, *q_square, *k_mean, *k_variance;
  const float *q_pool_scale, *k_pool_scale, *k_weight, *q_sim, *k_sim, *v_mean;
  const float* bias2;              // (B, N_k * 64) or null; only read where the causal edge cuts a block
  const uint8_t* forced_q;         // (N_q) 0/1 or null: these query blocks attend to everything visible
  const uint8_t* forced_k;         // (N_k) 0/1 or null: these key blocks are kept by every row
  const float *topk_heads, *cdf_heads, *sim_heads;  // (H,) or null: then the scalars below hold
  const uint8_t* block_map;        // (B|1, H|1, N_q, N_k) 0/1: keep exactly its visible part and score nothing; or null
  int64_t map_batch, map_head;     // strides of block_map; 0 where it is broadcast
  uint16_t* lists;                 // (B, H, N_q, capacity) kept key blocks, ascending
  int32_t* counts;                 // (B, H, N_q)
  int32_t* visible;                // (B, N_q) visible blocks of the row; written by head 0
  int32_t* pv_tiles;               // (B, H, 2) zeroed here for the attention kernel
  int32_t* counter;                // one number, zeroed here for the attention kernel; or null
  float* state;                    // (B, H, N_q, 4 + E): m0 (log2 units), l0, shift weight, unused, U; null unless compensating
  float* scratch;                  // (slots, 64, scratch_stride): the scores of the task at hand
  int64_t scratch_stride;          // at least N_k
  float scale, topk, cdf, sim;     // topk, cdf < 0: not used; sim <= 0: judge off
  int32_t batch, heads, kv_heads, s_q, s_k, capacity;
  int32_t subblock;                // 1: mean of the four pools' probabilities; 0: score of the block mean
  int32_t causal, causal_offset;
  int32_t row_in_shared;           // 1: shared memory holds one fp32 row of N_k per warp; 0: rows stay in scratch
  int32_t shift;                   // compensation: 0 leaves out the variance (causal)
};

// The order in which a head's query blocks are worked on: the longest list first, of equal ones the last. Grid: B * H.
struct SequenceParams {
  const int32_t* counts;           // (B, H, N_q)
  uint16_t* sequence;              // (B, H, N_q) query blocks
  int32_t s_q;
};

// Grid: B * H * N_q CTAs, heads slowest, the last query block of a head first. A persistent kernel has as many as the device holds at once, which
// fetch those query blocks from the counter, in the same order or in the sequence's.
struct AttentionParams {
  const int8_t *q8, *k8;           // as above
  const void* v8;
  const float *q_scale, *k_scale, *v_scale;
  const float* bias2;              // (B, N_k * 64); read by the masked variants only
  const uint16_t* lists;
  const int32_t* counts;
  const int64_t* perm;             // or null
  void* out;                       // (B, H, S_q, D) in the caller's order and type
  Strides out_stride;
  float* lse;                      // (B, H, S_q) natural log, caller's order; or null
  const float* lse_shift;          // (B, H, S_q) plan order; given with lse
  const float* top;                // (B,) largest key bias, added to lse; or null
  const float* pv_heads;           // (H,) or null
  int32_t* pv_tiles;               // (B, H, 2): tiles whose P V was skipped, all tiles; counted per warp of 16 rows, on Hopper per warpgroup of 64
  const float* state;              // compensation, as above; or null
  const float* row_shift;          // (B, H, S_q, D) fp32, caller's order: scale * C q per row, what the shift weight multiplies; null without a shift
  int32_t* counter;                // query blocks fetched so far, at first zero; persistent kernels only
  const uint16_t* sequence;        // (B, H, N_q) query blocks, the longest list first; null: N_q - 1, N_q - 2, ...; persistent kernels only
  float pvthreshd;                 // log2 units
  int32_t batch, heads, kv_heads, s_q, s_k, dim, capacity;
  int32_t causal, causal_offset;
  int32_t out_type;                // kHalf, kBfloat, kFloat
};
