"""How sparse attention compares, in the same run, with what would have run in its place: measured, or not said at all.

A few calls of a run are also run densely, to be timed; `Plan` says which. Each gives one ratio: its milliseconds over the median of the sparse calls
of its kind in the same step, so that what else the machine does in that step weighs on both, and one sparse call that was held up does not count. The
middle one of these ratios is the speed-up, the lowest and the highest are its spread.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_right
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import median, median_low
from typing import NamedTuple

import torch

from .geometry import CallShape

DENSE = "dense"
FEWEST, MOST = 3, 5  # ratios of a kind: below the fewest nothing is said
MAX_NAME = 80
MAX_HELD = 32  # functions and values of another node's attention that tell its modes apart
MAX_TIMES = 256  # single times of a kind that are kept in each step


class CallKind(NamedTuple):
    """What the time of an attention call hangs on: the shape of the call, the type and the device of its tensors, and `instead`, what would answer it
    if it were not sparse: "dense", or another node's attention by name. `attention` says which one exactly, where several go by that name."""

    shape: CallShape
    dtype: torch.dtype
    device: torch.device
    instead: str
    attention: str = ""


class Instead(NamedTuple):
    """What answers calls that are not sparse: its name, and what tells it from others of that name; "" for ComfyUI's own."""

    name: str
    key: str


def instead_of(override) -> Instead:
    """What an attention override, or None, puts in the place of ComfyUI's attention."""
    return Instead(name_of(override), "" if override is None else _key_of(override))


def _key_of(override) -> str:
    """A digest of the functions that an override leads to, and of the names it keeps.

    The modes of a node are often one override around another function or with another word: KJNodes' sage attention is. Numbers and flags are left
    out, for they may change from call to call.
    """
    told: list[str] = []
    seen, waiting = set(), deque([override])
    while waiting and len(told) < MAX_HELD:
        it = waiting.popleft()
        if id(it) in seen:
            continue
        seen.add(id(it))
        if isinstance(it, str | torch.dtype):
            told.append(str(it))
        elif callable(it):
            line = getattr(getattr(it, "__code__", None), "co_firstlineno", 0)
            named = it if isinstance(getattr(it, "__qualname__", None), str) else type(it)
            told.append(f"{getattr(named, '__module__', None)}.{named.__qualname__}:{line}")
            waiting.extend(_held(it))
    return hashlib.sha256("\n".join(told).encode(errors="replace")).hexdigest()[:12]


def _held(it) -> list:
    """What a function keeps: the values of its closure, or the function and the arguments of a partial."""
    if type(it).__name__ == "partial":
        return [it.func, *it.args, *it.keywords.values()]
    held = []
    for cell in getattr(it, "__closure__", None) or ():
        with suppress(ValueError):  # nothing is in it yet
            held.append(cell.cell_contents)
    return held


def name_of(override) -> str:
    """What another node's attention override is called: "attention_override_sage of comfyui-kjnodes"; `DENSE` for None, ComfyUI's own attention."""
    if override is None:
        return DENSE
    while type(override).__name__ == "partial":
        override = override.func
    owner = override if getattr(override, "__name__", None) not in (None, "__call__") else type(getattr(override, "__self__", override))
    name = owner.__name__ if owner.__name__.isidentifier() else "a function"  # "<lambda>"
    # ComfyUI calls a node pack's module by the path of its folder, in which it writes "_x_" for a dot.
    package = re.split(r"[/\\]", (getattr(owner, "__module__", None) or "").split(".")[0])[-1].replace("_x_", ".")
    return (f"{name} of {package}" if package else name)[:MAX_NAME]


