"""Every number of a run once: its name, its unit, how it adds up, what it is called, and where it is shown.

Cells, steps, totals, the report's files and pictures and the browser's message are made from `TABLE`. A new number of the attention calls is a row
here, and an entry in what the place that measures it gives to `recorder.Run.sparse`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Flag, auto

SUM, MEAN, OF_RUN = "sum over the calls", "mean over the sparse calls", "of the whole run"


class On(Flag):
    """Where a statistic is shown: in JSON, CSV and page; under the pictures; in the browser while the run goes on."""

    REPORT = auto()
    PICTURE = auto()
    MONITOR = auto()
    ALL = REPORT | PICTURE | MONITOR


@dataclass(frozen=True)
class Statistic:
    """One number.

    unit : "share" (0..1), "calls", "ms", "s" or "times".
    adds : `SUM`, `MEAN`, or `OF_RUN`: a number that no cell and no step has.
    label : what people read; in the browser `strings.js` may say it in other languages, under the statistic's name.
    parts : the statistics whose sum this one is, instead of a sum of its own.
    """

    name: str
    unit: str
    adds: str
    label: str
    on: On = On.ALL
    parts: tuple[str, ...] = ()


TABLE = (
    Statistic("density", "share", MEAN, "density"),
    Statistic("pv_skipped", "share", MEAN, "PV skipped"),
    Statistic("ms", "ms", SUM, "time", On.MONITOR, parts=("sparse_ms", "dense_ms")),
    Statistic("sparse_ms", "ms", SUM, "ms sparse", On.REPORT | On.PICTURE),
    Statistic("dense_ms", "ms", SUM, "ms dense", On.REPORT | On.PICTURE),
    Statistic("sparse_calls", "calls", SUM, "sparse calls"),
    Statistic("dense_calls", "calls", SUM, "dense calls"),
    Statistic("seconds", "s", OF_RUN, "run time", On.REPORT | On.PICTURE),
    Statistic("speedup", "times", OF_RUN, "measured speed-up"),  # the median; None where the spread does not tell faster from slower
    Statistic("speedup_low", "times", OF_RUN, "lowest speed-up"),
    Statistic("speedup_high", "times", OF_RUN, "highest speed-up"),
    Statistic("compared_calls", "calls", OF_RUN, "calls compared", On.REPORT | On.MONITOR),
    Statistic("saved_ms", "ms", OF_RUN, "ms saved", On.REPORT | On.MONITOR),
    Statistic("measuring_ms", "ms", OF_RUN, "ms spent measuring", On.REPORT | On.MONITOR),
)
"""In the order of every table and list."""


def of_calls(on: On = On.ALL) -> list[Statistic]:
    """The statistics that cells and steps have, of those that are shown there."""
    return [row for row in TABLE if row.adds != OF_RUN and row.on & on]


def of_run(on: On = On.ALL) -> list[Statistic]:
    """The statistics that the totals of a run have, of those that are shown there."""
    return [row for row in TABLE if row.on & on]


class Sums:
    """What some calls add up to; every name is there from the start, so that the server's thread may read while the sampler's adds.

    lost : sparse calls that are counted, but whose numbers never came.
    """

    def __init__(self) -> None:
        self.lost = 0
        self.of: dict[str, float] = {row.name: 0 for row in of_calls() if not row.parts}

    def add(self, name: str, number: float) -> None:
        self.of[name] += number

    def numbers(self, on: On = On.ALL) -> dict[str, float | None]:
        """Every statistic of these calls by name; None for a mean over no call."""
        return {row.name: self._number(row) for row in of_calls(on)}

    def _number(self, row: Statistic) -> float | None:
        total = sum(self.of[name] for name in row.parts or (row.name,))
        if row.adds == MEAN:
            known = self.of["sparse_calls"] - self.lost
            return total / known if known else None
        return total if row.unit == "calls" else float(total)


def total(parts: Iterable[Sums]) -> Sums:
    """The sums of all the parts together."""
    parts, whole = list(parts), Sums()
    whole.lost = sum(part.lost for part in parts)
    for name in whole.of:
        whole.of[name] = sum(part.of[name] for part in parts)
    return whole
