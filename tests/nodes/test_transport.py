"""What travels to the browser: sizes, maps, the routes on a real aiohttp app (a real server: test_real_server.py)."""

from __future__ import annotations

import asyncio
import base64
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlencode

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
STEPS, LAYERS, HEADS = 50, 60, 24


class Clock:
    def __init__(self, ms: float = 12.3456):
        self.ms = ms

    def milliseconds(self) -> float:
        return self.ms


def record(nodes, run, step, layer, heads, place=None, n_q=256, n_k=512, ms=12.3456):
    """One sparse call; `heads` are the pooled maps of its heads, uint8 (H, R, C)."""
    count = heads.shape[0]
    numbers = {"density": torch.full((1, count), 1 / 3), "pv_skipped": torch.zeros(1, count)}
    run.sparse(nodes.recorder.Timed(step, layer, 32760, Clock(ms), "s"), numbers, nodes.maps.Pooled(heads, n_q, n_k, place))


@pytest.fixture
def opened(nodes):
    def make(steps=3, monitors=("7",), **others):
        sigmas = [1 - i / steps for i in range(steps + 1)]
        return nodes.telemetry.runs.open(node="1", owner="o", metadata={}, sigmas=sigmas, monitors=dict.fromkeys(monitors, False), **others)

    return make


def close(nodes, run):
    run.close()
    nodes.telemetry.runs.add(run)
    return run


