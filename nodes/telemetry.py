"""Numbers per (step, layer, head) of every sampler run: density, skipped PV, milliseconds, and the reason of every dense call.

A run that a monitor watches also has a small picture of the kept blocks per (step, layer). A run gathers device tensors without reading them; at
the end of a step they travel to the host in one asynchronous copy. The store at the end of this file keeps the last runs, host numbers only.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np
import torch

MAX_RUNS = 8
MAX_HEAD_BYTES = 6 << 20  # per-head numbers of one run; beyond it a run keeps the mean over heads only
MAX_REASONS = 64
MAX_MAP_BYTES = 32 << 20  # pictures of one run; beyond it a run keeps those of every second step, then of every fourth, and the latest
MAX_STORED_MAP_BYTES = 64 << 20  # of all closed runs; beyond it the oldest lose theirs


class Timer:
    """Milliseconds between `start` and `stop` on the device's own clock, without waiting for it."""

    def __init__(self, device: torch.device):
        self._events = None
        if device.type == "cuda":
            self._events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            self._events[0].record()
        self._start = time.perf_counter()
        self._stop = self._start

    def stop(self) -> Timer:
        if self._events is not None:
            self._events[1].record()
        self._stop = time.perf_counter()
        return self

    def milliseconds(self) -> float:
        """Elapsed time; waits for the device where it has not got there yet."""
        if self._events is None:
            return (self._stop - self._start) * 1e3
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1])


@dataclass
class Cell:
    """Sums over the calls of one (step, layer)."""

    sparse_calls: int = 0
    dense_calls: int = 0
    density: float = 0.0
    pv_skipped: float = 0.0
    sparse_ms: float = 0.0
    dense_ms: float = 0.0
    head_density: np.ndarray | None = None
    reasons: Counter = field(default_factory=Counter)

    def to_dict(self, step: int, layer: int) -> dict:
        n = self.sparse_calls
        heads = None if self.head_density is None or not n else [round(float(x), 5) for x in self.head_density / n]
        return {
            "step": step,
            "layer": layer,
            "sparse_calls": n,
            "dense_calls": self.dense_calls,
            "density": self.density / n if n else None,
            "head_density": heads,
            "pv_skipped": self.pv_skipped / n if n else None,
            "sparse_ms": self.sparse_ms,
            "dense_ms": self.dense_ms,
            "reasons": dict(self.reasons),
        }


@dataclass(frozen=True, eq=False)
class Pooled:
    """The picture of a call's kept blocks on its device: uint8 (H, R, C), of `n_q` x `n_k` blocks.

    place : (order kind, the sequence's segments, which of them is the latent's grid), or None where that is not known.
    """

    heads: torch.Tensor
    n_q: int
    n_k: int
    place: tuple | None


@dataclass
class Picture:
    """The kept blocks of one (step, layer): the mean over calls and heads, uint8 (R, C); the rest as in `Pooled`."""

    values: np.ndarray
    n_q: int
    n_k: int
    place: tuple | None
    calls: int = 1

    def add(self, values: np.ndarray) -> None:
        total = self.values.astype(np.float32) * self.calls + values
        self.calls += 1
        self.values = (total / self.calls + 0.5).astype(np.uint8)


