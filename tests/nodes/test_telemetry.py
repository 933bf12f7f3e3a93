"""The numbers of a run: sums, means, limits, and that nothing but host numbers is kept."""

from __future__ import annotations

import gc
import json
import math
import weakref
from types import SimpleNamespace

import comfy_models
import numpy as np
import pytest
import torch


class Clock:
    """A timer of a known reading."""

    def __init__(self, ms: float):
        self.ms = ms

    def milliseconds(self) -> float:
        return self.ms


@pytest.fixture
def run(nodes):
    return nodes.telemetry.runs.open(node="1", owner=object(), metadata={"model": "Tiny"}, sigmas=[1.0, 0.5, 0.0])


@pytest.fixture
def record(nodes, run):
    """`sparse` and `dense` of the run, a call given as (step, layer, tokens, ...)."""

    def sparse(step, layer, tokens, density, pv_skipped, timer, kind=None, pooled=None):
        run.sparse(nodes.recorder.Timed(step, layer, tokens, timer, kind), {"density": density, "pv_skipped": pv_skipped}, pooled)

    def dense(step, layer, tokens, reason, timer):
        run.dense(nodes.recorder.Timed(step, layer, tokens, timer), reason)

    return SimpleNamespace(sparse=sparse, dense=dense)


def heads(*values):
    """(B, H) of one batch row, or of two."""
    return torch.tensor(values if isinstance(values[0], tuple) else [values], dtype=torch.float32)


def test_sums_and_means(run, record):
    record.sparse(0, 0, 256, heads((0.2, 0.4), (0.4, 0.6)), heads((0.0, 0.1), (0.2, 0.1)), Clock(2.0))  # a batch of two: its mean
    record.sparse(0, 0, 256, heads(0.5, 0.5), heads(0.3, 0.3), Clock(3.0))
    record.dense(0, 0, 256, "window", Clock(7.0))
    record.dense(0, None, 77, "cross", None)
    run.end_step()
    record.sparse(1, 1, 512, heads(1.0, 0.0), heads(0.0, 0.0), Clock(5.0))
    run.close()
    told = run.to_dict()
    first, second = told["cells"]
    assert (first["step"], first["layer"], second["step"], second["layer"]) == (0, 0, 1, 1)
    assert (first["sparse_calls"], first["dense_calls"], first["reasons"]) == (2, 1, {"window": 1})
    assert first["density"] == pytest.approx(0.45) and first["head_density"] == pytest.approx([0.4, 0.5])
    assert first["pv_skipped"] == pytest.approx(0.2)  # of (0.1, 0.1) and (0.3, 0.3)
    assert (first["sparse_ms"], first["dense_ms"]) == (5.0, 7.0)
    assert second["head_density"] == [1.0, 0.0] and second["density"] == pytest.approx(0.5)
    totals = told["totals"]
    assert (totals["sparse_calls"], totals["dense_calls"]) == (3, 2) and told["reasons"] == {"window": 1, "cross": 1}
    assert totals["density"] == pytest.approx((2 * 0.45 + 0.5) / 3)  # by calls, not by cells
    assert totals["pv_skipped"] == pytest.approx(0.4 / 3)
    assert (totals["sparse_ms"], totals["dense_ms"]) == (10.0, 7.0)
    assert (told["heads"], told["tokens"], told["layers"], told["steps"]) == (2, 512, 2, 2)


def test_empty_run(run):
    run.close()
    told = run.to_dict()
    assert told["cells"] == [] and told["steps"] == 2 and told["layers"] == 0 and told["totals"]["speedup"] is None
    json.dumps(told, allow_nan=False)


def test_reasons_are_capped(run, record):
    for i in range(500):
        record.dense(0, i % 3, 256, f"reason {i}", Clock(1.0))
    record.dense(0, 0, 256, "reason 0", Clock(1.0))
    run.close()
    assert len(run.reasons) <= 65  # 64 and the rest together
    assert sum(run.reasons.values()) == 501 == run.to_dict()["totals"]["dense_calls"] and run.reasons["reason 0"] == 2
    assert set().union(*(cell.reasons for cell in run.cells.values())) == set(run.reasons)