def picture(seed, heads=2, rows=64, columns=64):
    return torch.randint(0, 256, (heads, rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def size(data) -> int:
    return len(json.dumps(data, allow_nan=False))


def test_messages_of_a_large_run_are_small(nodes, opened, browser):
    """60 blocks of 24 heads, 50 steps, with as many reasons as a run can have: every message below 64 KB, and all of them within 1 MB."""
    run, heads = opened(STEPS), picture(1, HEADS)
    for i in range(100):
        run.dense(nodes.recorder.Timed(0, None, 77), f"reason {i}: " + "of the longer kind " * 4)
    for step in range(STEPS):
        for layer in range(LAYERS):
            record(nodes, run, step, layer, heads)
        run.end_step()
        nodes.transport.publish(run)
    close(nodes, run)
    nodes.transport.publish(run)
    assert max(map(size, browser.sent)) < 64 << 10 and sum(map(size, browser.sent)) < 1 << 20
    assert [len(m["cells"]) for m in browser.sent] == [LAYERS] * STEPS + [0]  # each cell once
    assert browser.sent[3]["cells"][5] == [3, 5, 0.3333, 0.0, 12.3456, 1, 0]
    assert browser.sent[3]["step_totals"] == [[3, None, 0.3333, 0.0, 740.736, LAYERS, 0]] and browser.sent[-1]["step_totals"] == []
    assert len(browser.sent[0]["reasons"]) == 16
    status, whole = nodes.transport.answer_runs({"monitor": "7"})
    assert (
        status == 200
        and len(whole["runs"][0]["cells"]) == STEPS * LAYERS
        and len(whole["runs"][0]["step_totals"]) == STEPS
        and size(whole) < 256 << 10
    )
    assert run.maps.nbytes == STEPS * LAYERS * 64 * 64 < nodes.maps.MAX_BYTES and run.maps.every == 1
    assert size(nodes.transport.answer_map({"run": str(run.number), "step": "49", "layer": "59", "head": "23"})[1]) < 64 << 10


def test_a_cell_that_grows_is_told_again(nodes, opened, browser):
    """A sampler may come back to a step; its cell then arrives whole once more."""
    run = opened()
    for _ in range(2):
        record(nodes, run, 0, 0, picture(1), ms=2.0)
        run.end_step()
        nodes.transport.publish(run)
    assert [m["cells"] for m in browser.sent] == [[[0, 0, 0.3333, 0, 2, 1, 0]], [[0, 0, 0.3333, 0, 4, 2, 0]]]
    assert [m["step_totals"] for m in browser.sent] == [[[0, None, 0.3333, 0, 2, 1, 0]], [[0, None, 0.3333, 0, 4, 2, 0]]]


# Maps.


def test_old_steps_thin_out(nodes, opened, monkeypatch):
    """Within its bound a run keeps every step; beyond, every second, every fourth ... and always the latest."""
    monkeypatch.setattr(nodes.maps, "MAX_BYTES", 4 * 64 * 64)
    run, kept = opened(11), []
    for step in range(11):
        record(nodes, run, step, 0, picture(step))
        run.end_step()
        kept.append([step for step, _ in sorted(run.maps.kept)])
        assert run.maps.nbytes <= 4 * 64 * 64
    assert kept[3] == [0, 1, 2, 3] and kept[4] == [0, 2, 4] and kept[5] == [0, 2, 4, 5]
    assert kept[6] == [0, 2, 4, 6] and kept[7] == [0, 4, 7] and kept[8] == [0, 4, 8] and kept[10] == [0, 4, 8, 10] and run.maps.every == 4
    close(nodes, run)
    status, said = nodes.transport.answer_map({"run": str(run.number), "step": "5", "layer": "0"})
    assert (status, said) == (404, {"error": "the map of step 5 was dropped to save memory: every 4 steps one is kept"})


def test_maps_of_all_runs_are_bounded(nodes, opened, monkeypatch):
    """Of eight runs the oldest lose theirs, as soon as there is no room; the heads stay with the newest run alone."""
    monkeypatch.setattr(nodes.telemetry, "MAX_STORED_MAP_BYTES", 5 * 64 * 64)
    runs = []
    for closed in range(8):
        runs.append(opened(2))
        for step in range(2):
            record(nodes, runs[-1], step, 0, picture(step))
            runs[-1].end_step()
        close(nodes, runs[-1])
        assert [len(run.maps.kept) for run in runs] == ([0] * closed + [2, 2])[-closed - 1 :] and sum(run.maps.nbytes for run in runs) <= 5 * 64 * 64
        assert [run.maps.heads.step for run in runs] == [-1] * closed + [1]
    assert len(nodes.telemetry.runs.closed) == 8
    status, said = nodes.transport.answer_map({"run": str(runs[0].number), "step": "0", "layer": "0"})
    assert status == 404 and said["error"] == f"the maps of run {runs[0].number} were dropped to make room for newer runs"


def test_map_of_a_step(nodes, opened):
    """The mean over heads and over calls; of one head in the last step; nothing of a run without monitors."""
    run, first, second = opened(), picture(1, 3, 5, 7), picture(2, 3, 5, 7)
    for step in range(2):
        for heads in (first, second):
            record(nodes, run, step, 4, heads, n_q=5, n_k=7)
        run.end_step()

    def ask(**query):
        return nodes.transport.answer_map({name: str(value) for name, value in query.items()})

    def values_of(answer):
        return np.frombuffer(base64.b64decode(answer["values"]), np.uint8).reshape(answer["rows"], answer["columns"]).astype(float)

    mean = (first.double().mean(0) + second.double().mean(0)).numpy() / 2
    for closed in (False, True):
        if closed:
            close(nodes, run)
        status, answer = ask(run=run.number, step=0, layer=4)
        assert status == 200 and set(answer) == {"version", "rows", "columns", "n_q", "n_k", "values", "frames"}
        assert (answer["rows"], answer["columns"], answer["n_q"], answer["n_k"], answer["frames"]) == (5, 7, 5, 7, None)
        assert abs(values_of(answer) - mean).max() <= 1.01
        status, answer = ask(run=run.number, step=1, layer=4, head=2)
        assert status == 200 and abs(values_of(answer) - (first[2].double() + second[2].double()).numpy() / 2).max() <= 0.51
        assert ask(run=run.number, step=0, layer=4, head=2) == (404, {"error": "heads are kept for the last sparse step alone (1), got step 0"})
        assert ask(run=run.number, step=1, layer=4, head=3) == (404, {"error": "head must be below 3, got 3"})
        assert ask(run=run.number, step=2, layer=4)[0] == ask(run=run.number, step=1, layer=5)[0] == 404
    unseen = opened(monitors=())
    unseen.sparse(nodes.recorder.Timed(0, 0, 256, Clock()), {"density": torch.ones(1, 2), "pv_skipped": torch.zeros(1, 2)})
    close(nodes, unseen)
    assert ask(run=unseen.number, step=0, layer=0) == (404, {"error": f"run {unseen.number} had no monitor, so no maps were kept"})


def test_a_closed_run_keeps_host_arrays_only(nodes, opened):
    run = opened()
    record(nodes, run, 0, 0, picture(1))
    run.end_step()
    (heads,) = run.maps.heads.layers[0]
    assert isinstance(heads, torch.Tensor)
    run.close()
    assert all(isinstance(x, np.ndarray) for x in [*run.maps.heads.layers[0], *(pooled.values for pooled in run.maps.kept.values())])


def test_frames_travel_as_text(nodes, opened):
    """Of a map whose place in the latent is known: bytes of the same arrays that a report draws."""
    place = nodes.maps.Place("row_major", ((2, 16, 24),), 0)
    run = opened()
    record(nodes, run, 0, 0, picture(5, 2, 6, 12), place, n_q=6, n_k=12)
    close(nodes, run)
    frames = nodes.maps.frames(run.maps.kept[0, 0])
    status, answer = nodes.transport.answer_map({"run": str(run.number), "step": "0", "layer": "0"})
    assert status == 200 and {name: answer["frames"][name] for name in "thw"} == {"t": 2, "h": 16, "w": 24}
    for name in ("queries", "keys"):
        assert base64.b64decode(answer["frames"][name]) == getattr(frames, name).tobytes()


# Routes.


def ask(routes, *paths):
    """What an app with these routes, prefixed as ComfyUI prefixes them too, answers: [(status, data)]."""
    from aiohttp import web
    from aiohttp.test_utils import TestClient, TestServer

    async def run():
        app, prefixed = web.Application(), web.RouteTableDef()
        for route in routes:
            prefixed.route(route.method, "/api" + route.path)(route.handler)
        app.add_routes(prefixed)
        app.add_routes(routes)
        async with TestClient(TestServer(app)) as client:
            return [(answer.status, await answer.json()) for answer in [await client.get(path) for path in paths]]

    return asyncio.run(run())


@pytest.fixture
def registered(nodes, pack, browser):
    asyncio.run(pack.comfy_entrypoint())
    return browser.routes


def test_runs_route(nodes, opened, registered):
    """The last four of this monitor, oldest first, open ones included."""
    for monitor in ("7", "8", "7", "7", "5:12", "7"):
        close(nodes, opened(monitors=(monitor,)))
    mine = opened(monitors=("7", "9"))
    found = ask(registered, "/sparge_attention/runs?monitor=7", "/api/sparge_attention/runs?" + urlencode({"monitor": "5:12"}),
                "/sparge_attention/runs?monitor=12")  # fmt: skip
    latest = mine.number
    assert [status for status, _ in found] == [200, 200, 200] and all(answer["version"] == 3 for _, answer in found)
    assert [[run["run"] for run in answer["runs"]] for _, answer in found] == [[latest - 4, latest - 3, latest - 1, latest], [latest - 2], []]
    assert [run["state"] for run in found[0][1]["runs"]] == ["done"] * 3 + ["running"]


BAD = {
    "runs": "monitor must be the name",
    "runs?monitor=": "monitor must be the name",
    "line": "node must be the name",
    "line?node=": "node must be the name",
    "map": "run must be a whole number from 0, got None; give it as run=0",
    "map?run=1&step=0": "layer must be a whole number",
    "map?run=x&step=0&layer=0": "run must be a whole number from 0, got 'x'",
    "map?run=1&step=-1&layer=0": "step must be a whole number from 0, got '-1'",
    "map?run=1&step=0&layer=1.5": "layer must be a whole number",
    "map?run=1&step=0&layer=0&head=": "head must be a whole number",
    "map?run=1&step=0&layer=%D9%A1": "layer must be a whole number",
    "map?run=99999999999999999999&step=0&layer=0": "run must be a whole number",
}


@pytest.mark.parametrize("path", BAD)
def test_bad_queries(registered, path):
    ((status, said),) = ask(registered, "/sparge_attention/" + path)
    assert status == 400 and BAD[path] in said["error"] and set(said) == {"error"}


def test_a_run_that_is_gone(registered):
    assert ask(registered, "/sparge_attention/map?run=999999&step=0&layer=0") == [(404, {"error": "run 999999 is gone: the last 8 runs are kept"})]


def test_no_server_no_routes(pack, monkeypatch):
    monkeypatch.delitem(sys.modules, "server", raising=False)
    asyncio.run(pack.comfy_entrypoint())
    assert "server" not in sys.modules


def test_two_copies_of_the_pack(nodes, opened, registered):
    """ComfyUI keeps the nodes of the copy that loads last; so it is its runs that the routes tell, and loading it does not fail."""
    mine = opened(monitors=("7",))
    assert [run["run"] for run in ask(registered, "/sparge_attention/runs?monitor=7")[0][1]["runs"]] == [mine.number]
    name = "sparge_pack_second_copy"
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    second = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(second)
        asyncio.run(second.comfy_entrypoint())
        store = importlib.import_module(name + ".nodes.telemetry").runs
        store.latest = 100
        theirs = store.open(node="1", owner="o", metadata={}, sigmas=[1.0, 0.0], monitors={"7": True})
        assert [run["run"] for run in ask(registered, "/sparge_attention/runs?monitor=7")[0][1]["runs"]] == [theirs.number]
        assert len(registered) == 3
    finally:
        for module in [module for module in sys.modules if module.split(".")[0] == name]:
            del sys.modules[module]


# The real server.


def test_the_name_server_of_another_package_is_no_server(nodes, monkeypatch):
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace())
    assert nodes._comfy.prompt_server() is None
    nodes._comfy.send("sparge.run", {})
