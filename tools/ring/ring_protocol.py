"""What the warps of kernels/cuda/src/attention_sm90.cuh do to each other, and nothing else of them: who waits for what, arrives where, reads and
overwrites what, as short programs.

    protocol = of(config.HOPPER_CONFIG[128])

tools/ring/explorer.py runs these programs in every interleaving, tests/ring/test_kernel.py compares them with what the kernel does on the emulator.
There are two programs: the producer's, and the consumers', which both warpgroups have with other hardware barriers.

A program is a table of sections. A section is a list of operations and what is done after it: a label, or one for each answer to a question that an
operation of the section has asked. Numbers of tiles and items are relative to the lane's counters `tile` and `turn` (how many went before), as in the
kernel: tile n lies in stage n % stages, item n in slot n % slots.

Lists have no lengths here. Whether a tile is its item's last one, whether an item is empty and whether there is one at all is decided when the
producer comes to ask, either way, and what it decided travels with the metadata of the tile and of the item. So one exploration covers lists of any
length and any number of items, and every split of the items among CTAs: they share nothing but the counter that they fetch from, and what a
CTA fetches is some subsequence of the items and then the end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from sparge_kernels import config

TILE, ITEM = "tile", "item"

PLACES = {"k": TILE, "v": TILE, "metadata": TILE, "q": ITEM, "scales": ITEM, "item": ITEM}
"""What is read and overwritten in shared memory: of a stage, or of a slot."""

BARRIERS = {"full": TILE, "empty": TILE, "q_full": ITEM, "q_empty": ITEM}
"""The barriers in shared memory: one of each per stage, or per slot."""

KINDS = {**BARRIERS, **PLACES, TILE: TILE, ITEM: ITEM}
"""Whether something is one of a stage or of a slot."""

COPIES = {"full": ("k", "v"), "q_full": ("q", "scales")}
"""What is copied on the account of a barrier. The blocks of a tile are issued together, and one stands for all."""


class Op(NamedTuple):
    """One operation of a lane.

    Attributes
    ----------
    kind : str
        "wait", "arrive", "expect" (announces copies, arrives, and issues them) at a barrier in shared memory; "come" and "stay", the two halves of
        meeting others at `what` ("meet": the lanes of the warp; "turn0", "turn1", "vote"), of which "come" alone only arrives; "begin" and "end" of
        reading a place; "write" to it; "learn" a question's answer from a place; "next" tile or item.
    what : str
        A barrier, a place, a meeting or a question.
    ahead : int
        0: the tile or item at hand; 1: the next one.
    first : bool
        By the warp's first lane alone.
    kept : bool or None
        Only where the tile at hand was kept, or dropped.
    asks : str
        A question that is answered where the lanes part.
    says : str
        The answer that is written to a place for those who learn it there.
    parity : int
        1: the wait is for the phase before, as one who fills a place waits for its last user.
    """

    kind: str
    what: str
    ahead: int = 0
    first: bool = False
    kept: bool | None = None
    asks: str = ""
    says: str = ""
    parity: int = 0


@dataclass(frozen=True)
class Ring:
    """What the warps of attention_sm90.cuh agree on however it is built.

    Attributes
    ----------
    slots : int
        Items whose Q is there or on its way.
    fills : int
        Arrivals that a stage or a slot is full after, beside the bytes that they announce: the producer's first lane.
    frees : int
        Arrivals that a stage or a slot is empty after: one of each warp that computes.
    turn, vote : int
        Hardware barriers of the first warpgroup that computes; the second one's are the next.
    turn_threads, vote_threads : int
        Threads that meet there: those of both warpgroups, those of one.
    """

    slots: int = config.HOPPER_SLOTS
    fills: int = 1
    frees: int = 8
    turn: int = 1
    vote: int = 3
    turn_threads: int = 256
    vote_threads: int = 128


RING = Ring()


class Section(NamedTuple):
    ops: tuple[Op, ...]
    then: str | dict[str, str]
    """A label, or answer -> label; "" ends the program."""


Program = dict[str, Section]


@dataclass(frozen=True)
class Protocol:
    """The programs and the numbers that they rest on.

    Attributes
    ----------
    stages, slots : int
    warps : int
        Of a warpgroup.
    ring : Ring
    producer : Program
    consumers : tuple of Program
    arrivals : dict of str to int
        Of each phase of a barrier.
    announced : dict of str to int
        Copies that "expect" announces at a barrier.
    places : dict of str to int
        How many there are of each.
    """

    stages: int
    slots: int
    warps: int
    ring: Ring
    producer: Program
    consumers: tuple[Program, ...]
    arrivals: dict[str, int]
    announced: dict[str, int]
    places: dict[str, int]

    def count(self, kind: str) -> int:
        """Stages or slots."""
        return self.stages if kind == TILE else self.slots


def meet(asks: str = "") -> tuple[Op, ...]:
    return Op("come", "meet"), Op("stay", "meet", asks=asks)


def sync(what: str, asks: str = "") -> tuple[Op, ...]:
    return Op("come", what), Op("stay", what, asks=asks)


def read(what: str, ahead: int = 0) -> tuple[Op, ...]:
    return Op("begin", what, ahead), Op("end", what, ahead)


def producer() -> Program:
    """The first warp of warpgroup 0."""

    # A lane that waited on while the place came and went once more would miss the phase: the lanes meet after the wait.
    def acquire(barrier: str, asks: str) -> tuple[Op, ...]:
        return Op("wait", barrier, parity=1), *meet(asks)

    def fill(barrier: str, metadata: str, says: str) -> tuple[Op, ...]:
        return Op("write", metadata, first=True, says=says), Op("expect", barrier, first=True), Op("next", BARRIERS[barrier])

    return {
        "fetch": Section(acquire("q_empty", ITEM), {"over": "over", "empty": "empty item", "tiles": "item"}),
        "empty item": Section(fill("q_full", "item", "empty"), "fetch"),
        "item": Section(fill("q_full", "item", "tiles"), "tile"),
        "tile": Section(acquire("empty", "last"), {"last": "last tile", "more": "another tile"}),
        "another tile": Section(fill("full", "metadata", "more"), "tile"),
        "last tile": Section(fill("full", "metadata", "last"), "fetch"),
        "over": Section((Op("write", "item", first=True, says="over"), Op("arrive", "q_full", first=True)), ""),
    }


def consumer(warpgroup: int, overlap: bool) -> Program:
    """The warps of a warpgroup that computes.

    A product reads shared memory from its issue until it was waited for. With turns P V of a tile and Q K^T of the next one are issued in the
    warpgroup's turn; without them P V is under way during the softmax of the next tile.
    """

    def scores(ahead: int) -> tuple[Op, ...]:
        return Op("begin", "k", ahead), Op("begin", "q")

    def scored(ahead: int) -> tuple[Op, ...]:
        return Op("end", "k", ahead), Op("end", "q")

    def softmax(ahead: int) -> tuple[Op, ...]:
        learn = Op("learn", "last", ahead)
        return Op("begin", "metadata", ahead), Op("begin", "scales"), learn, Op("end", "metadata", ahead), Op("end", "scales"), *sync("vote", "kept")

    free = Op("arrive", "empty", first=True)
    tile_is_there = (Op("wait", "full", 1), *meet())
    if overlap:
        more = (*tile_is_there, *scores(1), Op("begin", "v"), *scored(1), *softmax(1), Op("end", "v"), *meet(), free)
    else:
        take, hand = sync(f"turn{warpgroup}"), Op("come", f"turn{1 - warpgroup}")
        values, summed = Op("begin", "v", kept=True), Op("end", "v", kept=True)
        more = (*take, *tile_is_there, values, *scores(1), hand, summed, *meet(), free, *scored(1), *softmax(1))
    last = (Op("begin", "v", kept=True), Op("end", "v", kept=True), *meet(), free)
    rest = {"last": "last", "more": "more"}
    turns = not overlap
    return {
        "start": Section((Op("come", "turn0"),) if turns and warpgroup == 1 else (), "item"),
        "item": Section(
            (Op("wait", "q_full"), *meet(), Op("begin", "item"), Op("learn", ITEM)), {"over": "over", "empty": "leave", "tiles": "first"}
        ),
        "first": Section((Op("wait", "full"), *meet(), *scores(0), *scored(0), *softmax(0)), rest),
        "more": Section((*more, Op("next", TILE)), rest),
        "last": Section((*last, Op("next", TILE)), "leave"),
        "leave": Section((Op("end", "item"), *meet(), Op("arrive", "q_empty", first=True), Op("next", ITEM)), "item"),
        "over": Section((Op("end", "item"), *(sync("turn0") if turns and warpgroup == 0 else ())), ""),
    }


def of(chosen: config.HopperConfig, warps: int = 4) -> Protocol:
    """The protocol of Hopper's kernel as `chosen`, in small with fewer warps in a warpgroup."""
    ring = RING
    if warps != 4:
        ring = replace(ring, frees=2 * warps, turn_threads=64 * warps, vote_threads=32 * warps)
    counts = {TILE: chosen.stages, ITEM: ring.slots}
    return Protocol(
        stages=chosen.stages,
        slots=ring.slots,
        warps=warps,
        ring=ring,
        producer=producer(),
        consumers=tuple(consumer(warpgroup, chosen.overlap) for warpgroup in (0, 1)),
        arrivals={barrier: ring.frees if barrier.endswith("empty") else ring.fills for barrier in BARRIERS},
        announced={barrier: len(copies) for barrier, copies in COPIES.items()},
        places={place: counts[kind] for place, kind in PLACES.items()},
    )
