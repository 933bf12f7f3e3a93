"""Times of work on a GPU: CUDA events, contenders that take turns, and events around each launch of a call.

Before every timed run the L2 cache is overwritten and the GPU is kept busy for a moment, so that the host has queued the whole call before its first
kernel starts: what is measured is the device. What the host spends is measured by bench_host.py.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from sparge_kernels.backends import cuda as backend

_BUSY_CYCLES = 2_000_000  # about a millisecond: longer than the host needs to queue a call


@dataclass(frozen=True)
class Clock:
    """What timing needs of a device.

    Attributes
    ----------
    event : callable
        Makes an object with record(), synchronize() and elapsed_time(later) in milliseconds.
    before : callable
        Called before each timed run.
    """

    event: Callable
    before: Callable[[], None]


def cuda_clock(device: torch.device) -> Clock:
    """CUDA events, L2 flushed before each run."""
    l2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
    buffer = torch.empty(4 * l2, dtype=torch.uint8, device=device)

    def before() -> None:
        buffer.zero_()
        torch.cuda._sleep(_BUSY_CYCLES)

    return Clock(lambda: torch.cuda.Event(enable_timing=True), before)


def once(clock: Clock, call: Callable) -> float:
    """Milliseconds of one run."""
    return alternate(clock, {"": call}, rounds=1, warmup=0)[""][0]


def alternate(clock: Clock, calls: dict[str, Callable], *, rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Milliseconds of every call in `rounds` rounds, in each of which every call has its turn."""
    times = {name: [] for name in calls}
    for round_ in range(warmup + rounds):
        ends = []
        for name, call in calls.items():
            clock.before()
            start, end = clock.event(), clock.event()
            start.record()
            call()
            end.record()
            ends.append((name, start, end))
        for name, start, end in ends:
            end.synchronize()
            if round_ >= warmup:
                times[name].append(start.elapsed_time(end))
    return times


def rounds_for(milliseconds: float, budget_s: float, least: int, most: int) -> int:
    """How many rounds of `milliseconds` fit into the budget."""
    return max(least, min(most, int(budget_s * 1e3 / max(milliseconds, 1e-3))))


def spread(values: list[float]) -> dict[str, float | int]:
    """Median, quartiles, extremes and number of the values."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "low": low, "high": high, "min": min(values), "max": max(values), "runs": len(values)}


class Split:
    """A machine of the CUDA backend that records events around each of its launches; everything else is the machine's own."""

    def __init__(self, machine, clock: Clock):
        self.machine, self.clock = machine, clock
        self.launches = []

    def __getattr__(self, name: str):
        return getattr(self.machine, name)

    def launch(self, kernel, *arguments) -> None:
        start, end = self.clock.event(), self.clock.event()
        start.record()
        self.machine.launch(kernel, *arguments)
        end.record()
        self.launches.append((kernel.name, start, end))


@contextlib.contextmanager
def using(machine) -> Iterator[None]:
    """Inside, the CUDA backend runs everything on `machine`."""
    before = backend.machine_of
    backend.machine_of = lambda device: (machine, None)
    try:
        yield
    finally:
        backend.machine_of = before


def split(clock: Clock, machine, call: Callable, *, rounds: int, warmup: int = 1) -> dict:
    """Medians of a call's parts: {"kernels": {kernel: ms}, "whole": ms, "outside": share of the whole that is not the attention kernel}."""
    parts: dict[str, list[float]] = {}
    whole, outside = [], []
    for round_ in range(warmup + rounds):
        recorder = Split(machine, clock)
        with using(recorder):
            taken = once(clock, call)
        if round_ < warmup:
            continue
        spent: dict[str, float] = {}
        for name, start, end in recorder.launches:
            spent[name] = spent.get(name, 0.0) + start.elapsed_time(end)
        for name, value in spent.items():
            parts.setdefault(name, []).append(value)
        whole.append(taken)
        outside.append(1 - sum(value for name, value in spent.items() if name.startswith("sparge_attention")) / taken)
    kernels = {name: statistics.median(values) for name, values in parts.items()}
    return {"kernels": kernels, "whole": statistics.median(whole), "outside": statistics.median(outside)}
