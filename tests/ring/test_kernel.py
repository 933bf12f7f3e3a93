"""Hopper's kernel on the emulator does at its barriers what the programs of ring_protocol.py say, warp by warp, and in no other order."""

from __future__ import annotations

import dataclasses
import functools

import emulator
import hopper_candidates
import protocol_faults
import pytest
import ring_protocol
import torch
from ring_protocol import Protocol, of
from sequence import WARP, Noted, Work, expected
from sparge_kernels import config
from test_attention import Problem, inputs, ramp

LISTS = {
    "lists of many lengths": (3, 0, 1, 17, 2, 0, 5, 8),
    "empty lists": (0, 0, 0, 0, 0),
    "one long list": (33,),
    "lists of one block": (1,) * 7,
}


def launched(work: Work, seed: int, grid: int = 1, drop: bool = False) -> tuple[Problem, list[emulator.Record]]:
    """A launch over these lists, of which a CTA alone fetches the last one first."""
    counts = work.counts[::-1]
    n_k = max(*counts, 1)
    q, k, v, kept = inputs(31, 1, 1, 1, len(counts) * 128, n_k * 64, work.dim)
    if drop:
        q, k = ramp(q, k)
    for row, count in enumerate(counts):
        kept[0, 0, row] = torch.arange(n_k) < count
    problem = Problem(q, k, v, kept, kernel="sm90", pvthreshd=6.0 if drop else 1e6, chosen=work.chosen)
    records: list[emulator.Record] = []
    (symbol,) = problem.variant.symbols
    launch = emulator.library(problem.variant).launch
    launch(symbol, grid, problem.params, threads=problem.variant.threads, seed=seed, record=records)
    return problem, records


