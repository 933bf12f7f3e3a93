// Block-sparse flash attention for Hopper (sm_90a): INT8 Q K^T and FP8 P V by warpgroup products, key blocks brought by bulk copies.
//
// Persistent, one CTA of 384 threads per multiprocessor. Warpgroup 0 gives its registers away; its first warp, the producer, fetches items (a query
// block of 128 rows of one head) from a counter in global memory and has their Q, and the K and V of their list, copied into a ring of kStages tiles.
// Warpgroups 1 and 2, the consumers, compute 64 rows each. Items are taken head by head, so that the K and V of the heads in work stay in the L2
// cache; inside a head the longest list first.
//
// A tile is kTileBlocks kept key blocks that follow each other in the list; missing ones at the end are masked. Q K^T of a tile has both operands in
// shared memory, P V takes P from registers and V as [channel][key]; kOnes puts eight more channels of ones under V, so that P V also yields the row
// sum of the rounded P. Every tile has fresh P V accumulators, added to O in fp32: FP8 accumulators keep 13 bits or so, too few for long sums.
//   Turns (kOverlap 0): a warpgroup issues P V of a tile and Q K^T of the next one together while the other one does its softmax; two hardware
//   barriers hand the turn over.
//   Overlap (kOverlap 1): no turns; a warpgroup does its next softmax while its own P V is under way.
//   kParts 2: P V in two halves of the channels, one after the other, for half the registers.
// Whether a tile's P V is skipped is decided by a warpgroup, not by a warp; what that means, and the rest, is as in attention_mma.cuh.
#pragma once
#include <prim_sm90.cuh>
#include <layout.cuh>

constexpr int kDim = SPARGE_DIM;
constexpr int kPv = kPvFp8;
constexpr bool kMasked = SPARGE_MASKED;
constexpr int kTileBlocks = SPARGE_TILE_BLOCKS;
constexpr bool kOnes = SPARGE_ONES;
constexpr bool kSumRounded = kOnes;
constexpr int kPolynomial = SPARGE_POLY;
#include <epilogue.cuh>

constexpr bool kOverlap = SPARGE_OVERLAP;
constexpr int kParts = SPARGE_SPLIT ? 2 : 1;
constexpr int kStages = SPARGE_STAGES;
constexpr int kThreads = 384;
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
constexpr int kTileKeys = kTileBlocks * kBlockK;
constexpr int kRowsV = kDim + (kOnes ? 8 : 0);
constexpr int kPartTiles = kDim / 8 / kParts;                       // accumulators of 8 channels per part of P V
constexpr int kLastTiles = kPartTiles + (kOnes ? 1 : 0);            // the last part also has the ones
constexpr int kBytesQ = kBlockQ * kDim;
constexpr int kBytesK = kBlockK * kDim;
constexpr int kBytesV = kBlockK * kDim;                             // in global memory; in shared memory kRowsV rows
constexpr int kPlaceV = kBlockK * kRowsV;
constexpr int kSlots = 2;                                           // items whose Q is there or on its way
constexpr int kChunk = 32 / kTileBlocks * kTileBlocks;              // list entries that the producer's lanes hold

// Shared memory, from an address aligned to 1024 on: swizzles are relative to eight rows.
constexpr int kPlaceOfK = kSlots * kBytesQ;
constexpr int kPlaceOfV = kPlaceOfK + kStages * kTileBlocks * kBytesK;
constexpr int kPlaceOfMetadata = kPlaceOfV + kStages * kTileBlocks * kPlaceV;

// What the producer tells the consumers of a tile.
struct TileMetadata {
  int32_t id[kTileBlocks];
  float scale[kTileBlocks];  // of K
};
// What it tells them of an item.
struct ItemMetadata {
  Item item;
  int32_t count;      // key blocks of its list; -1: there are no more items
  float threshold;
  alignas(16) float q_scale[kBlockQ];
};
struct alignas(16) Control {
  ItemMetadata item[kSlots];
  uint64_t full[kStages], empty[kStages];  // barriers: the tile is there; all warps are done with it
  uint64_t q_full[kSlots], q_empty[kSlots];
  TileMetadata metadata[kStages];
};
static_assert(sizeof(Control) <= 2048, "kernels/config.py reserves 2048 bytes");
// Hardware barriers.
constexpr int kTurn = 1, kVote = 3;

