"""What each warp does at barriers, one after the other: by the programs of ring_protocol.py, and by what the emulator has noted of a launch.

Both are lists of `Event`, so that a test can compare them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from emulator import Record
from ring_protocol import BARRIERS, ITEM, TILE, Op, Program, Protocol
from sparge_kernels import config

BLOCK_Q, BLOCK_K = 128, 64
WARP, WARPGROUP = 32, 128
SCALES = 4 * BLOCK_Q
"""Bytes of the scales of an item's queries."""


class Event(NamedTuple):
    """`what`: a barrier, a place or a number of a hardware barrier; `index`: which of them; `amount`: parity, bytes, arrivals or threads."""

    kind: str
    what: str | int
    index: int = 0
    amount: int = 0


class Work(NamedTuple):
    """What a CTA has to do.

    Attributes
    ----------
    dim : int
    chosen : config.HopperConfig
    counts : tuple of int
        Blocks in the list of each item that it fetches, in order.
    """

    dim: int
    chosen: config.HopperConfig
    counts: tuple[int, ...]

    @property
    def tiles(self) -> list[tuple[int, bool]]:
        """(blocks, whether it is the last of its item) of every tile."""
        size = self.chosen.tile_blocks
        return [(min(size, count - first), first + size >= count) for count in self.counts for first in range(0, count, size)]

    def answer(self, question: str, tile: int, turn: int) -> str:
        """To the questions about items and tiles."""
        if question == ITEM:
            return "over" if turn == len(self.counts) else "tiles" if self.counts[turn] else "empty"
        return "last" if self.tiles[tile][1] else "more"


def steps(program: Program, first: bool, answer: Callable[[str, int, int], str | bool]) -> Iterator[tuple[Op, int, bool]]:
    """(operation, number of its tile or item, whether the lane stays there) of one lane, from the start to the end of its program."""
    tile = turn = 0
    kept, label = None, next(iter(program))
    while label:
        ops, then = program[label]
        answered = None
        for i, op in enumerate(ops):
            if (op.first and not first) or (op.kept is not None and op.kept != kept):
                continue
            asked = op.asks or (op.what if op.kind == "learn" else "")
            if asked == "kept":
                kept = answer(asked, tile, turn)
            elif asked:
                answered = answer(asked, tile + op.ahead, turn)
            if op.kind == "next":
                tile, turn = tile + (op.what == TILE), turn + (op.what == ITEM)
            elif op.what in BARRIERS:
                yield op, (tile if BARRIERS[op.what] == TILE else turn) + op.ahead, True
            elif op.kind == "come" and op.what != "meet":
                yield op, 0, ops[i + 1 : i + 2] != () and ops[i + 1].kind == "stay"
        label = then[answered] if isinstance(then, dict) else then