def test_head_numbers_are_capped(nodes, run, record, monkeypatch):
    monkeypatch.setattr(nodes.recorder, "MAX_HEAD_BYTES", 3 * 4 * 10)
    for layer in range(5):
        for _ in range(2):
            record.sparse(0, layer, 256, torch.full((1, 10), 0.25 * (layer + 1)).clamp_max(1), torch.zeros(1, 10), Clock(1.0))
    run.close()
    told = run.to_dict()["cells"]
    assert [cell["head_density"] is not None for cell in told] == [True, True, True, False, False]
    assert [cell["density"] for cell in told] == [0.25, 0.5, 0.75, 1.0, 1.0]  # the mean stays


def test_store_is_bounded(nodes):
    """Eight runs of 13 steps and 60 layers of 40 heads take a quarter of the 64 MB that eight of 50 steps may take."""
    import tracemalloc

    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        density, pv_skipped = torch.rand(1, 40), torch.zeros(1, 40)
        for _ in range(8):
            run = nodes.telemetry.runs.open(node="1", owner=object(), metadata={}, sigmas=[1.0] * 14)
            for step in range(13):
                for layer in range(60):
                    run.sparse(nodes.recorder.Timed(step, layer, 4096, Clock(1.0)), {"density": density, "pv_skipped": pv_skipped})
                run.end_step()
            run.close()
            nodes.telemetry.runs.add(run)
        gc.collect()
        assert len(nodes.telemetry.runs.closed) == 8
        assert tracemalloc.get_traced_memory()[0] - before < 16 << 20
    finally:
        tracemalloc.stop()
        nodes.telemetry.runs.closed.clear()


def test_mixed_head_counts(run, record):
    """Blocks with different numbers of heads (a UNet's levels) each keep their own; one cell that mixes them keeps the mean."""
    record.sparse(0, 0, 256, heads(0.2, 0.4), heads(0.0, 0.0), Clock(1.0))
    record.sparse(0, 1, 64, heads(0.1, 0.2, 0.3), heads(0.0, 0.0, 0.3), Clock(1.0))
    record.sparse(0, 1, 64, heads(0.6, 0.4), heads(0.0, 0.0), Clock(1.0))
    run.close()
    first, second = run.to_dict()["cells"]
    assert first["head_density"] == pytest.approx([0.2, 0.4])
    assert second["head_density"] is None and second["density"] == pytest.approx(0.35) and second["pv_skipped"] == pytest.approx(0.05)
    assert run.heads == 3


def everything_in(root) -> list:
    """Every object that can be reached from `root`: items, attributes, slots, closures, bound methods."""
    seen, front = {}, [root]
    while front:
        item = front.pop()
        if id(item) in seen or isinstance(item, type) or type(item).__name__ == "module":
            continue
        seen[id(item)] = item
        if isinstance(item, dict):
            front += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set | frozenset):
            front += list(item)
        elif not isinstance(item, str | bytes | np.ndarray | torch.Tensor):
            front += list(getattr(item, "__dict__", {}).values())
            front += [getattr(item, name) for name in getattr(type(item), "__slots__", ()) if hasattr(item, name)]
            front += [cell.cell_contents for cell in getattr(item, "__closure__", None) or ()]
            front += [getattr(item, "__self__", None)]
    return list(seen.values())


def test_a_closed_run_holds_no_tensors(nodes, tiny, patched):
    """Not its own, and not those of other nodes: an earlier override's must be free when the user removes that node."""
    model = tiny("wan_t2v")

    def tensor_holder():
        table = torch.zeros(1000)

        def override(func, *args, **kwargs):
            return func(*args, **kwargs) + table[0]

        return override, weakref.ref(table)

    override, table = tensor_holder()
    base = model.patcher.clone()
    base.model_options["transformer_options"]["optimized_attention_override"] = override
    comfy_models.sample(model, patched(base))
    run = nodes.telemetry.runs.closed[-1]
    assert run.sparse_calls == 4
    found = [x for x in everything_in(run) if isinstance(x, torch.Tensor)]
    assert found == [], f"the run leads to {len(found)} tensors"
    del override, base
    gc.collect()
    assert table() is None, "the store of runs keeps another node's tensors"


def test_a_closed_run_lets_go_of_its_own_tensors(run, record):
    density = torch.rand(1, 3)
    held = weakref.ref(density)
    record.sparse(0, 0, 256, density, torch.zeros(1, 3), Clock(1.0))
    run.close()
    del density
    assert held() is None
    assert not [x for x in everything_in(run) if isinstance(x, torch.Tensor | Clock)]


