"""Launches of every kernel under AddressSanitizer and UndefinedBehaviorSanitizer: no access outside any tensor or shared memory, no misaligned one,
no overflow. Odd sizes, with and without masks, plans and causal edges; what they compute is checked all the same."""

from __future__ import annotations

import emulator
import pytest

pytestmark = pytest.mark.skipif(emulator.sanitised(), reason="starts such processes itself")

RUNS = {
    "attention": (
        "test_attention.py::test_every_variant_on_odd_lengths[plain-d64-int8]",
        "test_attention.py::test_every_variant_on_odd_lengths[masked-d64-fp16]",
        "test_attention.py::test_every_variant_on_odd_lengths[masked-d128-fp8]",
        "test_attention.py::test_misaligned_outputs_take_the_narrow_stores",
        "test_attention.py::test_results_go_back_to_the_callers_order",
        "test_attention.py::test_causal[offset-150-d64]",
        "test_attention.py::test_lengths[k1-q1]",
    ),
    "prepass": (
        "test_prepass.py::test_sizes[d37-s129]",
        "test_prepass.py::test_sizes[d64-s63]",
        "test_prepass.py::test_sizes[d128-s333]",
        "test_prepass.py::test_sizes[d1-s1]",
        "test_prepass.py::test_views[float32-128-wide_rows]",
        "test_prepass.py::test_views[bfloat16-40-shifted]",
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


@pytest.mark.parametrize("kernel", RUNS)
def test_nothing_to_find(kernel):
    done = emulator.run_sanitised(*(f"tests/emulator/{node}" for node in RUNS[kernel]))
    assert done.returncode == 0, f"{done.stdout[-5000:]}\n{done.stderr[-10000:]}"
    assert f"{len(RUNS[kernel])} passed" in done.stdout, done.stdout
