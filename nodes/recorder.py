"""What one sampler run did, call by call: the statistics of every (step, layer), the reason of every dense call, pooled maps where a monitor watches.

A run gathers device tensors without reading them; at the end of a step they travel to the host in one asynchronous copy. The sampler's thread
records; the server's thread may ask at any time (`transport`), so whatever it walks over is a copy: a dict that grew meanwhile would raise.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from . import maps, statistics
from .speedup import Comparison
from .statistics import On, Sums, total

MAX_HEAD_BYTES = 6 << 20  # per-head numbers of one run; beyond it a run keeps the mean over heads only
MAX_REASONS = 64


class Timer:
    """Milliseconds between `start` and `stop` on the device's own clock, without waiting for it."""

    def __init__(self, device: torch.device):
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        if self._events:
            self._events[0].record()
        self._start = self._stop = time.perf_counter()

    def stop(self) -> Timer:
        if self._events:
            self._events[1].record()
        self._stop = time.perf_counter()
        return self

    def milliseconds(self) -> float:
        """Elapsed time; waits for the device where it has not got there yet."""
        if not self._events:
            return (self._stop - self._start) * 1e3
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1])


@dataclass(frozen=True, eq=False)
class Timed:
    """One attention call.

    layer : None for calls that are not a numbered layer's; those have no timer and no cell either.
    tokens : of its queries. shape : what its dense time depends on, in a run with monitors.
    """

    step: int
    layer: int | None
    tokens: int
    timer: Timer | None = None
    shape: Hashable | None = None

    @property
    def at(self) -> maps.At:
        return maps.At(self.step, self.layer)


class Cell(Sums):
    """The sums of one (step, layer), why its dense calls were dense, and the sums of each head's density, fp32 (H,), where they are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.reasons: Counter[str] = Counter()
        self.head_density_sum: np.ndarray | None = None

    def to_dict(self, step: int, layer: int) -> dict:
        n = self.of["sparse_calls"]
        heads = None if self.head_density_sum is None or not n else [round(float(x), 5) for x in self.head_density_sum / n]
        return {"step": step, "layer": layer, **self.numbers(On.REPORT), "head_density": heads, "reasons": dict(self.reasons)}


@dataclass(frozen=True, eq=False)
class _Pending:
    call: Timed
    numbers: Mapping[str, torch.Tensor] | None = None  # of a sparse call
    pooled: maps.Pooled | None = None
    plain: bool = True
    cost: Timer | None = None  # of an extra dense call, the time that it took in all


@dataclass(frozen=True, eq=False)
class _InFlight:
    """What travels to the host. `sent` keeps the device's side alive until it has arrived."""

    pending: list[_Pending]
    sent: list[torch.Tensor]
    host: list[torch.Tensor]
    done: torch.cuda.Event | None


def _to_host(tensors: list[torch.Tensor]) -> tuple[list[torch.Tensor], torch.cuda.Event | None]:
    """Copies on their way to the host and the event after which they are there; other devices than CUDA give the tensors themselves."""
    if not tensors[0].is_cuda:
        return tensors, None
    host = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True) for x in tensors]
    done = torch.cuda.Event()
    done.record()
    return host, done


