"""What the browser's side of the nodes gets: of a watched run a message a step, of every node its last line, and answers to questions about both.

Numbers and sentences only; drawing is the browser's. What a browser tab has queued is told to that tab alone.
"""

from __future__ import annotations

import base64
import logging
import re
from collections.abc import Mapping, Set

import numpy as np

from . import _comfy, maps, remarks, statistics, telemetry
from .recorder import Cell, Run
from .statistics import On, Sums

logger = logging.getLogger("sparge_attention")

EVENT = "sparge.run"
LINE_EVENT = "sparge.line"
VERSION = 3
MAX_REASONS = 16
MAX_SHOWN = 4  # runs that a browser gets when it opens


def publish(run: Run) -> None:
    """Sends what is new in a run that monitors watch. What goes wrong here is logged once a run and never reaches the sampler."""
    if not run.monitors:
        return
    try:
        _tell(EVENT, message(run, run.news()), run.clients)
    except Exception as error:
        if not run.send_failed:
            logger.warning("Sparge Monitor, run %d: no message could be sent (%s: %s)", run.number, type(error).__name__, error)
        run.send_failed = True


def show(node: str | None, text: str, clients: Set[str]) -> None:
    """Shows a line on the node of this name (`_comfy.name_of`; None: in no browser) and keeps it for pages that are loaded later."""
    if node is None:
        return
    line = telemetry.lines.add(node, text, clients)
    try:
        _tell(LINE_EVENT, _line(line), clients)
    except Exception as error:
        logger.warning("Sparge Attention: no line could be sent to node %s (%s: %s)", node, type(error).__name__, error)


def _tell(event: str, data: dict, clients: Set[str]) -> None:
    for client in list(clients) or [None]:  # a copy: a question from a browser may add one meanwhile
        _comfy.send(event, data, client)


def _line(line: telemetry.Line) -> dict:
    return {"version": VERSION, "number": line.number, "node": line.node, "text": line.text}


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


# Answers to GET requests: (HTTP status, JSON data). `client` in a query is the browser tab that asks; without it the answer is about all of them.


def register() -> None:
    _comfy.serve({"/sparge_attention/runs": answer_runs, "/sparge_attention/map": answer_map, "/sparge_attention/line": answer_line})


def answer_runs(query: Mapping[str, str]) -> tuple[int, dict]:
    """The newest runs that the monitor `monitor` watches or has watched, whole; a run of another tab only once that one is gone."""
    monitor, client = query.get("monitor", ""), query.get("client")
    if not monitor:
        return 400, {"error": "monitor must be the name of a Sparge Monitor node, got nothing; add ?monitor=<name>"}
    found = [run for run in telemetry.runs.for_monitor(monitor) if _concerns(run.clients, client)][-MAX_SHOWN:]
    for run in found:
        if run.clients and client and _comfy.is_connected(client):
            run.clients.add(client)  # a tab that was closed and opened again has a new name, and follows the run from here on
    return 200, {"version": VERSION, "runs": [message(run, run.numbers()) for run in found]}


def answer_line(query: Mapping[str, str]) -> tuple[int, dict]:
    """The last line of the Sparge Attention node `node`; null where it has said nothing yet, or not to this tab."""
    node, client = query.get("node", ""), query.get("client")
    if not node:
        return 400, {"error": "node must be the name of a Sparge Attention node, got nothing; add ?node=<name>"}
    line = telemetry.lines.find(node, lambda clients: _concerns(clients, client))
    return 200, {"version": VERSION, "line": None if line is None else _line(line)}


def _concerns(clients: Set[str], asker: str | None) -> bool:
    return asker is None or not clients or asker in clients or not any(_comfy.is_connected(client) for client in list(clients))


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
    if not _concerns(run.clients, query.get("client")):
        return 404, {"error": f"run {run.number} belongs to another browser tab, which is open"}
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
