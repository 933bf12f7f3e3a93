"""What SpargeReport saves: the formats and the place that its two inputs ask for, each run once in each format, and nothing else."""

from __future__ import annotations

import inspect
import json
import os
from types import SimpleNamespace

import comfy_models
import pytest
import torch

ALL = ["png", "html", "json", "csv", "gif", "webp", "mp4"]


@pytest.fixture
def output(comfy, tmp_path, monkeypatch):
    """ComfyUI's output folder."""
    import folder_paths

    (tmp_path / "output").mkdir()
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    return tmp_path / "output"


@pytest.fixture
def rendered(nodes, monkeypatch):
    """Names of what was rendered for files."""
    seen = []
    for module, name in ((nodes.animation, "write"), *((nodes.export, name) for name in ("to_png", "to_html", "to_csv"))):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, name=name, real=real: seen.append(name) or real(*args))
    return seen


@pytest.fixture
def sampled(tiny, patched):
    """A function that samples one model once more, one step, and returns its patcher."""
    model = tiny("wan_t2v")
    patcher = patched(model)

    def sample():
        comfy_models.sample(model, patcher, steps=1)
        return patcher

    return sample


@pytest.fixture
def report(nodes, output, monkeypatch):
    """`report(model, ...)`: the node's result, as node 9 of a graph."""

    def execute(model, **inputs):
        monkeypatch.setattr(nodes.report.SpargeReport, "hidden", SimpleNamespace(unique_id="9", prompt=None, extra_pnginfo=None), raising=False)
        return nodes.report.SpargeReport.execute(model, {"samples": torch.zeros(1, 4, 8, 8)}, **inputs)

    return execute


def files(folder) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def named(result) -> list[str]:
    """The files that the browser is told of, by subfolder and name."""
    assert all(file["type"] == "output" for file in result.ui["sparge_files"])
    return [f"{file['subfolder']}/{file['filename']}".lstrip("/") for file in result.ui["sparge_files"]]


def test_the_default_is_the_picture_and_the_page(sampled, report, output, rendered):
    """Also in a prompt that was saved before there was a choice."""
    result = report(sampled())
    assert named(result) == ["sparge/report_00001_.png", "sparge/report_00001_.html"]
    assert files(output) == sorted(named(result)) and rendered == ["to_png", "to_html"]
    report(sampled())
    assert files(output) == [f"sparge/report_0000{n}_.{name}" for n in (1, 2) for name in ("html", "png")]


@pytest.mark.parametrize(
    ("formats", "expected"),
    [
        ("html", ["html"]),
        ("WebP;.csv , png", ["png", "csv", "webp"]),
        ("json json\nmp4", ["json", "mp4"]),
        ("all", ALL),
        ("gif, all", ALL),
        ("none", []),
    ],
)
def test_what_is_listed_is_saved_and_nothing_else_is_rendered(sampled, report, output, rendered, formats, expected):
    result = report(sampled(), formats=formats)
    assert named(result) == [f"sparge/report_00001_.{name}" for name in expected] and files(output) == sorted(named(result))
    made = {"png": "to_png", "html": "to_html", "csv": "to_csv", "gif": "write", "webp": "write", "mp4": "write"}
    assert rendered == [made[name] for name in expected if name in made]
    assert len(result.ui["images"]) == 1 and all(part is not None for part in result.args), "preview and outputs hang on the formats"
    assert json.loads(result.args[3])["runs"][0]["cells"]


def test_a_format_that_is_added_later_is_saved_without_sampling_again(sampled, report, output):
    patcher = sampled()
    before = report(patcher, formats="none")
    first = report(patcher)
    assert named(first) == ["sparge/report_00001_.png", "sparge/report_00001_.html"] and not named(before)
    more = report(patcher, formats="png, html, webp, csv", filename_prefix="elsewhere/other")
    assert named(more) == ["elsewhere/other_00001_.csv", "elsewhere/other_00001_.webp"]
    assert json.loads(more.args[3])["runs"][0]["run"] == json.loads(first.args[3])["runs"][0]["run"]
    assert named(report(patcher, formats="webp, csv")) == [] == named(report(patcher, formats="png"))
    saved = files(output)
    assert named(report(sampled(), formats="webp")) == ["sparge/report_00002_.webp"], "a new run starts anew"
    assert files(output) == sorted([*saved, "sparge/report_00002_.webp"])


