"""The kernels as other devices and compilers have them, within the same bounds: with a * b + c contracted, with approximations that are off by twice
what a device's may be, and as sm_80 is built. Whole calls on every device that binaries are packaged for stand in test_whole_call.py."""

from __future__ import annotations

import emulator
import prepass_case
import pytest
import test_attention
import torch
from emulator import Configuration
from faults import Check, attention, prepass, select
from test_faults import run  # noqa: F401 - a fixture

CONFIGURATIONS = {
    "contracted": Configuration(contract=True),
    "approximate": Configuration(salt=1),
    "approximate in another way, contracted": Configuration(salt=2, contract=True),
}


def whole(name: str, *arguments) -> Check:
    return Check("test_whole_call", f"test_{name}", arguments)


ANY_ARCH = (
    prepass("forms", "float16", 64, "int8", "bool"),
    prepass("forms", "float32", 128, "fp16", "bias"),
    Check("test_prepass_memory", "test_bitwise_repeat_under_any_schedule", (64, "int8")),
    select("rules", dict(cdfthreshd=0.5), "subblock"),
    select("rules", dict(topk=0.2, cdfthreshd=0.4, causal=True, always_keep={"k": [(0, 1)]}, simthreshd1=0.3), "subblock"),
    select("rules", dict(topk=0.1, simthreshd1=0.4), "mean"),
    select("every_way_to_run_gives_the_same_bits", 64, "subblock"),
    attention("every_variant_on_odd_lengths", "mma", "int8", 64, True),
    attention("every_variant_on_odd_lengths", "mma", "fp16", 128, False),
    attention("tiles_far_below_are_dropped_as_the_reference_drops_them", "mma", "int8", 64),
    attention("the_state_of_pooled_blocks_joins_at_the_end", "mma", "int8", 64),
    attention("a_bitwise_repeat_in_any_order", "mma"),
)
"""Needs nothing that came after sm_80."""

CHECKS = (
    *ANY_ARCH,
    prepass("forms", "bfloat16", 128, "fp8", None),
    attention("every_variant_on_odd_lengths", "sm90", "fp8", 64, True),
    attention("every_variant_on_odd_lengths", "sm90", "fp8", 128, False),
    attention("tiles_far_below_are_dropped_as_the_reference_drops_them", "sm90", "fp8", 64),
    attention("a_bitwise_repeat_in_any_order", "sm90"),
    *(whole("shapes", (1, 2, 1, 200, 200, 64), form, 0.4) for form in ("int8", "fp16", "sm90")),
    whole("half_precision", torch.bfloat16, 128),
    whole("causal", "int8", (200, 333, 64), 63),
    whole("causal", "sm90", (333, 200, 128), 0),
    whole("key_masks", "bias with -1e4", True, "int8"),
    whole("key_masks", "scattered", False, "sm90"),
    whole("rules", "cdf", "sm90"),
    whole("rules", "judge", "int8"),
    whole("compensation", "mask", "int8"),
    whole("compensation", "mask", "sm90"),
    whole("any_order_of_threads_gives_the_same_bits_and_leaves_inputs_alone", True, "sm90"),
)


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_a_configuration_reaches_the_kernels(configuration):
    case = prepass_case.problem("float16", 64, 200, mask="bias")
    attention = test_attention.Problem(*test_attention.inputs(1, 1, 2, 1, 200, 333, 64))
    plain, out = prepass_case.run(case), attention.run()[0]
    with emulator.configured(CONFIGURATIONS[configuration]):
        other, other_out = prepass_case.run(case), attention.run()[0]
    differ = {name for name, x in vars(plain).items() if not torch.equal(prepass_case.bits(x), prepass_case.bits(getattr(other, name)))}
    assert differ
    # What attention sums is fused by its sources wherever g++ could do it: contraction changes nothing there.
    assert torch.equal(out, other_out) == (CONFIGURATIONS[configuration].salt == 0)


def name_of(check: Check) -> str:
    return f"{check.module}: {check.name} {check.arguments}"


@pytest.mark.parametrize("check", CHECKS, ids=name_of)
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_other_roundings(run, configuration, check):  # noqa: F811
    with emulator.configured(CONFIGURATIONS[configuration]):
        run(check)


@pytest.mark.parametrize("check", ANY_ARCH, ids=name_of)
def test_sm_80(run, check):  # noqa: F811
    with emulator.configured(Configuration(arch="sm_80")):
        run(check)
