"""A report as files: the same numbers in all of them, nothing that needs a network, nothing that data could inject."""

from __future__ import annotations

import base64
import csv
import importlib
import io
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

MODULES = ("pictures.canvas", "pictures.heat_map", "pictures.block_maps", "export", "maps", "recorder")
HOSTILE = """</style></script><script>alert(1)</script>&<img src=http://x.y/z onerror=1>'"\u4e2d"""


@pytest.fixture(scope="module")
def modules(pack):
    return SimpleNamespace(**{name.rpartition(".")[2]: importlib.import_module(f"{pack.__name__}.nodes.{name}") for name in MODULES})


def make_run(steps: int = 3, layers: int = 4, heads: int = 2, number: int = 7, **changes) -> dict:
    """Step 0 ran dense, one cell partly; numbers that no short decimal holds."""
    cells = [
        {
            "step": s, "layer": i, "sparse_calls": 0 if s == 0 else 2, "dense_calls": 1 if s == 0 or (s, i) == (1, 1) else 0,
            "density": None if s == 0 else (s * layers + i) / (steps * layers) / 3, "pv_skipped": None if s == 0 else i / 7,
            "head_density": None if s == 0 else [0.1] * heads, "sparse_ms": s * 1.1 / 3, "dense_ms": 2.2 / 3 if s == 0 else 0.0,
            "reasons": {"outside, the \"window\"": 1} if s == 0 else {"short": 1} if (s, i) == (1, 1) else {},
        }
        for s in range(steps) for i in range(layers)
    ]  # fmt: skip
    totals = {"sparse_calls": 16, "dense_calls": 5, "density": 1 / 3, "pv_skipped": 0.0, "sparse_ms": 8.8 / 3, "dense_ms": 22 / 3, "seconds": 1.5,
              "speedup": None, "saved_ms": -2 / 3, "measuring_ms": 0.0}  # fmt: skip
    steps_of = [
        {"step": s, "sparse_calls": 0 if s == 0 else 2 * layers, "dense_calls": layers if s == 0 else 1, "density": None if s == 0 else s / 11,
         "pv_skipped": None if s == 0 else s / 13, "sparse_ms": s / 17, "dense_ms": s / 19, "reasons": {}}
        for s in range(steps)
    ]  # fmt: skip
    run = {"version": 1, "step_totals": steps_of,
           "run": number, "node": "5", "model": "WanModel", "family": "Wan", "backend": "torch", "device": "cpu", "steps": steps,
           "settings": {"topk": 0.3, "dense_blocks": "", "compensate": False}, "layers": layers, "heads": heads, "tokens": 8192,
           "sigmas": [1 - s / steps for s in range(steps + 1)], "cells": cells, "reasons": {"outside": layers, "short": 1}, "warning": None,
           "note": None, "totals": totals}  # fmt: skip
    return json.loads(json.dumps(run | changes))


class Page(HTMLParser):
    """Which elements and attributes a page has, its text, the numbers of each table by its class, and those of its tiles."""

    VOID = {"meta", "img", "image", "br", "path", "rect"}

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.text, self.tables, self.tiles, self.open, self.bars = [], [], {}, {}, [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        if tag not in self.VOID:
            self.open.append((tag, attributes))
        if tag == "table":
            self.rows = self.tables.setdefault(attributes["class"], [])
        elif tag == "tr":
            self.rows.append([])
        elif tag == "td":
            self.rows[-1].append(None)
        elif tag == "data":
            value = json.loads(attributes["value"])
            if "td" in [tag for tag, _ in self.open]:
                self.rows[-1][-1] = value
            else:
                self.tiles[next(a["id"] for _, a in reversed(self.open) if "id" in a)] = value

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1][0] == "td" and self.rows[-1][-1] is None and data != "\u2013":
            self.rows[-1][-1] = data


def html(modules, runs, maps=None) -> tuple[str, Page]:
    text = modules.export.to_html(runs, maps or [[] for _ in runs], "2026-01-02 03:04")
    return text, Page(text)


def csv_rows(modules, runs) -> list[dict]:
    return list(csv.DictReader(io.StringIO(modules.export.to_csv(runs), newline="")))


NUMBERS = ("density", "pv_skipped", "sparse_ms", "dense_ms", "sparse_calls", "dense_calls")


def test_the_same_numbers_everywhere(modules):
    run = make_run()
    told = json.loads(modules.export.to_json([run]))
    assert told == {"version": 1, "runs": [run]}
    _, page = html(modules, [run])
    rows = csv_rows(modules, [run])
    assert len(rows) == len(run["cells"]) == len(page.tables["cells"]) - 1
    for cell, row, shown in zip(run["cells"], rows, page.tables["cells"][1:], strict=True):
        assert (int(row["run"]), int(row["step"]), int(row["layer"])) == (7, cell["step"], cell["layer"])
        assert [json.loads(row[name]) if row[name] else None for name in NUMBERS] == [cell[name] for name in NUMBERS]
        assert row["reasons"] == "; ".join(f"{n} x {reason}" for reason, n in cell["reasons"].items())
        assert shown[:2] == [str(cell["step"] + 1), str(cell["layer"])] and shown[2:8] == [cell[name] for name in NUMBERS]
        assert (shown[8] or "") == row["reasons"]
    assert page.tiles == {name: value for name, value in run["totals"].items() if value is not None and name != "measuring_ms"}
    assert run["totals"]["measuring_ms"] == 0.0  # nothing was measured, so nothing is said
    for step, shown in zip(run["step_totals"], page.tables["steps"][1:], strict=True):
        assert shown[1:] == [run["sigmas"][step["step"]], *(step[name] for name in NUMBERS)]
    assert {row[2]: row[0] for row in page.tables["reasons"]} == run["reasons"]