def _spread(n: int, count: int) -> list[int]:
    """`count` of the numbers below n, evenly spread; some of them several times where n is the smaller one."""
    return [i * n // count if n < count else round(i * (n - 1) / (count - 1)) for i in range(count)]


@dataclass
class _Seen:
    """The calls of one kind: how many in each step, and how many of them were run densely too, in all and in each step."""

    planned: list[int]
    cold: bool
    calls: Counter[int] = field(default_factory=Counter)
    usual: int = 0  # calls a step, once one is over
    step: int = -1
    taken: int = 0
    taken_in: Counter[int] = field(default_factory=Counter)


class Plan:
    """Which sparse calls of a run are also run densely: of each kind at most one a step, `MOST` of them spread over the steps that run sparse.

    Runs of fewer steps take one in each, and where these are fewer than `FEWEST`, several layers of a step. Each is another layer than the last, and
    not the first of its step, which may be cold, as far as there are others. On a GPU the first dense call of a kind warms up, unless the run has had
    dense calls of that kind: the first of a kernel takes the time to load it.
    """

    def __init__(self, steps: Sequence[int]):
        self._steps = list(steps)
        self._seen: dict[CallKind, _Seen] = {}
        self._warm: set[CallKind] = set()

    def saw_dense(self, kind: CallKind) -> None:
        """Notes a dense call that the run made by itself."""
        self._warm.add(kind)

    def warms_up(self, kind: CallKind) -> bool:
        """Whether the last call of this kind that was wanted is one to warm up, whose time says nothing."""
        seen = self._seen.get(kind)
        return seen is not None and seen.cold and seen.taken == 1

    def wants(self, kind: CallKind, step: int) -> bool:
        """Whether the sparse call that has just been made is one of them; to be asked once about each, in order."""
        seen = self._seen.get(kind)
        if seen is None:
            cold = kind.device.type == "cuda" and kind not in self._warm
            seen = self._seen[kind] = _Seen(self._planned(cold), cold)
        if step != seen.step:
            seen.usual, seen.step = seen.calls[seen.step], step
        number = seen.calls[step]
        seen.calls[step] += 1
        due, a_step = bisect_right(seen.planned, step), max(1, seen.planned.count(step))
        if seen.taken >= due or seen.taken_in[step] >= a_step or number < self._number(seen):
            return False
        seen.taken += 1
        seen.taken_in[step] += 1
        return True

    def _planned(self, cold: bool) -> list[int]:
        """The step of each extra call of a kind, in order."""
        steps = self._steps
        if not steps:
            return []
        if cold and len(steps) > MOST:
            return [steps[0], *(steps[1 + i] for i in _spread(len(steps) - 1, MOST))]
        return [steps[0]] * cold + [steps[i] for i in _spread(len(steps), max(FEWEST, min(MOST, len(steps))))]

    def _number(self, seen: _Seen) -> int:
        """Which call of its step the next extra call is, at the earliest."""
        if seen.usual == 0:  # the first sparse step: how many there are is not known
            return seen.taken_in[seen.step] + 1
        if seen.usual <= 2:
            return (seen.taken + 1) % seen.usual
        return 1 + (2 * seen.taken + 1) * (seen.usual - 1) // (2 * len(seen.planned))


class Pair(NamedTuple):
    """Milliseconds of the sparse calls of a kind in a step, their median and the fastest one, and of a dense call of the kind in that step."""

    step: int
    sparse_ms: float
    fastest_ms: float
    dense_ms: float


class _Step(NamedTuple):
    """The sparse calls of a kind in a step: how many, the fastest one, and the single times of the first `MAX_TIMES`."""

    calls: int
    fastest_ms: float
    times: tuple[float, ...]


class Speedup(NamedTuple):
    """Dense over sparse time: the median of the ratios, the lowest and the highest, and how many there are.

    Of several kinds the numbers are means, weighted by what each kind's sparse calls took, hiccups aside. The first three are None for too few.
    """

    median: float | None
    low: float | None
    high: float | None
    calls: int

    @property
    def is_clear(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 1 or self.high < 1)


class Comparison:
    """Milliseconds of the calls of one run by their kind.

    The thread that takes numbers in writes; the server's thread may read at any time: what it walks over is a copy, and steps are replaced whole.
    """

    def __init__(self) -> None:
        self.measuring_ms = 0.0  # what the extra dense calls took in all
        self._sparse: dict[CallKind, dict[int, _Step]] = defaultdict(dict)
        self._first: dict[CallKind, int] = {}  # the step of a kind's first sparse call
        self._dense: dict[CallKind, dict[int, list[float]]] = defaultdict(dict)
        self._extra: dict[CallKind, list[tuple[int, float]]] = defaultdict(list)

    def sparse(self, kind: CallKind, step: int, ms: float) -> None:
        """A sparse call."""
        self._first.setdefault(kind, step)
        calls, fastest, times = self._sparse[kind].get(step, _Step(0, ms, ()))
        self._sparse[kind][step] = _Step(calls + 1, min(fastest, ms), times if len(times) == MAX_TIMES else (*times, ms))

    def dense(self, kind: CallKind, step: int, ms: float) -> None:
        """A call that was dense for a reason of its own. Such calls serve where no extra ones were made."""
        self._dense[kind].setdefault(step, []).append(ms)

    def extra(self, kind: CallKind, step: int, ms: float) -> None:
        """A dense call that was made to be timed."""
        self._extra[kind].append((step, ms))

    def pairs(self, kind: CallKind) -> list[Pair]:
        """The extra calls of a kind, each with the sparse calls of its step."""
        steps = self._sparse.get(kind, {}).copy()
        found = [Pair(step, self._median(kind, step), steps[step].fastest_ms, ms) for step, ms in list(self._extra.get(kind, ())) if step in steps]
        return [pair for pair in found if pair.sparse_ms]

    def kinds(self) -> list[CallKind]:
        """The kinds that ran sparse."""
        return list(self._sparse)

    def speedup(self) -> Speedup:
        """What was measured, over all kinds."""
        ratios = self._ratios()
        enough = {kind: values for kind, values in ratios.items() if len(values) >= FEWEST}
        if not enough:
            return Speedup(None, None, None, sum(map(len, ratios.values())))
        ms = {kind: self._total(kind) for kind in enough}

        def weighted(of) -> float:
            return sum(of(values) * ms[kind] for kind, values in enough.items()) / sum(ms.values())

        return Speedup(weighted(median), weighted(min), weighted(max), sum(map(len, enough.values())))

    def instead(self) -> str | None:
        """What the speed-up compares with, by name; None while there is nothing to compare."""
        return " and ".join(sorted({kind.instead for kind in self._ratios()})) or None

    def saved_ms(self) -> float | None:
        """What the measured kinds would have taken more if they had not been sparse, less what measuring took; None where that is not clear."""
        if not self.speedup().is_clear:
            return None
        ratios = {kind: values for kind, values in self._ratios().items() if len(values) >= FEWEST}
        return sum((median(values) - 1) * self._total(kind) for kind, values in ratios.items()) - self.measuring_ms

    def _ratios(self) -> dict[CallKind, list[float]]:
        found = {}
        for kind in list(self._sparse):
            ratios = [pair.dense_ms / pair.sparse_ms for pair in self.pairs(kind)] or self._ratios_of_own_calls(kind)
            if ratios:
                found[kind] = ratios
        return found

    def _ratios_of_own_calls(self, kind: CallKind) -> list[float]:
        """One for each step with dense calls, from the middle one of them; with the sparse calls of the whole run where the step has none."""
        whole = median([ms for step in list(self._sparse[kind]) for ms in self._times(kind, step)])
        found = [(self._median(kind, step) or whole, list(times)) for step, times in self._dense.get(kind, {}).copy().items()]
        return [median_low(times) / sparse for sparse, times in found if sparse]

    def _times(self, kind: CallKind, step: int) -> tuple[float, ...]:
        """Single times of sparse calls of the kind in a step. The run's first is left out where the step has others: it may be cold."""
        found = self._sparse[kind].get(step)
        times = () if found is None else found.times
        return times[1:] if len(times) > 1 and self._first.get(kind) == step else times

    def _median(self, kind: CallKind, step: int) -> float:
        """Milliseconds of the middle sparse call of the kind in a step; 0 without one."""
        times = self._times(kind, step)
        return median(times) if times else 0.0

    def _total(self, kind: CallKind) -> float:
        """What the sparse calls of a kind take, but for what held single ones up: nobody would have been spared that."""
        return sum(found.calls * self._median(kind, step) for step, found in self._sparse[kind].copy().items())