class Run:
    """One sampler run of one patched model.

    owner : the key of the patch whose run this is. metadata : what is known before the first call, by name (model, backend, settings ...).
    monitors : the ids of the monitors that watch it, and whether each wants dense attention timed.
    """

    def __init__(self, number: int, *, node: str, owner: str, metadata: dict, sigmas: list[float], monitors: dict[str, bool] | None = None):
        self.number = number
        self.node = node
        self.owner = owner
        self.metadata = metadata
        self.sigmas = sigmas
        self.monitors = dict(monitors or {})
        self.measures = any(self.monitors.values())
        self.clients: set[str] = set()  # the browser tabs that are told of it; none: all
        self.cells: dict[maps.At, Cell] = {}
        self.outside = Cell()  # the calls of no numbered layer
        self.reasons: Counter = Counter()
        self.calls = 0
        self.answered_above = 0  # calls that another node of ours ran, not counted in `calls`
        self.sparse_calls = 0  # sparse calls, also those whose numbers have not arrived
        self.heads = 0
        self.tokens = 0
        self.seconds = 0.0
        self.note: str | None = None
        self.warning: str | None = None
        self.state = "running"
        self.finished = 0  # steps
        self.total_layers = 0  # where known before the numbers of all layers have arrived
        self.maps = maps.RunMaps()
        self.against_dense = Comparison()
        self.send_failed = False
        self._measured: set[Hashable] = set()
        self._collected: set[maps.At] = set()
        self._fresh: set[maps.At] = set()
        self._pending: list[_Pending] = []
        self._in_flight: _InFlight | None = None
        self._head_bytes = 0
        self._started = time.perf_counter()

    def sparse(self, call: Timed, numbers: Mapping[str, torch.Tensor], pooled: maps.Pooled | None = None) -> None:
        """Records a sparse call: `numbers` are the table's means by name, all of them, (B, H) each on the call's device; `pooled` for a monitor."""
        self.calls += 1
        self.sparse_calls += 1
        self._pending.append(_Pending(call, numbers, pooled))

    def wants_dense(self, shape: Hashable) -> bool:
        """Whether a call of this shape is to be run densely too, to be timed: once per shape, in a run with a monitor that measures."""
        if not self.measures or shape in self._measured:
            return False
        self._measured.add(shape)
        return True

    def measured(self, call: Timed, cost: Timer) -> None:
        """Records the dense time of a shape, from an extra call, and what measuring it took in all."""
        self._pending.append(_Pending(call, cost=cost))

    def dense(self, call: Timed, reason: str, plain: bool = True) -> None:
        """Records a dense call. `plain`: ComfyUI's own attention ran, not another node's; only such calls are what the speed-up compares with."""
        self.calls += 1
        if len(self.reasons) >= MAX_REASONS and reason not in self.reasons:
            reason = "other reasons"
        self.reasons[reason] += 1
        cell = self.outside
        if call.layer is not None:
            cell = self.cells.setdefault(call.at, Cell())
            self._pending.append(_Pending(call, plain=plain))
        cell.add("dense_calls", 1)
        cell.reasons[reason] += 1

    def end_step(self) -> None:
        """Sends what the step left on the device to the host and takes in what an earlier step sent."""
        self._collect()
        sparse = [p for p in self._pending if p.numbers is not None]
        if not sparse:
            self._take(self._pending, [])
        else:
            sent = [torch.cat([torch.stack([x.mean(0) for x in p.numbers.values()]).flatten() for p in sparse])]
            pooled = [p.pooled for p in sparse if p.pooled is not None]
            if pooled:
                sent.append((torch.cat([x.heads.mean(0, dtype=torch.float32).flatten() for x in pooled]) + 0.5).to(torch.uint8))
            self._in_flight = _InFlight(self._pending, sent, *_to_host(sent))
            if self._in_flight.done is None and sent[0].device.type == "cpu":  # it is there
                self._collect()
        self._pending = []

    def close(self) -> None:
        """Takes in everything; afterwards the run holds host numbers only."""
        self.end_step()
        self._collect()
        heads = self.maps.heads
        self.maps.heads = maps.HeadMaps(heads.step, {layer: [x.cpu().numpy() for x in calls] for layer, calls in heads.layers.items()})
        self.state = "done" if self.state == "running" else self.state
        self.seconds = time.perf_counter() - self._started

    def abandon(self, note: str) -> None:
        """Closes the run without what is still on the device."""
        self._pending, self._in_flight, self.maps.heads = [], None, maps.HeadMaps()
        self.state, self.note = "failed", self.note or note
        self.seconds = time.perf_counter() - self._started

    def _collect(self) -> None:
        if self._in_flight is None:
            return
        arrived, self._in_flight = self._in_flight, None
        if arrived.done is not None:
            arrived.done.synchronize()
        self._take(arrived.pending, [x.cpu().numpy() for x in arrived.host])
        heads = defaultdict(list)
        for p in arrived.pending:
            if p.pooled is not None:
                heads[p.call.layer].append(p.pooled.heads)
                step = p.call.step
        if heads:  # not earlier: the maps of heads belong to the last step whose numbers are there
            self.maps.heads = maps.HeadMaps(step, dict(heads))

    def _take(self, pending: list[_Pending], arrays: list[np.ndarray]) -> None:
        values = arrays[0].astype(np.float32) if arrays else None
        at = map_at = 0
        for p in pending:
            call, ms = p.call, p.call.timer.milliseconds()
            if p.cost is not None:
                self.against_dense.measured(call.tokens, call.shape, ms, p.cost.milliseconds())
                continue
            cell = self.cells.setdefault(call.at, Cell())
            if self.monitors:
                self._fresh.add(call.at)
            self.tokens = max(self.tokens, call.tokens)
            if p.numbers is None:
                cell.add("dense_ms", ms)
                if p.plain:
                    self.against_dense.dense(call.tokens, ms)
                continue
            shape = len(p.numbers), next(iter(p.numbers.values())).shape[1]
            by_head = dict(zip(p.numbers, values[at : at + shape[0] * shape[1]].reshape(shape), strict=True))
            at += shape[0] * shape[1]
            self._add_sparse(cell, by_head, ms)
            self.against_dense.sparse(call.tokens, call.shape, ms)
            if p.pooled is not None:
                size = p.pooled.heads.shape[1:]
                self.maps.add(call.at, p.pooled, arrays[1][map_at : map_at + size.numel()].reshape(size).copy())
                map_at += size.numel()
        self._collected |= self._fresh
        self.maps.thin()

    def _add_sparse(self, cell: Cell, by_head: dict[str, np.ndarray], ms: float) -> None:
        cell.add("sparse_calls", 1)
        cell.add("sparse_ms", ms)
        for name, heads in by_head.items():
            cell.add(name, float(heads.mean()))
        density = by_head["density"]
        self.heads = max(self.heads, len(density))
        if cell.head_density_sum is None and cell.of["sparse_calls"] == 1 and self._head_bytes + density.nbytes <= MAX_HEAD_BYTES:
            self._head_bytes += density.nbytes
            cell.head_density_sum = density.copy()
        elif cell.head_density_sum is not None and cell.head_density_sum.shape == density.shape:
            cell.head_density_sum = cell.head_density_sum + density
        else:
            cell.head_density_sum = None

    @property
    def steps(self) -> int:
        return max(len(self.sigmas) - 1, 1 + max((step for step, _ in list(self.cells)), default=-1))

    @property
    def layers(self) -> int:
        return 1 + max((layer for _, layer in list(self.cells)), default=-1)

    def numbers(self) -> dict[maps.At, Cell]:
        """The cell of every (step, layer) of which something has arrived, in order."""
        return {at: self.cells[at] for at in sorted(self._collected.copy())}

    def news(self) -> dict[maps.At, Cell]:
        """The same of what has arrived since the last call of this."""
        fresh, self._fresh = self._fresh, set()
        return {at: self.cells[at] for at in sorted(fresh)}

    def cells_of(self, steps: Iterable[int]) -> dict[int, list[Cell]]:
        """The cells of each of these steps."""
        found: dict[int, list[Cell]] = {step: [] for step in steps}
        for (step, _), cell in self.cells.copy().items():
            if step in found:
                found[step].append(cell)
        return found

    def size(self) -> dict[str, int]:
        return {"steps": self.steps, "layers": self.layers, "heads": self.heads, "tokens": self.tokens}

    def totals(self, on: On = On.ALL) -> dict[str, float | None]:
        """Every statistic of the whole run by name."""
        dense = self.against_dense
        known = total([*self.cells.copy().values(), self.outside]).numbers()
        known |= {"seconds": self.seconds, "speedup": dense.factor(), "saved_ms": dense.saved_ms(), "measuring_ms": dense.measuring_ms}
        return {row.name: known[row.name] for row in statistics.of_run(on)}

    def to_dict(self) -> dict:
        """The run as plain JSON-serialisable numbers: what every file and picture of a report is made from."""
        return {
            "version": 1,
            "run": self.number,
            "node": self.node,
            **self.metadata,
            **self.size(),
            "sigmas": self.sigmas,
            "cells": [cell.to_dict(*at) for at, cell in sorted(self.cells.items())],
            "step_totals": [
                {"step": step, **total(cells).numbers(On.REPORT), "reasons": dict(sum((cell.reasons for cell in cells), Counter()))}
                for step, cells in self.cells_of(range(self.steps)).items()
            ],
            "reasons": dict(self.reasons.most_common()),
            "warning": self.warning,
            "note": self.note,
            "totals": self.totals(On.REPORT),
        }
