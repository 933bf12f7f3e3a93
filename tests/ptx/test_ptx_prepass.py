"""What the kernels before attention leave, by their PTX: the tests of tests/emulator that compare it field by field with centring.py, selection.py
and fp64."""

from __future__ import annotations

import calls
import pytest
import test_prepass
import test_select
from sparge_kernels import config


@pytest.mark.parametrize("dim", config.DIMS, ids="d{}".format)
@pytest.mark.parametrize("pv, mask", [("int8", "bool"), ("fp8", "bias"), ("fp16", None)])
def test_forms(alone, dim, pv, mask):
    """With a token order under fp8."""
    alone("sm_90")
    test_prepass.test_forms("float16", dim, pv, mask)


def test_lengths_and_splits(alone):
    alone("sm_90")
    test_prepass.test_lengths_of_q_and_k_differ()
    test_prepass.test_the_statistics_sample_a_head_as_centring_does(7)


SELECTION = {
    "ties": lambda: test_select.test_ties_go_to_the_lowest_index("subblock", False),
    "lengths": lambda: test_select.test_lengths(161, 385, "mean"),
    "weights that underflow": lambda: test_select.test_a_block_whose_weight_underflows_is_visible("subblock"),
    "head size 80": lambda: test_select.test_head_sizes(80, 128, "subblock"),
    "state of what is skipped": lambda: test_select.test_compensation_state("bias", 96),
    "state with a map, causal": lambda: test_select.test_compensation_state("causal map", 64),
    "sequence": lambda: test_select.test_sequence(300, 299 * 128 + 1, 3),
}


@pytest.mark.parametrize("name", SELECTION)
def test_selection(alone, name):
    alone("sm_90")
    SELECTION[name]()


@pytest.mark.ptx_all
@pytest.mark.parametrize("dtype", config.DTYPES)
@pytest.mark.parametrize("dim", config.DIMS, ids="d{}".format)
@pytest.mark.parametrize("arch", config.SHIPPED)
def test_every_prepass(alone, arch, dim, dtype):
    skip_repeated(arch, config.prepass_name(dim, dtype))
    alone(arch)
    for pv in config.forms(arch):
        for mask in (None, "bool", "bias"):
            test_prepass.test_forms(dtype, dim, pv, mask)
    test_prepass.test_sizes(test_prepass.options(1, dim - 27, 333) | dict(dtype=dtype))


@pytest.mark.ptx_all
@pytest.mark.parametrize("name", SELECTION)
@pytest.mark.parametrize("arch", config.SHIPPED)
def test_every_selection(alone, arch, name):
    skip_repeated(arch, *map(config.select_name, config.DIMS))
    alone(arch)
    SELECTION[name]()


def skip_repeated(arch: str, *names: str) -> None:
    """Where an earlier architecture has the same instructions for all of these variants."""
    earlier = [calls.earlier_with(variant, arch) for variant in config.variants(arch) if variant.name in names]
    if all(earlier):
        pytest.skip(f"{earlier[0]} has the same instructions")