// Tile n lies in stage n % kStages, and is the stage's use number n / kStages. A barrier completes one phase per use, and a wait names the phase by
// its parity: even and odd uses. Items and slots the same.
DEVICE int stage_of(int tile) { return tile % kStages; }
DEVICE int parity_of(int tile) { return (uint32_t)tile / kStages & 1; }
DEVICE int slot_of(int item) { return (uint32_t)item % kSlots; }
DEVICE int slot_parity_of(int item) { return (uint32_t)item / kSlots & 1; }

// Shared addresses.
DEVICE uint32_t address_of_q(int slot) { return shared_address(shared_memory()) + slot * kBytesQ; }
DEVICE uint32_t address_of_k(int stage) { return shared_address(shared_memory()) + kPlaceOfK + stage * kTileBlocks * kBytesK; }
DEVICE uint32_t address_of_v(int stage) { return shared_address(shared_memory()) + kPlaceOfV + stage * kTileBlocks * kPlaceV; }
DEVICE Control& control() { return *(Control*)(shared_memory() + kPlaceOfMetadata); }
DEVICE uint32_t full(int stage) { return shared_address(&control().full[stage]); }
DEVICE uint32_t empty(int stage) { return shared_address(&control().empty[stage]); }
DEVICE uint32_t q_full(int slot) { return shared_address(&control().q_full[slot]); }
DEVICE uint32_t q_empty(int slot) { return shared_address(&control().q_empty[slot]); }

DEVICE Item item_of_rank(const AttentionParams& p, int index, int blocks_q) {
  int head_of_batch = index / blocks_q, rank = index % blocks_q;
  return item_at(p, head_of_batch, p.sequence ? p.sequence[index] : blocks_q - 1 - rank);
}

// The producer: one warp.
DEVICE void produce(const AttentionParams& p, int blocks_q) {
  const int64_t blocks_k = (p.s_k + kBlockK - 1) / kBlockK;
  const int items = p.batch * p.heads * blocks_q;
  const int lane = lane_id();
  int tile = 0, taken = 0;  // tiles copied and items taken so far
  while (true) {
    int index = shuffle(lane == 0 ? atomic_add(p.counter, 1) : 0, 0);
    const bool over = index >= items;
    barrier_wait(q_empty(slot_of(taken)), slot_parity_of(taken) ^ 1);
    // All lanes must have seen the slot empty before lane 0 fills it again: a lane that is still waiting when the consumers have emptied it once more
    // finds the parity that it waits for gone by, and waits for ever.
    sync_warp();
    if (over) {
      if (lane == 0) {
        control().item[slot_of(taken)].count = -1;
        barrier_arrive(q_full(slot_of(taken)));
      }
      return;
    }
    const Item item = item_of_rank(p, index, blocks_q);
    const int count = p.counts[item.list];
    if (lane == 0) {
      const uint32_t barrier = q_full(slot_of(taken));
      ItemMetadata& metadata = control().item[slot_of(taken)];
      metadata.item = item;
      metadata.count = count;
      metadata.threshold = p.pv_heads ? p.pv_heads[item.head] : p.pvthreshd;
      barrier_arrive_expect(barrier, kBytesQ + sizeof metadata.q_scale);
      bulk_copy(address_of_q(slot_of(taken)), p.q8 + item.list * kBytesQ, kBytesQ, barrier);
      bulk_copy(shared_address(metadata.q_scale), p.q_scale + item.list * kBlockQ, sizeof metadata.q_scale, barrier);
    }
    taken++;
    const uint16_t* ids = p.lists + item.list * p.capacity;
    const float* k_scale = p.k_scale + item.kv * blocks_k;
    const char* k8 = (const char*)p.k8 + item.kv * blocks_k * kBytesK;
    const char* v8 = (const char*)p.v8 + item.kv * blocks_k * kBytesV;
    // Each lane holds one entry of this chunk of the list and one of the next chunk, read a chunk early: else every copy would wait for its entry.
    auto entry = [&](int at) { return at < count && lane < kChunk ? (int)ids[at] : 0; };
    int next_id = entry(lane);
    float next_scale = count > 0 ? k_scale[next_id] : 0.0f;
    for (int chunk = 0; chunk < count; chunk += kChunk) {
      const int my_id = next_id;
      const float my_scale = next_scale;
      next_id = entry(chunk + kChunk + lane);
      next_scale = k_scale[next_id];
      for (int i = 0; i < kChunk && chunk + i < count; i += kTileBlocks) {
        const int blocks = min_of(kTileBlocks, count - chunk - i);
        int id[kTileBlocks];
        float scale[kTileBlocks];
        UNROLL for (int b = 0; b < kTileBlocks; b++) {
          // The place of a missing block gets the V of the tile's first one: its P is zero, and zero times what lay there before might be NaN.
          id[b] = shuffle(my_id, b < blocks ? i + b : i);
          scale[b] = shuffle(my_scale, b < blocks ? i + b : i);
        }
        barrier_wait(empty(stage_of(tile)), parity_of(tile) ^ 1);
        sync_warp();  // as for the slot above, of the stage
        if (lane == 0) {
          uint32_t barrier = full(stage_of(tile));
          UNROLL for (int b = 0; b < kTileBlocks; b++) {
            control().metadata[stage_of(tile)].id[b] = id[b];
            control().metadata[stage_of(tile)].scale[b] = scale[b];
          }
          barrier_arrive_expect(barrier, blocks * kBytesK + kTileBlocks * kBytesV);
          UNROLL for (int b = 0; b < kTileBlocks; b++) {
            if (b < blocks) bulk_copy(address_of_k(stage_of(tile)) + b * kBytesK, k8 + (int64_t)id[b] * kBytesK, kBytesK, barrier);
            bulk_copy(address_of_v(stage_of(tile)) + b * kPlaceV, v8 + (int64_t)id[b] * kBytesV, kBytesV, barrier);
          }
        }
        tile++;
      }
    }
  }
}

