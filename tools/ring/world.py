"""One state of the programs of ring_protocol.py, and what a step does to it. The rules stand at the top of explorer.py."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from ring_protocol import BARRIERS, COPIES, ITEM, KINDS, PLACES, TILE, Op, Program, Protocol

ACTS = frozenset(("come", "arrive", "expect", "write"))
"""What other lanes can notice."""
OWNER = {place: barrier for barrier, places in COPIES.items() for place in places}
"""The barrier that waits for a copy."""
ANSWERS = {ITEM: ("over", "empty", "tiles"), "last": ("last", "more"), "kept": (1, 0)}
TURNS, VOTES = (0, 2), 4
"""Places of the hardware barriers in `State.met`: two for each turn, of either warpgroup, and one for each vote."""


class Wrong(Exception):
    """What is wrong in a run."""


class Undecided(Exception):
    """A choice that a step has come to: how many ways there are."""


class State(NamedTuple):
    """A state taken down: tuples of numbers and words.

    Attributes
    ----------
    groups : tuple
        Of the producer and the two warpgroups: its warps, each a tuple of its lanes' (pc, tile, turn, answer, kept, open, closing).
    barriers : tuple
        By BARRIERS: (phase, missing arrivals, missing copies) of each.
    places : tuple
        By PLACES: (number of its tile or item, what it says) of each, or None where it is on its way.
    copies : tuple
        Those on their way: (place, number).
    met : tuple
        Threads that have come to hardware barriers.
    """

    groups: tuple
    barriers: tuple
    places: tuple
    copies: tuple
    met: tuple


class Lane:
    """A lane of a warp, or 31 that go together. `open`: what it reads; `closing`: of that, what ends with its next operation."""

    __slots__ = ("code", "group", "first", "threads", "pc", "tile", "turn", "answer", "kept", "open", "closing")

    def __init__(self, code: Code, group: int, first: bool, threads: int, at: tuple):
        self.code, self.group, self.first, self.threads = code, group, first, threads
        self.pc, self.tile, self.turn, self.answer, self.kept, self.open, self.closing = at

    def taken(self, tiles: int, turns: int) -> tuple:
        """Its part of a State that counts from these."""
        kept = self.kept if self.code.verdict_used[self.pc] else -1
        return self.pc, self.tile - tiles, self.turn - turns, self.answer, kept, self.open, self.closing

    def number(self, op: Op) -> int:
        """Of the tile or item that an operation is about."""
        return (self.turn if KINDS[op.what] == ITEM else self.tile) + op.ahead

    def stays(self, what: str) -> bool:
        op = self.code[self.pc]
        return type(op) is Op and op.kind == "stay" and op.what == what


class Code(list):
    """A program's sections one after the other: operations, and after each where it goes on, as a number or by the answer.

    Attributes
    ----------
    verdict_used : list of bool
        For each place whether the verdict on the tile at hand is still asked for before the next one: if not, states need not hold it.
    """

    def __init__(self, program: Program):
        starts, at = {}, 0
        for label, section in program.items():
            starts[label], at = at, at + len(section.ops) + 1
        for section in program.values():
            then = section.then
            self.extend(section.ops)
            self.append({answer: starts[to] for answer, to in then.items()} if isinstance(then, dict) else starts[then] if then else Op("done", ""))
        self.verdict_used = [False] * len(self)
        before = None
        while before != self.verdict_used:
            before = list(self.verdict_used)
            for pc, op in enumerate(self):
                if isinstance(op, Op):
                    self.verdict_used[pc] = op.kept is not None or (op.asks != "kept" and op.kind != "done" and before[pc + 1])
                else:
                    self.verdict_used[pc] = any(before[to] for to in (op.values() if isinstance(op, dict) else (op,)))


def beginning(protocol: Protocol, two_lanes: tuple[int, ...]) -> State:
    """Before the first step: places hold what would have gone before the first tile and item. `two_lanes`: of these groups the first warp has two."""
    lane = (0, 0, 0, "", -1, (), ())
    sizes = (1, protocol.warps, protocol.warps)
    groups = tuple(tuple((lane,) * (1 + (i == 0 and group in two_lanes)) for i in range(size)) for group, size in enumerate(sizes))
    barriers = tuple(((0, protocol.arrivals[name], 0),) * protocol.count(kind) for name, kind in BARRIERS.items())
    places = tuple(tuple((i - protocol.places[name], "") for i in range(protocol.places[name])) for name in PLACES)
    return State(groups, barriers, places, (), (0,) * 6)


def rotated(of: list, by: int) -> list:
    """From its `by`-th on, and then from the first."""
    by %= len(of)
    return of[by:] + of[:by] if by else of


class World:
    """A state in which a step is made. `choices` are made in turn; one too few raises Undecided."""

    def __init__(self, protocol: Protocol, codes: list[Code], state: State, choices: tuple = (), fuse: bool = True):
        self.protocol, self.choices, self.made, self.fuse = protocol, choices, 0, fuse
        self.groups = [[self._warp(codes[group], group, warp) for warp in warps] for group, warps in enumerate(state.groups)]
        self.barriers = dict(zip(BARRIERS, map(list, state.barriers), strict=True))
        self.places = dict(zip(PLACES, map(list, state.places), strict=True))
        self.copies = state.copies
        self.met = list(state.met)
        self.drops = True
        self.log: list[tuple[str, str]] | None = None

    @staticmethod
    def _warp(code: Code, group: int, warp: tuple) -> list[Lane]:
        if len(warp) == 1:
            return [Lane(code, group, True, 32, warp[0])]
        return [Lane(code, group, i == 0, (1, 31)[i], lane) for i, lane in enumerate(warp)]

    def lanes(self) -> list[Lane]:
        return [lane for warps in self.groups for warp in warps for lane in warp]

    def take(self, shift: bool) -> State:
        """The state as it is now; with `shift` tiles and items count from the hindmost lane's."""
        lanes = self.lanes()
        past = {TILE: min([lane.tile for lane in lanes]), ITEM: min([lane.turn for lane in lanes])}
        by = past if shift else {TILE: 0, ITEM: 0}
        tiles, turns = by[TILE], by[ITEM]
        groups = tuple([tuple([tuple([lane.taken(tiles, turns) for lane in warp]) for warp in warps]) for warps in self.groups])
        barriers, places = [], []
        for name, kind in BARRIERS.items():
            of, size = self.barriers[name], self.protocol.count(kind)
            if by[kind]:
                of = [(x[0] - (i + by[kind]) // size, *x[1:]) for i, x in enumerate(rotated(of, by[kind]))]
            barriers.append(tuple(of))
        for name, kind in PLACES.items():
            # What every lane is past says nothing more.
            of = [there and (there[0] - by[kind], there[1] if there[0] >= past[kind] else "") for there in self.places[name]]
            places.append(tuple(rotated(of, by[kind])))
        copies = tuple(sorted([(place, number - by[PLACES[place]]) for place, number in self.copies])) if self.copies else ()
        return State(groups, tuple(barriers), tuple(places), copies, tuple(self.met))

    # Choices, and what a step says of itself.

    def choose(self, ways: int) -> int:
        if ways == 1:
            return 0
        if self.made == len(self.choices):
            raise Undecided(ways)
        self.made += 1
        return self.choices[self.made - 1]

    def say(self, lane: Lane | None, text: str) -> None:
        if self.log is not None:
            self.log.append((self.name(lane) if lane else "", text))

    def name(self, lane: Lane) -> str:
        who = "the producer"
        if lane.group:
            who = f"warp {next(i for i, warp in enumerate(self.groups[lane.group]) if lane in warp)} of warpgroup {lane.group - 1}"
        return who if lane.first else f"another lane of {who}"

    def place(self, name: str, number: int) -> str:
        kind = KINDS[name]
        return f"{name} of {kind} {number} in {'stage' if kind == TILE else 'slot'} {number % len(self.places[name])}"

    def at(self, name: str, number: int) -> str:
        return f"{name}[{number % self.protocol.count(BARRIERS[name])}]"

    # Barriers in shared memory.

    def wanted(self, lane: Lane, op: Op) -> tuple[int, int]:
        """The phase that must be over for a wait, and the parity that the lane waits for."""
        number, size = lane.number(op), self.protocol.count(BARRIERS[op.what])
        return number // size - op.what.endswith("empty"), number // size + op.parity & 1

    def barrier(self, name: str, number: int) -> tuple[int, int, int]:
        return self.barriers[name][number % self.protocol.count(BARRIERS[name])]

    def passes(self, lane: Lane, op: Op) -> bool:
        """Whether a wait passes, if need be because copies land now."""
        number, (over, parity) = lane.number(op), self.wanted(lane, op)
        phase, missing, copies = self.barrier(op.what, number)
        if phase & 1 == parity:
            if phase > over:
                raise Wrong(f"{self.name(lane)} waits for {self.at(op.what, number)}, parity {parity}: phase {over} is over, but so is the next one, "
                            f"and phase {phase} has the same parity")  # fmt: skip
            ways = self.landings(op.what, number) if self.fuse and missing == 0 and copies > 0 else []
            if not ways:
                return False
            for copy in ways[self.choose(len(ways))]:
                self.land(copy)
        phase = self.barrier(op.what, number)[0]
        self.say(lane, f"is let through by {self.at(op.what, number)}, parity {parity}")
        if phase != over + 1:
            raise Wrong(f"{self.name(lane)} passes {self.at(op.what, number)}, parity {parity}, in phase {phase}: it wants the end of phase {over}")
        return True

    def landings(self, name: str, number: int) -> list[tuple]:
        """Which copies under way, when they land, bring the barrier's phase to its end; none that would do without one of them."""
        size = self.protocol.count(BARRIERS[name])
        mine = [copy for copy in self.copies if OWNER[copy[0]] == name and (copy[1] - number) % size == 0]
        return list(itertools.combinations(mine, self.barrier(name, number)[2]))

    def change(self, name: str, number: int, arrivals: int, copies: int) -> None:
        index = number % self.protocol.count(BARRIERS[name])
        phase, missing, expected = self.barriers[name][index]
        missing, expected = missing - arrivals, expected + copies
        over = missing == 0 and expected == 0
        self.barriers[name][index] = (phase + 1, self.protocol.arrivals[name], 0) if over else (phase, missing, expected)
        if over:
            self.say(None, f"phase {phase} of {name}[{index}] is over")

    def arrive(self, lane: Lane, name: str, number: int, copies: int = 0) -> None:
        phase, missing, _ = self.barrier(name, number)
        if missing == 0:
            raise Wrong(f"{self.name(lane)} arrives at {self.at(name, number)}, which has all arrivals of phase {phase}")
        self.say(lane, f"arrives at {self.at(name, number)}" + (f" and announces {copies} copies" if copies else ""))
        self.change(name, number, 1, copies)

    # Places.

    def overwrite(self, lane: Lane, name: str, number: int, there: tuple | None) -> None:
        """Wrong while somebody reads the place or a copy is under way to it."""
        size, kind = len(self.places[name]), PLACES[name]
        for other in self.lanes():
            for place, ahead in other.open:
                wanted = ahead + (other.tile if kind == TILE else other.turn)
                if place == name and (wanted - number) % size == 0:
                    raise Wrong(f"{self.name(lane)} overwrites {self.place(name, wanted)} with that of {kind} {number} "
                                f"while {self.name(other)} reads it")  # fmt: skip
        for place, wanted in self.copies:
            if place == name and (wanted - number) % size == 0:
                raise Wrong(f"{self.name(lane)} overwrites {self.place(name, wanted)}, which is still on its way")
        self.places[name][number % size] = there

    def content(self, lane: Lane, name: str, number: int) -> str:
        there = self.places[name][number % len(self.places[name])]
        if there is None or there[0] != number:
            found = "a copy on its way" if there is None else f"that of {KINDS[name]} {there[0]}" if there[0] >= 0 else "nothing"
            raise Wrong(f"{self.name(lane)} reads {self.place(name, number)} and finds {found}")
        return there[1]

    def land(self, copy: tuple[str, int]) -> None:
        name, number = copy
        self.copies = tuple([other for other in self.copies if other != copy])
        self.places[name][number % len(self.places[name])] = (number, "")
        self.say(None, f"{self.place(name, number)} has landed")
        self.change(OWNER[name], number, 0, -1)

    # Steps.

    def step(self, move: tuple) -> bool:
        """One step, of a lane (group, warp, lane) or of a copy that lands (place, number). False: the lane must wait."""
        if len(move) == 2:
            self.land(move)
            return True
        group, warp, index = move
        lane = self.groups[group][warp][index]
        return lane.code[lane.pc].kind not in ("stay", "done") and self.go(lane, False)

    def go(self, lane: Lane, acted: bool) -> bool:
        """Goes on to where a lane stops. `acted`: others could notice something of this step already. False: it must wait before that."""
        self.close(lane)
        while True:
            op = lane.code[lane.pc]
            if type(op) is int:
                lane.pc = op
            elif type(op) is dict:
                lane.pc, lane.answer = op[lane.answer], ""
            elif (op.first and not lane.first) or (op.kept is not None and op.kept != lane.kept):
                lane.pc += 1
            elif op.what == "meet" and lane.threads == 32:
                if op.kind == "stay":
                    self.answer([lane], op.asks)
                lane.pc += 1
            elif op.kind == "next":
                self.next(lane, op.what)
            elif op.kind in ("stay", "done") or (acted and (not self.fuse or op.kind == "wait" or op.kind in ACTS)):
                return True
            elif op.kind == "wait" and not self.passes(lane, op):
                return False
            else:
                lane.pc += 1
                if not acted and op.kind in ACTS:
                    self.close(lane)
                if op.kind != "wait":
                    self.perform(lane, op)
                acted = acted or not self.fuse or op.kind in ACTS

    def close(self, lane: Lane) -> None:
        if lane.closing:
            lane.open = tuple([x for x in lane.open if x not in lane.closing])
            lane.closing = ()

    def next(self, lane: Lane, kind: str) -> None:
        lane.pc += 1
        lane.open, lane.closing = (tuple([(x, at - (PLACES[x] == kind)) for x, at in of]) for of in (lane.open, lane.closing))
        if kind == TILE:
            lane.tile += 1
        else:
            lane.turn += 1

    def perform(self, lane: Lane, op: Op) -> None:
        what, number = op.what, lane.number(op) if op.what in KINDS else 0
        if op.kind == "arrive":
            self.arrive(lane, what, number)
        elif op.kind == "expect":
            self.arrive(lane, what, number, self.protocol.announced[what])
            for name in COPIES[what]:
                self.overwrite(lane, name, number, None)
                self.copies = (*self.copies, (name, number))
                self.say(lane, f"has {self.place(name, number)} copied")
        elif op.kind == "write":
            self.overwrite(lane, what, number, (number, op.says))
            self.say(lane, f"writes {self.place(what, number)}: {op.says}")
        elif op.kind == "begin":
            self.content(lane, what, number)
            if (what, op.ahead) in lane.open:
                raise ValueError(f"the program reads {what} twice at once")
            lane.open = tuple(sorted((*lane.open, (what, op.ahead))))
            self.say(lane, f"reads {self.place(what, number)}")
        elif op.kind == "end":
            lane.closing = (*lane.closing, (what, op.ahead))
            if not self.fuse:
                self.close(lane)
        elif op.kind == "learn":
            place = "item" if what == ITEM else "metadata"
            lane.answer = self.content(lane, place, (lane.turn if what == ITEM else lane.tile) + op.ahead)
        elif op.kind == "come":
            self.come(lane, what)
        else:
            raise ValueError(f"no operation {op.kind}")

    # Meetings.

    def come(self, lane: Lane, what: str) -> None:
        if what == "meet":
            warp = next(warp for warp in self.groups[lane.group] if lane in warp)
            if all(other.stays(what) for other in warp):
                self.let_go(warp)
            return
        ring, half = self.protocol.ring, 32 * self.protocol.warps
        if what == "vote":
            at, threads = VOTES + lane.group - 1, ring.vote_threads
            parts, groups = (at,), (lane.group,)
        else:
            parts, threads, groups = (TURNS[int(what[-1])], TURNS[int(what[-1])] + 1), ring.turn_threads, (1, 2)
            at = parts[lane.group - 1]
        self.met[at] += lane.threads
        self.say(lane, f"{'comes to' if lane.stays(what) else 'hands over'} {what}")
        if self.met[at] > half:
            raise Wrong(f"{self.name(lane)} comes to {what} once more before it has let go")
        if sum(self.met[i] for i in parts) >= threads:
            self.say(None, f"{what} lets go")
            if any(self.met[i] != half for i in parts) or len(parts) * half != threads:
                raise Wrong(f"{what} lets go of {threads} threads, and not of each of its warps once")
            for i in parts:
                self.met[i] = 0
            self.let_go([other for group in groups for warp in self.groups[group] for other in warp if other.stays(what)])

    def let_go(self, lanes: list[Lane]) -> None:
        self.answer(lanes, lanes[0].code[lanes[0].pc].asks)
        for lane in lanes:
            lane.pc += 1
        for lane in lanes:
            self.go(lane, True)

    def answer(self, lanes: list[Lane], asks: str) -> None:
        """Decides what they ask, for all of them."""
        if not asks:
            return
        answers = ANSWERS[asks][: None if self.drops or asks != "kept" else 1]
        answer = answers[self.choose(len(answers))]
        self.say(None, f"{asks}: {answer}" if asks != "kept" else "the tile is kept" if answer else "the tile is dropped")
        for lane in lanes:
            setattr(lane, "kept" if asks == "kept" else "answer", answer)

    # The end.

    def check_end(self) -> None:
        """Wrong where nobody can go on and this is not how a CTA ends."""
        lanes = self.lanes()
        if any(lane.code[lane.pc].kind != "done" for lane in lanes):
            raise Wrong("nobody can go on: " + "; ".join(f"{self.name(lane)} {self.state_of(lane)}" for lane in lanes))
        for name, number in self.copies:
            raise Wrong(f"{self.place(name, number)} is still on its way at the end")
        if any(self.met):
            raise Wrong(f"{sum(self.met)} threads are left over at hardware barriers")
        for name, of in self.barriers.items():
            for i, (phase, missing, copies) in enumerate(of):
                if missing != self.protocol.arrivals[name] or copies:
                    raise Wrong(f"{name}[{i}] is left in the middle of phase {phase}")
        for lane in lanes:
            if set(lane.open) != set(lane.closing):
                raise Wrong(f"{self.name(lane)} has ended and reads {lane.open}")

    def state_of(self, lane: Lane) -> str:
        op = lane.code[lane.pc]
        if op.kind == "wait":
            return f"waits for {self.at(op.what, lane.number(op))}, parity {self.wanted(lane, op)[1]}"
        return f"stays at {op.what}" if op.kind == "stay" else "has ended"
