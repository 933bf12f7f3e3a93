"""Faults that someone could make in the kernels, each with the test that notices it.

A row is a name, the file of kernels/cuda/src, a text that is there exactly once, what stands there instead, and the test: its module in this folder,
its name and its arguments (but for `machine`, which test_faults.py hands over). When a kernel changes under a row, the row follows; a row whose text
is gone fails loudly rather than testing nothing.
"""

from __future__ import annotations

from typing import NamedTuple

from sparge_kernels import config


class Check(NamedTuple):
    module: str
    name: str
    arguments: tuple = ()


class Fault(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    caught_by: Check


def attention(name: str, *arguments) -> Check:
    return Check("test_attention", f"test_{name}", arguments)


def prepass(name: str, *arguments) -> Check:
    return Check("test_prepass", f"test_{name}", arguments)


def select(name: str, *arguments) -> Check:
    return Check("test_select", f"test_{name}", arguments)


ORDER = attention("a_bitwise_repeat_in_any_order", "mma")
ODD = attention("every_variant_on_odd_lengths", "mma", "int8", 64, False)
PERM = attention("results_go_back_to_the_callers_order", "mma")
DROPS = attention("tiles_far_below_are_dropped_as_the_reference_drops_them", "mma", "int8", 64)
FORMS = prepass("forms", "float16", 64, "int8", "bool")
SPLITS = prepass("the_statistics_sample_a_head_as_centring_does", 7)
UNLIKE = prepass("lengths_of_q_and_k_differ")

MMA, SOFTMAX, EPILOGUE = "attention_mma.cuh", "softmax.cuh", "epilogue.cuh"
PRE, SELECT, LAYOUT = "prepass.cuh", "select.cuh", "layout.cuh"

ATTENTION = [
    Fault("tiles are used before they have landed", MMA, "    copy_async_wait<kStages - 2>();\n", "", ODD),
    Fault("the wait lets go one tile early", MMA, "copy_async_wait<kStages - 2>", "copy_async_wait<kStages - 1>", ODD),
    Fault("no barrier around a tile", MMA, "sync_cta();  // tile t is there", "// tile t is there", ORDER),
    Fault("one key past the end is seen", SOFTMAX, "missing || key >= p.s_k ||", "missing || key > p.s_k ||", attention("lengths", "mma", 17, 65)),
    Fault("the causal edge hides the row's own key", SOFTMAX, "key > row + (e >> 1) * 8", "key >= row + (e >> 1) * 8",
          attention("causal", "mma", 64, 0)),
    Fault("the causal edge is looked for a block late", SOFTMAX, "last_key > first_row +", "last_key > first_row + kBlockK +",
          attention("causal", "mma", 128, 0)),
    Fault("scale of another key block", MMA, "q_scale[h] * k_scale[id]", "q_scale[h] * k_scale[t]", ODD),
    Fault("Q is read as if it were not swizzled", MMA, "chunk_of(kDim, group, 2 * i + half)", "(2 * i + half)", ODD),
    Fault("decay of the other row", MMA, "fused(o[2 * d + x][e], decay[e >> 1], to_float(", "fused(o[2 * d + x][e], decay[e & 1], to_float(", ODD),
    Fault("the missing half of a tile is seen", SOFTMAX, "bool missing = block >= tile.blocks;", "bool missing = false;", ODD),
    Fault("the missing half of V is not cleared", MMA, "} else if (kPv == kPvHalf) {", "} else if (false) {",
          attention("every_variant_on_odd_lengths", "mma", "fp16", 64, False)),
    Fault("lanes of a warp decide each for itself", MMA, "needed = any_lane(tile_maxima<false>(acc, factor, threshold, rows, tile_top));",
          "needed = tile_maxima<false>(acc, factor, threshold, rows, tile_top);", DROPS),
    Fault("warps past the last row are counted", MMA, "if (lane == 0 && rows.real[0]) {", "if (lane == 0) {", DROPS),
    Fault("rows past the end keep a tile", SOFTMAX, "needed |= rows.real[h] && !(", "needed |= !(", DROPS),
    Fault("blocks are counted for tiles", MMA, "item.head_of_batch + 1, tiles);", "item.head_of_batch + 1, count);", DROPS),
    Fault("both rows of a lane go to the place of the first", EPILOGUE, "rows.real[h] ? p.perm[here] : here", "rows.real[h] ? p.perm[row] : here",
          PERM),
    Fault("the LSE's shift is read in the caller's order", EPILOGUE, "lse_shift[item.head_of_batch * p.s_q + here]",
          "lse_shift[item.head_of_batch * p.s_q + token]", PERM),
    Fault("32-bit offsets of the output", EPILOGUE, "int64_t at = item.batch * p.out_stride.batch", "int at = item.batch * p.out_stride.batch",
          attention("outputs_are_addressed_in_64_bits", "mma")),
    Fault("bias of the first block for all", SOFTMAX, "score += bias2[key];", "score += bias2[key - tile.first_key[block]];",
          attention("key_biases", "mma", 64)),
    Fault("the row sum misses two lanes", EPILOGUE, "sum += shuffle_xor(sum, 2);", "sum += shuffle_xor(sum, 1);", ODD),
    Fault("the pooled state joins unweighted", EPILOGUE, "value[i] = fused(value_of_pooled, pooled, value[i]);",
          "value[i] += value_of_pooled;",
          attention("the_state_of_pooled_blocks_joins_at_the_end", "mma", "int8", 64)),
    Fault("thresholds of as many heads as the batch has", MMA, "p.pv_heads[item.head]", "p.pv_heads[item.head_of_batch]",
          attention("thresholds_of_each_head", "mma")),
    Fault("keys of another head", EPILOGUE, "item.batch * p.kv_heads + item.head / (p.heads / p.kv_heads)",
          "item.batch * p.kv_heads + item.head % p.kv_heads",
          Check("test_whole_call", "test_block_masks_with_empty_and_full_rows", ("int8", 64, (2, 4)))),
]  # fmt: skip

PREPASS = [
    Fault("masked rows count in the maximum of V", PRE, "if (token < end && attends(p, batch, token))", "if (token < end)", FORMS),
    Fault("keys are not permuted as they are loaded", PRE, "block * kBlockK + key_at_position(thread_id() / kLanes * kKeyRows + j)",
          "block * kBlockK + (thread_id() / kLanes * kKeyRows + j)", FORMS),
    Fault("one key past the end has a weight", PRE, "if (thread < rows) {", "if (thread <= rows) {", UNLIKE),
    Fault("the last pool is divided by 32", PRE, "min_of(rows - pool * kPoolQ, kPoolQ)", "kPoolQ", FORMS),
    Fault("scale of the other 8-bit format", PRE, "p.pv == kPvInt8 ? 127 : 448", "p.pv == kPvInt8 ? 448 : 127", FORMS),
    Fault("queries are not gathered", PRE, "load_chunk(q + token * p.q_stride.token", "load_chunk(q + position * p.q_stride.token",
          prepass("forms", "float16", 64, "fp8", None)),
    Fault("32-bit offsets of the queries", PRE, "q + token * p.q_stride.token * kElementBytes", "q + (int)(token * p.q_stride.token * kElementBytes)",
          Check("test_prepass_memory", "test_offsets_beyond_32_bits")),
    Fault("scores in natural units", PRE, "to_score = p.scale * kLog2E;", "to_score = p.scale;", FORMS),
    Fault("centre of another head", PRE, "batch * p.kv_heads + head / (p.heads / p.kv_heads)", "batch * p.kv_heads + head % p.kv_heads", UNLIKE),
    Fault("the centre takes the same place of every group", LAYOUT, "(int)(group * group * 1126333u >> 20 & (kCentreGroup - 1))", "0", FORMS),
    Fault("groups of the centre are counted from the split", PRE, "return sampled_token(first + i * kSlots * kCentreGroup);",
          "return start + sampled_token(first - start + i * kSlots * kCentreGroup);", SPLITS),
    Fault("the centre stays in the keys", PRE, "channel_of(chunk[j], i) - shared.centre[channel + i] : 0;", "channel_of(chunk[j], i) : 0;", FORMS),
    Fault("Q is stored unswizzled", PRE, "byte_of(row, channel), x, scale", "channel, x, scale", FORMS),
    Fault("K is stored unswizzled", PRE, "key * kDim + byte_of(key, channel)", "key * kDim + channel", FORMS),
    Fault("8-bit V is stored unswizzled", PRE, "chunk = chunk_of(kBlockK, row, i % kChunks)", "chunk = i % kChunks", FORMS),
    Fault("fp16 V is stored unswizzled", PRE, "chunk_of(2 * kDim, key, channel / 8)", "channel / 8", prepass("forms", "float16", 64, "fp16", None)),
    Fault("rows of 64 bytes are swizzled one by one", LAYOUT, "(row >> 1) & 3", "row & 3", FORMS),
    Fault("a warp's maximum for the block's", PRE, "absmax = max_of(absmax, shared.absmax[i]);", "absmax = shared.absmax[i];", FORMS),
]  # fmt: skip

HOPPER = "attention_sm90.cuh"
H_ODD = attention("every_variant_on_odd_lengths", "sm90", "fp8", 128, False)
H_LONG = attention("lists_of_every_length", "sm90", 64)
H_RING = attention("one_block_goes_often_round_its_ring", 64)
H_DROPS = attention("tiles_far_below_are_dropped_as_the_reference_drops_them", "sm90", "fp8", 64)
H_ORDER = attention("a_bitwise_repeat_in_any_order", "sm90")
H_GRID = attention("a_bitwise_repeat_on_any_grid", 64, "random")
H_LEFT = attention("what_an_item_leaves_in_shared_memory_does_not_reach_the_next", 64)
H_HEADS = attention("thresholds_of_each_head", "sm90")
H_SHORT = attention("short_lists_one_after_the_other")
H_EMPTY = attention("empty_lists_one_after_the_other")
H_SEQUENCE = attention("the_sequence_says_what_an_item_is", 64)
H_OVERLAP = attention("every_candidate", 64, config.HopperConfig(tile_blocks=2, ones=True, overlap=True, split=False, poly=0, stages=6))
H_SPLIT = attention("every_candidate", 64, config.HopperConfig(tile_blocks=2, ones=True, overlap=True, split=True, poly=0, stages=6))

FETCH = """blocks * kBytesK + kTileBlocks * kBytesV);
          UNROLL for (int b = 0; b < kTileBlocks; b++) {
            if (b < blocks) bulk_copy(address_of_k("""

TILE_METADATA = """          UNROLL for (int b = 0; b < kTileBlocks; b++) {
            control().metadata[stage_of(tile)].id[b] = id[b];
            control().metadata[stage_of(tile)].scale[b] = scale[b];
          }
"""
TILE_COPIES = """          barrier_arrive_expect(barrier, blocks * kBytesK + kTileBlocks * kBytesV);
          UNROLL for (int b = 0; b < kTileBlocks; b++) {
            if (b < blocks) bulk_copy(address_of_k(stage_of(tile)) + b * kBytesK, k8 + (int64_t)id[b] * kBytesK, kBytesK, barrier);
            bulk_copy(address_of_v(stage_of(tile)) + b * kPlaceV, v8 + (int64_t)id[b] * kBytesV, kBytesV, barrier);
          }
"""
ITEM_METADATA = """      metadata.item = item;
      metadata.count = count;
      metadata.threshold = p.pv_heads ? p.pv_heads[item.head] : p.pvthreshd;
"""
ITEM_COPIES = """      barrier_arrive_expect(barrier, kBytesQ + sizeof metadata.q_scale);
      bulk_copy(address_of_q(slot_of(taken)), p.q8 + item.list * kBytesQ, kBytesQ, barrier);
      bulk_copy(shared_address(metadata.q_scale), p.q_scale + item.list * kBlockQ, sizeof metadata.q_scale, barrier);
"""
FOR_ALL_WARPS = "for (int i = 0; i < 4 && (thread_id_again() & 127) == 0; i++) barrier_arrive(empty(stage_of(tile)));"
SCALES_READ = "    fence_async();\n    sync_warp();  // all lanes have read the item's metadata\n"
PRODUCER = "keep_registers<kProducerRegisters>();\n    if (warp_id() == 0) produce(p, blocks_q);"

ATTENTION_HOPPER = [
    Fault("a tile is used before it has landed", HOPPER, "take_turn();\n          barrier_wait(full(next), parity_of(tile + 1));", "take_turn();",
          H_ORDER),
    Fault("the first tile is used before it has landed", HOPPER, "      barrier_wait(full(stage_of(tile)), parity_of(tile));\n", "", H_ODD),
    Fault("rounds of the ring are told by tiles", HOPPER, "(uint32_t)tile / kStages & 1", "(uint32_t)tile & 1", H_ODD),
    Fault("rounds of the slots are told by items", HOPPER, "(uint32_t)item / kSlots & 1", "(uint32_t)item & 1", H_ODD),
    Fault("a tile is free when one warp is done with it", HOPPER, "barrier_init(empty(i), 8)", "barrier_init(empty(i), 1)", H_LONG),
    Fault("a tile is free when one warpgroup is done with it", HOPPER, "barrier_init(empty(i), 8)", "barrier_init(empty(i), 4)", H_LONG),
    Fault("a tile is free when 7 of 8 warps are done with it", HOPPER, "barrier_init(empty(i), 8)", "barrier_init(empty(i), 7)", H_RING),
    Fault("a slot is free when one warpgroup is done with it", HOPPER, "barrier_init(q_empty(i), 8)", "barrier_init(q_empty(i), 4)", H_GRID),
    Fault("barriers are not published", HOPPER, "    barrier_publish();\n", "", H_ODD),
    Fault("the producer's lanes go on one by one", HOPPER, "for ever.\n    sync_warp();\n", "for ever.\n", H_EMPTY),
    Fault("thresholds of as many heads as the batch has", HOPPER, "p.pv_heads[item.head]", "p.pv_heads[item.head_of_batch]", H_HEADS),
    Fault("a lane that waits for a stage misses its phase", HOPPER, "        sync_warp();  // as for the slot", "        // as for the slot",
          H_SHORT),
    Fault("metadata of a tile is written when its copies are under way", HOPPER, TILE_METADATA + TILE_COPIES, TILE_COPIES + TILE_METADATA, H_SHORT),
    Fault("metadata of an item is written when its copies are under way", HOPPER, ITEM_METADATA + ITEM_COPIES, ITEM_COPIES + ITEM_METADATA, H_SHORT),
    Fault("a tile is freed while it is multiplied", HOPPER, "            wgmma_wait<1>(product);\n            free_stage();",
          "            free_stage();\n            wgmma_wait<1>(product);", H_LONG),
    Fault("a dropped tile is not freed", HOPPER, "pass_turn();\n            free_stage();\n          }", "pass_turn();\n          }", H_DROPS),
    Fault("no fence before the first product", HOPPER, "wgmma_fence(acc);\n      multiply_keys", "multiply_keys", H_ODD),
    Fault("P may change between the fence and its product", HOPPER, "wgmma_fence(product, w.weights, acc);", "wgmma_fence(product, acc);", H_ODD),
    Fault("scores may be read before the wait", HOPPER, "          wgmma_wait<0>(acc);\n        }\n        tile++;",
          "          wgmma_wait<0>();\n        }\n        tile++;", H_ODD),
    Fault("scores under way are taken to be there", HOPPER, "            wgmma_wait<1>(product);", "            wgmma_wait<1>(product, acc);", H_ODD),
    Fault("the first scores are read while they are summed", HOPPER, "wgmma_wait<0>(acc);\n      const int blocks_of_last",
          "wgmma_wait<1>();\n      const int blocks_of_last", H_ODD),
    Fault("scores are read while they are summed", HOPPER, "          wgmma_wait<0>(acc);\n        }\n        tile++;",
          "        }\n        tile++;", H_ODD),
    Fault("the last P V is added while it is summed", HOPPER, "wgmma_wait<0>(product);\n        add_part(o, product, now.decay, kParts - 1);",
          "add_part(o, product, now.decay, kParts - 1);", H_ODD),
    Fault("a tile that is dropped keeps the turn", HOPPER, "pass_turn();\n            free_stage();\n          }", "free_stage();\n          }",
          H_DROPS),
    Fault("a warpgroup hands the turn to itself", HOPPER, "arrive_threads(kTurn + 1 - warpgroup_again(), 256)",
          "arrive_threads(kTurn + warpgroup_again(), 256)", H_ODD),
    Fault("the last turn is left over", HOPPER, "if (!kOverlap && warpgroup == 0) sync_threads(kTurn, 256);", "", H_ODD),
    Fault("warps decide each for itself", HOPPER,
          "any_thread(kVote + warpgroup_again(), 128, tile_maxima<false>(acc, factor, threshold, rows, tile_top))",
          "tile_maxima<false>(acc, factor, threshold, rows, tile_top)", H_DROPS),
    Fault("both warpgroups vote together", HOPPER, "any_thread(kVote + warpgroup_again(), 128, tile_maxima<false>",
          "any_thread(kVote, 256, tile_maxima<false>", H_DROPS),
    Fault("metadata of another tile", HOPPER, "control().metadata[at]", "control().metadata[0]", H_ODD),
    Fault("metadata of an item is read when its slot is free", HOPPER, "const Item item = item_metadata.item;",
          "const Item& item = item_metadata.item;", H_GRID),
    Fault("both slots have one place for Q", HOPPER, "+ slot * kBytesQ", "", H_GRID),
    Fault("both warpgroups have the first 64 queries", HOPPER, "address_of_q(slot_of(taken)) + warpgroup_again() * 64 * kDim",
          "address_of_q(slot_of(taken))", H_ODD),
    Fault("the missing half of V is what was there", HOPPER, FETCH, FETCH.replace("kTileBlocks", "blocks"), H_LEFT),
    Fault("the barrier expects too few bytes", HOPPER, "blocks * kBytesK + kTileBlocks * kBytesV", "kBytesK + kTileBlocks * kBytesV", H_ODD),
    Fault("the barrier expects too many bytes", HOPPER, "blocks * kBytesK + kTileBlocks * kBytesV", "kTileBlocks * (kBytesK + kBytesV)", H_ODD),
    Fault("the next chunk of a list is the same again", HOPPER, "entry(chunk + kChunk + lane)", "entry(chunk + lane)", H_LONG),
    Fault("the sequence of another head", HOPPER, "p.sequence[index]", "p.sequence[rank]", H_SEQUENCE),
    Fault("items are counted on from the last call", SELECT, "if (task == 0 && p.counter != nullptr) *p.counter = 0;", "",
          Check("test_whole_call", "test_shapes", ((1, 2, 1, 200, 200, 64), "sm90", 1))),
    Fault("chunks of K lie one after the other", HOPPER, "at_byte(b, 32 * i)", "at_byte(b, 0)", H_ODD),
    Fault("the second half of a block's V is the first", HOPPER, "+ (g % 2) * 32)", ")", H_ODD),
    Fault("ones lie where the next block's V lies", HOPPER, "place * kPlaceV + kBytesV))[word]", "place * kBytesV + kBytesV))[word]", H_ODD),
    Fault("products do not see the ones", HOPPER, "    fence_async();\n  }\n  sync_cta();", "  }\n  sync_cta();", H_ODD),
    Fault("row sums of the first row", HOPPER, "product[kPartTiles][2 * h]", "product[kPartTiles][h]", H_ODD),
    Fault("decay of the other row", HOPPER, "decay[e >> 1], product[j][e]", "decay[e & 1], product[j][e]", H_ODD),
    Fault("dropped tiles are counted by every warp", HOPPER, "if (!w.needed && (thread_id_again() & 127) == 0",
          "if (!w.needed && (thread_id_again() & 31) == 0", H_DROPS),
    Fault("scores are read while they are summed, without turns", HOPPER,
          "            wgmma_wait<1>(acc);\n          }\n          softmax", "          }\n          softmax", H_OVERLAP),
    Fault("P of a dropped tile is what was there", HOPPER, "if (!now.needed) nothing(now);", "", H_SPLIT),
    Fault("a warp frees a tile for its whole warpgroup", HOPPER, "if (is_first_lane()) barrier_arrive(empty(stage_of(tile)));", FOR_ALL_WARPS,
          H_RING),
    Fault("a warp frees Q for its whole warpgroup", HOPPER, "if (is_first_lane()) barrier_arrive(q_empty(slot_of(taken)));",
          FOR_ALL_WARPS.replace("empty(stage_of(tile))", "q_empty(slot_of(taken))"), H_GRID),
    Fault("scales are freed that may still be read", HOPPER, SCALES_READ, SCALES_READ.replace("fence_async();\n", ""), H_GRID),
    Fault("one lane fences what all lanes of its warp read", HOPPER, SCALES_READ, SCALES_READ.replace("fence", "if (is_first_lane()) fence"), H_GRID),
    Fault("one thread fences the ones that all have written", HOPPER, "    fence_async();\n  }\n  sync_cta();",
          "    if (thread_id() == 0) fence_async();\n  }\n  sync_cta();", H_ODD),
    Fault("the ones are fenced before all are written", HOPPER, "[word] = 0x38383838u;\n    }\n    fence_async();\n",
          "[word] = 0x38383838u;\n      if (i < kThreads) fence_async();\n    }\n", H_ODD),
    Fault("more registers are taken than are given away", HOPPER, "kConsumerRegisters = 240", "kConsumerRegisters = 248", H_ODD),
    Fault("no registers are given away", HOPPER, "    keep_registers<kProducerRegisters>();\n", "", H_ODD),
    Fault("registers are given away at the end", HOPPER, PRODUCER, "\n    ".join(reversed(PRODUCER.split("\n    "))), H_ODD),
    Fault("a descriptor whose leading dimension is 2", HOPPER, "b = matrix_descriptor<kDim>(k);", "b = matrix_descriptor<kDim>(k) + (1 << 16);",
          H_ODD),
    Fault("a descriptor of the next k-step by its bytes", HOPPER, "at_byte(a, 32 * i)", "a + 32 * i", H_ODD),
    Fault("both parts of P V have the first channels", HOPPER, "part * kPartTiles * 8 * kBlockK + (g % 2)", "(g % 2)", H_SPLIT),
]  # fmt: skip

LENGTHS = select("lengths", 200, 1000, "subblock")
SIZES = select("head_sizes", 128, 128, "subblock")
WAYS = select("every_way_to_run_gives_the_same_bits", 64, "subblock")

CHOICE = [
    Fault("pools are used before they have landed", SELECT, "    copy_async_wait<1>();\n", "", SIZES),
    Fault("no barrier between scores and choice", SELECT, "= z;\n    }\n  sync_cta();\n}", "= z;\n    }\n}", WAYS),
    Fault("no barrier between two tasks", SELECT, "    sync_cta();  // shared memory and scratch", "    // shared memory and scratch", WAYS),
    Fault("one block too many at a tie", SELECT, "count_bits(tied & before) < cut.ties", "count_bits(tied & before) <= cut.ties",
          select("ties_go_to_the_lowest_index", "subblock", True)),
    Fault("the causal edge is looked for a block late", SELECT, "last_key > (int64_t)query_block * kBlockQ +",
          "last_key > (int64_t)query_block * kBlockQ + kBlockQ +", select("rules", dict(topk=0.3, causal=True), "subblock")),
    Fault("the block that the causal edge cuts is not visible", SELECT, "(keys_before_edge(p, query_block) + kBlockK - 1) / kBlockK",
          "keys_before_edge(p, query_block) / kBlockK", select("rules", dict(topk=0.3, causal=True), "subblock")),
    Fault("keys behind the causal edge have a weight", SELECT, "if (p.causal && key_block == end - 1) weight = shared.edge[block];", "",
          select("rules", dict(cdfthreshd=0.5, causal=True, causal_offset=1), "subblock")),
    Fault("the variance has no cap", SELECT, "min_of(x, kVarianceCap) * kLog2E", "x * kLog2E",
          select("rules", dict(topk=0.2, scale=1.5), "subblock")),
    Fault("the variance has the mean's scale", SELECT, "shared.scale[buffer][kind][n * 8", "shared.scale[buffer][0][n * 8", LENGTHS),
    Fault("keys of another head are scored", SELECT, "t.b * p.kv_heads + t.h / (p.heads / p.kv_heads)",
          "t.b * p.kv_heads + t.h % p.kv_heads", LENGTHS),
    Fault("the judge looks at the first head", SELECT, "p.k_sim[t.k_row + j] < sim", "p.k_sim[j] < sim", LENGTHS),
    Fault("the count is rounded down", SELECT, "(float)n_free, 0.0f) + 0.5f)", "(float)n_free, 0.0f))", LENGTHS),
    Fault("what is forced does not count", SELECT, "wanted = cdf - forced_mass;", "wanted = cdf;",
          select("rules", dict(cdfthreshd=0.3, always_keep={"q": [(0, 10)], "k": [(990, 1000)]}), "subblock")),
    Fault("lists run over", SELECT, "kept = kept && position < p.capacity;", "", select("capacity_is_never_passed")),
    Fault("strides of the block map swapped", SELECT, "t.b * p.map_batch + t.h * p.map_head", "t.b * p.map_head + t.h * p.map_batch",
          select("block_maps", (2, 4), False)),
    Fault("kept blocks are pooled with weight 0", SELECT, "if (weight != 0.0f) sums[i]", "sums[i]",
          select("a_skipped_block_without_numbers_stays_out_of_other_rows")),
    Fault("weights of another tile", SELECT, "shared.log_weight[buffer][column]", "shared.log_weight[0][column]", SIZES),
]  # fmt: skip

FAULTS = [*ATTENTION, *ATTENTION_HOPPER, *PREPASS, *CHOICE]
