"""A report as files for other programs and for people: JSON, CSV, a picture that carries the numbers, and a page that opens offline.

Every file holds the numbers of `recorder.Run.to_dict` unrounded; the page shows them rounded and keeps them in `<data value>`.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from html import escape

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from . import statistics
from .pictures import canvas, heat_map
from .pictures.block_maps import LayerMaps
from .statistics import On

MAX_PNG_TEXT = 4 << 20  # beyond it the picture's text leaves out the numbers of single heads, which it does not show
MAX_ROWS = 6000  # of the tables of cells on a page; a browser is slow with more
_PLOT, _LEFT = 960, 52  # width of a page's map, and of the room for its numbers on the left, in the units of its SVG


def to_json(runs: list[dict], **style) -> str:
    """The runs as JSON text, for people but where `json.dumps` is told another style."""
    return json.dumps({"version": 1, "runs": runs}, **(style or {"indent": 1}))


def to_csv(runs: list[dict]) -> str:
    """One row for each cell (step and layer count from 0); an empty field is a number that was not measured."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    columns = ["run", "step", "layer", *(row.name for row in statistics.of_calls(On.REPORT)), "reasons"]
    table.writerow(columns)
    for run in runs:
        for cell in run["cells"]:
            numbers = {**cell, "run": run["run"], "reasons": reasons_text(cell["reasons"])}
            table.writerow([numbers[name] for name in columns])
    return text.getvalue()


def reasons_text(reasons: dict) -> str:
    return "; ".join(f"{count} x {reason}" for reason, count in heat_map.ranked(reasons))


def to_png(pictures: list[Image.Image], runs: list[dict]) -> bytes:
    """The pictures one below the other as a PNG, whose text chunk "sparge" is the runs' JSON."""
    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), canvas.PAPER)
    y = 0
    for picture in pictures:
        sheet.paste(picture, (0, y))
        y += picture.height
    text = to_json(runs, separators=(",", ":"))
    if len(text) > MAX_PNG_TEXT:
        text = to_json([{**run, "cells": [{**cell, "head_density": None} for cell in run["cells"]]} for run in runs], separators=(",", ":"))
    info = PngInfo()
    info.add_text("sparge", text)
    return _png(sheet, pnginfo=info)