def test_the_store_does_not_keep_models(nodes, comfy):
    model = comfy_models.build("wan_t2v", latent=(1, 16, 1, 32, 32))
    held = weakref.ref(model.patcher.model.diffusion_model)
    comfy_models.sample(model, nodes.patch.install(model.patcher, nodes.patch.Settings(min_tokens=0)), steps=1)
    assert nodes.telemetry.runs.closed[-1].sparse_calls
    comfy.model_management.unload_all_models()
    del model
    gc.collect()
    assert held() is None


@pytest.mark.parametrize("family", ["hunyuan_video", "sdxl"])
def test_numbers_are_the_kernels_own(nodes, tiny, patched, last_run, monkeypatch, family):
    """Each cell says what the kernels returned for its calls: a batch's mean, by head; also where cdf and the judge make heads differ."""
    model = tiny(family) if family != "sdxl" else tiny("sdxl", latent=(1, 4, 34, 38))
    returned, real = [], nodes._kernels.attend

    def attend(*args, **kwargs):
        out, info = real(*args, **kwargs)
        skipped = torch.rand_like(info.pv_skipped)  # the torch backend never skips: other numbers must come through too
        returned.append((info.density.clone(), skipped.clone()))
        return out, SimpleNamespace(density=info.density, pv_skipped=skipped)

    monkeypatch.setattr(nodes._kernels, "attend", attend)
    comfy_models.sample(model, patched(model, topk=0.25, cdfthreshd=0.6, simthreshd1=0.1), steps=2, cfg=3.0 if family == "sdxl" else 1.0)
    run = last_run()
    cells = run["cells"]
    assert len(cells) == len(returned) == 2 * run["layers"] == run["totals"]["sparse_calls"]
    assert any(density.std() > 0 for density, _ in returned), "heads do not differ: this test sees nothing"
    for cell, (density, skipped) in zip(cells, returned, strict=True):
        assert density.shape[0] == (2 if family == "sdxl" else 1)
        assert cell["head_density"] == pytest.approx(density.mean(0).tolist(), abs=1e-5)
        assert cell["density"] == pytest.approx(density.mean().item(), abs=1e-6)
        assert cell["pv_skipped"] == pytest.approx(skipped.mean().item(), abs=1e-6)
    assert run["totals"]["density"] == pytest.approx(sum(d.mean().item() for d, _ in returned) / len(returned), abs=1e-6)
    json.dumps(run, allow_nan=False)


def test_times_are_measured(nodes, tiny, patched, last_run):
    model = tiny("wan_t2v")
    comfy_models.sample(model, patched(model, end_percent=0.4), steps=6)
    run = last_run()
    totals = run["totals"]
    assert totals["sparse_ms"] > 0 and totals["dense_ms"] > 0 and totals["seconds"] * 1e3 >= totals["sparse_ms"] + totals["dense_ms"]
    assert 0 < totals["speedup_low"] <= totals["speedup_high"] and math.isfinite(totals["speedup_high"]) and totals["compared_calls"] == 3
    for cell in run["cells"]:
        assert (cell["sparse_ms"] > 0) == (cell["step"] < 3) and (cell["dense_ms"] > 0) == (cell["step"] >= 3)
    json.dumps(run, allow_nan=False)


def test_numbers_that_are_a_step_late(nodes, run, record, monkeypatch):
    """As on a GPU: what a step sent is taken in when the next one ends, after its event; closing takes in everything."""
    waited = []

    def to_host(tensors):
        return [x.clone() for x in tensors], SimpleNamespace(synchronize=lambda: waited.append(len(tensors)))

    monkeypatch.setattr(nodes.recorder, "_to_host", to_host)
    run.monitors, seen = {"7": True}, []
    for step in range(3):
        heads_map = torch.full((2, 4, 4), 10 * step, dtype=torch.uint8)
        record.sparse(step, 0, 256, heads(0.5, 0.5), heads(0.0, 0.0), Clock(2.0), pooled=nodes.maps.Pooled(heads_map, 4, 4, None))
        run.end_step()
        seen.append(list(run.news()))
        assert run.maps.heads.step == step - 1 and sorted(run.maps.kept) == [(earlier, 0) for earlier in range(step)]
        assert nodes.remarks.warning_and_note(run)[0] is None, "that nothing ran sparse is not known before the numbers are there"
    assert seen == [[], [(0, 0)], [(1, 0)]] and waited == [2, 2]  # two tensors, numbers and maps, after one event
    run.close()
    assert list(run.news()) == [(2, 0)] and list(run.numbers()) == [(0, 0), (1, 0), (2, 0)] and waited == [2, 2, 2]
    assert {at: int(pooled.values[0, 0]) for at, pooled in run.maps.kept.items()} == {(0, 0): 0, (1, 0): 10, (2, 0): 20}


