"""Never slower: what is decided from measured calls, what later runs make of it, and the file that keeps it."""

from __future__ import annotations

import json
import os
import threading

import comfy_models
import pytest
import torch

pytestmark = pytest.mark.usefixtures("no_gradients")
WHERE = "delete sparge_attention/pace.json in ComfyUI's user folder to measure again"


@pytest.fixture
def folder(nodes, monkeypatch, tmp_path):
    """ComfyUI's user folder, which is not there yet."""
    monkeypatch.setattr(nodes._comfy, "user_folder", lambda: tmp_path / "user")
    return tmp_path / "user"


@pytest.fixture
def file(nodes, folder):
    """The file of decisions; warnings are said anew in each test."""
    nodes.pace._warn.cache_clear()
    return folder / "sparge_attention" / "pace.json"


@pytest.fixture
def kind(nodes):
    def make(tokens=4096, instead="dense", dtype=torch.bfloat16, device="cpu", attention="attention_pytorch"):
        shape = nodes.geometry.CallShape((1, 2, tokens, 64), 2, tokens, False)
        return nodes.speedup.CallKind(shape, dtype, torch.device(device), instead, attention)

    return make


@pytest.fixture
def pace(nodes):
    """`pace(measures=True, **settings)`: what a run with a monitor knows; `measures` None: a run without one."""

    def make(measures=True, **settings):
        return nodes.pace.Pace(nodes.settings.Settings(**settings), {} if measures is None else {"7": measures})

    return make


@pytest.fixture
def measured(nodes):
    """`measured(kind, (sparse, dense), ...)`: a comparison of such pairs of milliseconds."""

    def make(kind, *pairs):
        found = nodes.speedup.Comparison()
        for step, (sparse, dense) in enumerate(pairs):
            found.sparse(kind, step, sparse)
            found.extra(kind, step, dense)
        return found

    return make


SLOW = ((12.0, 8.0), (12.1, 8.3), (13.0, 8.5))


# What is decided.


@pytest.mark.parametrize(
    ("pairs", "decided"),
    [
        (SLOW, (12.1, 8.3, 3)),
        (SLOW[:2], None),
        ((*SLOW, (8.5, 8.4)), None),  # as fast as the slowest dense call: the spreads touch
        ((*SLOW, (9.0, 8.9)), (12.1, 8.5, 4)),
        (((2.0, 8.0), (2.1, 8.3), (2.2, 8.5)), None),
        ((), None),
    ],
    ids=["slower", "too_few", "touching", "apart", "faster", "none"],
)
def test_disjoint_spreads_of_three_pairs_decide(nodes, pairs, decided):
    made = [nodes.speedup.Pair(step, sparse, sparse, dense) for step, (sparse, dense) in enumerate(pairs)]
    assert nodes.pace.slower_by(made) == decided


@pytest.mark.parametrize("steps", [(0, 0, 0, 0, 0), (0, 0, 1, 1, 1)])
def test_fewer_than_three_steps_decide_nothing(nodes, measured, pace, kind, file, steps):
    """However many pairs they have; the factor is shown all the same."""
    found = nodes.speedup.Comparison()
    for step in steps:
        found.sparse(kind(), step, 213.0)
        found.extra(kind(), step, 25.0)
    assert pace().learn(found) == "" and not file.exists() and found.speedup().is_clear


def test_every_sparse_call_of_the_steps_counts(nodes, measured, pace, kind, file):
    """The middle one of each step is slow, but one call was as fast as the slowest dense one."""
    found = measured(kind(), *SLOW)
    for step in range(3):
        found.sparse(kind(), step, 8.5 if step == 1 else 12.0)
        found.sparse(kind(), step, 13.0)
    assert pace().learn(found) == "" and not file.exists()
    found = measured(kind(), *SLOW)
    found.sparse(kind(), 7, 1.0)  # of a step without a pair
    assert pace().learn(found)


