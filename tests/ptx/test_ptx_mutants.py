"""Faults in the PTX of the kernels, one at a time: each is noticed by the check beside it, which the PTX as it is passes.

Faults that no run shows, of the order of matrix products and of what touches their registers, stand in test_ptx_flow.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import calls
import pytest
import test_prepass
from calls import PLAIN, long_lists, run
from executor import Schedule, altered, ptx_of
from sparge_kernels import config

HOPPER, MMA, HALF, PREPASS = "attention_sm90_d64_fp8", "attention_mma_d64_int8", "attention_mma_d64_fp16", "prepass_d64_float16"
NUMBERS = "relative L2"
METADATA = r"st\.shared\.v4\.u32\s+\[%rd\d+\+1280\], \{[^}]*\};"
INIT = r"mbarrier\.init\.shared::cta\.b64 \[%r\d+\]"


class Mutant(NamedTuple):
    """In the PTX of a variant `instead` stands for what `pattern` finds, at so many places from the first on; what notices it, and says."""

    variant: str
    pattern: str
    instead: str
    places: int
    noticed_by: str
    said: str


MUTANTS = {
    "the halves of e4m3x2 are swapped": Mutant(
        HOPPER, r"(cvt\.rn\.satfinite\.e4m3x2\.f32\s+\S+), (\S+), (\S+);", r"\1, \3, \2;", 64, "topk on sm_90", NUMBERS
    ),
    "descriptors of another swizzle": Mutant(HOPPER, "-9223371899415822336", "-4611685880988434432", 20, "topk on sm_90", "descriptor"),
    "sums are never begun anew": Mutant(HOPPER, r"(setp\.ne\.b32 p, )%r\d+, 0;", r"\g<1>1, 0;", 14, "topk on sm_90", "not finite"),
    "the ones are not fenced": Mutant(HOPPER, r"fence\.proxy\.async\.shared::cta;", "", 1, "topk on sm_90", "without a proxy fence"),
    "the scales are not fenced": Mutant(
        HOPPER, r"(fence\.proxy\.async\.shared::cta;.*?)fence\.proxy\.async\.shared::cta;", r"\1", 1, "long lists on sm_90", "without a proxy fence"
    ),
    "the first product is not fenced": Mutant(HOPPER, r"wgmma\.fence\.sync\.aligned;", "", 1, "topk on sm_90", "without wgmma.fence"),
    "the first turn is not handed over": Mutant(HOPPER, r"barrier\.cta\.arrive %r\d+, %r\d+;", "", 1, "topk on sm_90", "deadlock"),
    "more registers than there are": Mutant(HOPPER, r"(setmaxnreg\.inc\.sync\.aligned\.u32) 240;", r"\1 248;", 1, "topk on sm_90", "deadlock"),
    "a stage is free when 7 of 8 warps are done": Mutant(
        HOPPER, rf"({INIT}, %r\d+;.*?{INIT}), %r\d+;", r"\1, 7;", 6, "long lists on sm_90", "operand of wgmma changed|wgmma reads"
    ),
    "the last turn is not taken": Mutant(
        HOPPER, r"barrier\.cta\.sync %r\d+, %r\d+;(?=\s+// end inline asm\s+bra\.uni)", "", 1, "topk on sm_90", "in vain"
    ),
    "metadata of a tile comes after its copies": Mutant(
        HOPPER,
        rf"({METADATA})((?:.*?cp\.async\.bulk[^;]*;){{4}})",
        r"\2\1",
        1,
        "stalled lists on sm_90",
        f"not finite|{NUMBERS}|outside of every tensor",
    ),
    "lanes of the producer do not wait for each other": Mutant(
        HOPPER, rf"bar\.warp\.sync\s+-1;([^{{]*{METADATA})", r"\1", 1, "stalled lists on sm_90", "deadlock"
    ),
    "the values of cvt.pack are swapped": Mutant(
        PREPASS, r"(cvt\.pack\.sat\.s8\.s32\.b32 \S+), (\S+), (\S+), ", r"\1, \3, \2, ", 40, "fields of the pre-pass", "q8"
    ),
    "the halves of f16x2 are swapped": Mutant(
        PREPASS, r"(cvt\.rn\.f16x2\.f32\s+\S+), (\S+), (\S+);", r"\1, \3, \2;", 14, "fields of the pre-pass", "q_mean"
    ),
    "tiles are waited for a group late": Mutant(MMA, r"cp\.async\.wait_group 1;", "cp.async.wait_group 2;", 1, "topk on sm_80", NUMBERS),
    "weights are signed": Mutant(MMA, r"(m16n8k32\.row\.col\.s32)\.u8\.s8", r"\1.s8.s8", 32, "topk on sm_80", NUMBERS),
    "tiles are used without a barrier": Mutant(MMA, r"bar\.sync\s+0;", "", 1, "topk on sm_80", NUMBERS),
    "values are read untransposed": Mutant(HALF, r"(ldmatrix\.sync\.aligned\.m8n8\.x4)\.trans", r"\1", 32, "topk in half precision", NUMBERS),
}


def fields(machine, alone) -> None:
    alone("sm_90")
    test_prepass.test_forms("float16", 64, "int8", None)


def stalled_lists(machine, alone) -> None:
    """With twelve seeds, for who stands still where it matters is a matter of luck."""
    for seed in range(1, 13):
        run(machine, calls.HOPPER, PLAIN["lists of 0 to 9 blocks"](64), schedule=Schedule(seed, copies="at once", preempt=3, stall=4000))


CHECKS: dict[str, Callable] = {
    "topk on sm_90": lambda machine, alone: run(machine, calls.HOPPER, PLAIN["topk"](64)),
    "long lists on sm_90": lambda machine, alone: run(machine, calls.HOPPER, long_lists(64), schedule=Schedule(seed=3, preempt=20), processors=1),
    "stalled lists on sm_90": stalled_lists,
    "topk on sm_80": lambda machine, alone: run(machine, ("sm_80", "int8"), PLAIN["topk"](64)),
    "topk in half precision": lambda machine, alone: run(machine, ("sm_80", "fp16"), PLAIN["topk"](64)),
    "fields of the pre-pass": fields,
}
"""By the fixtures of conftest.py."""
passed: set[str] = set()
"""Checks that were seen to pass on the PTX as it is."""


def change_of(mutant: Mutant) -> Callable[[config.Variant, str], str]:
    """What `altered` takes; it leaves other variants as they are."""

    def change(variant: config.Variant, text: str) -> str:
        if variant.name != mutant.variant:
            return text
        return re.sub(mutant.pattern, mutant.instead, text, count=mutant.places, flags=re.DOTALL)

    return change


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name, machine, alone):
    mutant = MUTANTS[name]
    check = CHECKS[mutant.noticed_by]
    if mutant.noticed_by not in passed:
        check(machine, alone)
        passed.add(mutant.noticed_by)
    with altered(change_of(mutant)), pytest.raises((AssertionError, RuntimeError), match=mutant.said):
        check(machine, alone)


def test_mutants_change_as_many_places_as_they_say():
    for name, mutant in MUTANTS.items():
        arch = "sm_80" if mutant.variant in (MMA, HALF) else "sm_90"
        (variant,) = (variant for variant in config.variants(arch) if variant.name == mutant.variant)
        _, count = re.subn(mutant.pattern, mutant.instead, ptx_of(variant, arch), count=mutant.places, flags=re.DOTALL)
        assert count == mutant.places, name
