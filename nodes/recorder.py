"""What one sampler run did, call by call: the statistics of every (step, layer), the reason of every dense call, pooled maps where a monitor watches.

A run gathers device tensors without reading them; at the end of a step they travel to the host, in one asynchronous copy for each device. ComfyUI may
sample with a thread for each of several GPUs, so any thread may record, and end a step, at any time. The server's thread may ask meanwhile
(`transport`): whatever it walks over is a copy, for a dict that grew meanwhile would raise.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from . import maps, reasons, statistics
from .speedup import CallKind, Comparison, Plan
from .statistics import On, Sums, total

MAX_HEAD_BYTES = 6 << 20  # per-head numbers of one run; beyond it a run keeps the mean over heads only
MAX_REASONS = 64


def check_device(device: torch.device) -> None:
    """Raises where a kernel has failed on a GPU: that shows in whatever comes next and must not pass for want of room there."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Timer:
    """Milliseconds between `start` and `stop` on the device's own clock, without waiting for it.

    stream : of a GPU, the one that the work between goes to; else None.
    """

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self.stream else []
        if self._events:
            self._events[0].record(self.stream)
        self._start = self._stop = time.perf_counter()

    def stop(self) -> Timer:
        if self._events:
            self._events[1].record(self.stream)
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
    tokens : of its queries. kind : None for a call that is to be compared with nothing.
    """

    step: int
    layer: int | None
    tokens: int
    timer: Timer | None = None
    kind: CallKind | None = None

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
        n = self.of["sparse_calls"] - self.lost
        heads = None if self.head_density_sum is None or not n else [round(float(x), 5) for x in self.head_density_sum / n]
        return {"step": step, "layer": layer, **self.numbers(On.REPORT), "head_density": heads, "reasons": dict(self.reasons)}


@dataclass(frozen=True, eq=False)
class _Pending:
    call: Timed
    numbers: Mapping[str, torch.Tensor] | None = None  # of a sparse call
    pooled: maps.Pooled | None = None
    cost: Timer | None = None  # of an extra dense call, the time that it took in all
    warm_up: bool = False

    @property
    def device(self) -> torch.device | None:
        return None if self.numbers is None else next(iter(self.numbers.values())).device


@dataclass(frozen=True, eq=False)
class _InFlight:
    """What travels from one device to the host. `sent` keeps the device's side alive until it has arrived."""

    pending: list[_Pending]
    sent: list[torch.Tensor]
    host: list[torch.Tensor]
    done: torch.cuda.Event | None


def _batches(pending: list[_Pending]) -> list[list[_Pending]]:
    """The calls by the device and the stream that their numbers were made on. What has timers alone travels with the first, whatever it ran on."""
    found: dict = defaultdict(list)
    for p in pending:
        if p.numbers is not None:
            device = p.device
            found[device, p.call.timer.stream if device.type == "cuda" else None].append(p)
    timed, batches = [p for p in pending if p.numbers is None], list(found.values())
    if timed:
        batches[:1] = [[*(batches[0] if batches else []), *timed]]
    return batches


def _milliseconds(timer: Timer | None) -> float:
    return 0.0 if timer is None else timer.milliseconds()


