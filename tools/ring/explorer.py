"""Runs the programs of ring_protocol.py in every interleaving.

    found = explore(protocol.of(config.HOPPER_CONFIG[128]))
    print(found.states, found.depth, found.wrong)

The model is a CTA: the producer's warp and the warps of two warpgroups, which are not tied to each other but by what they wait for. A
warp is one lane or, where a search asks for it, two: the first, and all others as one that may lag behind it. (Lanes do nothing to each other but
meet, so where one of the 31 goes wrong, it does so in a run in which the other 30 are where they are needed.) Barriers in shared memory have a
phase, and the arrivals and copies that it still waits for; a wait passes when the parity of the phase is not the one that it names. Copies are under
way from their issue, land at any later moment, each on its own, and until then nobody may read their place. A hardware barrier lets go when its
number of threads has come.

What is wrong, in any state:
- nobody can go on, and not everybody is at the end;
- a place is read and does not hold the tile or item that is wanted, or is overwritten while somebody reads it or a copy to it is under way;
- a wait passes although its phase is not over, or does not although it is; a phase gets more arrivals than it counts;
- a hardware barrier lets go of others than each of its warps, once;
- at the end a copy is under way, a barrier in the middle of a phase, or a thread left over at a hardware barrier.
Every step is progress in somebody's program. So with finite lists every run ends, and since nobody is ever stuck it ends where the programs end.

What makes it small, and why nothing is lost. Each can be switched off, and tests compare.
- `fuse`. A step is: waits that pass, and reads; then one thing that others can notice (arriving, coming to a meeting, announcing copies, writing),
  and on to the next wait or the next such thing.
  Waiting later changes nothing: a wait that passes goes on passing, or its phase is missed, which is looked for in every state. Reading later is not
  kinder: a place that was overwritten in between holds something else. (There is nothing in between that others could wait for.)
  Copies are issued with their announcement. A read that begins after something that others notice begins at once and ends with the lane's next step:
  longer than it is, which is not kinder.
  A copy lands when somebody waits for its barrier. Earlier it would let nobody go on, and what has not landed is wrong to read.
- `alike`. The warps of a warpgroup have one program: a state holds which positions there are, not whose they are.
- `shift`. A state in which all is one tile or item further on, in the next stage or slot, is the same one, so tiles and items count from the
  hindmost lane's. Thus the states are finitely many, although lists are of any length and items of any number. (Phases move along with their stage,
  for the parity is that of the round; a program that tells rounds otherwise must be searched without.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from ring_protocol import Protocol
from world import Code, State, Undecided, World, Wrong, beginning


class Search(NamedTuple):
    """How a search is made small.

    Attributes
    ----------
    fuse, alike, shift : bool
        See above.
    drops : bool
        Tiles may be dropped, as each warpgroup likes; else all are kept.
    two_lanes : tuple of int
        Groups (0: the producer's; 1 and 2: those that compute) whose first warp is two lanes.
    """

    fuse: bool = True
    alike: bool = True
    shift: bool = True
    drops: bool = True
    two_lanes: tuple[int, ...] = (0,)


class Move(NamedTuple):
    """A step: which lane of a warp in which state, or which copy lands, or (without either) the start; and what was chosen in it."""

    group: int
    warp: tuple
    lane: int
    copy: tuple
    choices: tuple


class Found(NamedTuple):
    """What a search has seen.

    Attributes
    ----------
    states, steps, depth : int
        Depth: the most steps that any state is away from the start.
    wrong : str
        Empty: nothing.
    way : tuple of Move
        The steps to what is wrong, for `story`; only of a search without `shift`.
    """

    states: int
    steps: int
    depth: int
    wrong: str
    way: tuple[Move, ...] = ()


class Explorer:
    """A protocol and how it is searched. States are kept as tuples of small numbers, each for a part that was seen before."""

    def __init__(self, protocol: Protocol, search: Search):
        self.protocol, self.search = protocol, search
        self.codes = [Code(program) for program in (protocol.producer, *protocol.consumers)]
        self.parts: list = []
        self.numbers: dict = {}
        self.can_go: dict[tuple, bool] = {}

    def keep(self, state: State) -> tuple:
        """(group of warps, ..., barriers, places, copies, met), each a number or a tuple of numbers."""
        groups = []
        for warps in state.groups:
            numbers = [self.number(warp) for warp in warps]
            groups.append(tuple(sorted(numbers) if self.search.alike else numbers))
        return (*groups, *[self.number(part) for part in state[1:]])

    def number(self, part) -> int:
        found = self.numbers.get(part)
        if found is None:
            found = self.numbers[part] = len(self.parts)
            self.parts.append(part)
        return found

    def kept(self, key: tuple) -> State:
        parts = self.parts
        return State(tuple([tuple([parts[x] for x in group]) for group in key[:3]]), *[parts[x] for x in key[3:]])

    def ways(self, state: State, act: Callable[[World], bool]) -> Iterator[tuple[tuple, World]]:
        """(choices, the world after `act`) for every way to choose in it."""
        open: list[tuple] = [()]
        while open:
            choices = open.pop()
            world = World(self.protocol, self.codes, state, choices, self.search.fuse)
            world.drops = self.search.drops
            try:
                if act(world):
                    yield choices, world
            except Undecided as more:
                open += [(*choices, i) for i in range(more.args[0])]
            except Wrong as wrong:
                wrong.choices = choices
                raise

    def moves(self, key: tuple) -> list[tuple]:
        """What may be done next: lanes of warps that differ, and copies that land."""
        found = []
        for group in range(3):
            warps = key[group]
            for i, warp in enumerate(warps):
                if not self.search.alike or i == 0 or warp != warps[i - 1]:
                    found += [(group, i, lane) for lane in range(len(self.parts[warp])) if self.may_go(key, group, warp, lane)]
        return found if self.search.fuse else found + list(self.parts[key[5]])

    def may_go(self, key: tuple, group: int, warp: int, index: int) -> bool:
        """False where a lane must wait, found out once for its position and what barriers and copies are."""
        at = (group, warp, index, key[3], key[5])
        found = self.can_go.get(at)
        if found is None:
            world = World(self.protocol, self.codes, self.kept(key), (0,) * 9, self.search.fuse)
            lane = next(x for i, x in enumerate(world.groups[group]) if key[group][i] == warp)[index]
            op = lane.code[lane.pc]
            try:
                found = op.kind not in ("stay", "done") and (op.kind != "wait" or world.passes(lane, op))
            except Wrong:
                found = True
            self.can_go[at] = found
        return found


def start(world: World) -> bool:
    """What is done before the first step."""
    for lane in world.lanes():
        world.go(lane, True)
    return True


def explore(protocol: Protocol, search: Search = Search(), limit: int = 10**7) -> Found:  # noqa: B008 - a tuple
    """Every state that the protocol can come to, breadth first: what is wrong is found on a shortest way.

    Raises
    ------
    RuntimeError
        There are more than `limit` states.
    """
    explorer = Explorer(protocol, search)
    steps = depth = 0
    came_by: dict[tuple, tuple | None] = {}
    key = move = None
    try:
        for choices, world in explorer.ways(beginning(protocol, search.two_lanes), start):
            came_by[explorer.keep(world.take(search.shift))] = (None, None, choices)
        frontier = list(came_by)
        while frontier:
            following = []
            for key in frontier:
                state, went = explorer.kept(key), False
                for move in explorer.moves(key):
                    for choices, world in explorer.ways(state, lambda world, move=move: world.step(move)):
                        went = True
                        steps += 1
                        after = explorer.keep(world.take(search.shift))
                        if after not in came_by:
                            came_by[after] = None if search.shift else (key, move, choices)
                            following.append(after)
                move = None
                if not went:
                    World(protocol, explorer.codes, state).check_end()
            frontier = following
            depth += bool(frontier)
            if len(came_by) > limit:
                raise RuntimeError(f"more than {limit} states")
    except Wrong as wrong:
        way = []
        if not search.shift:
            choices = getattr(wrong, "choices", ())
            while key is not None:
                if move is not None:
                    group, i, lane = move if len(move) == 3 else (0, 0, 0)
                    way.append(Move(group, explorer.parts[key[group][i]], lane, move if len(move) == 2 else (), choices))
                key, move, choices = came_by[key]
            way.append(Move(0, (), 0, (), choices))
        return Found(len(came_by), steps, depth, str(wrong), tuple(reversed(way)))
    return Found(len(came_by), steps, depth, "")


def sentences(log: list[tuple[str, str]]) -> list[str]:
    """What was done one after the other: a lane is named where it is another one than before."""
    found, last = [], ""
    for who, text in log:
        found.append(f"{who}: {text}" if who and who != last else text)
        last = who or last
    return found


def story(protocol: Protocol, search: Search, found: Found) -> list[str]:
    """What `found` found to be wrong, a line each step: who did what, and last what is wrong."""
    explorer = Explorer(protocol, search._replace(alike=False, shift=False))
    state, lines, wrong = beginning(protocol, search.two_lanes), [], found.wrong
    for move in found.way:
        world = World(protocol, explorer.codes, state, move.choices, search.fuse)
        world.drops, world.log = search.drops, []
        try:
            if move.copy:
                world.step(move.copy)
            elif move.warp:
                world.step((move.group, state.groups[move.group].index(move.warp), move.lane))
            else:
                start(world)
        except Wrong as again:
            wrong = str(again)
        if world.log:
            lines.append("; ".join(sentences(world.log)))
        state = world.take(False)
    return [*lines, wrong]
