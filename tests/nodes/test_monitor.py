"""The node SpargeMonitor: what a run tells the browser, wherever the node stands, and that it changes nothing else."""

from __future__ import annotations

from types import SimpleNamespace

import comfy_models
import pytest
import torch

COLUMNS = ["density", "pv_skipped", "ms", "sparse_calls", "dense_calls"]
KEYS = {"version", "run", "monitors", "state", "step", "steps", "layers", "heads", "tokens", "columns", "cells", "step_totals", "reasons", "warning",
        "note", "compared_with", "totals"}  # fmt: skip
TOTALS = {*COLUMNS, "speedup", "speedup_low", "speedup_high", "compared_calls", "saved_ms", "measuring_ms"}


@pytest.fixture
def watched(nodes):
    """`watched(model, *ids, measures=False)`: a clone with a monitor per id."""

    def install(patcher, *ids, measures=False):
        for node in ids:
            patcher = nodes.monitor.watched(patcher, node, measures)
        return patcher

    return install


def test_messages_of_a_run(nodes, tiny, patched, watched, browser, last_run):
    """One when it opens, one a step, one when it closes; on the CPU each brings its own step; together they are the report's numbers."""
    model = tiny("wan_t2v")
    comfy_models.sample(model, watched(patched(model), "7", measures=True), steps=3)
    sent, run = browser.sent, last_run()
    assert [(m["state"], m["step"]) for m in sent] == [("running", 0), ("running", 1), ("running", 2), ("done", 3)]
    assert all(set(m) == KEYS and set(m["totals"]) == TOTALS and m["monitors"] == ["7"] and m["version"] == 3 for m in sent)
    assert {m["run"] for m in sent} == {nodes.telemetry.runs.latest} and {m["steps"] for m in sent} == {3}
    assert [[cell[:2] for cell in m["cells"]] for m in sent] == [[], [[0, 0], [0, 1]], [[1, 0], [1, 1]], [[2, 0], [2, 1]]]
    assert all([column["name"] for column in m["columns"]] == ["step", "layer", *COLUMNS] for m in sent)
    assert [column["unit"] for column in sent[0]["columns"]] == ["index", "index", "share", "share", "ms", "calls", "calls"]
    for kind in ("cells", "step_totals"):
        for row, numbers in zip([row for m in sent for row in m[kind]], run[kind], strict=True):
            expected = {**numbers, "layer": numbers.get("layer"), "ms": numbers["sparse_ms"] + numbers["dense_ms"]}
            assert row == pytest.approx([expected[name] for name in ("step", "layer", *COLUMNS)], abs=1e-4)
    last = sent[-1]
    assert (last["layers"], last["heads"], last["tokens"]) == (2, 2, 256) and last["reasons"] == [["cross-attention to 7 tokens", 6]]
    assert last["totals"].pop("ms") == pytest.approx(run["totals"]["sparse_ms"] + run["totals"]["dense_ms"], abs=1e-4)
    for name, value in last["totals"].items():
        assert value == pytest.approx(run["totals"][name], abs=1e-4), name
    assert last["warning"] is last["note"] is None


@pytest.mark.parametrize("family", ["wan_t2v", "qwen_image", "sdxl"])
def test_the_picture_is_the_same_to_the_bit(tiny, patched, watched, browser, family):
    model = tiny(family) if family != "sdxl" else tiny("sdxl", latent=(1, 4, 34, 38))
    plain = comfy_models.sample(model, patched(model), steps=2)
    for measures in (True, False):
        assert torch.equal(comfy_models.sample(model, watched(patched(model), "7", "8", measures=measures), steps=2), plain)


def test_before_or_behind(tiny, patched, watched, browser):
    model = tiny("wan_t2v")
    for patcher in (watched(patched(model), "7"), patched(watched(model.patcher, "7"))):
        del browser.sent[:]
        comfy_models.sample(model, patcher, steps=1)
        assert [m["state"] for m in browser.sent] == ["running", "done"] and browser.sent[-1]["totals"]["sparse_calls"] == 2


def test_several_monitors_and_branches(nodes, tiny, patched, watched, browser):
    """Every run names all monitors on its branch, and no others; one of them that measures is enough."""
    model = tiny("wan_t2v")
    trunk = watched(patched(model), "7")
    branch = watched(trunk, "5:12", measures=True).clone()
    comfy_models.sample(model, branch, steps=1)
    assert browser.sent[-1]["monitors"] == ["7", "5:12"] and browser.sent[-1]["totals"]["measuring_ms"] > 0
    comfy_models.sample(model, trunk, steps=1)
    assert browser.sent[-1]["monitors"] == ["7"] and browser.sent[-1]["totals"]["measuring_ms"] == 0
    assert [run.number for run in nodes.telemetry.runs.for_monitor("7")] == [nodes.telemetry.runs.latest - 1, nodes.telemetry.runs.latest]
    assert len(nodes.telemetry.runs.for_monitor("5:12")) == 1 and nodes.telemetry.runs.for_monitor("12") == []


