"""What the monitor's browser side gets: a message a step, and answers to its questions about runs. Numbers only; drawing is the browser's."""

from __future__ import annotations

import base64
import logging
import re
from collections.abc import Mapping

import numpy as np

from . import _comfy, _kernels, reasons, telemetry

logger = logging.getLogger("sparge_attention")

EVENT = "sparge.run"
VERSION = 1
MAX_REASONS = 16
MAX_SHOWN = 4  # runs that a browser gets when it opens
MOST_FRAMES, MOST_ACROSS = 32, 64
BLOCK_Q, BLOCK_K = 128, 64  # tokens of a block, as in the kernels
CROSS = reasons.CROSS_ATTENTION.split("{")[0]


def publish(run: telemetry.Run) -> None:
    """Tells the browsers what is new in a run that monitors watch. What goes wrong here is logged once a run and never reaches the sampler."""
    if not run.monitors:
        return
    try:
        _comfy.send(EVENT, message(run, run.news()))
    except Exception as error:
        if not run.send_failed:
            logger.warning("Sparge Monitor, run %d: no message could be sent (%s: %s)", run.number, type(error).__name__, error)
        run.send_failed = True


def message(run: telemetry.Run, cells: list) -> dict:
    """The run with these cells, ((step, layer), Cell), in the form of the event."""
    warning, note = remarks(run)
    totals = run.totals()
    del totals["seconds"]
    return {
        "version": VERSION,
        "run": run.number,
        "monitors": list(run.monitors),
        "state": run.state,
        "step": run.finished,
        "steps": run.steps,
        "layers": max(run.layers, run.total_layers),
        "heads": run.heads,
        "tokens": run.tokens,
        "cells": [_cell(step, layer, cell) for (step, layer), cell in cells],
        "reasons": [[reason, count] for reason, count in run.reasons.copy().most_common(MAX_REASONS)],
        "warning": warning,
        "note": note,
        "totals": {name: _rounded(value) for name, value in totals.items()},
    }


def _cell(step: int, layer: int, cell: telemetry.Cell) -> list:
    n = cell.sparse_calls
    shares = [_rounded(cell.density / n), _rounded(cell.pv_skipped / n)] if n else [None, None]
    # Last: the relative error of the call, which nothing on the way to the sampler measures yet.
    return [step, layer, *shares, round(cell.sparse_ms + cell.dense_ms, 3), n, cell.dense_calls, None]


def _rounded(value):
    return round(value, 4) if isinstance(value, float) else value


def remarks(run: telemetry.Run) -> tuple[str | None, str | None]:
    """(warning, note): that nothing runs sparse is a warning, unless a window or the counting of blocks explains it and the run goes on."""
    closed = run.state != "running"
    if run.launched or run.warning == reasons.NO_NODE:
        return run.warning, run.note
    if run.state == "done" and run.note is not None:
        return run.note, None  # NEVER_ROUTED, NOTHING_SEEN
    found = [reason for reason, _ in run.reasons.copy().most_common() if not reason.startswith(CROSS)] or list(run.reasons)
    waiting = not run.finished or any(reason in (reasons.WINDOW, reasons.COUNTING_BLOCKS) for reason in found)
    if found and (closed or not waiting):
        return reasons.NOTHING_SPARSE.format(reason=found[0]), run.note
    return run.warning, run.note


# Answers to GET requests: (HTTP status, JSON data).


def register() -> None:
    _comfy.serve({"/sparge_attention/runs": answer_runs, "/sparge_attention/map": answer_map})


def answer_runs(query: Mapping[str, str]) -> tuple[int, dict]:
    """The newest runs that the monitor `monitor` watches or has watched, whole."""
    monitor = query.get("monitor", "")
    if not monitor:
        return 400, {"error": "monitor must be the id of a Sparge Monitor node, got nothing; add ?monitor=<id>"}
    found = telemetry.runs.for_monitor(monitor)[-MAX_SHOWN:]
    return 200, {"version": VERSION, "runs": [message(run, run.numbers()) for run in found]}


