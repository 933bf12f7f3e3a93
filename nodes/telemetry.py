"""The runs that this process remembers, host numbers only, and what each report node has shown of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from .maps import HeadMaps
from .recorder import Run

MAX_RUNS = 8
MAX_STORED_MAP_BYTES = 64 << 20  # of all closed runs; beyond it the oldest lose their maps


class Shown(NamedTuple):
    """What a report has shown: the first and the last number of its runs, and the formats of the files that it saved of them."""

    first: int = 0
    last: int = 0
    formats: frozenset[str] = frozenset()


class Runs:
    """The open and the last runs of this process, and what each report node has shown."""

    def __init__(self) -> None:
        self.running: deque[Run] = deque(maxlen=MAX_RUNS)
        self.closed: deque[Run] = deque(maxlen=MAX_RUNS)
        self.unpatched: deque[Run] = deque(maxlen=MAX_RUNS)  # of models without our patch: no numbers, only the warning of a monitor
        self.latest = 0
        self._shown: dict[str, Shown] = {}

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

    def shown(self, report: str) -> Shown:
        """What `report` showed last; zeros before the first time."""
        return self._shown.get(report, Shown())

    def for_report(self, report: str, owners: list[str]) -> list[Run]:
        """The runs since those that `report` showed; when there is none, the ones it showed last.

        `owners` limits them to the runs of these patches; empty: all runs.
        """
        first, last, _ = self.shown(report)
        known = sorted((r for r in self.closed if not owners or r.owner in owners), key=lambda r: r.number)  # an inner run closes first
        chosen = [r for r in known if r.number > last]
        return chosen or [r for r in known if first <= r.number <= last]

    def mark_shown(self, report: str, found: list[Run], formats: Iterable[str] = ()) -> None:
        """What `for_report` gave is shown, and saved in `formats`: to be said once nothing can go wrong any more."""
        before = self.shown(report)
        if found and found[-1].number > before.last:
            if len(self._shown) >= 64 and report not in self._shown:
                self._shown.pop(next(iter(self._shown)))
            self._shown[report] = Shown(found[0].number, found[-1].number, frozenset(formats))
        elif found:
            self._shown[report] = before._replace(formats=before.formats.union(formats))


runs = Runs()