def test_what_could_not_be_saved_is_saved_the_next_time(nodes, sampled, report, output, monkeypatch):
    patcher = sampled()
    report(patcher, formats="png")

    def full(*_):
        raise OSError("no space left")

    with monkeypatch.context() as broken, pytest.raises(OSError, match="no space left"):
        broken.setitem(nodes.report.FORMATS, "csv", full)
        report(patcher, formats="csv")
    assert named(report(patcher, formats="png, csv")) == ["sparge/report_00002_.csv"]


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("plain", "plain_00001_.csv"),
        ("a/b/c", "a/b/c_00001_.csv"),
        ("2.1/run.of.today", "2.1/run.of.today_00001_.csv"),
        ("wide/%width%", "wide/0_00001_.csv"),
        ("a/../b", "b_00001_.csv"),
    ],
)
def test_the_place(sampled, report, output, prefix, expected):
    assert named(report(sampled(), formats="csv", filename_prefix=prefix)) == [expected] == files(output)
    again = expected.replace("_00001_", "_00002_")
    assert named(report(sampled(), formats="csv", filename_prefix=prefix)) == [again] and files(output) == [expected, again]


BAD = {
    "unknown format": ({"formats": "png, pdf"}, ["formats must list some of png, html, json, csv, gif, webp, mp4", "all", "none", "got 'pdf'"]),
    "no format": ({"formats": " , "}, ["formats must list", "got ' , '", "'png, html'"]),
    "none and more": ({"formats": "none, png"}, ["formats must list", "got 'none, png'"]),
    "formats of another type": ({"formats": 3}, ["formats must be text, got 3; convert"]),
    "parent": ({"filename_prefix": "../report"}, ["filename_prefix must stay inside ComfyUI's output folder, got '../report'; leave out"]),
    "parent further down": ({"filename_prefix": "a/../../report"}, ["filename_prefix must stay inside", "got 'a/../../report'"]),
    "another place": ({"filename_prefix": os.path.abspath("/elsewhere/report")}, ["filename_prefix must stay inside", "elsewhere"]),
    "the folder itself": ({"filename_prefix": "a/.."}, ["filename_prefix must stay inside", "got 'a/..'"]),
    "no name": ({"filename_prefix": ""}, ["filename_prefix must end with a name for the files, got ''; write a subfolder and a name"]),
    "subfolder alone": ({"filename_prefix": "sparge/"}, ["filename_prefix must end with a name for the files, got 'sparge/'"]),
    "prefix of another type": ({"filename_prefix": 2.5}, ["filename_prefix must be text, got 2.5; convert"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_refused_before_anything_is_sampled(nodes, sampled, report, output, name):
    inputs, parts = BAD[name]
    said = nodes.report.SpargeReport.validate_inputs(**inputs)
    assert isinstance(said, str) and all(part in said for part in parts) and said.count(";") == 1, said
    patcher = sampled()
    with pytest.raises(ValueError) as error:  # the same over a link, where ComfyUI's check before the run sees nothing
        report(patcher, **inputs)
    assert str(error.value) == said and files(output) == []
    assert json.loads(report(patcher).args[3])["runs"][0]["note"] is None, "a refused report counts as shown"


def test_good_values_and_those_that_come_over_links(nodes, output):
    check = nodes.report.SpargeReport.validate_inputs
    assert check() is True and check(formats=None, filename_prefix=None) is True and check(formats="all", filename_prefix="x") is True
    given = inspect.signature(nodes.report.SpargeReport.execute).parameters
    schema = {entry.id: entry for entry in nodes.report.SpargeReport.define_schema().inputs}
    for name in ("formats", "filename_prefix"):
        assert schema[name].optional and schema[name].default == given[name].default, "a prompt without it and a new node differ"
    assert list(schema)[:2] == ["model", "data"]