// Issues Q K^T of a tile.
DEVICE void multiply_keys(int (&acc)[kKeyTiles][4], uint32_t q, uint32_t k) {
  const uint64_t a = matrix_descriptor<kDim>(q), b = matrix_descriptor<kDim>(k);
  UNROLL for (int i = 0; i < kDim / 32; i++) wgmma_s8<kTileKeys>(acc, at_byte(a, 32 * i), at_byte(b, 32 * i), i > 0);
}

// Issues P V of a tile for the channels from 8 kTiles part on.
template <int kTiles>
DEVICE void multiply_values(float (&product)[kTiles][4], const uint32_t (&weights)[kGroups][4], uint32_t v, int part) {
  const uint64_t b = matrix_descriptor<kBlockK>(v);
  UNROLL for (int g = 0; g < kGroups; g++) {
    wgmma_e4m3<kTiles * 8>(product, weights[g], at_byte(b, (g / 2) * kPlaceV + part * kPartTiles * 8 * kBlockK + (g % 2) * 32), g > 0);
  }
}

// O = O * decay + P V for one part.
template <int kTiles>
DEVICE void add_part(float (&o)[kDim / 8][4], const float (&product)[kTiles][4], const float (&decay)[2], int part) {
  UNROLL for (int j = 0; j < kPartTiles; j++) {
    UNROLL for (int e = 0; e < 4; e++) o[part * kPartTiles + j][e] = fused(o[part * kPartTiles + j][e], decay[e >> 1], product[j][e]);
  }
}

DEVICE void add_sums(Rows& rows, const float (&product)[kLastTiles][4], const float (&decay)[2]) {
  if constexpr (kOnes) {
    UNROLL for (int h = 0; h < 2; h++) rows.sum[h] = fused(rows.sum[h], decay[h], product[kPartTiles][2 * h]);
  }
}

// What the softmax of a tile leaves for its P V.
struct TileWeights {
  uint32_t weights[kGroups][4];
  float decay[2];
  bool needed;  // false: its P V is skipped
};

// Weights that add nothing: with kOverlap the product is issued for every tile, skipped or not.
DEVICE void nothing(TileWeights& w) {
  UNROLL for (int g = 0; g < kGroups; g++) {
    UNROLL for (int i = 0; i < 4; i++) w.weights[g][i] = 0;
  }
  UNROLL for (int h = 0; h < 2; h++) w.decay[h] = 1.0f;
}