def answer_map(query: Mapping[str, str]) -> tuple[int, dict]:
    """The picture of the kept blocks of (run, step, layer), of one head where `head` is given."""
    asked = {}
    for name in ("run", "step", "layer", "head"):
        text = query.get(name)
        if text is None and name == "head":
            continue
        if not re.fullmatch(r"[0-9]{1,9}", text or ""):
            return 400, {"error": f"{name} must be a whole number from 0, got {text!r}; give it as {name}=0"}
        asked[name] = int(text)
    run = telemetry.runs.find(asked["run"])
    if run is None:
        return 404, {"error": f"run {asked['run']} is gone: the last {telemetry.MAX_RUNS} runs are kept"}
    picture = run.maps.get((asked["step"], asked["layer"]))
    if picture is None:
        return 404, {"error": _why_no_map(run, asked["step"], asked["layer"])}
    values = picture.values
    if "head" in asked:
        step, layers = run.head_maps
        calls = layers.get(asked["layer"], []) if step == asked["step"] else []
        if not calls:
            return 404, {"error": f"heads are kept for the last sparse step alone ({step if layers else 'none here'}), got step {asked['step']}"}
        if asked["head"] >= calls[0].shape[0]:
            return 404, {"error": f"head must be below {calls[0].shape[0]}, got {asked['head']}"}
        alike = [call[asked["head"]] for call in calls if call.shape == calls[0].shape]
        chosen = [np.asarray(call.cpu() if hasattr(call, "cpu") else call, dtype=np.float32) for call in alike]
        values = (sum(chosen) / len(chosen) + 0.5).astype(np.uint8)
    rows, columns = values.shape
    return 200, {"version": VERSION, "rows": rows, "columns": columns, "n_q": picture.n_q, "n_k": picture.n_k, "values": _text(values),
                 "frames": frames(values, picture)}  # fmt: skip


def _why_no_map(run: telemetry.Run, step: int, layer: int) -> str:
    if not run.monitors:
        return f"run {run.number} had no monitor, so no maps were kept"
    cell = run.cells.get((step, layer))
    if cell is None:
        return f"run {run.number} has no step {step} with a layer {layer} yet" if run.state == "running" else f"no step {step} with a layer {layer}"
    if not run.maps and run.state != "running" and run.sparse_calls:
        return f"the maps of run {run.number} were dropped to make room for newer runs"
    if cell.sparse_calls and step % run.map_every:
        return f"the map of step {step} was dropped to save memory: every {run.map_every} steps one is kept"
    return f"step {step}, layer {layer} was not sparse, or its map has not arrived yet"


def frames(values: np.ndarray, picture: telemetry.Picture) -> dict | None:
    """The rows and columns of the picture laid back over the latent's (T, H, W) grid, or None where the grid is not known.

    A place of the grid gets the mean over its tokens: how much their queries keep, and how often their keys are kept.
    """
    if picture.place is None:
        return None
    kind, segments, number = picture.place
    grid, t, spot, _ = _kernels.order_plan(kind, segments).coordinates()
    position = np.flatnonzero(grid == number)
    y, x = np.divmod(spot[position], segments[number][2])
    size = [min(n, most) for n, most in zip(segments[number], (MOST_FRAMES, MOST_ACROSS, MOST_ACROSS), strict=True)]
    place = 0
    for at, n, cells in zip((t[position], y, x), segments[number], size, strict=True):
        place = place * cells + at * cells // n
    tokens = np.bincount(place, minlength=size[0] * size[1] * size[2])

    def laid_back(shares: np.ndarray, edges: np.ndarray, block: int) -> str:
        cell = np.searchsorted(edges, position // block, side="right") - 1
        return _text((np.bincount(place, shares[cell], len(tokens)) / tokens + 0.5).astype(np.uint8))

    rows, columns = (np.arange(cells + 1) * n // cells for cells, n in zip(values.shape, (picture.n_q, picture.n_k), strict=True))
    kept = values.astype(np.float64)
    return {
        "t": size[0],
        "h": size[1],
        "w": size[2],
        "queries": laid_back(kept @ np.diff(columns) / picture.n_k, rows, BLOCK_Q),
        "keys": laid_back(np.diff(rows) @ kept / picture.n_q, columns, BLOCK_K),
    }


def _text(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode("ascii")