def test_png_carries_the_numbers(modules):
    runs = [make_run(), make_run(number=8, layers=9)]
    pictures = [modules.heat_map.heat_map(run) for run in runs]
    with Image.open(io.BytesIO(modules.export.to_png(pictures, runs))) as file:
        assert json.loads(file.text["sparge"]) == {"version": 1, "runs": runs}
        assert file.size == (1280, sum(p.height for p in pictures))
        assert file.crop((0, pictures[0].height, *file.size)).tobytes() == pictures[1].tobytes()


def test_png_of_long_runs_leaves_out_heads(modules, monkeypatch):
    run = make_run()
    monkeypatch.setattr(modules.export, "MAX_PNG_TEXT", 1000)
    with Image.open(io.BytesIO(modules.export.to_png([Image.new("RGB", (4, 4))], [run]))) as file:
        (told,) = json.loads(file.text["sparge"])["runs"]
    assert all(cell["head_density"] is None for cell in told["cells"]) and run["cells"][-1]["head_density"] is not None
    assert told == {**run, "cells": [{**cell, "head_density": None} for cell in run["cells"]]}


def test_page_needs_nothing_else(modules):
    shares = np.arange(64, dtype=np.uint8).reshape(4, 4, 4)
    maps = [modules.block_maps.layer_maps(1, i, shares[0], modules.maps.Frames(shares, shares)) for i in range(2)]
    text, page = html(modules, [make_run()], [maps])
    assert text.startswith("<!doctype html>") and page.open == []
    assert not {"script", "link", "iframe", "object", "embed", "form", "base", "a"} & {tag for tag, _ in page.elements}
    sources = [
        value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href", "srcset", "xlink:href", "data")
    ]
    assert len(sources) == 1 + 2 * (1 + 2 * 4) and all(source.startswith("data:image/png;base64,") for source in sources)
    for source in sources:
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as picture:
            picture.load()
    assert not re.search(r"https?:|@import|url\((?!#)|//", text.replace("data:image/png;base64,", "").split("<body>")[0])
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert "prefers-color-scheme: dark" in text


@pytest.mark.parametrize("field", ["model", "backend", "device", "warning", "note", "settings", "setting", "reasons", "reason of a cell"])
def test_data_is_text_on_the_page(modules, field):
    changes = {"settings": {HOSTILE: 1}, "setting": {"x": HOSTILE}, "reasons": {HOSTILE: 2}}.get(field, HOSTILE)
    run = make_run(**{"settings" if field == "setting" else field: changes})
    if field == "reason of a cell":
        run["cells"][0]["reasons"] = {HOSTILE: 1}
    text, page = html(modules, [run])
    assert any(HOSTILE in part for part in page.text), "it is not shown"
    assert HOSTILE not in text and "<script" not in text and "<img" not in text
    harmless = {key: {"x": 1} for key in ("settings", "reasons")}
    _, plain = html(modules, [make_run(**harmless)])
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in plain.elements}  # HOSTILE would bring script and img


def test_map_on_the_page_is_the_map(modules):
    run = make_run()
    _, page = html(modules, [run])
    (source,) = [attributes["href"] for tag, attributes in page.elements if tag == "image"]
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as picture:
        assert picture.size == (3, 4) and picture.mode == "RGBA"
        for cell in run["cells"]:
            *colour, alpha = picture.getpixel((cell["step"], cell["layer"]))
            assert alpha == (0 if cell["density"] is None else 255)
            assert cell["density"] is None or colour == modules.canvas.palette(cell["density"]).tolist()
    hatched = [attributes["d"] for tag, attributes in page.elements if tag == "path" and attributes["class"] == "hatch"]
    assert hatched[0].count("M") == 4 and hatched[1].count("M") == 1  # step 0 in each layer; the cell that is partly dense
    assert "".join(page.text).count("density 0.") == 2 and "step 1: dense" in page.text  # the strip


def test_a_run_without_cells_has_a_page(modules):
    empty = modules.recorder.Run(0, node="", owner="", metadata={}, sigmas=[]).to_dict() | {"note": "why not"}
    text, page = html(modules, [empty])
    assert "why not" in page.text and not page.tables and "<image" not in text
    assert csv_rows(modules, [empty]) == []


def test_files_of_long_runs_are_bounded(modules):
    run = make_run(50, 60, 24)
    rng = np.random.default_rng(0)
    for cell in run["cells"]:
        if cell["head_density"]:
            cell["head_density"] = rng.random(24).round(5).tolist()
    text, page = html(modules, [run] * 8)
    assert len(page.tables["cells"]) - len(re.findall('class="cells"', text)) == modules.export.MAX_ROWS
    assert text.count("3,000 more rows are in the CSV file.") == 6
    assert len(text) < 8 << 20
    assert len(modules.export.to_csv([run])) < 1 << 20 and len(modules.export.to_json([run])) < 3 << 20
    assert len(modules.export.to_png([modules.heat_map.heat_map(run)], [run] * 8)) < modules.export.MAX_PNG_TEXT + (1 << 20)
