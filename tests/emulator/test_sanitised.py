"""Launches of every kernel under AddressSanitizer and UndefinedBehaviorSanitizer: no access outside any tensor or shared memory, no misaligned one,
no overflow. Odd sizes, with and without masks, plans and causal edges; what they compute is checked all the same."""

from __future__ import annotations

import emulator
import pytest

pytestmark = pytest.mark.skipif(emulator.sanitised(), reason="starts such processes itself")

RUNS = {
    "attention": (
        "test_attention.py::test_every_variant_on_odd_lengths[plain-d64-mma-int8]",
        "test_attention.py::test_every_variant_on_odd_lengths[masked-d64-mma-fp16]",
        "test_attention.py::test_every_variant_on_odd_lengths[masked-d128-mma-int8]",
        "test_attention.py::test_misaligned_outputs_take_the_narrow_stores[mma]",
        "test_attention.py::test_results_go_back_to_the_callers_order[mma]",
        "test_attention.py::test_causal[offset-150-d64-mma]",
        "test_attention.py::test_lengths[k1-q1-mma]",
    ),
    "attention of Hopper": (
        "test_attention.py::test_every_variant_on_odd_lengths[plain-d64-sm90-fp8]",
        "test_attention.py::test_every_variant_on_odd_lengths[masked-d128-sm90-fp8]",
        "test_attention.py::test_misaligned_outputs_take_the_narrow_stores[sm90]",
        "test_attention.py::test_results_go_back_to_the_callers_order[sm90]",
        "test_attention.py::test_causal[offset-150-d128-sm90]",
        "test_attention.py::test_lengths[k1-q1-sm90]",
        "test_attention.py::test_a_bitwise_repeat_on_any_grid[d64-longest first]",
        "test_attention.py::test_what_an_item_leaves_in_shared_memory_does_not_reach_the_next[d128]",
        "test_attention.py::test_every_candidate[d64 n192 s4 ones]",
        "test_attention.py::test_every_candidate[d128 n128 s4 overlap split]",
    ),
    "prepass": (
        "test_prepass.py::test_sizes[d37-s129]",
        "test_prepass.py::test_sizes[d64-s63]",
        "test_prepass.py::test_sizes[d128-s333]",
        "test_prepass.py::test_sizes[d1-s1]",
        "test_prepass_memory.py::test_views[float32-128-wide_rows]",
        "test_prepass_memory.py::test_views[bfloat16-40-shifted]",
        # Rows that no 16-byte load may touch, sizes that end in the middle of everything.
        *(f"test_prepass_memory.py::test_views[float16-64-{view}]" for view in ("nhd", "shifted", "wide_rows", "fused_qkv")),
        "test_prepass.py::test_sizes[d40-s63]",
        "test_prepass.py::test_sizes[d37-s333]",
    ),
    "select": (
        "test_select.py::test_lengths[161-385-subblock]",
        "test_select.py::test_lengths[1-1-mean]",
        "test_select.py::test_capacity_is_never_passed",
        "test_select.py::test_block_maps[causal-(2, 4)]",
        "test_select.py::test_compensation_state[causal-64]",
        "test_select.py::test_ties_go_to_the_lowest_index[shared-subblock]",
    ),
}


def test_nothing_to_find():
    """One process for all: most of its time goes into loading PyTorch."""
    tests = [test for tests in RUNS.values() for test in tests]
    done = emulator.run_sanitised(*(f"tests/emulator/{test}" for test in tests))
    assert done.returncode == 0, f"{done.stdout[-5000:]}\n{done.stderr[-10000:]}"
    assert f"{len(tests)} passed" in done.stdout, done.stdout