// The consumers: warpgroup 0 or 1 of them, with the rows 64 * warpgroup and on of every item.
DEVICE void consume(const AttentionParams& p, int warpgroup) {
  // Small numbers that follow from the thread's: worked out each time, because the compiler would hold a register for each and spill others.
  auto row_in_block = [] { return (thread_id_again() >> 5) * 16 - 64 + (thread_id_again() >> 2 & 7); };
  auto is_first_lane = [] { return (thread_id_again() & 31) == 0; };
  auto warpgroup_again = [] { return (thread_id_again() >> 7) - 1; };
  int tile = 0, taken = 0;  // tiles and items done so far
  if (!kOverlap && warpgroup == 1) arrive_threads(kTurn, 256);  // the first turn is warpgroup 0's
  while (true) {
    barrier_wait(q_full(slot_of(taken)), slot_parity_of(taken));
    const ItemMetadata& item_metadata = control().item[slot_of(taken)];
    // Shuffled, so that the compiler knows that all lanes have the same.
    const int count = shuffle(item_metadata.count, 0);
    if (count < 0) break;
    const int tiles = (count + kTileBlocks - 1) / kTileBlocks;
    auto q = [&] { return address_of_q(slot_of(taken)) + warpgroup_again() * 64 * kDim; };
    Rows rows = {{kNone, kNone}, {0.0f, 0.0f}, {}};
    float o[kDim / 8][4] = {};
    int acc[kKeyTiles][4];
    // Softmax of the tile whose scores acc holds and which lies in stage `at`.
    auto softmax = [&](int blocks, int at, TileWeights& w) {
      const TileMetadata& metadata = control().metadata[at];
      const int mine = row_in_block(), row = (int)item_metadata.item.block_q * kBlockQ + mine;  // and row + 8
      const float threshold = item_metadata.threshold;
      UNROLL for (int h = 0; h < 2; h++) rows.real[h] = row + h * 8 < p.s_q;
      Tile keys;
      keys.blocks = blocks;
      float factor[kTileBlocks][2], gain[2], tile_top[2];
      UNROLL for (int b = 0; b < kTileBlocks; b++) {
        keys.first_key[b] = metadata.id[b] * kBlockK;
        UNROLL for (int h = 0; h < 2; h++) factor[b][h] = item_metadata.q_scale[mine + h * 8] * metadata.scale[b];
      }
      if (has_edge(p, keys, row & ~63)) {
        mask_scores(p, acc, factor, keys, p.bias2 + (kMasked ? item_metadata.item.batch * ((p.s_k + kBlockK - 1) / kBlockK) * kBlockK : 0), row);
        w.needed = any_lane(any_thread(kVote + warpgroup_again(), 128, tile_maxima<true>(acc, factor, threshold, rows, tile_top)));
        if (w.needed) softmax_weights<true>(acc, factor, tile_top, rows, w.weights, w.decay, gain);
      } else {
        w.needed = any_lane(any_thread(kVote + warpgroup_again(), 128, tile_maxima<false>(acc, factor, threshold, rows, tile_top)));
        if (w.needed) softmax_weights<false>(acc, factor, tile_top, rows, w.weights, w.decay, gain);
      }
      if (!w.needed && (thread_id_again() & 127) == 0 && rows.real[0]) atomic_add(p.pv_tiles + 2 * item_metadata.item.head_of_batch, 1);
    };
    auto take_turn = [&]() { sync_threads(kTurn + warpgroup_again(), 256); };
    auto pass_turn = [&]() { arrive_threads(kTurn + 1 - warpgroup_again(), 256); };
    auto free_stage = [&] {
      if (is_first_lane()) barrier_arrive(empty(stage_of(tile)));
    };

    // Issues P V of the tile at hand, of two parts the second after the first is done. Q K^T of the next one may follow without a fence of its own.
    auto issue_values = [&](TileWeights& w, float (&product)[kLastTiles][4]) {
      if constexpr (kParts == 2) {
        float first[kPartTiles][4];
        wgmma_fence(first, w.weights);
        multiply_values(first, w.weights, address_of_v(stage_of(tile)), 0);
        wgmma_commit();
        wgmma_wait<0>(first);
        add_part(o, first, w.decay, 0);
      }
      wgmma_fence(product, w.weights, acc);
      multiply_values(product, w.weights, address_of_v(stage_of(tile)), kParts - 1);
      wgmma_commit();
    };

    if (tiles > 0) {
      TileWeights now;
      barrier_wait(full(stage_of(tile)), parity_of(tile));
      wgmma_fence(acc);
      multiply_keys(acc, q(), address_of_k(stage_of(tile)));
      wgmma_commit();
      wgmma_wait<0>(acc);
      const int blocks_of_last = (count - 1) % kTileBlocks + 1;
      if (kOverlap) softmax(tiles > 1 ? kTileBlocks : blocks_of_last, stage_of(tile), now);
      for (int left = tiles - 1;; left--) {
        const int next = stage_of(tile + 1);
        if (!kOverlap) softmax(left > 0 ? kTileBlocks : blocks_of_last, stage_of(tile), now);
        if (left == 0) break;
        if constexpr (kOverlap) {
          float product[kLastTiles][4];
          TileWeights after;
          if (!now.needed) nothing(now);
          barrier_wait(full(next), parity_of(tile + 1));
          auto issue_both = [&](auto& values) {
            wgmma_fence(acc, values, now.weights);
            multiply_keys(acc, q(), address_of_k(next));
            wgmma_commit();
            multiply_values(values, now.weights, address_of_v(stage_of(tile)), 0);
            wgmma_commit();
          };
          if constexpr (kParts == 2) {
            float first[kPartTiles][4];
            issue_both(first);
            wgmma_wait<0>(acc, first);
            add_part(o, first, now.decay, 0);
            wgmma_fence(product, now.weights);
            multiply_values(product, now.weights, address_of_v(stage_of(tile)), 1);
            wgmma_commit();
          } else {
            issue_both(product);
            wgmma_wait<1>(acc);
          }
          softmax(left > 1 ? kTileBlocks : blocks_of_last, next, after);
          wgmma_wait<0>(product);
          free_stage();
          add_part(o, product, now.decay, kParts - 1);
          add_sums(rows, product, now.decay);
          now = after;
        } else {
          take_turn();
          barrier_wait(full(next), parity_of(tile + 1));
          if (now.needed) {
            float product[kLastTiles][4];
            issue_values(now, product);
            multiply_keys(acc, q(), address_of_k(next));
            wgmma_commit();
            pass_turn();
            wgmma_wait<1>(product);
            free_stage();
            add_part(o, product, now.decay, kParts - 1);
            add_sums(rows, product, now.decay);
          } else {
            wgmma_fence(acc);
            multiply_keys(acc, q(), address_of_k(next));
            wgmma_commit();
            pass_turn();
            free_stage();
          }
          wgmma_wait<0>(acc);
        }
        tile++;
      }
      if (now.needed) {
        float product[kLastTiles][4];
        issue_values(now, product);
        wgmma_wait<0>(product);
        add_part(o, product, now.decay, kParts - 1);
        add_sums(rows, product, now.decay);
      }
      free_stage();
      tile++;
    }
    const Item item = item_metadata.item;
    // The scales in the metadata come by a bulk copy. Without this fence the barriers do not order a later item's copy after this thread's own loads:
    // the thread might read a scale of that item.
    fence_async();
    sync_warp();  // all lanes have read the item's metadata
    if (is_first_lane()) barrier_arrive(q_empty(slot_of(taken)));
    taken++;
    const int row = (int)item.block_q * kBlockQ + row_in_block();
    UNROLL for (int h = 0; h < 2; h++) rows.real[h] = row + h * 8 < p.s_q;
    if ((thread_id_again() & 127) == 0 && row < p.s_q) {  // the warpgroup's first row
      atomic_add(p.pv_tiles + 2 * item.head_of_batch + 1, tiles);
    }
    write_rows(p, item, row, rows, o);
  }
  if (!kOverlap && warpgroup == 0) sync_threads(kTurn, 256);  // takes the turn that warpgroup 1 handed over last
}

