"""Pictures of one run's numbers (`recorder.Run.to_dict`): a (step x layer) heat map, and one (head x layer) frame a step.

Pure functions. On the pictures steps count from 1, as ComfyUI's progress bar does; layers and heads count from 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .. import statistics
from ..statistics import On
from .canvas import FADED, INK, LINE, PANEL, PAPER, Sheet, Style, draw_legend, fit, font, hatch, line_height, palette, plain, ticks, wrap

NO_CALL = "no attention call was recorded"
WIDTH = 1280  # of a heat map; its height follows from the layers
FRAME_SIZE = (960, 720)  # as an IMAGE a frame takes 8 MB
_REASON_LINES = 6


@dataclass(frozen=True)
class Grid:
    """Cells of a map, each array (rows, columns)."""

    density: np.ndarray  # NaN where nothing is known
    dense: np.ndarray  # bool: every call ran dense
    mixed: np.ndarray  # bool: some calls ran dense


def grid(run: dict, step: int | None = None) -> Grid:
    """The run's cells by layer (rows) and step (columns); of one step: by layer and head."""
    shape = run["layers"], run["steps"] if step is None else run["heads"]
    cells = Grid(np.full(shape, np.nan), np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool))
    for cell in run["cells"]:
        if step not in (None, cell["step"]):
            continue
        heads = cell["head_density"] or []
        at = (cell["layer"], cell["step"]) if step is None else (cell["layer"], slice(len(heads)))
        cells.density[at] = np.nan if cell["density"] is None else cell["density"] if step is None else heads
        cells.mixed[at] = cell["dense_calls"] and cell["sparse_calls"]
        cells.dense[at if step is None else cell["layer"]] = cell["dense_calls"] and not cell["sparse_calls"]
    return cells


def ranked(reasons: dict) -> list[tuple[str, int]]:
    """Reasons and counts, most frequent first."""
    return sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))


def details(run: dict) -> list[str]:
    """What the run was, in short parts."""
    parts = [f"{run[key]:,} {key if run[key] > 1 else key[:-1]}" for key in ("tokens", "heads") if run[key]]
    parts += [f"{key} {run[key]}" for key in ("backend", "device", "run") if run.get(key)]
    return parts + [f"{name} {setting(value)}" for name, value in (run.get("settings") or {}).items() if value != ""]