def _png(picture: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", **options)
    return file.getvalue()


def data_uri(picture: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(_png(picture)).decode("ascii")


def to_html(runs: list[dict], maps: list[list[LayerMaps]], written: str) -> str:
    """The report as one page that needs nothing else: no script, no network, no font.

    runs : `recorder.Run.to_dict` of each; maps : the block maps of each, empty where a run has none; written : when, as a person writes it.
    """
    rows_left, body = MAX_ROWS, []
    for run, shown in zip(runs, maps, strict=True):
        body.append(_run_section(run, shown, rows_left))
        rows_left = max(0, rows_left - len(run["cells"]))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<title>Sparge Attention report</title>\n'
        f"<style>{_style()}</style>\n</head>\n<body>\n{_PATTERN}\n<header><h1>Sparge Attention report</h1><p>{escape(written)}</p></header>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _number(value, shown: str = "{:,}") -> str:
    """A number rounded for the eye, the whole of it for a program; a dash for None."""
    return "–" if value is None else f'<data value="{value!r}">{shown.format(value)}</data>'


def _run_section(run: dict, maps: list[LayerMaps], rows: int) -> str:
    metadata = " · ".join(str(run[key]) for key in ("model", "backend", "device") if run.get(key))
    sizes = " · ".join(f"{run[key]:,} {key}" for key in ("steps", "layers", "heads", "tokens"))
    parts = [
        f'<section>\n<h2>Run {run["run"]}</h2>\n<p class="faded">{escape(metadata)}<br>{escape(sizes)}</p>',
        *(f'<p class="note">{escape(said)}</p>' for said in (run["warning"], run["note"]) if said),
        _totals(run["totals"]),
        _map(run) if run["cells"] else "",
        f'<div class="columns">{_reasons(run["reasons"])}{_settings(run.get("settings") or {})}</div>',
        _maps(maps),
        _steps_table(run),
        _cells_table(run["cells"], rows),
        "</section>",
    ]
    return "\n".join(part for part in parts if part)


_FORMATS = heat_map.FORMATS | {"share": "{:.3f}", "ms": "{:,.2f}", "times": "{:.2f}×"}
_TILE_FORMATS = _FORMATS | {"ms": "{:,.1f}"}


def _totals(totals: dict) -> str:
    """A tile for every statistic but those that were not measured; a time of 0 is that of nothing."""
    tiles = [
        f'<div id="{row.name}"><b>{_number(totals[row.name], _TILE_FORMATS[row.unit])}</b><span>{escape(row.label)}</span></div>'
        for row in statistics.of_run(On.REPORT)
        if totals[row.name] or (totals[row.name] == 0 and row.unit not in ("ms", "s"))
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _reasons(reasons: dict) -> str:
    most = max(reasons.values(), default=0)
    rows = "".join(
        f'<tr><td class="n">{_number(count)}</td><td class="bar"><i style="width:{100 * count / most:.1f}%"></i></td><td>{escape(reason)}</td></tr>'
        for reason, count in heat_map.ranked(reasons)
    )
    return f'<div><h3>Dense calls by reason</h3><table class="reasons">{rows}</table></div>' if rows else "<div><p>No call ran dense.</p></div>"


def _settings(settings: dict) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(heat_map.setting(value)) or '–'}</td></tr>" for name, value in settings.items())
    return f'<div><h3>Settings</h3><table class="settings">{rows}</table></div>' if rows else ""


def _map(run: dict) -> str:
    """The strip of steps over the map of steps and layers, as one inline SVG."""
    cells = heat_map.grid(run)
    layers, count = cells.density.shape
    wide, tall = _PLOT / count, min(28.0, max(520 / layers, 14.0 if layers <= 40 else 0))
    strip, top, gap = 48, 62, 1 if min(_PLOT / count, tall) >= 8 else 0
    bottom = top + tall * layers
    colours = np.concatenate([canvas.palette(cells.density), np.where(np.isnan(cells.density), 0, 255)[..., None]], axis=-1).astype(np.uint8)
    box = f'x="0" y="{top}" width="{_PLOT}" height="{bottom - top:.1f}"'
    corner = min(wide, tall) * 0.6
    corners = (f"M{(x + 1) * wide:.1f} {top + (y + 1) * tall:.1f}v{-corner:.1f}l{-corner:.1f} {corner:.1f}z" for y, x in np.argwhere(cells.mixed))
    drawn = [
        _strip(run["step_totals"], wide, strip, gap),
        f'<rect class="empty" {box}/>',
        f'<image {box} preserveAspectRatio="none" style="image-rendering:pixelated" href="{data_uri(Image.fromarray(colours))}"/>',
        f'<path class="hatch" d="{_dense_path(cells.dense, wide, tall, top)}"/><path class="hatch" d="{"".join(corners)}"/>',
    ]
    if gap:
        rules = [f"M{x * wide:.1f} {top}V{bottom:.1f}" for x in range(1, count)] + [f"M0 {top + y * tall:.1f}H{_PLOT}" for y in range(1, layers)]
        drawn.append(f'<path class="rules" d="{"".join(rules)}"/>')
    for index, number in canvas.ticks(count, 1, wide, 34):
        drawn.append(f'<text x="{(index + 0.5) * wide:.1f}" y="{bottom + 18:.1f}" text-anchor="middle">{number}</text>')
    for index, number in canvas.ticks(layers, 0, tall, 16):
        drawn.append(f'<text x="-8" y="{top + (index + 0.5) * tall + 4.5:.1f}" text-anchor="end">{number}</text>')
    drawn += [
        f'<text x="-8" y="{strip / 2 + 4}" text-anchor="end">mean</text><text x="{_PLOT / 2}" y="{bottom + 38:.1f}" text-anchor="middle">step</text>',
        f'<text transform="translate(-38 {(top + bottom) / 2:.1f}) rotate(-90)" text-anchor="middle">layer</text>',
    ]
    view = f"{-_LEFT} 0 {_PLOT + _LEFT} {bottom + 46:.1f}"
    swatches = [("hatched", "dense"), *([("half", "partly dense")] if cells.mixed.any() else []), ("empty", "no call")]
    legend = "".join(f'<span><i class="{name}"></i>{label}</span>' for name, label in swatches)
    return (
        f'<figure><figcaption><span>{canvas.LEGEND} <b>0</b><i class="scale"></i><b>1</b></span>{legend}</figcaption>'
        f'<svg class="map" viewBox="{view}" role="img" aria-label="density by step and layer">{"".join(drawn)}</svg></figure>'
    )


def _strip(steps: list[dict], wide: float, tall: int, gap: int) -> str:
    bars = []
    for step in steps:
        density, x = step["density"], step["step"] * wide
        hatched = density is None and step["dense_calls"] > 0
        height = tall if hatched else max(1.5, density * tall) if density is not None else 0
        state = "dense" if hatched else "no call" if density is None else f"density {density:.3f}"
        paint = 'class="hatch"' if hatched else f'fill="{_colour(density or 0.0)}"'
        place = f'x="{x:.1f}" width="{max(wide - gap, 0.5):.1f}"'
        bars.append(
            f'<g><title>step {step["step"] + 1}: {state}</title><rect class="empty" {place} y="0" height="{tall}"/>'
            f'<rect {paint} {place} y="{tall - height:.1f}" height="{height:.1f}"/></g>'
        )
    return "".join(bars)


def _dense_path(dense: np.ndarray, wide: float, tall: float, top: float) -> str:
    """Rectangles around the dense cells, one for each stretch of neighbours in a row."""
    pieces = []
    for row, line in enumerate(dense):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], line.view(np.int8), [0]])))
        for start, stop in edges.reshape(-1, 2):
            pieces.append(f"M{start * wide:.1f} {top + row * tall:.1f}h{(stop - start) * wide:.1f}v{tall:.1f}h{-(stop - start) * wide:.1f}z")
    return "".join(pieces)


