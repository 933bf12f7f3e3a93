"""The one table of numbers: how they add up, and that a row of it is all that a new number needs to be seen everywhere."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from node_js import node

ROOT = Path(__file__).resolve().parents[2]
MODEL = """
import { receive, emptyModel, shownRun, stepNumbers } from "%s/web/js/lib/model.js";
import { cellText } from "%s/web/js/lib/format.js";
import { translator } from "%s/web/js/lib/strings.js";
let text = "";
for await (const part of process.stdin) text += part;
const run = shownRun(receive(emptyModel(), JSON.parse(text)));
const told = { columns: run.columns, cell: run.cells.energy[0], step: stepNumbers(run, 0), total: run.totals.energy };
console.log(JSON.stringify({ ...told, text: cellText(run, { step: 0, layer: 0 }, translator("zh")) }));
""".replace("%s", ROOT.as_uri())


@pytest.fixture
def run(nodes):
    return nodes.telemetry.runs.open(node="1", owner="o", metadata={"model": "Tiny"}, sigmas=[1.0, 0.0], monitors={"7": False})


def record(nodes, run, layer, ms=2.0, **numbers):
    timer = SimpleNamespace(milliseconds=lambda: ms)
    run.sparse(nodes.recorder.Timed(0, layer, 256, timer), {name: torch.tensor([values]) for name, values in numbers.items()})


def test_sums_and_means(nodes):
    """Means are over the sparse calls of all parts, not over the parts."""
    parts = [nodes.statistics.Sums() for _ in range(3)]
    for part, numbers in zip(parts, ({"sparse_calls": 1, "density": 0.2}, {"sparse_calls": 3, "density": 1.8, "dense_calls": 1}, {}), strict=True):
        for name, number in numbers.items():
            part.add(name, number)
    parts[1].add("sparse_ms", 2.5)
    parts[1].add("dense_ms", 7.0)
    numbers = nodes.statistics.total(parts).numbers()
    assert numbers["density"] == pytest.approx(0.5) and numbers["pv_skipped"] == 0.0
    assert (numbers["sparse_calls"], numbers["dense_calls"], numbers["sparse_ms"], numbers["dense_ms"], numbers["ms"]) == (4, 1, 2.5, 7.0, 9.5)
    nothing = nodes.statistics.total([]).numbers()
    assert nothing["density"] is None is nothing["pv_skipped"] and nothing["sparse_calls"] == 0 and nothing["ms"] == 0.0
    assert isinstance(nothing["sparse_calls"], int) and isinstance(nothing["ms"], float)


def test_the_numbers_of_a_step_are_those_of_its_cells(nodes, run):
    record(nodes, run, 0, density=[0.2, 0.2], pv_skipped=[0.5, 0.5])
    for _ in range(3):
        record(nodes, run, 1, density=[0.6, 0.6], pv_skipped=[0.5, 0.5])
    run.dense(nodes.recorder.Timed(0, 1, 256, SimpleNamespace(milliseconds=lambda: 7.0)), "short")
    run.dense(nodes.recorder.Timed(0, None, 256), "cross")
    run.close()
    (step,) = run.to_dict()["step_totals"]
    assert step.pop("density") == pytest.approx(0.5)
    assert step == {"step": 0, "pv_skipped": 0.5, "sparse_ms": 8.0, "dense_ms": 7.0, "sparse_calls": 4, "dense_calls": 1, "reasons": {"short": 1}}


def test_every_statistic_of_the_totals_is_measured(nodes, run):
    assert set(run.totals()) == {row.name for row in nodes.statistics.TABLE} and len({row.name for row in nodes.statistics.TABLE}) == len(
        run.totals()
    )


def test_the_browser_knows_every_unit_and_name(nodes):
    """A statistic that the monitor shows has a name in every other language than the table's own."""
    script = (ROOT / "web/js/lib/strings.js").read_text(encoding="utf-8")
    (labels,) = re.findall(r"LABELS = \{\n(.*?)\n\};", script, re.S)
    for line in labels.splitlines():
        names = set(re.findall(r"(\w+): \"", line))
        assert names == {row.name for row in nodes.statistics.of_calls(nodes.statistics.On.MONITOR)}, line
    assert {row.unit for row in nodes.statistics.of_calls(nodes.statistics.On.MONITOR)} == {"share", "ms", "calls"}


def test_a_new_statistic_is_seen_everywhere(nodes, monkeypatch):
    """One row, and one number more from the place that measures it: in cell, step, totals, CSV, page, picture, message and the browser's model."""
    row = nodes.statistics.Statistic("energy", "share", nodes.statistics.MEAN, "energy kept")
    monkeypatch.setattr(nodes.statistics, "TABLE", (*nodes.statistics.TABLE, row))
    run = nodes.telemetry.runs.open(node="1", owner="o", metadata={"model": "Tiny"}, sigmas=[1.0, 0.0], monitors={"7": False})
    record(nodes, run, 0, density=[0.5, 0.5], pv_skipped=[0.0, 0.0], energy=[0.5, 0.75])
    record(nodes, run, 1, density=[0.5, 0.5], pv_skipped=[0.0, 0.0], energy=[0.75, 1.0])
    run.close()
    report = run.to_dict()
    assert [cell["energy"] for cell in report["cells"]] == [0.625, 0.875]
    assert report["step_totals"][0]["energy"] == report["totals"]["energy"] == 0.75

    rows = list(csv.DictReader(io.StringIO(nodes.export.to_csv([report]), newline="")))
    assert [line["energy"] for line in rows] == ["0.625", "0.875"]
    page = nodes.export.to_html([report], [[]], "now")
    assert '<div id="energy"><b><data value="0.75">0.750</data></b><span>energy kept</span></div>' in page
    assert page.count("<th>energy kept</th>") == 2 and page.count('<data value="0.875">0.875</data>') == 1 and page.count('value="0.75"') == 2
    assert ("0.75", "energy kept") in nodes.heat_map.stats(report["totals"])
    assert ("0.75", "energy kept") in nodes.heat_map.stats(report["step_totals"][0])

    message = json.loads(json.dumps(nodes.transport.message(run, run.numbers())))
    at = message["columns"].index({"name": "energy", "unit": "share", "label": "energy kept"})
    assert [cell[at] for cell in message["cells"]] == [0.625, 0.875] and message["step_totals"][0][at] == message["totals"]["energy"] == 0.75
    done = subprocess.run([node(), "--input-type=module", "-e", MODEL], input=json.dumps(message), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    browser = json.loads(done.stdout)
    assert {"name": "energy", "unit": "share", "label": "energy kept"} in browser["columns"] and "energy kept 0.63" in browser["text"]
    assert (browser["cell"], browser["step"]["energy"], browser["total"]) == (0.625, 0.75, 0.75)