def test_two_patches_on_one_model(tiny, patched, watched, browser):
    """Each has a run of its own; the inner one opens last and closes first."""
    model = tiny("wan_t2v")
    comfy_models.sample(model, watched(patched(patched(model)), "7"), steps=1)
    first, second = sorted({m["run"] for m in browser.sent})
    assert [(m["run"], m["state"]) for m in browser.sent] == [(first, "running"), (second, "running"), (second, "done"), (first, "done")]


def test_without_a_monitor_nothing_is_done(nodes, tiny, patched, browser, monkeypatch):
    monkeypatch.setattr(nodes._kernels.AttentionInfo, "pooled", None)
    monkeypatch.setattr(nodes.transport, "message", None)
    model = tiny("wan_t2v")
    comfy_models.sample(model, patched(model), steps=2)
    run = nodes.telemetry.runs.closed[-1]
    assert browser.sent == [] and run.sparse_calls == 4 and not (run.maps.kept or run._collected) and not run.send_failed


def test_no_server(tiny, patched, watched, nodes, caplog):
    """Scripts: the same numbers, nobody to tell."""
    model = tiny("wan_t2v")
    comfy_models.sample(model, watched(patched(model), "7"), steps=2)
    assert nodes.telemetry.runs.closed[-1].sparse_calls == 4 and not [r for r in caplog.records if r.levelname == "WARNING"]


def test_a_server_that_fails_does_not_stop_the_sampler(tiny, patched, watched, browser, caplog):
    model = tiny("wan_t2v")
    whole = comfy_models.sample(model, patched(model), steps=3)

    def fail(*args):
        raise OSError("the loop is closed")

    browser.send_sync = fail
    assert torch.equal(comfy_models.sample(model, watched(patched(model), "7"), steps=3), whole)
    said = [r.getMessage() for r in caplog.records if r.name == "sparge_attention" and r.levelname == "WARNING"]
    assert len(said) == 1 and "OSError: the loop is closed" in said[0]


def test_the_open_run_can_be_asked(nodes, tiny, patched, watched, browser):
    """In the middle of a run the routes tell what has arrived, pictures too; afterwards the whole."""
    import comfy.sample

    model, seen = tiny("wan_t2v"), []

    def look(step, *_):
        (run,) = nodes.transport.answer_runs({"monitor": "7"})[1]["runs"]
        asked = {"run": str(run["run"]), "step": str(step - 1), "layer": "1", "head": "1"}
        seen.append((run["state"], len(run["cells"]), nodes.transport.answer_map(asked)[0] if step else None))

    noise = comfy.sample.prepare_noise(model.latent, 1)
    comfy.sample.sample(watched(patched(model), "7"), noise, 3, 1.0, "euler", "simple", model.positive, model.negative, model.latent,
                        disable_pbar=True, callback=lambda *args: look(*args), seed=1)  # fmt: skip
    # The callback of a step comes after its model call and before the next, which is what ends it.
    assert seen == [("running", 0, None), ("running", 2, 200), ("running", 4, 200)]
    assert len(nodes.telemetry.runs.running) == 0
    (run,) = nodes.transport.answer_runs({"monitor": "7"})[1]["runs"]
    assert run["state"] == "done" and len(run["cells"]) == 6 and run["cells"] == [cell for m in browser.sent for cell in m["cells"]]


def test_maps_are_the_kernels_own(nodes, tiny, patched, watched, browser, monkeypatch):
    """The mean over heads and the batch, per step and layer; the heads of the last step."""
    returned, real = [], nodes._kernels.attend

    def attend(*args, **kwargs):
        out, info = real(*args, **kwargs)
        returned.append(info.kept.to_map().float().mean(0))
        return out, info

    monkeypatch.setattr(nodes._kernels, "attend", attend)
    model = tiny("wan_t2v")
    comfy_models.sample(model, watched(patched(model, cdfthreshd=0.6), "7"), steps=2)
    run = nodes.telemetry.runs.closed[-1]
    kept_maps = run.maps.kept
    assert sorted(kept_maps) == [(0, 0), (0, 1), (1, 0), (1, 1)] and run.maps.heads.step == 1
    for pooled, kept in zip((kept_maps[at] for at in sorted(kept_maps)), returned, strict=True):
        assert (pooled.n_q, pooled.n_k) == (2, 4) and pooled.place == ("row_major", ((1, 16, 16),), 0)
        assert abs(pooled.values / 255 - kept.mean(0).numpy()).max() < 0.006
    for layer in range(2):
        (heads,) = run.maps.heads.layers[layer]
        assert abs(heads / 255 - returned[2 + layer].numpy()).max() < 0.003


