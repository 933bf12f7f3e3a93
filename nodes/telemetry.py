"""What this process remembers: runs, host numbers only; what each report node has shown of them; the last line that each node said."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from typing import NamedTuple

from .maps import HeadMaps
from .recorder import Run

MAX_RUNS = 8
MAX_LINES = 256
MAX_STORED_MAP_BYTES = 64 << 20  # of all closed runs; beyond it the oldest lose their maps


class Shown(NamedTuple):
    """How a report has shown a run: the number of the newest run that was new to it then, and the formats of the files that it saved of this one."""

    last: int
    formats: frozenset[str] = frozenset()


class Runs:
    """The open and the last runs of this process, and what each report node has shown."""

    def __init__(self) -> None:
        self.running: deque[Run] = deque(maxlen=MAX_RUNS)
        self.closed: deque[Run] = deque(maxlen=MAX_RUNS)
        self.unpatched: deque[Run] = deque(maxlen=MAX_RUNS)  # of models without our patch: no numbers, only the warning of a monitor
        self.latest = 0
        self.unsaved = 0  # how many reports could not write all their files
        self._shown: dict[str, dict[int, Shown]] = {}  # report -> number of a run: nodes of two workflows may share a name, but no runs

    def open(self, **known) -> Run:
        self.latest += 1
        run = Run(self.latest, **known)
        self.running.append(run)
        return run

    def open_unpatched(self, **known) -> Run:
        self.latest += 1
        self.unpatched.append(Run(self.latest, **known))
        return self.unpatched[-1]

    def add(self, run: Run) -> None:
        """Moves a run to the closed ones. The maps of heads stay with the newest alone, the others as far as there is room."""
        for earlier in self.closed:
            earlier.maps.heads = HeadMaps()
        self.closed.append(run)
        if run in self.running:  # only now: whoever asks in between finds it
            self.running.remove(run)
        room = MAX_STORED_MAP_BYTES
        for kept in reversed(self.closed):
            room -= kept.maps.nbytes
            if room < 0:
                kept.maps.kept = {}

    def find(self, number: int) -> Run | None:
        """An open or closed run by its number."""
        return next((run for run in [*self.running, *self.closed] if run.number == number), None)

    def for_monitor(self, monitor: str) -> list[Run]:
        """The runs that a monitor watches or has watched, oldest first."""
        known = {run.number: run for run in [*self.running, *self.closed, *self.unpatched] if monitor in run.monitors}
        return [known[number] for number in sorted(known)]

    def saved(self, report: str, found: list[Run]) -> frozenset[str] | None:
        """The formats in which `report` has saved all of `found`, which `for_report` gave; None when they are new to it."""
        shown = self._shown.get(report, {})
        formats = [shown[run.number].formats for run in found if run.number in shown]
        return frozenset.intersection(*formats) if formats else None

    def for_report(self, report: str, owners: list[str]) -> list[Run]:
        """The runs that `report` has not shown; when there is none, the ones it showed last.

        `owners` limits them to the runs of these patches; empty: all runs.
        """
        shown = self._shown.get(report, {})
        known = sorted((r for r in self.closed if not owners or r.owner in owners), key=lambda r: r.number)  # an inner run closes first
        last = max((shown[r.number].last for r in known if r.number in shown), default=0)
        return [r for r in known if r.number not in shown] or [r for r in known if shown[r.number].last == last]

    def mark_shown(self, report: str, found: list[Run], formats: Iterable[str] = ()) -> None:
        """What `for_report` gave is shown, and saved in `formats`: to be said once nothing can go wrong any more."""
        if not found:
            return
        if len(self._shown) >= 64 and report not in self._shown:
            self._shown.pop(next(iter(self._shown)))
        kept = {run.number for run in [*self.closed, *found]}
        shown = {number: how for number, how in self._shown.get(report, {}).items() if number in kept}
        for run in found:
            how = shown.get(run.number, Shown(found[-1].number))
            shown[run.number] = how._replace(formats=how.formats.union(formats))
        self._shown[report] = shown


@dataclass(frozen=True)
class Line:
    """What a node said last: `number` counts all lines, `node` is its name (`_comfy.name_of`), `clients` as in `Run`."""

    number: int
    node: str
    text: str
    clients: Set[str]


class Lines:
    """The last line of each node, one for each browser tab that queued it: two tabs may hold the same workflow file."""

    def __init__(self) -> None:
        self.kept: deque[Line] = deque(maxlen=MAX_LINES)
        self.latest = 0

    def add(self, node: str, text: str, clients: Set[str]) -> Line:
        self.latest += 1
        line = Line(self.latest, node, text, frozenset(clients))
        for earlier in [kept for kept in self.kept if (kept.node, kept.clients) == (node, line.clients)]:
            self.kept.remove(earlier)
        self.kept.append(line)
        return line

    def find(self, node: str, concerns: Callable[[Set[str]], bool]) -> Line | None:
        """The newest line of a node among those whose clients `concerns` says yes to."""
        return next((line for line in reversed(list(self.kept)) if line.node == node and concerns(line.clients)), None)


runs = Runs()
lines = Lines()
