"""The protocol of Hopper's kernel holds in every interleaving, and the search finds what is wrong with it where something is."""

from __future__ import annotations

import protocol_faults
import pytest
from explorer import Explorer, Search, explore, start, story
from prove import Case
from world import State, World, beginning

LANES = Search(two_lanes=(0, 1, 2))
KEPT = Search(two_lanes=(), drops=False)

MEASURED = [
    (Case(2, False, 1, LANES), 59135, 77),
    (Case(2, False, 2), 16873, 55),
    (Case(2, True, 2), 9378, 42),
    (Case(3, False, 2), 44047, 63),
    (Case(2, False, 4, KEPT), 41203, 81),
    (Case(2, True, 4, KEPT), 32257, 56),
]
"""States and depth. `make proof` has them all with whole warpgroups."""


@pytest.mark.parametrize(("case", "states", "depth"), MEASURED, ids=[case.label for case, _, _ in MEASURED])
def test_nothing_is_wrong_in_any_interleaving(case, states, depth):
    found = explore(case.protocol(), case.search)
    print(f"{case.label}: {found.states} states, {found.steps} steps, depth {found.depth}")
    assert (found.wrong, found.states, found.depth) == ("", states, depth)


def test_one_stage_is_too_few():
    """Q K^T of the next tile is issued before P V of this one is over."""
    assert "nobody can go on" in explore(Case(1, False, 2).protocol()).wrong


@pytest.mark.parametrize("fault", protocol_faults.FAULTS, ids=lambda fault: fault.name)
def test_fault(fault):
    protocol = fault.change(Case(2, fault.overlap, 2).protocol())
    found = explore(protocol, fault.search)
    told = story(protocol, fault.search, found)
    print(*told, sep="\n")
    assert fault.says in told[-1]


def test_a_story_tells_who_did_what():
    fault = next(fault for fault in protocol_faults.FAULTS if fault.name == "a slot is free when all warps but one are done with it")
    protocol = fault.change(Case(2, False, 1).protocol())
    told = story(protocol, fault.search, explore(protocol, fault.search))
    assert told[:2] == [
        "the producer: is let through by q_empty[0], parity 1; item: empty; writes item of item 0 in slot 0: empty",
        "the producer: arrives at q_full[0] and announces 2 copies; has q of item 0 in slot 0 copied; has scales of item 0 in slot 0 copied",
    ]
    assert told[-1] == "warp 0 of warpgroup 1 reads item of item 0 in slot 0 and finds that of item 2" and len(told) == 9


# What makes the search small.


SOON = ("a slot is free", "are waited for with the other parity", "the first turn", "the last turn", "a turn is of", "after their wait for a slot",
        "fewer bytes of a tile", "two slots")  # fmt: skip
"""Faults that come out before a search of single operations has grown."""


@pytest.mark.parametrize("fault", [x for x in protocol_faults.FAULTS if any(y in x.name for y in SOON)], ids=lambda fault: fault.name)
def test_a_search_of_single_operations_finds_the_same_faults(fault):
    protocol = fault.change(Case(2, fault.overlap, 1).protocol())
    small, plain = (explore(protocol, fault.search._replace(fuse=fuse, alike=fuse)) for fuse in (True, False))
    assert small.wrong and plain.wrong


def reached(case: Case, search: Search, depth: int) -> set[State]:
    """The states of the first so many steps, as if the search were with `alike` and `shift`."""
    protocol = case.protocol()
    explorer = Explorer(protocol, search)
    found = {explorer.keep(world.take(search.shift)) for _, world in explorer.ways(beginning(protocol, search.two_lanes), start)}
    frontier = set(found)
    for _ in range(depth):
        after = set()
        for key in frontier:
            for move in explorer.moves(key):
                ways = explorer.ways(explorer.kept(key), lambda world, move=move: world.step(move))
                after |= {explorer.keep(world.take(search.shift)) for _, world in ways}
        frontier = after - found
        found |= frontier
    small = set()
    for key in found:
        state = World(protocol, explorer.codes, explorer.kept(key)).take(shift=True)
        small.add(state._replace(groups=tuple(tuple(sorted(warps)) for warps in state.groups)))
    return small


@pytest.mark.parametrize("overlap", (False, True), ids=("turns", "overlap"))
def test_states_that_are_taken_for_one_are_one(overlap):
    """A search that tells warps and rounds apart sees the same states."""
    case = Case(2, overlap, 2)
    assert reached(case, Search(), 13) == reached(case, Search(alike=False, shift=False), 13)