def setting(value) -> str:
    """A setting's value as a person writes it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


FORMATS = {"share": "{:.2f}", "calls": "{:,}", "ms": "{:,.1f} ms", "s": "{:,.1f} s", "times": "{:.2f}x"}
_PAIRS = {"sparse_calls": ("sparse_ms", "sparse attention"), "dense_calls": ("dense_ms", "dense attention")}
"""Written as one: how many calls, and what they took."""


def stats(numbers: dict) -> list[tuple[str, str]]:
    """(value, label) of the statistics of a run or a step, as text; without those that were not measured."""
    shown, written = [], {ms for ms, _ in _PAIRS.values()}
    for row in statistics.of_run(On.PICTURE):
        number = numbers.get(row.name)
        if row.name in _PAIRS:
            (name, label), calls = _PAIRS[row.name], f"{number:,} call{'' if number == 1 else 's'}"
            ms = numbers.get(name)  # calls outside numbered layers are not timed
            shown.append((calls + (f", {FORMATS['ms'].format(ms)}" if ms else ""), label))
        elif row.name == "density" and number is None:
            shown.append(("-", row.label))
        elif number and row.name not in written:
            shown.append((FORMATS[row.unit].format(number), row.label))
    return shown


def reason_lines(reasons: dict, face, width: float, max_lines: int) -> list[tuple[str, str]]:
    """(count, text) lines, most frequent first, "+N more reasons" where lines run out; the count is "" on the second line of a reason."""
    counted = ranked(reasons)
    lines: list[tuple[str, str]] = []
    for index, (reason, count) in enumerate(counted):
        wrapped = wrap(plain(reason), face, width, 2 if max_lines >= 4 else 1)
        if len(lines) + len(wrapped) + (index + 1 < len(counted)) > max_lines:
            left = counted[index:]
            more = f"+{len(left)} more reason{'' if len(left) == 1 else 's'}"
            return [*lines, (f"{sum(number for _, number in left):,}", fit(more, face, width))][:max_lines]
        lines += [(f"{count:,}" if line == 0 else "", part) for line, part in enumerate(wrapped)]
    return lines


@dataclass(frozen=True)
class _Page:
    """What one picture shows, before anything is measured."""

    run: dict
    cells: Grid
    title: str
    details: list[str]
    numbers: dict  # of the run, or of the step
    reasons: dict
    notice: str
    step: int | None = None  # the step of a frame, marked on the strip over the map; None: a heat map, whose columns are the strip's


def heat_map(run: dict) -> Image.Image:
    """Draws the whole run: steps on x, layers on y (layer 0 at the top), the density of each as a colour, over the columns each step's mean.

    Cells that ran dense are hatched grey, a hatched corner says that some of a cell's calls ran dense, pairs without a call are pale.
    Below the map stand the run's totals and the reasons of its dense calls, most frequent first.

    Returns an RGB image, 1280 pixels wide, as high as the layers need; its `info["plot_box"]` is (left, top, right, bottom) of the map in pixels,
    right and bottom excluded, and `info["strip_box"]` the same of the strip, where there is one.
    """
    model, cells = run.get("model") or "unknown model", grid(run)
    notice = "" if run["cells"] else run["note"] or NO_CALL
    title = f"{plain(model, 120)} \xb7 attention density by step and layer"
    return _picture(_Page(run, cells, title, details(run), run["totals"], run["reasons"], notice))


def step_frame(run: dict, step: int) -> Image.Image:
    """Draws one step: heads on x, layers on y (layer 0 at the top), the density of each head as a colour; above it every step's mean density.

    `step` counts from 0, on the picture from 1; a run of no steps has one frame, 0, that says so. Returns an RGB image of `FRAME_SIZE`, with `info`
    as `heat_map` has it.
    """
    steps = run["step_totals"]
    numbers = steps[step] if steps else {row.name: run["totals"][row.name] for row in statistics.of_calls(On.PICTURE)} | {"reasons": {}}
    called = numbers["sparse_calls"] + numbers["dense_calls"] > 0
    title = f"step {step + 1} of {run['steps']}" if steps else "no step"
    title = f"{title} (sigma {run['sigmas'][step]:.2f})" if step < len(run["sigmas"]) else title
    notice = "" if called else f"{NO_CALL} in this step" if run["cells"] else run["note"] or NO_CALL
    return _picture(
        _Page(run, grid(run, step), title, [run.get("model") or "unknown model", *details(run)], numbers, numbers["reasons"], notice, step)
    )


def _picture(page: _Page) -> Image.Image:
    """Lays the page out from the top down and draws it. Only the map's height gives way: a frame's is fixed, a heat map's follows from its rows."""
    rows, columns = page.cells.density.shape
    is_frame = page.step is not None
    style = Style(0.75 if is_frame else 1.0)
    width, px = FRAME_SIZE[0] if is_frame else WIDTH, style.px
    heading, big, body, small = style.heading, style.big, style.body, style.small
    margin = px(32)
    inner = width - 2 * margin
    below = wrap(" \xb7 ".join(plain(part, 120) for part in page.details), body, inner, 2, " \xb7 ")
    count_width = max(small.getlength("00"), small.getlength(f"{sum(page.reasons.values()):,}")) + px(12)
    listed = 3 if is_frame else _REASON_LINES  # a frame keeps this room in any case, so that the map does not jump from step to step
    reasons = reason_lines(page.reasons, small, inner - count_width, listed)
    row_height = line_height(small) + px(4)
    steps = page.run["step_totals"]
    strip = px(36) if steps else 0

    legend_top = margin + line_height(heading) + px(6) + len(below) * (line_height(body) + px(4)) + px(12)
    strip_top = legend_top + px(16) + px(6) + line_height(small) + px(18)
    top = strip_top + (strip + px(20 if is_frame else 10) if strip else 0)
    axis = px(5) + line_height(small) + px(4) + line_height(body) + px(20)
    stats_height = px(14) + line_height(big) + px(3) + line_height(small)
    lines = listed if is_frame else len(reasons)
    reasons_height = px(16) + line_height(small) + px(6) + lines * row_height if lines else 0
    if is_frame:
        height = FRAME_SIZE[1]
        room = height - top - axis - stats_height - reasons_height - margin
    else:
        room = 220 if not rows or not columns else 780 if rows > 100 else rows * min(780 // rows, 64, max(26, 240 // rows))
        height = top + room + axis + stats_height + reasons_height + margin
        height += height % 2  # for video

    sheet = Sheet(width, height, style)
    y = margin
    sheet.text((margin, y), page.title, heading, width=inner)
    y += line_height(heading) + px(6)
    for line in below:
        sheet.text((margin, y), line, body, FADED, inner)
        y += line_height(body) + px(4)
    has_mixed = any(cell["dense_calls"] and cell["sparse_calls"] for cell in page.run["cells"])  # in any step: legends of frames are alike
    draw_legend(sheet, margin, legend_top, inner, ("dense", "partly dense", "no call") if has_mixed else ("dense", "no call"))

    left = margin
    if rows and columns:
        left += line_height(body) + px(8) + math.ceil(max(small.getlength(str(rows - 1)), small.getlength("mean"))) + px(7)
        cell = min((width - margin - left) / columns, px(300)), min(room / rows, px(96))
        cells = map_image(page.cells, cell, max(2, px(4)))
        box = (left, top, left + cells.width, top + cells.height)
        sheet.image.paste(cells, box[:2])
        _draw_axes(sheet, page, box, cell)
        _draw_numbers(sheet, page.cells, box, cell)
    else:
        box = (left, top, width - margin, top + room)
        sheet.draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=PANEL)
    if strip:
        right = width - margin if is_frame else box[2]
        gap = None if is_frame or not columns or not rows else gap_of(min(cell))
        sheet.image.paste(strip_image(steps, right - left, strip, gap), (left, strip_top))
        sheet.image.info["strip_box"] = (left, strip_top, right, strip_top + strip)
        ascent = small.getbbox("mean")
        sheet.text((left - px(7), strip_top + strip / 2 - (ascent[1] + ascent[3]) / 2), "steps" if is_frame else "mean", small, FADED, align=1.0)
        if is_frame:
            _draw_marker(sheet, page.step, len(steps), sheet.image.info["strip_box"])
    if page.notice:
        _draw_notice(sheet, page.notice, (left, top, width - margin, box[3]))

    y = top + room + axis
    sheet.draw.line((margin, y, width - margin - 1, y), fill=LINE)
    y += px(14)
    _draw_stats(sheet, stats(page.numbers), (margin, y), inner)
    y += line_height(big) + px(3) + line_height(small) + px(16)
    if reasons:
        sheet.text((margin, y), "dense calls by reason", small, FADED, inner)
        y += line_height(small) + px(6)
    count_width = max(small.getlength(count) for count, _ in [("00", ""), *reasons]) + px(12)
    for count, reason in reasons:
        sheet.text((margin + count_width - px(12), y), count, small, INK, align=1.0)
        sheet.text((margin + count_width, y), reason, small, INK, inner - count_width)
        y += row_height
    sheet.image.info["plot_box"] = box
    return sheet.image


