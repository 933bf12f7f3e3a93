"""The node SpargeReport: what it hands on, draws, saves and says, and which runs it shows."""

from __future__ import annotations

import csv
import importlib
import io
import json
import re
from types import SimpleNamespace

import comfy_models
import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture
def folders(comfy, tmp_path, monkeypatch):
    """ComfyUI's output and temp folders."""
    import folder_paths

    for name in ("output", "temp"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    return tmp_path


@pytest.fixture
def report(nodes, folders, monkeypatch):
    """`report(model, data)`: the node's result as node 9 of a graph; `saved`: its inputs formats and filename_prefix."""
    node = nodes.report.SpargeReport

    def execute(model, data=None, unique_id="9", **saved):
        hidden = None if unique_id is None else SimpleNamespace(unique_id=unique_id, prompt=None, extra_pnginfo=None)
        monkeypatch.setattr(node, "hidden", hidden, raising=False)
        return node.execute(getattr(model, "patcher", model), {"samples": torch.zeros(1, 4, 8, 8)} if data is None else data, **saved)

    return execute


def written(folder) -> list[str]:
    """Every file below a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def sampled(model, patcher, steps=2):
    comfy_models.sample(model, patcher, steps=steps)
    return patcher


@pytest.mark.parametrize("data", [{"samples": torch.zeros(1, 4, 8, 8), "noise_mask": 1}, torch.rand(2, 16, 16, 3)], ids=["latent", "images"])
def test_outputs(nodes, tiny, patched, last_run, report, folders, data):
    model = tiny("wan_t2v")
    patcher = sampled(model, patched(model, end_percent=0.6), steps=3)
    result = report(patcher, data, formats="all")
    passed, heat_map, frames, text, maps = result.args
    assert passed is data
    for images, count in ((heat_map, 1), (frames, 3), (maps, 1)):
        assert images.dtype == torch.float32 and images.dim() == 4 and images.shape[0] == count and images.shape[3] == 3
        assert images.min() >= 0 and images.max() <= 1 and images.std() > (0.01 if images is not maps else 0)
    assert frames.shape[1:3] == (720, 960)
    assert not torch.equal(frames[0], frames[2]), "the sparse and the dense step look the same"
    told = json.loads(text)
    assert told["version"] == 1 and told["runs"] == [json.loads(json.dumps(last_run()))]
    assert json.loads(text, parse_constant=pytest.fail) == told  # no NaN or Infinity

    files = result.ui["sparge_files"]
    assert [file["filename"] for file in files] == [f"report_00001_.{name}" for name in ("png", "html", "json", "csv", "gif", "webp", "mp4")]
    assert all((file["subfolder"], file["type"]) == ("sparge", "output") for file in files)
    path = {file["filename"].rpartition(".")[2]: folders / "output" / file["subfolder"] / file["filename"] for file in files}
    assert written(folders / "output") == sorted(f"sparge/{file['filename']}" for file in files)
    with Image.open(path["gif"]) as gif:
        assert gif.format == "GIF" and gif.n_frames == 3 and gif.size == (960, 720)
    assert path["mp4"].stat().st_size > 1000 and path["mp4"].read_bytes()[4:8] == b"ftyp"
    assert path["json"].read_text(encoding="utf-8") == text
    with Image.open(path["webp"]) as webp, Image.open(path["png"]) as png:
        assert webp.format == "WEBP" and webp.n_frames == 3 and webp.size == (960, 720)
        assert json.loads(png.text["sparge"]) == told
        assert np.abs(np.asarray(png) / 255 - heat_map[0].numpy()).max() < 1 / 256

    (preview,) = result.ui["images"]
    assert preview["type"] == "temp"
    with Image.open(folders / "temp" / preview["subfolder"] / preview["filename"]) as picture:
        assert np.abs(np.asarray(picture.convert("RGB")) / 255 - heat_map[0].numpy()).max() < 1 / 128


def test_the_same_numbers_from_the_kernels_to_every_file(nodes, tiny, patched, report, folders, monkeypatch):
    """AttentionInfo of every call, by hand summed up, is what JSON, CSV and page say."""
    calls, sparse = {}, nodes.recorder.Run.sparse
    attend, infos = nodes._kernels.attend, []

    def noted(*args, **kwargs):
        out, info = attend(*args, **kwargs)
        infos.append(info)
        return out, info

    def placed(run, call, *args, **kwargs):
        calls.setdefault(call.at, []).append(infos.pop())
        return sparse(run, call, *args, **kwargs)

    monkeypatch.setattr(nodes._kernels, "attend", noted)
    monkeypatch.setattr(nodes.recorder.Run, "sparse", placed)
    model = tiny("wan_t2v", latent=(1, 16, 2, 64, 64))
    result = report(sampled(model, patched(model, end_percent=0.6, cdfthreshd=0.5), steps=3), formats="json, csv, html")
    assert len({info.density.double().mean().item() for of in calls.values() for info in of}) > 2, "densities are all the same"
    (run,) = json.loads(result.args[3])["runs"]
    read = {file["filename"][-4:]: (folders / "output" / "sparge" / file["filename"]).read_bytes() for file in result.ui["sparge_files"]}
    rows = list(csv.DictReader(io.StringIO(read[".csv"].decode("utf-8"), newline="")))
    page = read["html"].decode("utf-8")
    assert len(rows) == len(run["cells"]) > len(calls) > 0
    shown = re.findall(r"<tr>(.*?)</tr>", page[page.index('<table class="cells">') :])[1:]
    for cell, row, line in zip(run["cells"], rows, shown, strict=True):
        of = calls.get((cell["step"], cell["layer"]), [])
        assert len(of) == cell["sparse_calls"] == int(row["sparse_calls"])
        numbers = re.findall(r'value="([^"]+)"', line)
        for name, index in (("density", 0), ("pv_skipped", 1)) if of else ():
            expected = np.mean([getattr(info, name).double().mean() for info in of])
            assert cell[name] == float(row[name]) == float(numbers[index]) == pytest.approx(expected, abs=1e-6)
    every = [info.density.double().mean() for of in calls.values() for info in of]
    assert run["totals"]["density"] == pytest.approx(np.mean(every), abs=1e-6)
    assert f'id="density"><b><data value="{run["totals"]["density"]!r}">' in page


def test_no_run_since_the_last_report_is_said_and_saves_nothing(tiny, patched, report, folders):
    """The sampler was cached, or Sparge Attention was bypassed: the old numbers must not pass for those of the new picture."""
    model = tiny("wan_t2v", latent=(1, 16, 2, 64, 64))
    patched_model = sampled(model, patched(model), steps=2)
    first = report(patched_model)
    saved = written(folders / "output")
    again = report(patched_model)
    bypassed = report(model.patcher)
    assert len(first.ui["sparge_files"]) == len(saved) == 2 and written(folders / "output") == saved
    runs = [json.loads(result.args[3])["runs"] for result in (first, again, bypassed)]
    assert [len(of) for of in runs] == [1, 1, 1] and len({of[0]["run"] for of in runs}) == 1
    for result, (run,) in zip((again, bypassed), runs[1:], strict=True):
        assert result.ui["sparge_files"] == [] and "no run since the last report" in run["note"]
    assert "no run since" not in (runs[0][0]["note"] or "")


def watched(nodes, pack, patcher):
    return importlib.import_module(f"{pack.__name__}.nodes.monitor").watched(patcher, "3", False)


@pytest.mark.parametrize("images", [True, False], ids=["images", "latent"])
def test_maps_of_a_watched_run(nodes, pack, tiny, patched, report, folders, images):
    model = tiny("wan_t2v")
    patcher = sampled(model, watched(nodes, pack, patched(model)), steps=2)
    (run,) = nodes.telemetry.runs.closed
    layers = {layer for step, layer in run.maps.kept if step == 1}
    data = torch.linspace(0, 1, 4 * 600 * 800 * 3).reshape(4, 600, 800, 3) if images else None
    result = report(patcher, data)
    of = nodes.report.layer_maps(run, nodes.report.images_of(data))
    assert [maps.step for maps in of] == [1] * min(3, len(layers)) and {maps.layer for maps in of} <= layers
    for maps in of:
        assert maps.blocks.tobytes() == nodes.block_maps.block_map(run.maps.kept[1, maps.layer].values).tobytes()
        assert maps.frames == [1] and maps.queries[0].width / maps.queries[0].height == pytest.approx(4 / 3 if images else 1, abs=0.02)
    assert np.array_equal(
        result.args[4][0].numpy(),
        nodes.animation.to_array(nodes.block_maps.sheet(f"{run.metadata['model']} \xb7 blocks kept, run {run.number}", of)),
    )
    page = (folders / "output" / "sparge" / result.ui["sparge_files"][1]["filename"]).read_text(encoding="utf-8")
    assert page.count("<img ") == 3 * len(of)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_images_that_are_not_rgb(nodes, pack, tiny, patched, report, folders, channels):
    """Grey ones, such as masks, and ones with transparency lie under the maps all the same."""
    model = tiny("wan_t2v")
    patcher = sampled(model, watched(nodes, pack, patched(model)), steps=1)
    images = torch.rand(2, 30, 20, channels, generator=torch.Generator().manual_seed(1))
    found = nodes.report.images_of(images)
    expected = images[..., :3] if channels > 2 else images[..., :1].expand(-1, -1, -1, 3)
    assert np.array_equal(found, expected.numpy())
    assert len(report(patcher, images).ui["sparge_files"]) == 2


@pytest.mark.parametrize("part", ["save", "batch"])
def test_a_report_that_fails_has_shown_nothing(nodes, tiny, patched, report, folders, monkeypatch, part):
    """Whatever it is that nobody expected: the next try saves the run's files."""
    model = tiny("wan_t2v")
    patcher = sampled(model, patched(model), steps=1)

    def fail(*args):
        raise MemoryError("no room")

    with monkeypatch.context() as broken, pytest.raises(MemoryError, match="no room"):
        broken.setattr(nodes.report, part, fail)
        report(patcher)
    result = report(patcher)
    (run,) = json.loads(result.args[3])["runs"]
    assert run["note"] is None and len(result.ui["sparge_files"]) == 2


def runs_in(result) -> list[int]:
    return [run.get("run") for run in json.loads(result.args[3])["runs"]]


def test_runs_since_the_last_report(nodes, tiny, patched, report):
    model = tiny("wan_t2v")
    patcher = patched(model)
    start = nodes.telemetry.runs.latest
    for _ in range(2):
        sampled(model, patcher, steps=1)
    first = report(patcher)
    assert runs_in(first) == [start + 1, start + 2] and first.args[1].shape[0] == 2 and first.args[2].shape[0] == 2
    assert runs_in(report(patcher)) == [start + 1, start + 2]  # nothing new: the same again
    assert runs_in(report(patcher, unique_id="10")) == [start + 1, start + 2]  # another report has seen nothing yet
    sampled(model, patcher, steps=1)
    assert runs_in(report(patcher)) == [start + 3] == runs_in(report(patcher))


def test_only_the_models_own_runs(nodes, tiny, patched, report):
    model = tiny("wan_t2v")
    first, second = patched(model), patched(model)
    start = nodes.telemetry.runs.latest
    for patcher in (first, second, first):
        sampled(model, patcher, steps=1)
    assert runs_in(report(first)) == [start + 1, start + 3]
    assert runs_in(report(second, unique_id="10")) == [start + 2]
    assert runs_in(report(first.clone(), unique_id="11")) == [start + 1, start + 3]  # a LoRA behind the node
    assert runs_in(report(model, unique_id="12")) == [start + 1, start + 2, start + 3]  # an unpatched model: all runs
    assert runs_in(report(patched(first), unique_id="13")) == [start + 1, start + 3]  # a node that has not run yet, behind one that has


def test_two_workflows_whose_reports_have_one_number(nodes, tiny, patched, report, folders):
    """What the report of one has shown is neither new nor lost when the other one's has run in between."""
    model = tiny("wan_t2v")
    here, there = (sampled(model, patched(model), steps=1) for _ in range(2))
    start = nodes.telemetry.runs.latest - 2
    assert runs_in(report(there)) == [start + 2]  # the newer run is shown first
    first = report(here)
    assert runs_in(first) == [start + 1] and len(first.ui["sparge_files"]) == 2
    assert json.loads(first.args[3])["runs"][0]["note"] is None, "a new run passes for an old one"
    sampled(model, there, steps=1)
    assert runs_in(report(there)) == [start + 3]
    again = report(here, formats="all")
    (run,) = json.loads(again.args[3])["runs"]
    assert run["run"] == start + 1 and run["cells"] and "no run since the last report" in run["note"]
    assert [file["filename"].rpartition(".")[2] for file in again.ui["sparge_files"]] == ["json", "csv", "gif", "webp", "mp4"]
    assert report(there).ui["sparge_files"] == [] == report(here, formats="all").ui["sparge_files"]


def test_no_run(nodes, tiny, patched, report, folders):
    result = report(patched(tiny("wan_t2v")), formats="all")
    _, heat_map, frames, text, maps = result.args
    assert "no run" in json.loads(text)["runs"][0]["note"]
    assert heat_map.shape[0] == frames.shape[0] == maps.shape[0] == 1
    assert written(folders / "output") == [] and result.ui["sparge_files"] == []
    assert says_more_than_without_its_note(nodes, nodes.report.empty_run(), heat_map), "the note is not on the picture"


def says_more_than_without_its_note(nodes, run, heat_map) -> bool:
    blank = nodes.animation.to_array(nodes.heat_map.heat_map({**run, "note": None}))
    return blank.shape != heat_map[0].shape or not np.array_equal(blank, heat_map[0].numpy())


def test_a_run_without_any_call(nodes, tiny, patched, report):
    model = tiny("pixart")
    result = report(sampled(model, patched(model), steps=1))
    (run,) = json.loads(result.args[3])["runs"]
    assert "PixArt" in run["note"] and result.args[1].shape[0] == 1 and len(result.ui["sparge_files"]) == 2
    assert says_more_than_without_its_note(nodes, run, result.args[1]), "why nothing was seen is not on the picture"


def test_from_a_script(nodes, tiny, patched, report):
    model = tiny("wan_t2v")
    assert runs_in(report(sampled(model, patched(model), steps=1), unique_id=None)) == [nodes.telemetry.runs.latest]


def test_fingerprint(nodes, tiny, patched):
    node, model = nodes.report.SpargeReport, tiny("wan_t2v")
    before = node.fingerprint_inputs(model=None, data=None)
    assert node.fingerprint_inputs(model=None, data=None) == before
    sampled(model, patched(model), steps=1)
    assert node.fingerprint_inputs(model=None, data=None) == before + 1


@pytest.mark.parametrize("steps", [1, 99, 100, 101, 1000, 4000])
def test_frames_of_a_long_run(nodes, monkeypatch, steps):
    drawn = []
    monkeypatch.setattr(nodes.heat_map, "step_frame", lambda run, step: drawn.append(step))
    assert len(nodes.report.step_frames({"steps": steps})) == len(drawn) <= nodes.report.MAX_FRAMES == 100
    assert drawn[0] == 0 and drawn == sorted(set(drawn)) and drawn[-1] >= steps - -(-steps // 100)
    assert len(drawn) >= min(steps, 50)


def test_frames_of_many_runs_stay_bounded(nodes, report, monkeypatch, tiny):
    """Eight runs of 100 steps, as a store can hold: the IMAGE batch must not take gigabytes."""
    width, height = nodes.heat_map.FRAME_SIZE
    for _ in range(8):
        run = nodes.telemetry.runs.open(node="1", owner=object(), metadata={}, sigmas=[1.0] * 101)
        run.close()
        nodes.telemetry.runs.add(run)
    shapes = []
    monkeypatch.setattr(nodes.heat_map, "step_frame", lambda run, step: Image.new("RGB", (4, 4)))
    monkeypatch.setattr(nodes.report, "save", lambda made, *rest: shapes.append(len(made.frames)) or nodes.report.Files([], [], None))
    report(tiny("wan_t2v"))
    taken = shapes[0] * width * height * 3 * 4
    assert taken <= 2 << 30, f"{shapes[0]} frames take {taken / 2**30:.1f} GiB"


def test_pictures_of_different_sizes_share_a_batch(nodes):
    batch = nodes.report.batch([Image.new("RGB", (4, 2), (255, 0, 0)), Image.new("RGB", (3, 5), (0, 0, 255))])
    assert batch.shape == (2, 5, 4, 3)
    assert torch.equal(batch[0, :2], torch.tensor([1.0, 0.0, 0.0]).expand(2, 4, 3)) and (batch[0, 2:] == 1).all() and (batch[1, :, 3] == 1).all()