@dataclass(eq=False)
class _Pending:
    step: int
    layer: int
    tokens: int
    timer: Timer
    density: torch.Tensor | None = None
    pv_skipped: torch.Tensor | None = None
    plain: bool = True
    shape: tuple | None = None
    pooled: Pooled | None = None
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

    monitors : the ids of the monitors that watch it, and whether each wants dense attention timed.
    """

    def __init__(self, number: int, *, node: str, owner: str, facts: dict, sigmas: list[float], monitors: dict[str, bool] | None = None):
        self.number = number
        self.node = node
        self.owner = owner  # the key of the patch whose run this is
        self.facts = facts
        self.sigmas = sigmas
        self.cells: dict[tuple[int, int], Cell] = {}
        self.reasons: Counter = Counter()
        self.calls = 0
        self.launched = 0  # sparse calls, also those whose numbers have not arrived
        self.heads = 0
        self.tokens = 0
        self.seconds = 0.0
        self.note: str | None = None
        self.warning: str | None = None
        self.state = "running"
        self.finished = 0  # steps
        self.total_layers = 0  # where known before the numbers of all layers have arrived
        self.monitors = dict(monitors or {})
        self.measures = any(self.monitors.values())
        self.measuring_ms = 0.0
        self.maps: dict[tuple[int, int], Picture] = {}
        self.map_every = 1
        self.head_maps: tuple[int, dict[int, list]] = (-1, {})  # of the last step that ran sparse: on the device, of a closed run on the host
        self.send_failed = False
        self._measured: set[tuple] = set()
        self._dense_ms: dict[tuple, float] = {}
        self._sparse_ms: dict[tuple, tuple[int, float]] = {}  # calls and their sum
        self._collected: set[tuple[int, int]] = set()
        self._fresh: set[tuple[int, int]] = set()
        self._pending: list[_Pending] = []
        self._in_flight: _InFlight | None = None
        self._ms_by_tokens: dict[tuple[int, bool], list[float]] = {}
        self._head_bytes = 0
        self._started = time.perf_counter()

    def sparse(self, step: int, layer: int, tokens: int, density: torch.Tensor, pv_skipped: torch.Tensor, timer: Timer, *,
               shape: tuple | None = None, pooled: Pooled | None = None) -> None:  # fmt: skip
        """Records a sparse call; `density` and `pv_skipped` are (B, H) on the device of the call.

        In a run with monitors, `shape` is what the dense time of the call depends on, and `pooled` its picture.
        """
        self.calls += 1
        self.launched += 1
        self._pending.append(_Pending(step, layer, tokens, timer, density, pv_skipped, shape=shape, pooled=pooled))

    def wants_dense(self, shape: tuple) -> bool:
        """Whether a call of this shape is to be run densely too, to be timed: once per shape, in a run with a monitor that measures."""
        if not self.measures or shape in self._measured:
            return False
        self._measured.add(shape)
        return True

    def measured(self, step: int, layer: int, tokens: int, shape: tuple, timer: Timer, cost: Timer) -> None:
        """Records the dense time of a shape, from an extra call, and what measuring it took in all."""
        self._pending.append(_Pending(step, layer, tokens, timer, shape=shape, cost=cost))

    def dense(self, step: int, layer: int | None, tokens: int, reason: str, timer: Timer | None, plain: bool = True) -> None:
        """Records a dense call; only calls of a numbered layer have a timer and a cell.

        `plain`: ComfyUI's own attention ran, not another node's; only such calls are what `speedup` compares with.
        """
        self.calls += 1
        if len(self.reasons) >= MAX_REASONS and reason not in self.reasons:
            reason = "other reasons"
        self.reasons[reason] += 1
        if layer is not None:
            cell = self.cells.setdefault((step, layer), Cell())
            cell.dense_calls += 1
            cell.reasons[reason] += 1
            self._pending.append(_Pending(step, layer, tokens, timer, plain=plain))

    def end_step(self) -> None:
        """Sends what the step left on the device to the host and takes in what an earlier step sent."""
        self._collect()
        sparse = [p for p in self._pending if p.density is not None]
        if not sparse:
            self._take(self._pending, [])
        else:
            sent = [torch.cat([torch.stack([p.density.mean(0), p.pv_skipped.mean(0)]).flatten() for p in sparse])]
            pooled = [p for p in sparse if p.pooled is not None]
            if pooled:
                means = torch.cat([p.pooled.heads.mean(0, dtype=torch.float32).flatten() for p in pooled])
                sent.append((means + 0.5).to(torch.uint8))
            self._in_flight = _InFlight(self._pending, sent, *_to_host(sent))
            if self._in_flight.done is None and sent[0].device.type == "cpu":  # it is there
                self._collect()
        self._pending = []

    def close(self) -> None:
        """Takes in everything; afterwards the run holds host numbers only."""
        self.end_step()
        self._collect()
        step, layers = self.head_maps
        self.head_maps = step, {layer: [x.cpu().numpy() for x in maps] for layer, maps in layers.items()}
        self.state = "done" if self.state == "running" else self.state
        self.seconds = time.perf_counter() - self._started

    def abandon(self, note: str) -> None:
        """Closes the run without what is still on the device."""
        self._pending, self._in_flight, self.head_maps = [], None, (-1, {})
        self.state, self.note = "failed", self.note or note
        self.seconds = time.perf_counter() - self._started

    def _remember_heads(self, pooled: list[_Pending]) -> None:
        layers: dict[int, list] = {}
        for p in pooled:
            layers.setdefault(p.layer, []).append(p.pooled.heads)
        self.head_maps = pooled[-1].step, layers

    def _collect(self) -> None:
        if self._in_flight is None:
            return
        arrived, self._in_flight = self._in_flight, None
        if arrived.done is not None:
            arrived.done.synchronize()
        self._take(arrived.pending, [x.cpu().numpy() for x in arrived.host])
        pooled = [p for p in arrived.pending if p.pooled is not None]
        if pooled:  # not earlier: the pictures of heads belong to the last step whose numbers are there
            self._remember_heads(pooled)

    def _take(self, pending: list[_Pending], arrays: list[np.ndarray]) -> None:
        values = arrays[0].astype(np.float32) if arrays else None
        at = map_at = 0
        for p in pending:
            ms = p.timer.milliseconds()
            if p.plain:
                self._ms_by_tokens.setdefault((p.tokens, p.density is not None), []).append(ms)
            if p.cost is not None:
                self.measuring_ms += p.cost.milliseconds()
                self._dense_ms[p.shape] = ms
                continue
            cell = self.cells.setdefault((p.step, p.layer), Cell())
            if self.monitors:
                self._fresh.add((p.step, p.layer))
            self.tokens = max(self.tokens, p.tokens)
            if p.density is None:
                cell.dense_ms += ms
                continue
            heads = p.density.shape[1]
            density, pv_skipped = values[at : at + heads], values[at + heads : at + 2 * heads]
            at += 2 * heads
            self.heads = max(self.heads, heads)
            cell.sparse_calls += 1
            cell.sparse_ms += ms
            cell.density += float(density.mean())
            cell.pv_skipped += float(pv_skipped.mean())
            self._add_heads(cell, density)
            if p.shape is not None:
                calls, sum_ms = self._sparse_ms.get(p.shape, (0, 0.0))
                self._sparse_ms[p.shape] = calls + 1, sum_ms + ms
            if p.pooled is not None:
                shape = p.pooled.heads.shape[1:]
                self._add_map(p, arrays[1][map_at : map_at + shape.numel()].reshape(shape).copy())
                map_at += shape.numel()
        self._collected |= self._fresh
        self._thin_maps()

    def _add_map(self, p: _Pending, values: np.ndarray) -> None:
        found = self.maps.get((p.step, p.layer))
        if found is not None and found.values.shape == values.shape:
            found.add(values)
        else:
            self.maps[p.step, p.layer] = Picture(values, p.pooled.n_q, p.pooled.n_k, p.pooled.place)

    def _thin_maps(self) -> None:
        last = max((step for step, _ in self.maps), default=0)
        while True:
            if self.map_every > 1:
                self.maps = {at: picture for at, picture in self.maps.items() if at[0] % self.map_every == 0 or at[0] == last}
            if self.map_bytes <= MAX_MAP_BYTES or self.map_every > last:
                return
            self.map_every *= 2

    @property
    def map_bytes(self) -> int:
        return sum(picture.values.nbytes for picture in self.maps.values())

    def _add_heads(self, cell: Cell, density: np.ndarray) -> None:
        if cell.head_density is None and cell.sparse_calls == 1 and self._head_bytes + density.nbytes <= MAX_HEAD_BYTES:
            self._head_bytes += density.nbytes
            cell.head_density = density.copy()
        elif cell.head_density is not None and cell.head_density.shape == density.shape:
            cell.head_density = cell.head_density + density
        else:
            cell.head_density = None

    @property
    def sparse_calls(self) -> int:
        return sum(c.sparse_calls for c in list(self.cells.values()))

    def speedup(self) -> float | None:
        """Dense over sparse milliseconds a call, from calls of equal length in this run; None when one of the two was not measured."""
        dense_ms = sparse_ms = 0.0
        for (tokens, is_sparse), ms in list(self._ms_by_tokens.items()):
            if is_sparse and (tokens, False) in self._ms_by_tokens:
                dense = self._ms_by_tokens[tokens, False]
                dense_ms += sum(dense) / len(dense) * len(ms)
                sparse_ms += sum(ms)
        return dense_ms / sparse_ms if sparse_ms > 0 else None

    def saved_ms(self) -> float | None:
        """Dense minus sparse milliseconds over the calls whose shape was measured, less what measuring took; None when none was."""
        known = [(self._dense_ms[shape], *of_shape) for shape, of_shape in list(self._sparse_ms.items()) if shape in self._dense_ms]
        return sum(dense * calls - sparse for dense, calls, sparse in known) - self.measuring_ms if known else None

    @property
    def steps(self) -> int:
        return max(len(self.sigmas) - 1, 1 + max((step for step, _ in list(self.cells)), default=-1))

    @property
    def layers(self) -> int:
        return 1 + max((layer for _, layer in list(self.cells)), default=-1)

    def numbers(self) -> list[tuple[tuple[int, int], Cell]]:
        """((step, layer), cell) of everything that has arrived, in order."""
        return [(at, self.cells[at]) for at in sorted(self._collected.copy())]

    def news(self) -> list[tuple[tuple[int, int], Cell]]:
        """The same of what has arrived since the last call of this."""
        fresh, self._fresh = self._fresh, set()
        return [(at, self.cells[at]) for at in sorted(fresh)]

    def totals(self) -> dict:
        cells = list(self.cells.values())
        sparse = sum(c.sparse_calls for c in cells)
        return {
            "sparse_calls": sparse,
            "dense_calls": sum(self.reasons.values()),
            "density": sum(c.density for c in cells) / sparse if sparse else None,
            "pv_skipped": sum(c.pv_skipped for c in cells) / sparse if sparse else None,
            "sparse_ms": sum(c.sparse_ms for c in cells),
            "dense_ms": sum(c.dense_ms for c in cells),
            "seconds": self.seconds,
            "speedup": self.speedup(),
            "saved_ms": self.saved_ms(),
            "measuring_ms": self.measuring_ms,
        }

    def to_dict(self) -> dict:
        """The run as plain JSON-serialisable numbers."""
        return {
            "version": 1,
            "run": self.number,
            "node": self.node,
            **self.facts,
            "steps": self.steps,
            "layers": self.layers,
            "heads": self.heads,
            "tokens": self.tokens,
            "sigmas": self.sigmas,
            "cells": [cell.to_dict(step, layer) for (step, layer), cell in sorted(self.cells.items())],
            "reasons": dict(self.reasons.most_common()),
            "note": self.note,
            "totals": self.totals(),
        }

    def summary(self) -> str:
        """One line for the log and the node."""
        totals = self.totals()
        if self.note and not totals["sparse_calls"]:
            return self.note
        dense = ", ".join(f"{n} x {reason}" for reason, n in self.reasons.most_common(4))
        if not totals["sparse_calls"]:
            return f"nothing ran sparse; dense: {dense or 'no attention call was seen'}"
        faster, ratio = "", totals["speedup"]
        if ratio:
            told = f"{ratio:.2f}x faster than dense" if ratio >= 1 else f"{1 / ratio:.2f}x slower than dense: raise min_tokens"
            faster = f", {told} (a call, measured)"
        text = f"{totals['sparse_calls']} calls sparse, density {totals['density']:.2f}, {totals['sparse_ms']:.0f} ms{faster}"
        return "; ".join(part for part in (self.note, text, f"dense: {dense}" if dense else "") if part)


class Runs:
    """The open and the last runs of this process, and what each report node has shown."""

    def __init__(self):
        self.running: deque[Run] = deque(maxlen=MAX_RUNS)
        self.closed: deque[Run] = deque(maxlen=MAX_RUNS)
        self.unpatched: deque[Run] = deque(maxlen=MAX_RUNS)  # of models without our patch: no numbers, only the warning of a monitor
        self.latest = 0
        self._shown: dict[str, tuple[int, int]] = {}

    def open(self, **facts) -> Run:
        self.latest += 1
        run = Run(self.latest, **facts)
        self.running.append(run)
        return run

    def open_unpatched(self, **facts) -> Run:
        self.latest += 1
        self.unpatched.append(Run(self.latest, **facts))
        return self.unpatched[-1]

    def add(self, run: Run) -> None:
        """Moves a run to the closed ones. Pictures of heads stay with the newest alone, the others' as far as there is room."""
        for earlier in self.closed:
            earlier.head_maps = (-1, {})
        self.closed.append(run)
        if run in self.running:  # only now: whoever asks in between finds it
            self.running.remove(run)
        room = MAX_STORED_MAP_BYTES
        for kept in reversed(self.closed):
            room -= kept.map_bytes
            if room < 0:
                kept.maps = {}

    def find(self, number: int) -> Run | None:
        """An open or closed run by its number."""
        return next((run for run in [*self.running, *self.closed] if run.number == number), None)

    def for_monitor(self, monitor: str) -> list[Run]:
        """The runs that a monitor watches or has watched, oldest first."""
        known = {run.number: run for run in [*self.running, *self.closed, *self.unpatched] if monitor in run.monitors}
        return [known[number] for number in sorted(known)]

    def last_shown(self, report: str) -> int:
        """The number of the last run that `report` showed; 0 before the first."""
        return self._shown.get(report, (0, 0))[1]

    def for_report(self, report: str, owners: list[str]) -> list[Run]:
        """The runs since `report` last asked; when there is none, the ones it showed before.

        `owners` limits them to the runs of these patches; empty: all runs.
        """
        first, last = self._shown.get(report, (0, 0))
        known = sorted((r for r in self.closed if not owners or r.owner in owners), key=lambda r: r.number)  # an inner run closes first
        chosen = [r for r in known if r.number > last]
        if chosen:
            if len(self._shown) >= 64 and report not in self._shown:
                self._shown.pop(next(iter(self._shown)))
            self._shown[report] = (chosen[0].number, chosen[-1].number)
            return chosen
        return [r for r in known if first <= r.number <= last]


runs = Runs()