def _maps(maps: list[LayerMaps]) -> str:
    if not maps:
        return ""
    rows = []
    for layer in maps:
        frames = "".join(f'<h4>{label.capitalize()}</h4><div class="row">{_frames(layer.frames, pictures)}</div>' for label, pictures in layer.rows)
        blocks = f'<div><h4>{layer.title.capitalize()}</h4><img class="blocks" src="{data_uri(layer.blocks)}" alt="block map"></div>'
        rows.append(f'<div class="layer">{blocks}<div class="frames">{frames}</div></div>' if frames else f'<div class="layer alone">{blocks}</div>')
    return f"<h3>Blocks kept</h3>{''.join(rows)}"


def _frames(numbers: list[int], pictures: list[Image.Image]) -> str:
    figure = '<figure><img src="{}" alt="frame {number}"><figcaption>frame {number}</figcaption></figure>'
    return "".join(figure.format(data_uri(picture), number=number) for number, picture in zip(numbers, pictures, strict=True))


def _heads() -> str:
    return "".join(f"<th>{escape(row.label)}</th>" for row in statistics.of_calls(On.REPORT))


def _numbers(values: dict) -> str:
    return "".join(f'<td class="n">{_number(values[row.name], _FORMATS[row.unit])}</td>' for row in statistics.of_calls(On.REPORT))


def _steps_table(run: dict) -> str:
    sigmas = dict(enumerate(run["sigmas"]))
    rows = "".join(
        f'<tr><td class="n">{step["step"] + 1}</td><td class="n">{_number(sigmas.get(step["step"]), "{:.3f}")}</td>{_numbers(step)}</tr>'
        for step in run["step_totals"][:MAX_ROWS]
    )
    head = f"<tr><th>step</th><th>sigma</th>{_heads()}</tr>"
    return f'<details><summary>Steps</summary><table class="steps">{head}{rows}</table></details>' if rows else ""


def _cells_table(cells: list[dict], most: int) -> str:
    rows = "".join(
        f'<tr><td class="n">{cell["step"] + 1}</td><td class="n">{cell["layer"]}</td>{_numbers(cell)}'
        f"<td>{escape(reasons_text(cell['reasons']))}</td></tr>"
        for cell in cells[:most]
    )
    left = len(cells) - most
    more = f"<p>{left:,} more rows are in the CSV file.</p>" if left > 0 else ""
    head = f"<tr><th>step</th><th>layer</th>{_heads()}<th>dense because</th></tr>"
    return f'<details><summary>Steps and layers</summary><table class="cells">{head}{rows}</table>{more}</details>' if cells else ""


def _colour(density: float) -> str:
    return "#" + bytes(canvas.palette(density).tolist()).hex()


