"""What SpargeReport saves: the formats and the place that its two inputs ask for, each run once in each format, and nothing else."""

from __future__ import annotations

import errno
import inspect
import json
import os
from pathlib import Path
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


def full(path, *_) -> None:
    """A full disk, which takes the beginning of a file."""
    Path(path).write_bytes(b"half")
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


def test_what_could_not_be_saved_is_said_and_saved_the_next_time(nodes, sampled, report, output, monkeypatch, caplog):
    """Everything is sampled by then: the prompt goes on, with the outputs and the picture."""
    node, patcher = nodes.report.SpargeReport, sampled()
    before, well = node.fingerprint_inputs(), report(patcher, formats="png")
    assert node.fingerprint_inputs() == before
    with monkeypatch.context() as broken:
        broken.setitem(nodes.report.FORMATS, "csv", lambda made, path: full(path))
        failed = report(patcher, formats="csv, json")
    said = "the report's csv could not be written: No space left on device; make room"
    (run,) = json.loads(failed.args[3])["runs"]
    assert said in run["note"] and said in caplog.text and str(output) not in run["note"]
    assert named(failed) == ["sparge/report_00002_.json"] and files(output) == ["sparge/report_00001_.png", "sparge/report_00002_.json"]
    assert len(failed.ui["images"]) == 1 and all(part is not None for part in failed.args)
    height = well.args[1].shape[1]
    assert torch.equal(failed.args[1][:, :height], well.args[1]) and failed.args[1][:, height:].std() > 0.01, "the sentence is not below the picture"
    assert node.fingerprint_inputs() > before, "ComfyUI takes the report from its cache and never writes the file"
    assert named(report(patcher, formats="png, csv, json")) == ["sparge/report_00003_.csv"]


def test_a_folder_that_cannot_be_made(sampled, report, output):
    (output / "sparge").write_text("a file")
    patcher = sampled()
    failed = report(patcher)
    assert "the report's png, html could not be written: " in json.loads(failed.args[3])["runs"][0]["note"] and named(failed) == []
    assert named(report(patcher, filename_prefix="elsewhere")) == ["elsewhere_00001_.png", "elsewhere_00001_.html"]


def test_a_preview_that_cannot_be_written(nodes, sampled, report, output, monkeypatch, caplog):
    monkeypatch.setattr(nodes.report.ui, "PreviewImage", lambda *_, **__: full(output / "preview"))
    result = report(sampled())
    assert "images" not in result.ui and len(named(result)) == 2 and all(part is not None for part in result.args)
    assert "the picture on the report could not be written: No space left on device; make room" in caplog.text


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("plain", "plain_00001_.csv"),
        ("a/b/c", "a/b/c_00001_.csv"),
        ("2.1/run.of.today", "2.1/run.of.today_00001_.csv"),
        ("wide/%width%", "wide/0_00001_.csv"),
        ("a/../b", "b_00001_.csv"),
        ("console/日本 (nul) " + "x" * 130, "console/日本 (nul) " + "x" * 130 + "_00001_.csv"),
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
    **{
        f"character {ord(letter):#x}": (
            {"filename_prefix": f"a{letter}b/c"},
            [f"filename_prefix must be a name that every system can write, got {letter!r} in"],
        )
        for letter in '<>:"|?*\0\n\x1f\x7f\x85\udc80'
    },
    **{
        f"device {part}": (
            {"filename_prefix": f"a/{part}"},
            ["filename_prefix must be a name that every system can write, got '", "a device of Windows"],
        )
        for part in ("CON", "nul.txt", "com1/b", "Lpt9 .x/b", "b\\aux")
    },
    "long name": (
        {"filename_prefix": "a/" + "é" * 76},
        ["filename_prefix must have names of up to 150 bytes, got 'éé", "of 152; write a shorter one"],
    ),
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
