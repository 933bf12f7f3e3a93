"""Numbers per (step, layer, head) of every sampler run: density, skipped PV, milliseconds, and the reason of every dense call.

A run gathers device tensors without reading them; at the end of a step they travel to the host in one asynchronous copy. The store at the end of
this file keeps the last runs, host numbers only.
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


@dataclass(eq=False)
class _Pending:
    step: int
    layer: int
    tokens: int
    timer: Timer
    density: torch.Tensor | None = None
    pv_skipped: torch.Tensor | None = None
    plain: bool = True


class Run:
    """One sampler run of one patched model."""

    def __init__(self, number: int, *, node: str, owner: str, facts: dict, sigmas: list[float]):
        self.number = number
        self.node = node
        self.owner = owner  # the key of the patch whose run this is
        self.facts = facts
        self.sigmas = sigmas
        self.cells: dict[tuple[int, int], Cell] = {}
        self.reasons: Counter = Counter()
        self.calls = 0
        self.heads = 0
        self.tokens = 0
        self.seconds = 0.0
        self.note: str | None = None
        self._pending: list[_Pending] = []
        self._in_flight: tuple[list[_Pending], torch.Tensor, torch.Tensor, object] | None = None
        self._ms_by_tokens: dict[tuple[int, bool], list[float]] = {}
        self._head_bytes = 0
        self._started = time.perf_counter()

    def sparse(self, step: int, layer: int, tokens: int, density: torch.Tensor, pv_skipped: torch.Tensor, timer: Timer) -> None:
        """Records a sparse call; `density` and `pv_skipped` are (B, H) on the device of the call."""
        self.calls += 1
        self._pending.append(_Pending(step, layer, tokens, timer, density, pv_skipped))

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
            self._take(self._pending, None)
        else:
            rows = torch.cat([torch.stack([p.density.mean(0), p.pv_skipped.mean(0)]).flatten() for p in sparse])
            host, done = rows, None
            if rows.is_cuda:
                host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
                host.copy_(rows, non_blocking=True)
                done = torch.cuda.Event()
                done.record()
            self._in_flight = (self._pending, host, rows, done)
        self._pending = []

    def close(self) -> None:
        """Takes in everything; afterwards the run holds host numbers only."""
        self.end_step()
        self._collect()
        self.seconds = time.perf_counter() - self._started

    def _collect(self) -> None:
        if self._in_flight is None:
            return
        pending, host, _, done = self._in_flight
        self._in_flight = None
        if done is not None:
            done.synchronize()
        self._take(pending, host.float().cpu().numpy())

    def _take(self, pending: list[_Pending], values: np.ndarray | None) -> None:
        at = 0
        for p in pending:
            cell = self.cells.setdefault((p.step, p.layer), Cell())
            ms = p.timer.milliseconds()
            if p.plain:
                self._ms_by_tokens.setdefault((p.tokens, p.density is not None), []).append(ms)
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
        return sum(c.sparse_calls for c in self.cells.values())

    def speedup(self) -> float | None:
        """Dense over sparse milliseconds a call, from calls of equal length in this run; None when one of the two was not measured."""
        dense_ms = sparse_ms = 0.0
        for (tokens, is_sparse), ms in self._ms_by_tokens.items():
            if is_sparse and (tokens, False) in self._ms_by_tokens:
                dense = self._ms_by_tokens[tokens, False]
                dense_ms += sum(dense) / len(dense) * len(ms)
                sparse_ms += sum(ms)
        return dense_ms / sparse_ms if sparse_ms > 0 else None

    def to_dict(self) -> dict:
        """The run as plain JSON-serialisable numbers."""
        cells = [cell.to_dict(step, layer) for (step, layer), cell in sorted(self.cells.items())]
        sparse = sum(c["sparse_calls"] for c in cells)

        def mean(name):
            return sum(c[name] * c["sparse_calls"] for c in cells if c["sparse_calls"]) / sparse if sparse else None

        return {
            "version": 1,
            "run": self.number,
            "node": self.node,
            **self.facts,
            "steps": max(len(self.sigmas) - 1, 1 + max((c["step"] for c in cells), default=-1)),
            "layers": 1 + max((c["layer"] for c in cells), default=-1),
            "heads": self.heads,
            "tokens": self.tokens,
            "sigmas": self.sigmas,
            "cells": cells,
            "reasons": dict(self.reasons.most_common()),
            "note": self.note,
            "totals": {
                "sparse_calls": sparse,
                "dense_calls": sum(self.reasons.values()),
                "density": mean("density"),
                "pv_skipped": mean("pv_skipped"),
                "sparse_ms": sum(c["sparse_ms"] for c in cells),
                "dense_ms": sum(c["dense_ms"] for c in cells),
                "seconds": self.seconds,
                "speedup": self.speedup(),
            },
        }

    def summary(self) -> str:
        """One line for the log and the node."""
        totals = self.to_dict()["totals"]
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
    """The last runs of this process and what each report node has shown."""

    def __init__(self):
        self.closed: deque[Run] = deque(maxlen=MAX_RUNS)
        self.latest = 0
        self._shown: dict[str, tuple[int, int]] = {}

    def open(self, **facts) -> Run:
        self.latest += 1
        return Run(self.latest, **facts)

    def add(self, run: Run) -> None:
        self.closed.append(run)

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