_PATTERN = (
    '<svg width="0" height="0" style="position:absolute"><defs><pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" '
    'patternTransform="rotate(45)"><rect class="hatch-paper" width="6" height="6"/><rect class="hatch-line" width="3" height="6"/>'
    "</pattern></defs></svg>"
)


def _style() -> str:
    scale = ",".join(_colour(i / 10) for i in range(11))
    stripes = "repeating-linear-gradient(-45deg,var(--hatch) 0 2px,var(--hatch-paper) 2px 4px)"
    return f"""
:root {{ --paper: #fff; --ink: #181c24; --faded: #5f6774; --line: #d6dae0; --panel: #eaedf1;
  --hatch: #a4aab4; --hatch-paper: #dcdfe4; --mark: #8a4b00; --bar: #35608d }}
@media (prefers-color-scheme: dark) {{ :root {{ --paper: #15181d; --ink: #e6e9ee; --faded: #9aa3b0; --line: #363c46; --panel: #262b33;
  --hatch: #7b8492; --hatch-paper: #3a414c; --mark: #ffb454; --bar: #5a8fc4 }} }}
body {{ background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 0 auto; padding: 24px }}
h1 {{ font-size: 26px; margin: 0 }} h2 {{ font-size: 21px; margin: 0 }} h3 {{ font-size: 16px; margin: 24px 0 6px }}
h4 {{ font-size: 13px; font-weight: normal; margin: 8px 0 4px }}
header p, .faded, .tiles span, figcaption, th {{ color: var(--faded) }} header p, .faded {{ margin: 4px 0 }}
section {{ border-top: 1px solid var(--line); margin-top: 20px; padding-top: 20px }}
.note {{ border-left: 4px solid var(--mark); padding: 6px 12px; background: var(--panel) }}
.tiles {{ display: flex; flex-wrap: wrap; gap: 10px 36px; margin: 18px 0 }} .tiles b {{ display: block; font-size: 22px; font-weight: 500 }}
figure {{ margin: 0 }} figcaption {{ display: flex; flex-wrap: wrap; gap: 6px 22px; font-size: 13px; margin-bottom: 12px }}
figcaption i {{ display: inline-block; width: 22px; height: 14px; margin-right: 6px; vertical-align: -2px }}
figcaption b {{ font-weight: normal; margin: 0 6px }}
i.scale {{ width: 200px; margin: 0; background: linear-gradient(90deg,{scale}) }} i.empty {{ background: var(--panel) }}
i.hatched {{ background: {stripes} }}
i.half {{ background: linear-gradient(135deg,{_colour(0.3)} 62%,var(--hatch) 62%) }}
.map {{ width: 100%; height: auto; display: block }} .map text {{ font-size: 13px; fill: var(--faded) }}
.map .empty {{ fill: var(--panel) }} .hatch {{ fill: url(#hatch) }} .rules {{ stroke: var(--paper); stroke-width: 1 }}
.hatch-paper {{ fill: var(--hatch-paper) }} .hatch-line {{ fill: var(--hatch) }}
.columns {{ display: grid; grid-template-columns: 3fr 2fr; gap: 0 40px; overflow-wrap: anywhere }}
@media (max-width: 700px) {{ .columns {{ grid-template-columns: 1fr }} }}
table {{ border-collapse: collapse; font-size: 14px }}
td, th {{ padding: 3px 14px 3px 0; text-align: left; font-weight: normal; vertical-align: top }}
.n, .steps th, .cells th {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }}
.cells th:last-child {{ text-align: left }}
.steps tr, .cells tr {{ border-bottom: 1px solid var(--line) }}
.bar {{ width: 90px }} .bar i {{ display: block; height: 10px; margin-top: 6px; background: var(--bar); min-width: 2px }}
details {{ margin-top: 16px; overflow-x: auto }} summary {{ cursor: pointer }}
.layer {{ display: flex; flex-wrap: wrap; gap: 8px 20px; margin-bottom: 18px }}
.layer > :first-child {{ min-width: 296px }} .alone {{ display: inline-block }}
.blocks {{ width: 256px; height: 256px; image-rendering: pixelated }}
.frames {{ flex: 1 1 300px }} .row {{ display: flex; gap: 10px }} .row figure {{ flex: 0 1 auto; min-width: 0 }} .frames figcaption {{ margin: 0 }}
.frames img {{ max-width: 100%; height: auto; display: block }}
"""