def _on_its_stream(sparse: list[_Pending]) -> torch.cuda.StreamContext | nullcontext:
    """On the stream that made them: on another one a copy could read numbers before they are there."""
    return torch.cuda.stream(sparse[0].call.timer.stream) if sparse[0].device.type == "cuda" else nullcontext()


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
        self.said: dict[str, str] = {}
        self.warning: str | None = None
        self.state = "running"
        self.finished = 0  # steps
        self.total_layers = 0  # where known before the numbers of all layers have arrived
        self.maps = maps.RunMaps()
        self.plan = Plan(range(len(sigmas) - 1))
        self.against_dense = Comparison()
        self.send_failed = False
        self._lock = threading.Lock()  # of what follows, and of the counts: held for appends and sums, never while a device is waited for
        self._step = 0
        self._collected: set[maps.At] = set()
        self._fresh: set[maps.At] = set()
        self._pending: list[_Pending] = []
        self._head_bytes = 0
        self._lost = 0
        self._ending = threading.Lock()  # held by the thread that moves numbers to the host
        self._in_flight: list[_InFlight] = []
        self._started = time.perf_counter()

    def reach(self, step: int) -> bool:
        """Notes that a model call is at this step; whether it is the first one there, after which the step before is to be ended."""
        with self._lock:
            is_new = step != self._step
            self._step, self.finished = step, max(self.finished, step if is_new else 0)  # samplers go back to an earlier step, too
        return is_new

    def sparse(self, call: Timed, numbers: Mapping[str, torch.Tensor], pooled: maps.Pooled | None = None) -> None:
        """Records a sparse call: `numbers` are the table's means by name, all of them, (B, H) each on the call's device; `pooled` for a monitor."""
        made = _Pending(call, numbers, pooled)
        with self._lock:
            self.calls += 1
            self.sparse_calls += 1
            self._pending.append(made)

    def wants_dense(self, call: Timed) -> bool:
        """Whether this sparse call is to be run densely too, to be timed: to be asked once about each, in a run with a monitor that measures."""
        if not self.measures or call.kind is None:
            return False
        with self._lock:
            return self.plan.wants(call.kind, call.step)

    def measured(self, call: Timed, cost: Timer) -> None:
        """Records the time of an extra dense call that was wanted, and what making it took in all."""
        with self._lock:
            self._pending.append(_Pending(call, cost=cost, warm_up=call.kind is not None and self.plan.warms_up(call.kind)))

    def dense(self, call: Timed, reason: str) -> None:
        """Records a dense call."""
        with self._lock:
            self.calls += 1
            if len(self.reasons) >= MAX_REASONS and reason not in self.reasons:
                reason = "other reasons"
            self.reasons[reason] += 1
            cell = self.outside
            if call.layer is not None:
                cell = self.cells.setdefault(call.at, Cell())
                self._pending.append(_Pending(call))
                if call.kind is not None:
                    self.plan.saw_dense(call.kind)
            cell.add("dense_calls", 1)
            cell.reasons[reason] += 1

    def count_above(self) -> None:
        """Counts a call that another node of ours ran."""
        with self._lock:
            self.answered_above += 1

    def say(self, sentence: str, **values: object) -> None:
        """Adds a sentence of `reasons` to what is said of the run; said again with other values, it takes its own place."""
        self.said = {**self.said, sentence: sentence.format(**values)}

    @property
    def notes(self) -> str | None:
        """Everything that is said of the run as a whole, in one line."""
        return "; ".join(filter(None, (self.note, *self.said.values()))) or None

    def end_step(self) -> None:
        """Sends what the calls have left on their devices to the host and takes in what was sent before."""
        with self._ending:
            self._collect()
            with self._lock:
                pending, self._pending = self._pending, []
            batches = _batches(pending)
            try:
                while batches:
                    self._send(batches.pop(0))
            finally:  # a broken device ends the run, which counts what it leaves
                with self._lock:
                    self._pending[:0] = itertools.chain(*batches)

    def close(self) -> None:
        """Takes in everything; afterwards the run holds host numbers only."""
        self.end_step()
        with self._ending:
            self._collect()
            self.maps.heads = self._heads_on_the_host()
        self.state = "done" if self.state == "running" else self.state
        self.seconds = time.perf_counter() - self._started

    def abandon(self, note: str) -> None:
        """Closes the run without what is still on the device."""
        with self._ending:
            left = [p for batch in self._in_flight for p in batch.pending]
            self._in_flight, self.maps.heads = [], maps.HeadMaps()
            with self._lock:
                left, self._pending = left + self._pending, []
            self._leave_out(left)
        self.state, self.note = "failed", self.note or note
        self.seconds = time.perf_counter() - self._started

    def _send(self, batch: list[_Pending]) -> None:
        """Sends the numbers of the calls of one device; where nothing has to travel, they are taken in at once."""
        sparse = [p for p in batch if p.numbers is not None]
        if not sparse:
            return self._arrive(_InFlight(batch, [], [], None))
        try:
            with _on_its_stream(sparse):
                sent = [torch.cat([torch.stack([x.mean(0) for x in p.numbers.values()]).flatten() for p in sparse if p.numbers is not None])]
                pooled = [p.pooled for p in sparse if p.pooled is not None]
                if pooled:
                    sent.append((torch.cat([x.heads.mean(0, dtype=torch.float32).flatten() for x in pooled]) + 0.5).to(torch.uint8))
                sent_off = _InFlight(batch, sent, *_to_host(sent))
        except Exception as error:
            return self._lose(batch, error)
        if sent_off.done is None and sent[0].device.type == "cpu":
            return self._arrive(sent_off)
        self._in_flight.append(sent_off)

    def _collect(self) -> None:
        while self._in_flight:
            self._arrive(self._in_flight.pop(0))

    def _arrive(self, batch: _InFlight) -> None:
        try:
            if batch.done is not None:
                batch.done.synchronize()
            arrays = [x.cpu().numpy() for x in batch.host]
            times = [(_milliseconds(p.call.timer), _milliseconds(p.cost)) for p in batch.pending]
        except Exception as error:
            return self._lose(batch.pending, error)
        with self._lock:
            self._take(batch.pending, arrays, times)
        self._keep_heads(batch.pending)

    def _lose(self, pending: list[_Pending], error: Exception) -> None:
        """Goes on without the numbers of these calls, where it was no kernel's failure that kept them."""
        calls = self._leave_out(pending)
        devices = {p.device for p in pending if p.device is not None}
        if not devices:  # timers alone: nothing was copied that there may have been no room for
            raise error
        for device in devices:
            check_device(device)
        rest = [p for p in pending if p.numbers is None]
        if rest:  # their timers are on the host's side of the copy
            self._arrive(_InFlight(rest, [], [], None))
        self._lost += calls
        what = "1 sparse call" if self._lost == 1 else f"{self._lost:,} sparse calls"
        self.say(reasons.NUMBERS_LOST, calls=what, error=type(error).__name__)

    def _leave_out(self, pending: list[_Pending]) -> int:
        """Counts sparse calls whose numbers will not arrive; how many they are."""
        sparse = [p.call.at for p in pending if p.numbers is not None]
        with self._lock:
            for at in sparse:
                cell = self.cells.setdefault(at, Cell())
                cell.add("sparse_calls", 1)
                cell.lost += 1
                self._is_news(at)
            self._collected |= self._fresh
        return len(sparse)

    def _is_news(self, at: maps.At) -> None:
        if self.monitors:
            self._fresh.add(at)

    def _keep_heads(self, pending: list[_Pending]) -> None:
        """The maps of heads belong to the last step whose numbers are there; its calls may arrive from several devices, one after the other."""
        last = max((p.call.step for p in pending if p.pooled is not None), default=-1)
        kept = self.maps.heads
        if last < max(kept.step, 0):
            return
        layers = {layer: list(calls) for layer, calls in kept.layers.items()} if kept.step == last else {}
        for p in pending:
            if p.pooled is not None and p.call.step == last:
                layers.setdefault(p.call.layer, []).append(p.pooled.heads)
        self.maps.heads = maps.HeadMaps(last, layers)

    def _heads_on_the_host(self) -> maps.HeadMaps:
        heads = self.maps.heads
        try:
            return maps.HeadMaps(heads.step, {layer: [x.cpu().numpy() for x in calls] for layer, calls in heads.layers.items()})
        except Exception as error:
            for device in {x.device for calls in heads.layers.values() for x in calls}:
                check_device(device)
            self.say(reasons.NO_MAP, error=type(error).__name__)
            return maps.HeadMaps()

    def _take(self, pending: list[_Pending], arrays: list[np.ndarray], times: list[tuple[float, float]]) -> None:
        values = arrays[0].astype(np.float32) if arrays else None
        at = map_at = 0
        for p, (ms, cost_ms) in zip(pending, times, strict=True):
            call, kind = p.call, p.call.kind
            if p.cost is not None:
                self.against_dense.measuring_ms += cost_ms
                if kind is not None and not p.warm_up:
                    self.against_dense.extra(kind, call.step, ms)
                continue
            cell = self.cells.setdefault(call.at, Cell())
            self._is_news(call.at)
            self.tokens = max(self.tokens, call.tokens)
            if p.numbers is None:
                cell.add("dense_ms", ms)
                if kind is not None:
                    self.against_dense.dense(kind, call.step, ms)
                continue
            shape = len(p.numbers), next(iter(p.numbers.values())).shape[1]
            by_head = dict(zip(p.numbers, values[at : at + shape[0] * shape[1]].reshape(shape), strict=True))
            at += shape[0] * shape[1]
            self._add_sparse(cell, by_head, ms)
            if kind is not None:
                self.against_dense.sparse(kind, call.step, ms)
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
        is_first = cell.of["sparse_calls"] - cell.lost == 1
        if cell.head_density_sum is None and is_first and self._head_bytes + density.nbytes <= MAX_HEAD_BYTES:
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
        with self._lock:
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
        against, known = self.against_dense, total([*self.cells.copy().values(), self.outside]).numbers()
        found = against.speedup()
        known |= {"speedup": found.median if found.is_clear else None, "speedup_low": found.low, "speedup_high": found.high}
        known |= {
            "compared_calls": found.calls or None,
            "saved_ms": against.saved_ms(),
            "measuring_ms": against.measuring_ms,
            "seconds": self.seconds,
        }
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
            "note": self.notes,
            "compared_with": self.against_dense.instead(),
            "totals": self.totals(On.REPORT),
        }
