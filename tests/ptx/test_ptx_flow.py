"""The rules of flow.py hold for Hopper's kernels, and each is seen to be broken where it is."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import flow
import hopper_candidates
import parse
import pytest
from executor import LINE_INFO, ptx_of
from sparge_kernels import config
from sparge_kernels.cuda import nvrtc

SYMBOL = "sparge_attention_sm90"
KERNEL = "attention_sm90.cuh"
LOADS, RELEASE = "item_metadata.q_scale[", "barrier_arrive(q_empty("
"""In the source: where consumers load an item's scales, and where they give its slot back."""


def variant(dim: int, masked: bool) -> config.Variant:
    return config.SM90.variant(dim, "fp8", masked)


@functools.lru_cache(maxsize=2)
def entry_of(ptx: str) -> parse.Entry:
    return parse.module(ptx).entries[SYMBOL]


SHIPPED = [pytest.param(dim, masked, id=f"d{dim} {'masked' if masked else 'plain'}") for dim in config.DIMS for masked in (False, True)]
CANDIDATES = [
    pytest.param(hopper_candidates.variant(dim, masked, chosen), id=f"d{dim} {'masked' if masked else 'plain'} {hopper_candidates.label(chosen)}")
    for dim in config.DIMS
    for chosen in hopper_candidates.candidates(dim)
    for masked in (False, True)
]


# ---- the registers of a matrix product -----------------------------------------------------------------------------------------------------------


def check_products(entry: parse.Entry) -> None:
    assert flow.products_in_flight(entry) == [] and flow.products_unfenced(entry) == []


@pytest.mark.parametrize("dim, masked", SHIPPED)
def test_nothing_touches_the_registers_of_a_product_between_its_fence_and_its_wait(dim, masked):
    entry = entry_of(ptx_of(variant(dim, masked), "sm_90"))
    assert sum(flow.product_of(instruction) is not None for instruction in entry.instructions) >= 14
    check_products(entry)


@pytest.mark.ptx_all
@pytest.mark.parametrize("candidate", CANDIDATES)
def test_nor_in_any_candidate(candidate):
    check_products(entry_of(ptx_of(candidate, "sm_90")))


FENCE, WAIT, COMMIT = (rf"wgmma\.{name}\.sync\.aligned{rest};" for name, rest in (("fence", ""), ("wait_group", " {}"), ("commit_group", "")))
SUMS = r"(wgmma\.mma_async\S+ \{)(%r\d+)(,[^}]*\}, )"
BROKEN = {
    "the wait for P V is left out": (WAIT.format(1), "", 1, flow.products_in_flight),
    "P V is waited for a group late": (WAIT.format(1), "wgmma.wait_group.sync.aligned 2;", 1, flow.products_in_flight),
    "the other waits are left out": (WAIT.format(0), "", 3, flow.products_in_flight),
    "a group is committed late": (rf"{COMMIT}(.*?)({WAIT.format(0)})", r"\1\2 wgmma.commit_group.sync.aligned;", 1, flow.products_in_flight),
    "a sum is read in flight": (rf"{SUMS}(%rd\d+, %rd\d+, p;\}})", r"\1\2\3\4 mov.b32 %r1, \2;", 1, flow.products_in_flight),
    "a product takes sums in flight for a part of its own": (
        rf"{SUMS}(%rd\d+, %rd\d+, p;\}})", r"\1\2\3\4 {.reg .pred p; setp.ne.b32 p, 1, 0; \1%r1\3\4", 1, flow.products_in_flight
    ),
    "the weights are changed in flight": (
        r"(wgmma\.mma_async\S+e4m3 \{[^}]*\}, \{)(%r\d+)([^;]*;\})", r"\1\2\3 add.s32 \2, \2, 1;", 1, flow.products_in_flight
    ),
    "a product at the end is not waited for": (
        r"ret;", "wgmma.mma_async.sync.aligned.m64n8k32.s32.s8.s8 {%r1, %r2, %r3, %r4}, %rd1, %rd2, %p1; wgmma.commit_group.sync.aligned; ret;", 1,
        flow.products_in_flight,
    ),
    "the first fence is left out": (FENCE, "", 1, flow.products_unfenced),
    "all fences are left out": (FENCE, "", 4, flow.products_unfenced),
    "a sum is set behind the fence": (rf"({FENCE})(.*?){SUMS}", r"\1 mov.u32 \4, 0;\2\3\4\5", 1, flow.products_unfenced),
    "a weight is set behind the fence": (
        rf"({FENCE})((?:(?!{FENCE}).)*?)(wgmma\.mma_async\S+e4m3 \{{[^}}]*\}}, \{{)(%r\d+)", r"\1 selp.b32 \4, \4, 0, %p1;\2\3\4", 1,
        flow.products_unfenced,
    ),
}  # fmt: skip
"""Pattern, what stands there instead, at how many of its places from the first on, the rule that notices it."""


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_of_the_products_is_seen(name):
    pattern, instead, places, rule = BROKEN[name]
    text = ptx_of(variant(64, False), "sm_90")
    changed, count = re.subn(pattern, instead, text, count=places, flags=re.DOTALL)
    assert count == places and rule(entry_of(text)) == []
    assert rule(entry_of(changed)) != []


# ---- the scales of an item are loaded plainly and later written by a bulk copy -------------------------------------------------------------------


def located(dim: int, masked: bool) -> str:
    """The kernel's PTX with the place in the source of every instruction."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nvrtc, "FLAGS", (*nvrtc.FLAGS, LINE_INFO))
        return ptx_of.__wrapped__(variant(dim, masked), "sm_90")


def line_of(words: str) -> int:
    """The number of the one line of the kernel's code that holds `words`."""
    source = (nvrtc.SOURCES / KERNEL).read_text(encoding="utf-8")
    (number,) = (i for i, line in enumerate(source.splitlines(), 1) if words in line.split("//")[0])
    return number


def stands_at(place: parse.Place | None, words: str) -> bool:
    return place is not None and (Path(place.file).name, place.line) == (KERNEL, line_of(words))


def given_back_unfenced(entry: parse.Entry) -> list[str]:
    loads = {i.line for i in entry.instructions if i.opcode.startswith("ld.shared") and stands_at(i.place, LOADS)}
    releases = {i.line for i in entry.instructions if i.opcode.startswith("mbarrier.arrive") and stands_at(i.inlined_at, RELEASE)}
    assert len(releases) == 1
    return flow.released_unfenced(entry, lambda i: i.line in loads, lambda i: i.line in releases)


@pytest.mark.parametrize("dim, masked", SHIPPED)
def test_scales_are_fenced_before_their_slot_is_given_back(dim, masked):
    """Each thread, on every way through the shipped kernel; and this test sees where it is left out, or comes too late."""
    text = located(dim, masked)
    entry, shipped = entry_of(text), entry_of(ptx_of(variant(dim, masked), "sm_90"))
    assert [i.text for i in entry.instructions] == [i.text for i in shipped.instructions], "the places change the instructions"
    assert given_back_unfenced(entry) == []
    fence = "fence.proxy.async.shared::cta;"
    before, last, behind = text.rpartition(fence)
    assert last and text.count(fence) == 2, "that of the ones, and that of the scales"
    (release,) = (i.text for i in entry.instructions if i.opcode.startswith("mbarrier.arrive") and stands_at(i.inlined_at, RELEASE))
    for changed in (before + behind, before + behind.replace(f"{release};", f"{release}; {fence}", 1)):
        assert given_back_unfenced(entry_of(changed)) != []