def _edges(cell: float, count: int) -> np.ndarray:
    """The pixel at which each cell begins, and the end of the last."""
    return np.rint(np.arange(count + 1) * cell).astype(np.int64)


def gap_of(cell: float) -> int:
    """Pixels of paper after a cell of this size, which are part of it."""
    return 0 if cell < 5 else 1 if cell < 20 else 2


def map_image(cells: Grid, cell: tuple[float, float], stripe: int) -> Image.Image:
    """The cells, each (width, height) pixels large; every pixel takes its cell's colour, so that the cost does not grow with the cells."""
    rows, columns = cells.density.shape
    colours = palette(cells.density)
    colours[np.isnan(cells.density)] = PANEL
    x_edges, y_edges = _edges(cell[0], columns), _edges(cell[1], rows)
    x, y = np.arange(max(x_edges[-1], 1)), np.arange(max(y_edges[-1], 1))
    column, row = np.searchsorted(x_edges[1:-1], x, side="right"), np.searchsorted(y_edges[1:-1], y, side="right")
    pixels = colours[row[:, None], column]
    hatched = cells.dense[row[:, None], column]
    if cells.mixed.any():  # the lower right corner of a cell
        corner = (y_edges[row + 1] - y)[:, None] + (x_edges[column + 1] - x) <= 0.7 * min(cell) + 1
        hatched = hatched | (cells.mixed[row[:, None], column] & corner)
    pixels[hatched] = hatch(len(y), len(x), stripe)[hatched]
    gap = gap_of(min(cell))
    if gap:
        pixels[y >= y_edges[row + 1] - gap] = PAPER
        pixels[:, x >= x_edges[column + 1] - gap] = PAPER
    return Image.fromarray(pixels)


def strip_image(steps: list[dict], width: int, height: int, gap: int | None = None) -> Image.Image:
    """The density of every step as bars side by side: full height is 1, dense steps are hatched, steps without a call have no bar.

    gap : pixels of paper after each bar; None: as `map_image` has them for cells of this width.
    """
    density = np.array([0.0 if s["density"] is None else s["density"] for s in steps])
    edges = _edges(width / len(steps), len(steps))
    x, y = np.arange(width), np.arange(height, 0, -1)[:, None]
    column = np.searchsorted(edges[1:-1], x, side="right")
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    pixels[:] = PANEL
    tall = np.maximum(np.rint(density * height), [2 if s["sparse_calls"] else 0 for s in steps])
    bars = y <= tall[column]
    pixels[bars] = np.broadcast_to(palette(density)[column], pixels.shape)[bars]
    hatched = np.array([s["dense_calls"] > 0 and not s["sparse_calls"] for s in steps])[column]
    pixels[:, hatched] = hatch(height, width, 3)[:, hatched]
    pixels[:, x >= edges[column + 1] - (gap_of(width / len(steps)) if gap is None else gap)] = PAPER
    return Image.fromarray(pixels)