def compare(work: Work, records: list[emulator.Record], cta: int = 0, protocol: Protocol | None = None) -> list[bool]:
    """Every thread of a CTA with its program; returns whether tiles were kept, of both warpgroups."""
    protocol = protocol or of(work.chosen)
    noted = Noted(records, cta, protocol, work)
    verdicts = [[], noted.verdicts(1), noted.verdicts(2)]
    assert noted.threads() <= set(range(config.SM90.threads))
    for warp in range(config.SM90.threads // WARP):
        first, others = (expected(protocol, work, warp, first, verdicts[warp // 4]) for first in (True, False))
        for lane in range(WARP):
            got, wanted = noted.events(WARP * warp + lane), others if lane else first
            if got != wanted:
                at = next((i for i, (x, y) in enumerate(zip(got, wanted, strict=False)) if x != y), min(len(got), len(wanted)))
                pytest.fail(f"warp {warp}, lane {lane}, operation {at}: the kernel has {got[at : at + 3]}, the program {wanted[at : at + 3]}")
    return verdicts[1] + verdicts[2]


SHIPPED = [(dim, config.HOPPER_CONFIG[dim]) for dim in config.DIMS]
FORMS = SHIPPED + [(dim, chosen) for dim in config.DIMS for chosen in hopper_candidates.candidates(dim) if chosen.overlap and chosen.ones]
forms = pytest.mark.parametrize(("dim", "chosen"), FORMS, ids=[f"d{dim} {hopper_candidates.label(chosen)}" for dim, chosen in FORMS])


@forms
@pytest.mark.parametrize("lists", LISTS)
def test_every_warp_follows_its_program(dim, chosen, lists):
    work = Work(dim, chosen, LISTS[lists])
    kept = compare(work, launched(work, seed=len(work.counts))[1])
    assert len(kept) == 2 * len(work.tiles) and all(kept)


@forms
def test_dropped_tiles_change_nothing_at_the_barriers(dim, chosen):
    work = Work(dim, chosen, (20, 3, 20))
    problem, records = launched(work, 1, drop=True)
    kept = compare(work, records)
    dropped, tiles = problem.tensors["pv_tiles"][0, 0].tolist()
    assert 0 < dropped == kept.count(False) and tiles == len(kept)


def test_two_ctas_follow_their_programs_with_what_they_fetched():
    chosen = config.HOPPER_CONFIG[64]
    _, records = launched(Work(64, chosen, (5,) * 7), 3, grid=2)
    fetched = [sum(r.block == cta and r.event == "copy" and r.amount == 128 * 64 for r in records) for cta in (0, 1)]
    assert sum(fetched) == 7
    for cta, items in enumerate(fetched):
        compare(Work(64, chosen, (5,) * items), records, cta)


# Either side alone is noticed.

KERNEL = "attention_sm90.cuh"
EDITS = {
    "a stage is free after 7 warps": ("barrier_init(empty(i), 8)", "barrier_init(empty(i), 7)"),
    "a slot is free after 7 warps": ("barrier_init(q_empty(i), 8)", "barrier_init(q_empty(i), 7)"),
    "one slot": ("constexpr int kSlots = 2;", "constexpr int kSlots = 1;"),
    "other hardware barriers": ("kTurn = 1, kVote = 3;", "kTurn = 5, kVote = 7;"),
    "the turn is handed over after the stage is freed": (
        "            pass_turn();\n            wgmma_wait<1>(product);\n            free_stage();",
        "            wgmma_wait<1>(product);\n            free_stage();\n            pass_turn();",
    ),
    "every warp of the first warpgroup waits": ("if (warp_id() == 0) produce(p, blocks_q);",
                                                "if (warp_id() == 0) produce(p, blocks_q); else barrier_wait(full(0), 1);"),
}  # fmt: skip
SMALL = Work(64, config.HOPPER_CONFIG[64], (3, 0, 1, 17, 2, 5))


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_the_kernel_alone_is_noticed(edit):
    with emulator.altered(KERNEL, *EDITS[edit]), pytest.raises((pytest.fail.Exception, RuntimeError, ValueError)):
        compare(SMALL, launched(SMALL, 1)[1])


@functools.cache
def noted() -> list[emulator.Record]:
    return launched(Work(64, SMALL.chosen, (20, 3, 0, 20)), 1, drop=True)[1]


def agrees(protocol: Protocol | None = None, **changes) -> bool:
    """Whether the kernel does what this protocol says; `changes` are to how it is built."""
    try:
        compare(Work(64, dataclasses.replace(SMALL.chosen, **changes), (20, 3, 0, 20)), noted(), protocol=protocol)
    except (pytest.fail.Exception, ValueError):
        return False
    return True


@pytest.mark.parametrize("change", [dict(slots=3), dict(frees=7), dict(fills=2), dict(turn=2), dict(vote=5), dict(turn_threads=128),
                                    dict(vote_threads=256)], ids=lambda change: next(iter(change)))  # fmt: skip
def test_an_edit_of_the_table_alone_is_noticed(monkeypatch, change):
    assert agrees()
    monkeypatch.setattr(ring_protocol, "RING", dataclasses.replace(ring_protocol.RING, **change))
    assert not agrees()


@pytest.mark.parametrize("change", [dict(stages=5), dict(tile_blocks=3), dict(overlap=True)], ids=lambda change: next(iter(change)))
def test_another_configuration_is_noticed(change):
    assert not agrees(**change)


UNSEEN = ("do not meet", "while a lane reads it", "before its product", "before its last product", "metadata of", "announced",
          "one place for Q", "a turn is of one")  # fmt: skip
"""Faults that nobody sees at the barriers: of what is read or written when, and of the model's numbers that stand for bytes and places."""


@pytest.mark.parametrize("fault", [x for x in protocol_faults.FAULTS if not x.overlap and not any(word in x.name for word in UNSEEN)],
                         ids=lambda fault: fault.name)  # fmt: skip
def test_an_edit_of_the_programs_alone_is_noticed(fault):
    assert not agrees(fault.change(of(SMALL.chosen)))
