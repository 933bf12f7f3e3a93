"""What the monitor's browser side gets: a message a step, and answers to its questions about runs. Numbers only; drawing is the browser's."""

from __future__ import annotations

import base64
import logging
import re
from collections.abc import Mapping

import numpy as np

from . import _comfy, maps, remarks, statistics, telemetry
from .recorder import Cell, Run
from .statistics import On, Sums

logger = logging.getLogger("sparge_attention")

EVENT = "sparge.run"
VERSION = 2
MAX_REASONS = 16
MAX_SHOWN = 4  # runs that a browser gets when it opens


def publish(run: Run) -> None:
    """Sends the browsers what is new in a run that monitors watch. What goes wrong here is logged once a run and never reaches the sampler."""
    if not run.monitors:
        return
    try:
        _comfy.send(EVENT, message(run, run.news()))
    except Exception as error:
        if not run.send_failed:
            logger.warning("Sparge Monitor, run %d: no message could be sent (%s: %s)", run.number, type(error).__name__, error)
        run.send_failed = True


def message(run: Run, cells: Mapping[maps.At, Cell]) -> dict:
    """The run with these cells in the form of the event.

    `columns` names what the rows of `cells` and of `step_totals` hold, in their order; a row of `step_totals` has no layer. Totals go by name.
    """
    warning, note = remarks.warning_and_note(run)
    steps = sorted({step for step, _ in cells})
    statistic = [{"name": row.name, "unit": row.unit, "label": row.label} for row in statistics.of_calls(On.MONITOR)]
    return {
        "version": VERSION,
        "run": run.number,
        "monitors": list(run.monitors),
        "state": run.state,
        "step": run.finished,
        **run.size(),
        "layers": max(run.layers, run.total_layers),
        "columns": [{"name": "step", "unit": "index"}, {"name": "layer", "unit": "index"}, *statistic],
        "cells": [[*at, *_row(cell)] for at, cell in cells.items()],
        "step_totals": [[step, None, *_row(statistics.total(of))] for step, of in run.cells_of(steps).items()],
        "reasons": [[reason, count] for reason, count in run.reasons.copy().most_common(MAX_REASONS)],
        "warning": warning,
        "note": note,
        "compared_with": run.against_dense.instead(),
        "totals": _rounded(run.totals(On.MONITOR)),
    }


def _row(sums: Sums) -> list:
    return list(_rounded(sums.numbers(On.MONITOR)).values())


def _rounded(numbers: dict) -> dict:
    return {name: round(number, 4) if isinstance(number, float) else number for name, number in numbers.items()}


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
    """The pooled map of (run, step, layer), of one head where `head` is given, and its frames."""
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
    at = maps.At(asked["step"], asked["layer"])
    pooled = run.maps.kept.get(at)
    if pooled is None:
        return 404, {"error": _why_no_map(run, at)}
    if "head" in asked:
        try:
            pooled = run.maps.of_head(pooled, at, asked["head"])
        except LookupError as error:
            return 404, {"error": str(error)}
    (rows, columns), frames = pooled.values.shape, maps.frames(pooled)
    answer = {"version": VERSION, "rows": rows, "columns": columns, "n_q": pooled.n_q, "n_k": pooled.n_k}
    return 200, {**answer, "values": _text(pooled.values), "frames": None if frames is None else _frames(frames)}


def _why_no_map(run: Run, at: maps.At) -> str:
    step, layer = at
    if not run.monitors:
        return f"run {run.number} had no monitor, so no maps were kept"
    cell = run.cells.get(at)
    if cell is None:
        return f"run {run.number} has no step {step} with a layer {layer} yet" if run.state == "running" else f"no step {step} with a layer {layer}"
    if not run.maps.kept and run.state != "running" and run.sparse_calls:
        return f"the maps of run {run.number} were dropped to make room for newer runs"
    if cell.of["sparse_calls"] and step % run.maps.every:
        return f"the map of step {step} was dropped to save memory: every {run.maps.every} steps one is kept"
    return f"step {step}, layer {layer} was not sparse, or its map has not arrived yet"


def _frames(frames: maps.Frames) -> dict:
    t, h, w = frames.queries.shape
    return {"t": t, "h": h, "w": w, "queries": _text(frames.queries), "keys": _text(frames.keys)}


def _text(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode("ascii")