def _draw_axes(sheet: Sheet, page: _Page, box, cell: tuple[float, float]) -> None:
    """Numbers and titles of both axes, layers from 0, steps from 1, heads from 0; the gap after each cell is not part of it."""
    x_title, x_first = ("step", 1) if page.step is None else ("head", 0)
    px, body, small = sheet.style.px, sheet.style.body, sheet.style.small
    rows, columns = page.cells.density.shape
    gap = gap_of(min(cell))
    left, top, right, bottom = box
    spacing = small.getlength(str(columns - 1 + x_first)) + px(10)
    for index, number in ticks(columns, x_first, cell[0], spacing):
        sheet.text((left + (index + 0.5) * cell[0] - gap / 2, bottom + px(5)), str(number), small, FADED, align=0.5)
    ascent = small.getbbox("0")
    for index, number in ticks(rows, 0, cell[1], line_height(small) + px(3)):
        middle = top + (index + 0.5) * cell[1] - gap / 2
        sheet.text((left - px(7), middle - (ascent[1] + ascent[3]) / 2), str(number), small, FADED, align=1.0)
    title = (left + right - gap) / 2, bottom + px(5) + line_height(small) + px(4)
    sheet.text(title, x_title, body, INK, right - left + px(40), align=0.5)
    sheet.upright(px(32), (top + bottom - gap) / 2, "layer", body, INK)


def _draw_numbers(sheet: Sheet, cells: Grid, box, cell: tuple[float, float]) -> None:
    """The densities inside the cells, where cells are big enough to read them."""
    gap, px = gap_of(min(cell)), sheet.style.px
    clear = (cell[0] - gap - px(8), 0.66 * (cell[1] - gap))
    faces = (font(size) for size in range(max(10, px(14)), max(10, px(8)) - 1, -1))
    boxes = ((face, face.getbbox("0.00")) for face in faces)
    face = next((face for face, (left, top, right, bottom) in boxes if right - left <= clear[0] and bottom - top <= clear[1]), None)
    if face is None:
        return
    light = (palette(cells.density) / 255.0) ** 2.2 @ (0.2126, 0.7152, 0.0722) > 0.2  # dark ink has more contrast than white from here on
    for row, column in np.argwhere(~np.isnan(cells.density)).tolist():
        x, y = box[0] + (column + 0.5) * cell[0] - gap / 2, box[1] + (row + 0.5) * cell[1] - gap / 2
        sheet.centred(x, y, f"{cells.density[row, column]:.2f}", face, INK if light[row, column] else PAPER)


def _draw_marker(sheet: Sheet, step: int, steps: int, box) -> None:
    """A bar under this step on the strip, wide enough to be seen among many."""
    (left, _, right, bottom), px = box, sheet.style.px
    edges = _edges((right - left) / steps, steps)
    middle, half = left + (edges[step] + edges[step + 1]) / 2, max((edges[step + 1] - edges[step]) / 2 - 1, px(4))
    sheet.draw.rectangle((max(left, round(middle - half)), bottom + px(4), min(right, round(middle + half)) - 1, bottom + px(8) - 1), fill=INK)


def _draw_notice(sheet: Sheet, notice: str, box) -> None:
    """A sentence on a plate in the middle of the box."""
    px, face = sheet.style.px, sheet.style.body
    lines = wrap(plain(notice), face, box[2] - box[0] - px(60), 3)
    row = line_height(face) + px(4)
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    wide, tall = max(map(face.getlength, lines)) / 2 + px(16), len(lines) * row / 2 + px(9)
    sheet.draw.rounded_rectangle((x - wide, y - tall, x + wide, y + tall), radius=px(6), fill=PAPER, outline=LINE)
    for index, line in enumerate(lines):
        sheet.centred(x, y + (index + 0.5 - len(lines) / 2) * row, line, face, INK)


def _draw_stats(sheet: Sheet, shown: list[tuple[str, str]], at: tuple[float, float], inner: int) -> None:
    """Values over their labels in one row, in the first face that has room, squeezed where the smallest has none."""
    (x, y), px, big, small = at, sheet.style.px, sheet.style.big, sheet.style.small
    for face in (big, sheet.style.body, small):
        wide = [max(face.getlength(value), small.getlength(label)) for value, label in shown]
        space = max(px(14), min(px(90), (inner - sum(wide)) / (len(wide) - 1)))
        squeeze = min(1.0, (inner - space * (len(wide) - 1)) / sum(wide))
        if squeeze == 1.0:
            break
    for (value, label), length in zip(shown, wide, strict=True):
        sheet.text((x, y + line_height(big) - line_height(face)), value, face, width=length * squeeze + 1)
        sheet.text((x, y + line_height(big) + px(3)), label, small, FADED, length * squeeze + 1)
        x += length * squeeze + space