# Models that our patch is not on, and other warnings.


def test_no_sparge_attention(nodes, tiny, watched, browser):
    model = tiny("wan_t2v")
    plain = comfy_models.sample(model, steps=2)
    assert torch.equal(comfy_models.sample(model, watched(model.patcher, "7", "8"), steps=2), plain)
    (message,) = browser.sent
    assert set(message) == KEYS and message["monitors"] == ["7", "8"] and message["cells"] == [] and message["steps"] == 0
    assert (message["warning"], message["state"]) == ("no Sparge Attention node on this model", "done")
    assert nodes.transport.answer_runs({"monitor": "8"})[1]["runs"] == [message]
    assert not nodes.telemetry.runs.closed and nodes.telemetry.runs.for_report("9", []) == []


def test_nothing_sparse(tiny, patched, watched, browser):
    """Said as soon as a whole step shows it; the cross-attention, which always stays dense, is not the reason."""
    model = tiny("wan_t2v")
    comfy_models.sample(model, watched(patched(model, min_tokens=5000), "7"), steps=3)
    assert [m["warning"] for m in browser.sent] == [None, *["nothing ran sparse: 256 tokens < min_tokens 5,000"] * 3]


def test_waiting_for_the_window_is_no_warning(tiny, patched, watched, browser):
    model = tiny("wan_t2v")
    comfy_models.sample(model, watched(patched(model, start_percent=0.6), "7"), steps=4)
    assert [m["warning"] for m in browser.sent] == [None] * 5 and browser.sent[-1]["totals"]["sparse_calls"] > 0
    del browser.sent[:]
    comfy_models.sample(model, watched(patched(model, start_percent=1.0), "7"), steps=2)
    assert [m["warning"] for m in browser.sent] == [None, None, "nothing ran sparse: outside the step window (start_percent, end_percent)"]


def test_a_family_outside_the_hook(tiny, patched, watched, browser):
    model = tiny("pixart")
    comfy_models.sample(model, watched(patched(model), "7"), steps=1)
    assert "ComfyUI does not route the attention of PixArt" in browser.sent[-1]["warning"] and browser.sent[-1]["note"] is None


def test_a_replaced_hook(tiny, patched, watched, passing, browser):
    model = tiny("wan_t2v")
    patcher = watched(patched(model), "7")
    patcher.model_options["transformer_options"]["optimized_attention_override"] = passing()
    comfy_models.sample(model, patcher, steps=1)
    assert "another node replaced the attention hook" in browser.sent[-1]["warning"] and browser.sent[-1]["totals"]["sparse_calls"] == 2


def test_a_run_that_breaks_off(tiny, patched, watched, browser, nodes):
    import comfy.sample

    def stop(step, *_):
        if step == 1:
            raise KeyError("stop")

    model = tiny("wan_t2v")
    noise = comfy.sample.prepare_noise(model.latent, 1)
    inputs = model.positive, model.negative, model.latent
    with pytest.raises(KeyError):
        comfy.sample.sample(watched(patched(model), "7"), noise, 4, 1.0, "euler", "simple", *inputs, disable_pbar=True, callback=stop, seed=1)
    last = browser.sent[-1]
    assert (last["state"], last["step"], last["steps"], last["warning"]) == ("failed", 1, 4, None) and last[
        "note"
    ] == "the run ended early (KeyError)"
    assert len(last["cells"]) == 2 and not nodes.telemetry.runs.running