def test_what_was_decided_holds_in_later_runs(pace, measured, kind, file):
    """Not in the run that found it, nor in one that is open by then."""
    first, open_by_then = pace(), pace()
    assert not first.knows_any and first.reason(kind()) is None
    assert first.learn(measured(kind(), *SLOW)) == "12.1 ms against 8.3 ms for dense at 4,096 tokens"
    assert first.reason(kind()) is None is open_by_then.reason(kind()) and not open_by_then.knows_any
    for later in (pace(), pace(None)):
        assert later.knows_any and later.reason(kind(4095)) is None
        assert later.reason(kind()) == f"sparse was slower here when measured: 12.1 ms against 8.3 ms for dense; {WHERE}"
    assert not pace(False).knows_any  # every monitor has measure_dense off
    file.unlink()
    assert not pace().knows_any and later.knows_any


def test_it_holds_for_what_was_measured_alone(nodes, pace, measured, kind, file, monkeypatch):
    pace(topk=0.3).learn(measured(kind(), *SLOW))
    assert pace(topk=0.3).reason(kind()) and pace(topk=0.3, min_tokens=0, start_percent=0.5, dense_blocks="0").reason(kind())
    for changes in (dict(topk=0.31), dict(cdfthreshd=0.9), dict(simthreshd1=0.5), dict(pvthreshd=20.0), dict(compensate=True),
                    dict(token_order="tiles"), dict(protect_references=True)):  # fmt: skip
        assert pace(**{"topk": 0.3, **changes}).reason(kind()) is None, changes
    for other in (kind(4160), kind(instead="sage of kjnodes"), kind(dtype=torch.float16), kind(attention="attention_sub_quad")):
        assert pace(topk=0.3).reason(other) is None, other
    for room, name, value in (
        (nodes._kernels, "VERSION", "9.9"),
        (nodes.pace, "device_name", lambda device: "another GPU"),
        (nodes._kernels, "backend_for", lambda *kind: nodes._kernels.BackendChoice("cuda", None, True, True)),
        (torch, "__version__", "99.0"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(room, name, value)
            assert pace(topk=0.3).reason(kind()) is None, name
    assert pace(topk=0.3).reason(kind())


def test_who_makes_decisions(pace, measured, kind, file):
    """Runs with a monitor that measures, and without a policy."""
    slow = measured(kind(), *SLOW)
    for run in (pace(None), pace(False), pace(policy=object())):
        assert run.learn(slow) == "" and not file.exists()
    assert pace().learn(measured(kind(), *SLOW[:2])) == "" and not file.exists()
    assert pace().learn(slow) and pace().knows_any and not pace(policy=object()).knows_any


def test_no_folder_no_decision(nodes, pace, measured, kind):
    assert nodes._comfy.user_folder() is None and pace().learn(measured(kind(), *SLOW)) == "" and not pace().knows_any


def test_several_kinds_are_told_together(pace, measured, kind, file):
    found = measured(kind(), *SLOW)
    for tokens in (100, 200, 300):
        for step, (sparse, dense) in enumerate(SLOW):
            found.sparse(kind(tokens), step, sparse / 10 if tokens > 100 else sparse * 1000)
            found.extra(kind(tokens), step, dense / 10 if tokens > 100 else dense * 1000)
    times = ["12.1 ms against 8.3 ms", "12,100 ms against 8,300 ms", "1.2 ms against 0.83 ms"]
    said = [f"{ms} for dense at {tokens} tokens" for ms, tokens in zip(times, ("4,096", "100", "200"), strict=True)]
    assert pace().learn(found) == ", ".join([*said, "and others"])


# The file.


def test_the_file_is_plain_and_bounded(nodes, pace, measured, kind, file, monkeypatch):
    monkeypatch.setattr(nodes.pace, "MAX_KEPT", 4)
    for tokens in range(64, 64 * 8, 64):
        pace().learn(measured(kind(tokens), *SLOW))
    told = json.loads(file.read_text(encoding="utf-8"))
    assert set(told) == {"about", "version", "off", "slower"} and [entry["of"]["call"]["s_k"] for entry in told["slower"]] == [256, 320, 384, 448]
    entry = told["slower"][0]
    assert (entry["sparse_ms"], entry["dense_ms"], entry["pairs"]) == (12.1, 8.3, 3) and entry["of"]["call"]["instead"] == "dense"
    assert os.listdir(file.parent) == ["pace.json"]
    assert pace().reason(kind(256)) and not pace().reason(kind(64))


def test_two_runs_that_end_together_both_count(pace, measured, kind, file):
    runs = [pace() for _ in range(2)]
    for run, tokens in zip(runs, (100, 200), strict=True):
        run.learn(measured(kind(tokens), *SLOW))
    assert pace().reason(kind(100)) and pace().reason(kind(200))


def test_the_user_may_switch_it_off(pace, measured, kind, file):
    pace().learn(measured(kind(), *SLOW))
    told = json.loads(file.read_text(encoding="utf-8")) | {"off": True}
    file.write_text(json.dumps(told), encoding="utf-8")
    assert not pace().knows_any and pace().learn(measured(kind(100), *SLOW)) == ""
    assert json.loads(file.read_text(encoding="utf-8")) == told


@pytest.mark.parametrize(
    "content", ['{"off": true}', '\ufeff{"off": true}', '{"version": 9, "off": true, "slower": 5}', '\ufeff{"version": 1, "off": true}']
)
def test_off_is_all_it_takes(pace, measured, kind, file, caplog, content):
    """Written by hand, with the mark that Windows' editors put before it."""
    file.parent.mkdir(parents=True)
    file.write_text(content, encoding="utf-8")
    assert not pace().knows_any and pace().learn(measured(kind(), *SLOW)) == "" and not caplog.records
    assert file.read_text(encoding="utf-8") == content


@pytest.mark.parametrize(
    "content",
    [b'{"off": true', b"{'off': True}", b"{off: true}", b'{"version": 1, "off": 1}', b'{"off": "true"}', '{"off": true}'.encode("utf-16"), b'"off"'],
)
def test_what_may_be_meant_to_switch_it_off_is_left_alone(pace, measured, kind, file, caplog, content):
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    assert not pace().knows_any and pace().learn(measured(kind(), *SLOW)) == "" and file.read_bytes() == content
    (said,) = [record.getMessage() for record in caplog.records]
    assert str(file) in said and "it is left alone, and nothing is kept" in said


def test_a_mark_before_the_text_is_no_error(pace, measured, kind, file):
    pace().learn(measured(kind(), *SLOW))
    file.write_text(file.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert pace().reason(kind())


def test_half_a_file_of_ours_is_written_anew(nodes, pace, measured, kind, file):
    """It has "off" in it too, as every one has."""
    pace().learn(measured(kind(), *SLOW))
    file.write_text(file.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    assert not pace().knows_any and json.loads(file.read_text(encoding="utf-8"))["slower"] == []


ENTRY = {"of": {}, "sparse_ms": 2.0, "dense_ms": 1.0, "pairs": 3}
BROKEN = {
    "empty": "",
    "half": '{"version": 1, "slower": [',
    "list": "[]",
    "text": '"hello"',
    "version": '{"version": 2, "slower": []}',
    "not_off": '{"version": 2, "off": false}',
    "slower": '{"version": 1, "slower": {}}',
    "entry": '{"version": 1, "slower": [5]}',
    "of": json.dumps({"version": 1, "slower": [ENTRY | {"of": "x"}]}),
    "number": json.dumps({"version": 1, "slower": [ENTRY | {"sparse_ms": "1"}]}),
    "nan": json.dumps({"version": 1, "slower": [ENTRY | {"sparse_ms": float("nan")}]}),
    "nan_inside": json.dumps({"version": 1, "slower": [ENTRY | {"of": {"a": float("nan")}}]}),
    "huge": '{"version": 1, "slower": [{"of": {}, "sparse_ms": 1' + "0" * 400 + ', "dense_ms": 1, "pairs": 3}]}',
    "negative": json.dumps({"version": 1, "slower": [ENTRY | {"dense_ms": -1}]}),
    "deep": "[" * 100_000,
    "large": '{"version": 1, "slower": []}' + " " * (1 << 20),
    "bytes": b"\xff\xfe\x00 no text",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=list(BROKEN))
def test_a_file_that_is_broken_or_not_ours(pace, measured, kind, file, caplog, content):
    file.parent.mkdir(parents=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert [pace().knows_any for _ in range(3)] == [False] * 3
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and str(file) in said[0] and "it is ignored and written anew" in said[0]
    assert json.loads(file.read_text(encoding="utf-8"))["slower"] == [] and pace().learn(measured(kind(), *SLOW)) and pace().knows_any


def test_a_folder_that_cannot_be_written(nodes, pace, measured, kind, folder, file, caplog):
    """Said once; nothing is left lying about, and no run ends by it."""
    folder.mkdir()
    (folder / "sparge_attention").write_text("a file where the folder should be")
    for _ in range(2):
        assert pace().learn(measured(kind(), *SLOW)) == ""
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(set(said)) <= 2 and "later runs measure again" in said[-1] and os.listdir(folder) == ["sparge_attention"]


def test_the_old_file_stays_until_the_new_one_is_whole(nodes, pace, measured, kind, file, monkeypatch, caplog):
    pace().learn(measured(kind(100), *SLOW))
    before = file.read_text(encoding="utf-8")

    def fail(*args):
        raise OSError("the disk is full")

    monkeypatch.setattr(nodes.pace.Path, "replace", fail)
    assert pace().learn(measured(kind(200), *SLOW)) == "" and "the disk is full" in caplog.text
    assert file.read_text(encoding="utf-8") == before and os.listdir(file.parent) == ["pace.json"]


def test_many_runs_at_once_leave_a_whole_file(pace, measured, kind, file):
    def keep(at):
        for number in range(10):
            pace().learn(measured(kind(64 * (10 * at + number + 1)), *SLOW))
            assert pace().knows_any

    threads = [threading.Thread(target=keep, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    entries = json.loads(file.read_text(encoding="utf-8"))["slower"]
    assert 10 <= len(entries) <= 40 and os.listdir(file.parent) == ["pace.json"]  # of writes at one moment the last one stays


# In runs.


@pytest.fixture
def timed(nodes, monkeypatch):
    """`timed(sparse=..., dense=...)`: every sparse call takes so many milliseconds, and every extra dense one."""

    def set_to(sparse, dense):
        def milliseconds(self):
            return self.ms

        real = nodes.recorder.Run.sparse, nodes.recorder.Run.measured

        def fixed(run, call, *args):
            object.__setattr__(call.timer, "ms", sparse)
            return real[0](run, call, *args)

        def fixed_dense(run, call, cost):
            object.__setattr__(call.timer, "ms", dense)
            return real[1](run, call, cost)

        monkeypatch.setattr(nodes.recorder.Timer, "milliseconds", milliseconds)
        monkeypatch.setattr(nodes.recorder.Timer, "ms", 1.0, raising=False)
        monkeypatch.setattr(nodes.recorder.Run, "sparse", fixed)
        monkeypatch.setattr(nodes.recorder.Run, "measured", fixed_dense)

    return set_to


def test_a_shape_that_is_slower_runs_dense_from_the_next_run_on(nodes, tiny, patched, computed, last_run, file, timed):
    model = tiny("wan_t2v")
    patcher = nodes.monitor.watched(patched(model), "7", True)
    alone = comfy_models.sample(model, patched(model), steps=4)
    dense = comfy_models.sample(model, steps=4)
    timed(sparse=12.1, dense=8.3)
    assert torch.equal(comfy_models.sample(model, patcher, steps=4), alone), "the run that measures is not changed"
    first = last_run()
    said = "sparse was slower (12.1 ms against 8.3 ms for dense at 256 tokens), so later runs do not run such calls sparse"
    assert first["note"] == said and first["totals"]["sparse_calls"] == 8
    reason = f"sparse was slower here when measured: 12.1 ms against 8.3 ms for dense; {WHERE}"
    for watching in (patcher, patched(model)):  # with the monitor, and without one
        computed.clear()
        assert torch.equal(comfy_models.sample(model, watching, steps=4), dense)
        later = last_run()
        assert later["reasons"] == {reason: 8, "cross-attention to 7 tokens": 8} and len(computed) == 16, "nothing is measured again"
        assert reason in nodes.remarks.summary(nodes.telemetry.runs.closed[-1])
        assert later["note"] is None and later["totals"]["measuring_ms"] == 0
    assert nodes.remarks.warning_and_note(nodes.telemetry.runs.closed[-1])[0] == f"nothing ran sparse: {reason}"
    for unchanged in (nodes.monitor.watched(patched(model), "7", False), patched(model, topk=0.5)):
        comfy_models.sample(model, unchanged, steps=4)
        assert last_run()["totals"]["sparse_calls"] == 8
    file.unlink()
    assert torch.equal(comfy_models.sample(model, patched(model), steps=4), alone)


@pytest.mark.parametrize(("sparse", "dense", "steps"), [(8.3, 12.1, 4), (8.0, 8.0, 4), (12.1, 8.3, 1)], ids=["faster", "equal", "too_few"])
def test_a_shape_that_is_not_slower_stays_sparse(nodes, tiny, patched, last_run, file, timed, sparse, dense, steps):
    model = tiny("wan_t2v")
    timed(sparse, dense)
    for _ in range(2):
        comfy_models.sample(model, nodes.monitor.watched(patched(model), "7", True), steps=steps)
        assert last_run()["totals"]["sparse_calls"] == 2 * steps and last_run()["note"] is None
    assert not file.exists()


def test_a_decision_is_never_taken_within_a_run(nodes, tiny, patched, last_run, file, timed):
    """The file that another run writes meanwhile is not looked at."""
    import comfy.sample

    model, seen = tiny("wan_t2v"), []
    timed(12.1, 8.3)
    comfy_models.sample(model, nodes.monitor.watched(patched(model), "7", True), steps=4)
    kept = file.read_text(encoding="utf-8")
    file.unlink()

    def meanwhile(step, *_):
        seen.append(step)
        file.write_text(kept, encoding="utf-8")

    noise = comfy.sample.prepare_noise(model.latent, 1)
    inputs = model.positive, model.negative, model.latent
    comfy.sample.sample(patched(model), noise, 4, 1.0, "euler", "simple", *inputs, disable_pbar=True, callback=meanwhile, seed=1)
    assert len(seen) == 4 and last_run()["totals"]["sparse_calls"] == 8
    comfy_models.sample(model, patched(model), steps=4)
    assert last_run()["totals"]["sparse_calls"] == 0


def test_a_run_that_breaks_off_decides_nothing(nodes, tiny, patched, file, timed):
    import comfy.sample

    def stop(step, *_):
        if step == 3:
            raise KeyError("stop")

    model = tiny("wan_t2v")
    timed(12.1, 8.3)
    noise = comfy.sample.prepare_noise(model.latent, 1)
    inputs = model.positive, model.negative, model.latent
    with pytest.raises(KeyError):
        comfy.sample.sample(nodes.monitor.watched(patched(model), "7", True), noise, 4, 1.0, "euler", "simple", *inputs, disable_pbar=True,
                            callback=stop, seed=1)  # fmt: skip
    assert not file.exists() and nodes.telemetry.runs.closed[-1].state == "failed"


def test_it_is_not_lost_among_many_reasons(nodes):
    """The line on the node names the most frequent reasons, and this one always."""
    run = nodes.telemetry.runs.open(node="1", owner="o", metadata={}, sigmas=[1.0, 0.0])
    reason = nodes.reasons.SLOWER.format(sparse="2", dense="1", instead="dense", file="x")
    for number, text in enumerate(("a", "b", "c", "d", "e", reason)):
        for _ in range(10 - number):
            run.dense(nodes.recorder.Timed(0, None, 77), text)
    run.close()
    assert nodes.remarks.summary(run) == f"nothing ran sparse; dense: 10 x a, 9 x b, 8 x c, 7 x d, 5 x {reason}"


def test_the_users_folder_is_comfyuis(node_modules, comfy, monkeypatch):
    import folder_paths

    assert str(node_modules._comfy.user_folder()) == folder_paths.get_user_directory()
    monkeypatch.delattr(folder_paths, "get_user_directory")
    assert node_modules._comfy.user_folder() is None