def test_runs_for_reports(nodes):
    """Each report node has seen its own; owners limit what is shown; nothing new shows the same again."""
    runs = nodes.telemetry.runs
    mine, other = object(), object()

    def add(owner):
        run = runs.open(node="1", owner=owner, metadata={}, sigmas=[1.0, 0.0])
        run.close()
        runs.add(run)
        return run

    def shown(report, owners):
        found = runs.for_report(report, owners)
        runs.mark_shown(report, found)
        return found

    assert shown("a", []) == []
    first, second = add(mine), add(other)
    assert runs.for_report("a", []) == [first, second]  # asked for, but not shown
    assert shown("a", []) == [first, second] == shown("a", [])
    assert shown("b", [mine]) == [first] == shown("b", [mine])
    third = add(mine)
    assert shown("a", []) == [third] == shown("a", [])
    assert shown("b", [mine]) == [third]
    assert shown("b", [object()]) == []
    assert runs.saved("b", [third]) == frozenset() and runs.saved("c", [third]) is None is runs.saved("b", [])
    runs.mark_shown("b", [third], ["png", "csv"])
    runs.mark_shown("b", [third], ["gif"])
    assert runs.saved("b", [third]) == {"png", "csv", "gif"} and runs.saved("a", [third]) == frozenset()
    assert runs.saved("b", [first, third]) == frozenset(), "not every one of them is saved"
    fourth = add(mine)
    runs.mark_shown("b", runs.for_report("b", [mine]), ["png"])
    assert runs.saved("b", [fourth]) == {"png"}, "files of another run count"
    for _ in range(9):
        add(other)
    assert shown("b", [mine]) == []  # forgotten: eight newer ones are kept
    assert len(shown("a", [])) == 8
    for i in range(200):
        shown(f"report {i}", [])
    assert len(runs._shown) <= 64 and all(len(of) <= nodes.telemetry.MAX_RUNS for of in runs._shown.values())


def test_report_of_nested_runs_is_in_order_and_stays(nodes):
    """Two nodes on one model: the inner run is opened last and closed first."""
    runs = nodes.telemetry.Runs()
    outer, inner = (runs.open(node="n", owner=owner, metadata={}, sigmas=[]) for owner in ("outer", "inner"))
    runs.add(inner)
    runs.add(outer)
    for _ in range(2):
        found = runs.for_report("9", ["outer", "inner"])
        assert [run.number for run in found] == [outer.number, inner.number]
        runs.mark_shown("9", found)


def test_a_run_is_always_found_while_it_closes(nodes, monkeypatch):
    """The server asks from another thread."""
    store = nodes.telemetry.Runs()
    run = store.open(node="1", owner="o", metadata={}, sigmas=[1.0, 0.0], monitors={"7": True})

    class Watched(list):
        def remove(self, value):
            assert store.find(value.number) is value and value in store.closed
            super().remove(value)

    store.running = Watched(store.running)
    store.add(run)
    assert store.running == [] and store.find(run.number) is run


def test_a_device_that_fails_while_the_run_closes(nodes, run, record):
    """The calls were made; that is all that is known of them."""
    record.sparse(0, 0, 256, heads(0.5, 0.5), heads(0.0, 0.0), Clock(2.0))
    run.abandon("the run ended early (OutOfMemoryError)")
    totals = run.to_dict()["totals"]
    assert run.state == "failed" and "OutOfMemory" in run.note and (totals["sparse_calls"], totals["density"], totals["sparse_ms"]) == (1, None, 0)
    assert "1 calls sparse, density not known" in nodes.remarks.summary(run)