def expected(protocol: Protocol, work: Work, warp: int, first: bool, verdicts: list[bool]) -> list[Event]:
    """Of a warp's first lane, or of each of its others. `verdicts`: of its warpgroup on each tile, whether it is kept."""
    group = warp // 4
    program, left = (protocol.consumers[group - 1] if group else protocol.producer), iter(verdicts)
    ring, found = protocol.ring, []
    if warp == 0 and first:
        found += [Event("init", name, i, protocol.arrivals[name]) for i in range(protocol.stages) for name in ("full", "empty")]
        found += [Event("init", name, i, protocol.arrivals[name]) for i in range(protocol.slots) for name in ("q_full", "q_empty")]
    if group == 0 and warp > 0:
        return []

    def answer(question: str, tile: int, turn: int) -> str | bool:
        return next(left) if question == "kept" else work.answer(question, tile, turn)

    for op, number, stays in steps(program, first, answer):
        if op.kind == "come":
            vote = op.what == "vote"
            at = ring.vote + group - 1 if vote else ring.turn + int(op.what[-1])
            kind = "any_thread" if vote else "sync_threads" if stays else "arrive_threads"
            found.append(Event(kind, at, 0, ring.vote_threads if vote else ring.turn_threads))
            continue
        size = protocol.count(BARRIERS[op.what])
        if op.kind == "wait":
            found.append(Event("wait", op.what, number % size, number // size + op.parity & 1))
        elif op.kind == "arrive":
            found.append(Event("arrive", op.what, number % size))
        else:
            copies = copied(work, op.what, number, size)
            found += [Event("arrive", op.what, number % size, sum(copy.amount for copy in copies)), *copies]
    return found


def copied(work: Work, barrier: str, number: int, size: int) -> list[Event]:
    """The copies of an item or of a tile: `index` counts blocks through the stages."""
    if barrier == "q_full":
        return sorted([Event("copy", "q", number % size, BLOCK_Q * work.dim), Event("copy", "scales", number % size, SCALES)])
    first, bytes_of_block = number % size * work.chosen.tile_blocks, BLOCK_K * work.dim
    blocks = {"k": work.tiles[number][0], "v": work.chosen.tile_blocks}
    return sorted(Event("copy", place, first + b, bytes_of_block) for place, count in blocks.items() for b in range(count))


class Noted:
    """What the emulator noted of one CTA.

    Raises
    ------
    ValueError
        An address is that of nothing.
    """

    def __init__(self, records: list[Record], cta: int, protocol: Protocol, work: Work):
        self.protocol, self.work = protocol, work
        self.of: dict[int, list[Record]] = {}
        for record in records:
            if record.block == cta:
                self.of.setdefault(record.thread, []).append(record)
        inits = [record.where for record in self.of.get(0, []) if record.event == "init"]
        names = [(name, i) for i in range(protocol.stages) for name in ("full", "empty")]
        names += [(name, i) for i in range(protocol.slots) for name in ("q_full", "q_empty")]
        self.barriers = dict(zip(inits, names, strict=False))
        if len(self.barriers) != len(names):
            raise ValueError(f"{len(inits)} barriers, not {len(names)}")
        self.places: dict[int, tuple[str, int]] = {}
        base = next((record.where for record in self.of[0] if record.event == "copy"), 0)  # 0: there was nothing left to fetch
        dim, chosen = work.dim, work.chosen
        blocks = protocol.stages * chosen.tile_blocks
        self._lay("q", base, protocol.slots, BLOCK_Q * dim)
        self._lay("k", base + protocol.slots * BLOCK_Q * dim, blocks, BLOCK_K * dim)
        self._lay("v", base + protocol.slots * BLOCK_Q * dim + blocks * BLOCK_K * dim, blocks, BLOCK_K * (dim + 8 * chosen.ones))

    def _lay(self, place: str, start: int, count: int, size: int) -> None:
        self.places.update({start + i * size: (place, i) for i in range(count)})

    def threads(self) -> set[int]:
        return set(self.of)

    def verdicts(self, group: int) -> list[bool]:
        """Of a warpgroup that computes (1 or 2) on each tile: whether any of its threads said to keep it."""
        threads = range(WARPGROUP * group, WARPGROUP * (group + 1))
        votes = [[record.other for record in self.of.get(thread, []) if record.event == "any_thread"] for thread in threads]
        return [any(said) for said in zip(*votes, strict=False)]

    def events(self, thread: int) -> list[Event]:
        """What a thread did; copies one after the other are sorted, for the order of their issue means nothing."""
        found, copies = [], []
        for record in self.of.get(thread, []):
            if record.event == "copy":
                copies.append(Event("copy", *self.place(record), record.amount))
                continue
            found += sorted(copies)
            copies = []
            at = (record.where,) if record.event.endswith(("threads", "thread")) else self.barrier(record.where)
            found.append(Event(record.event, *at, *([0] if len(at) == 1 else []), record.amount))
        return found + sorted(copies)

    def barrier(self, address: int) -> tuple[str, int]:
        if address not in self.barriers:
            raise ValueError(f"{address} is the address of no barrier")
        return self.barriers[address]

    def place(self, copy: Record) -> tuple[str, int]:
        """Where a copy goes. The scales of a slot lie among the metadata, wherever the compiler puts them, but always in the same place."""
        name, index = self.barrier(copy.other)
        found = self.places.get(copy.where)
        if found is None and name == "q_full" and ("scales", index) not in self.places.values():
            found = self.places[copy.where] = ("scales", index)
        if found is None:
            raise ValueError(f"a copy goes to {copy.where}, where nothing is")
        owner = {"q": "q_full", "scales": "q_full", "k": "full", "v": "full"}[found[0]]
        if owner != name:
            raise ValueError(f"a copy of {found[0]} is on the account of {name}")
        return found