KERNEL(sparge_attention_sm90, kThreads, AttentionParams) {
  const int blocks_q = (p.s_q + kBlockQ - 1) / kBlockQ;
  if (thread_id() == 0) {
    UNROLL for (int i = 0; i < kStages; i++) {
      barrier_init(full(i), 1);
      barrier_init(empty(i), 8);
    }
    UNROLL for (int i = 0; i < kSlots; i++) {
      barrier_init(q_full(i), 1);
      barrier_init(q_empty(i), 8);
    }
    barrier_publish();
  }
  if (kOnes) {
    for (int i = thread_id(); i < kStages * kTileBlocks * 8 * kBlockK / 4; i += kThreads) {
      int place = i / (8 * kBlockK / 4), word = i % (8 * kBlockK / 4);
      ((uint32_t*)(shared_memory() + kPlaceOfV + place * kPlaceV + kBytesV))[word] = 0x38383838u;
    }
    fence_async();
  }
  sync_cta();
  const int warpgroup = shuffle(warp_id() / 4, 0);
  if (warpgroup == 0) {
    keep_registers<kProducerRegisters>();
    if (warp_id() == 0) produce(p, blocks_q);
  } else {
    take_registers<kConsumerRegisters>();
    consume(p, warpgroup - 1);
  }
}