@pytest.mark.parametrize("error", (torch.OutOfMemoryError("no room"), ValueError("not this shape")), ids=("memory", "refusal"))
def test_a_dense_call_that_fails(direct, nodes, error):
    """The sparse call went well: the run goes on without a comparison."""
    ours = direct()
    ours.run.monitors, ours.run.measures = {"7": True}, True
    asked = []

    def fail(*args, **kwargs):
        asked.append(1)
        raise error

    q, k, v = torch.randn(3, 1, 2, 300, 16, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        assert ours.patch.override(fail, q, k, v, 2, skip_reshape=True, transformer_options=ours.options).isfinite().all()
    run = ours.closed()
    assert len(asked) == 1 and run["totals"]["sparse_calls"] == 2 and run["totals"]["measuring_ms"] == 0
    assert run["note"] == f"dense attention could not be timed ({type(error).__name__}), so the speed-up is missing or of fewer calls"
    assert run["totals"]["saved_ms"] is None is run["totals"]["speedup"]


def test_a_stop_by_the_user_in_the_dense_call_stops_the_run(direct, nodes):
    ours = direct()
    ours.run.monitors, ours.run.measures = {"7": True}, True

    def stop(*args, **kwargs):
        raise nodes._comfy.Interrupted()

    q, k, v = torch.randn(3, 1, 2, 300, 16, generator=torch.Generator().manual_seed(1))
    with pytest.raises(nodes._comfy.Interrupted):
        for _ in range(2):  # the second of a step is the first that is timed
            ours.patch.override(stop, q, k, v, 2, skip_reshape=True, transformer_options=ours.options)


def test_no_room_for_the_picture(direct, nodes, monkeypatch):
    ours = direct()
    ours.run.monitors = {"7": True}

    def fail(*args):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(nodes._kernels.AttentionInfo, "pooled", fail)
    q, k, v = torch.randn(3, 1, 2, 300, 16, generator=torch.Generator().manual_seed(1))
    assert ours.patch.override(fail, q, k, v, 2, skip_reshape=True, transformer_options=ours.options).isfinite().all()
    run = ours.closed()
    assert run["totals"]["sparse_calls"] == 1 and run["note"] == "a block map could not be made for the monitor (OutOfMemoryError)"


# The node.


def test_the_node_as_comfyui_runs_it(nodes, tiny, monkeypatch):
    node, model = nodes.monitor.SpargeMonitor, tiny("wan_t2v").patcher
    monkeypatch.setattr(node, "hidden", SimpleNamespace(unique_id="5:12"), raising=False)
    (first,) = node.execute(model, measure_dense=False, id="0f3c").args
    monkeypatch.setattr(node, "hidden", SimpleNamespace(unique_id=31), raising=False)
    (second,) = node.execute(first).args
    named = {"0f3c/5:12": False, "31": True}
    assert nodes._comfy.monitors_of(second) == named and nodes._comfy.monitors_of(second.clone()) == named
    assert nodes._comfy.monitors_of(first) == {"0f3c/5:12": False} and nodes._comfy.monitors_of(model) == {}
    assert first is not model and nodes.patch.patches_of(second) == []


def test_bad_values(nodes, tiny):
    with pytest.raises(ValueError, match="model must be a ComfyUI model, got 5; "):
        nodes.monitor.SpargeMonitor.execute(5)
    with pytest.raises(ValueError, match="measure_dense must be true or false, got 'yes'; "):
        nodes.monitor.SpargeMonitor.execute(tiny("wan_t2v").patcher, "yes")


@pytest.mark.parametrize("stopped", (False, True), ids=("after sampling", "after the sampler's own error"))
def test_a_device_that_fails_at_the_end_is_told(tiny, patched, watched, browser, nodes, monkeypatch, stopped):
    import comfy.sample

    def fail(run):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def stop(*_):
        if stopped:
            raise KeyError("stop")

    model = tiny("wan_t2v")
    noise = comfy.sample.prepare_noise(model.latent, 1)
    inputs = model.positive, model.negative, model.latent
    monkeypatch.setattr(nodes.recorder.Run, "close", fail)
    with pytest.raises(KeyError if stopped else RuntimeError, match="stop" if stopped else "illegal memory access"):
        comfy.sample.sample(watched(patched(model), "7"), noise, 2, 1.0, "euler", "simple", *inputs, disable_pbar=True, callback=stop, seed=1)
    assert browser.sent[-1]["state"] == "failed" and not nodes.telemetry.runs.running


@pytest.mark.parametrize("part", ("dense call", "picture"))
def test_a_kernel_failure_is_not_taken_for_want_of_room(direct, nodes, monkeypatch, part):
    ours = direct()
    ours.run.monitors, ours.run.measures = {"7": True}, part == "dense call"

    def fail(*args, **kwargs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    if part == "picture":
        monkeypatch.setattr(nodes._kernels.AttentionInfo, "pooled", fail)
    monkeypatch.setattr(nodes.override, "check_device", fail)
    q, k, v = torch.randn(3, 1, 2, 300, 16, generator=torch.Generator().manual_seed(1))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        for _ in range(2):
            ours.patch.override(fail, q, k, v, 2, skip_reshape=True, transformer_options=ours.options)
