"""Mistakes that someone could make in the protocol, each with what the explorer must say of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from explorer import Search
from ring_protocol import Op, Program, Protocol, Section, meet


class Fault(NamedTuple):
    """`says`: a part of what is wrong. `search`: what the search must have to find it."""

    name: str
    change: Callable[[Protocol], Protocol]
    says: str
    overlap: bool = False
    two_lanes: tuple[int, ...] = ()
    drops: bool = False

    @property
    def search(self) -> Search:
        return Search(shift=False, drops=self.drops, two_lanes=self.two_lanes)


def edited(program: Program, label: str, old: tuple[Op, ...], new: tuple[Op, ...]) -> Program:
    """The program with `new` for the one run of operations `old` in a section."""
    ops, then = program[label]
    (at,) = [i for i in range(len(ops) - len(old) + 1) if ops[i : i + len(old)] == old]
    return {**program, label: Section((*ops[:at], *new, *ops[at + len(old) :]), then)}


def producing(label: str, old: tuple[Op, ...], new: tuple[Op, ...]) -> Callable[[Protocol], Protocol]:
    return lambda p: replace(p, producer=edited(p.producer, label, old, new))


def consuming(label: str, old: tuple[Op, ...], new: tuple[Op, ...], only: int | None = None) -> Callable[[Protocol], Protocol]:
    """In both warpgroups, or in one."""

    def change(p: Protocol) -> Protocol:
        return replace(p, consumers=tuple(edited(x, label, old, new) if only in (None, i) else x for i, x in enumerate(p.consumers)))

    return change


def counting(**more: int) -> Callable[[Protocol], Protocol]:
    """So many arrivals more than it is."""
    return lambda p: replace(p, arrivals={name: count + more.get(name, 0) for name, count in p.arrivals.items()})


def announcing(**copies: int) -> Callable[[Protocol], Protocol]:
    return lambda p: replace(p, announced={**p.announced, **copies})


def with_places(**counts: int) -> Callable[[Protocol], Protocol]:
    return lambda p: replace(p, places={**p.places, **counts})


def metadata_first(p: Protocol) -> Protocol:
    """The metadata of a tile is written before the wait for its stage."""
    acquire, program = p.producer["tile"], dict(p.producer)
    asking = acquire.ops[1:]
    program["tile"] = Section(asking, acquire.then)
    for label in ("another tile", "last tile"):
        write, expect, following = program[label].ops
        program[label] = Section((write, acquire.ops[0], *meet(), expect, following), program[label].then)
    return replace(p, producer=program)


def with_a_throttle(p: Protocol) -> Protocol:
    """Instead of turns: warpgroup 1 tells of every tile that it goes on to, and warpgroup 0 waits for that once it has freed the one before."""
    told, programs = (Op("come", "turn0"), Op("stay", "turn0")), []
    for group, program in enumerate(p.consumers):
        without = {label: Section(tuple(op for op in ops if not op.what.startswith("turn")), then) for label, (ops, then) in program.items()}
        programs.append(edited(without, "more", *(((NEXT_FULL,), (NEXT_FULL, told[0])) if group else ((FREE,), (FREE, *told)))))
    return replace(p, consumers=tuple(programs))


FREE = Op("arrive", "empty", first=True)
FULL, NEXT_FULL, Q_FULL = Op("wait", "full"), Op("wait", "full", 1), Op("wait", "q_full")
ITEM_METADATA = (Op("write", "item", first=True, says="tiles"), Op("expect", "q_full", first=True))
SUMMED, SUMMED_IF_KEPT = Op("end", "v"), Op("end", "v", kept=True)


def late(wait: Op) -> tuple[tuple[Op, ...], tuple[Op, ...]]:
    return (wait,), (wait._replace(parity=1 - wait.parity),)


def alone(asks: str, barrier: str) -> tuple[tuple[Op, ...], tuple[Op, ...]]:
    """The lanes meet before their wait for a barrier, and not after it."""
    wait = Op("wait", barrier, parity=1)
    return (wait, *meet(asks)), (*meet(asks), wait)


FAULTS = [
    Fault("a stage is free when all warps but one are done with it", counting(empty=-1), "overwrites v"),
    Fault("without turns a stage is free when all warps but one are done with it", counting(empty=-1), "overwrites v", overlap=True),
    Fault("a slot is free when all warps but one are done with it", counting(q_empty=-1), "finds that of item 2"),
    Fault("a stage is free when one warp more is done with it", counting(empty=1), "is left in the middle of phase 0"),
    Fault("tiles are waited for with the other parity", consuming("first", *late(FULL)), "it wants the end of phase 0"),
    Fault("the next tile is waited for with the other parity", consuming("more", *late(NEXT_FULL)), "it wants the end of phase 0"),
    Fault("items are waited for with the other parity", consuming("item", *late(Q_FULL)), "it wants the end of phase 0"),
    Fault("free stages are waited for with the other parity", producing("tile", *late(Op("wait", "empty", parity=1))), "has the same parity"),
    Fault("free slots are waited for with the other parity", producing("fetch", *late(Op("wait", "q_empty", parity=1))), "has the same parity"),
    Fault("the next tile is not waited for", consuming("more", (NEXT_FULL,), ()), "finds"),
    Fault("the first turn is not handed over", consuming("start", (Op("come", "turn0"),), (), only=1), "nobody can go on"),
    Fault("the last turn is not taken", consuming("over", (Op("come", "turn0"), Op("stay", "turn0")), (), only=0), "left over"),
    Fault("a warpgroup hands the turn to itself", consuming("more", (Op("come", "turn1"),), (Op("come", "turn0"),), only=0),
          "comes to turn0 once more"),
    Fault("a turn is handed over that was not taken", with_a_throttle, "comes to turn0 once more"),
    Fault("a turn is of one warpgroup", lambda p: replace(p, ring=replace(p.ring, turn_threads=p.ring.turn_threads // 2)),
          "not of each of its warps once"),
    Fault("a stage is freed before its product is waited for", consuming("more", (SUMMED_IF_KEPT, *meet(), FREE), (FREE, SUMMED_IF_KEPT, *meet())),
          "overwrites v"),
    Fault("without turns a stage is freed before its product is waited for", consuming("more", (SUMMED, *meet(), FREE), (FREE, SUMMED, *meet())),
          "overwrites v", overlap=True),
    Fault("a stage is freed before its last product is waited for",
          consuming("last", (SUMMED_IF_KEPT, *meet(), FREE), (FREE, SUMMED_IF_KEPT, *meet())), "overwrites v"),
    Fault("a tile that is dropped is not freed", consuming("more", (FREE,), (FREE._replace(kept=True),)), "nobody can go on", drops=True),
    Fault("a tile that is dropped keeps the turn", consuming("more", (Op("come", "turn1"),), (Op("come", "turn1", kept=True),), only=0),
          "nobody can go on", drops=True),
    Fault("the producer's lanes do not meet after their wait for a slot", producing("fetch", *alone("item", "q_empty")), "has the same parity",
          two_lanes=(0,)),
    Fault("the producer's lanes do not meet after their wait for a stage", producing("tile", *alone("last", "empty")), "has the same parity",
          two_lanes=(0,)),
    Fault("an item is given back while a lane reads it", consuming("leave", (Op("end", "item"), *meet()), (Op("end", "item"),)), "overwrites item",
          two_lanes=(1,)),
    Fault("metadata of a tile is written before its stage is free", metadata_first, "reads metadata of tile 0 in stage 0 and finds that of tile 2"),
    Fault("metadata of an item is written after its copies are announced", producing("item", ITEM_METADATA, ITEM_METADATA[::-1]),
          "reads item of item 0 in slot 0 and finds nothing"),
    Fault("fewer bytes of a tile are announced than copied", announcing(full=1), "a copy on its way"),
    Fault("fewer bytes of an item are announced than copied", announcing(q_full=1), "a copy on its way"),
    Fault("more bytes of a tile are announced than copied", announcing(full=3), "nobody can go on"),
    Fault("two slots have one place for Q", with_places(q=1), "overwrites q"),
]  # fmt: skip
