"""Pictures of one run's numbers (`telemetry.Run.to_dict`): a (step x layer) heat map, and one (head x layer) frame a step.

Pure functions; standard library, numpy and Pillow only. On the pictures steps count from 1, as ComfyUI's progress bar does; layers and heads count
from 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Every 15th of the 256 colours of viridis (S. van der Walt, N. Smith, E. Firing, CC0): matplotlib, lib/matplotlib/_cm_listed.py.
_VIRIDIS = "440154 481769 472a7a 433d84 3d4e8a 355e8d 2e6d8e 297b8e 23898e 1f978b 21a585 2eb37c 46c06f 65cb5e 89d548 b0dd2f d8e219 fde725"
_ANCHORS = np.array([tuple(bytes.fromhex(colour)) for colour in _VIRIDIS.split()], dtype=np.float64)

PAPER, PANEL, LINE = (255, 255, 255), (234, 237, 241), (214, 218, 224)  # background; a cell without a call; rules
INK, FADED = (24, 28, 36), (98, 106, 120)  # text; secondary text
HATCH = ((220, 223, 228), (164, 170, 180))  # the two greys of what ran dense

NO_CALL = "no attention call was recorded"
LEGEND = "density (kept / visible blocks)"
WIDTH = 1280  # of a heat map; its height follows from the layers
FRAME_SIZE = (960, 720)  # as an IMAGE a frame takes 8 MB
_REASON_LINES = 6


def palette(density) -> np.ndarray:
    """The colours of densities: viridis, perceptually uniform and safe for the common kinds of colour blindness.

    Parameters
    ----------
    density : array_like
        Densities (kept / visible blocks), clipped to 0..1, any shape. A NaN gives the colour of 0.

    Returns
    -------
    np.ndarray
        uint8, shape `density.shape + (3,)`, RGB.
    """
    position = np.clip(np.nan_to_num(np.asarray(density, dtype=np.float64)), 0.0, 1.0) * (len(_ANCHORS) - 1)
    index = np.minimum(position.astype(np.int64), len(_ANCHORS) - 2)
    part = (position - index)[..., None]
    return np.rint(_ANCHORS[index] * (1.0 - part) + _ANCHORS[index + 1] * part).astype(np.uint8)


@dataclass(frozen=True)
class Grid:
    """Cells of a map, each array (rows, columns)."""

    density: np.ndarray  # NaN where nothing is known
    dense: np.ndarray  # bool: every call ran dense
    mixed: np.ndarray  # bool: some calls ran dense

    @classmethod
    def empty(cls, rows: int, columns: int) -> Grid:
        return cls(np.full((rows, columns), np.nan), np.zeros((rows, columns), dtype=bool), np.zeros((rows, columns), dtype=bool))


def grid(run: dict) -> Grid:
    """The run's cells by layer (rows) and step (columns)."""
    cells = Grid.empty(run["layers"], run["steps"])
    for cell in run["cells"]:
        at = cell["layer"], cell["step"]
        cells.dense[at] = cell["dense_calls"] and not cell["sparse_calls"]
        cells.mixed[at] = cell["dense_calls"] and cell["sparse_calls"]
        if cell["density"] is not None:
            cells.density[at] = cell["density"]
    return cells


def head_grid(run: dict, step: int) -> Grid:
    """One step's cells by layer (rows) and head (columns)."""
    cells = Grid.empty(run["layers"], run["heads"])
    for cell in run["cells"]:
        if cell["step"] == step:
            layer, heads = cell["layer"], cell["head_density"] or []
            cells.dense[layer] = cell["dense_calls"] and not cell["sparse_calls"]
            cells.density[layer, : len(heads)] = heads
            cells.mixed[layer, : len(heads)] = cell["dense_calls"] and cell["sparse_calls"]
    return cells


def step_totals(run: dict) -> list[dict]:
    """The numbers of every step: sums over its cells, and for densities the mean over its sparse calls (None without one)."""
    steps = [
        {"step": step, "sparse_calls": 0, "dense_calls": 0, "density": 0.0, "pv_skipped": 0.0, "sparse_ms": 0.0, "dense_ms": 0.0, "reasons": {}}
        for step in range(run["steps"])
    ]
    for cell in run["cells"]:
        total = steps[cell["step"]]
        for name in ("sparse_calls", "dense_calls", "sparse_ms", "dense_ms"):
            total[name] += cell[name]
        for name in ("density", "pv_skipped"):
            total[name] += (cell[name] or 0.0) * cell["sparse_calls"]
        for reason, count in cell["reasons"].items():
            total["reasons"][reason] = total["reasons"].get(reason, 0) + count
    for total in steps:
        for name in ("density", "pv_skipped"):
            total[name] = total[name] / total["sparse_calls"] if total["sparse_calls"] else None
    return steps


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


def stats(numbers: dict) -> list[tuple[str, str]]:
    """(value, label) of the totals of a run or a step, as text."""

    def calls(kind):
        count, ms = numbers[f"{kind}_calls"], numbers[f"{kind}_ms"]
        return f"{count:,} call{'' if count == 1 else 's'}" + (f", {ms:,.1f} ms" if ms else "")  # calls outside numbered layers are not timed

    shown = [
        ("-" if numbers["density"] is None else f"{numbers['density']:.2f}", "density"),
        (calls("sparse"), "sparse attention"),
        (calls("dense"), "dense attention"),
    ]
    if numbers["pv_skipped"]:
        shown.append((f"{numbers['pv_skipped']:.2f}", "PV skipped"))
    if numbers.get("seconds") is not None:
        shown.append((f"{numbers['seconds']:,.1f} s", "run time"))
    if numbers.get("speedup") is not None:
        shown.append((f"{numbers['speedup']:.2f}x", "measured speed-up"))
    return shown


@lru_cache(maxsize=32)
def font(pixels: int):
    """Pillow's built-in font: scalable from Pillow 10.1 on where it was built with FreeType, else its one bitmap size."""
    try:
        return ImageFont.load_default(pixels)
    except (TypeError, ImportError, OSError):
        return getattr(ImageFont, "load_default_imagefont", ImageFont.load_default)()


def line_height(face) -> int:
    """Height of a line: from the top of the tallest letter to below the deepest."""
    return math.ceil(face.getbbox("Ag(j|")[3])


def plain(value, limit: int = 400) -> str:
    """The value as one line of the characters that the built-in font has, `limit` at most."""
    text = " ".join(str(value)[: 4 * limit].translate({0xD7: "x", 0x2013: "-", 0x2014: "-", 0x2026: "..."}).split())
    text = "".join(letter if " " <= letter <= "~" or letter == "\xb7" else "?" for letter in text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def fit(text: str, face, width: float, tail: str = "...") -> str:
    """The longest beginning of the text, with `tail` after it when something was cut, that is at most `width` pixels wide."""
    if face.getlength(text) <= width:
        return text
    low, high = -1, len(text)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if face.getlength(text[:middle].rstrip() + tail) <= width else (low, middle)
    return text[:low].rstrip() + tail if low >= 0 else ""


def wrap(text: str, face, width: float, max_lines: int, separator: str = " ") -> list[str]:
    """The text in lines of at most `width` pixels, broken at separators, inside a word only where it is wider than a line."""
    lines, words = [], text.split(separator)
    while words and len(lines) < max_lines:
        if len(lines) == max_lines - 1:
            return [*lines, fit(separator.join(words), face, width)]
        taken = 1
        while taken < len(words) and face.getlength(separator.join(words[: taken + 1])) <= width:
            taken += 1
        line = separator.join(words[:taken])
        piece = fit(line, face, width, tail="")
        lines.append(piece)
        words = [line[len(piece) :].lstrip(), *words[taken:]] if piece and piece != line else words[taken:]
    return lines


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


class Sheet:
    """An RGB image with helpers that never write past a given width."""

    def __init__(self, width: int, height: int):
        self.image = Image.new("RGB", (width, height), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def text(self, x: float, y: float, text: str, face, fill=INK, width: float | None = None, align: float = 0.0) -> float:
        """Writes one line with its top at y and returns its width; `align` 0 starts at x, 0.5 is centred on x, 1 ends at x."""
        text = fit(text, face, self.image.width if width is None else width)
        length = face.getlength(text)
        self.draw.text((round(x - align * length), round(y)), text, font=face, fill=fill)
        return length

    def centred(self, x: float, y: float, text: str, face, fill) -> None:
        """Writes a line centred on (x, y) by the height of its own letters."""
        left, top, right, bottom = face.getbbox(text)
        self.draw.text((round(x - (left + right) / 2), round(y - (top + bottom) / 2)), text, font=face, fill=fill)

    def upright(self, x: int, y: float, text: str, face, fill) -> None:
        """Writes a line that reads upwards, its left edge at x, centred on y."""
        strip = Image.new("L", (math.ceil(face.getlength(text)), line_height(face)), 0)
        ImageDraw.Draw(strip).text((0, 0), text, font=face, fill=255)
        strip = strip.rotate(90, expand=True)
        self.image.paste(fill, (x, round(y - strip.height / 2)), strip)


def hatch(height: int, width: int, stripe: int) -> np.ndarray:
    """(height, width, 3) diagonal stripes, the pattern of dense attention."""
    diagonal = np.arange(height)[:, None] + np.arange(width)
    return np.array(HATCH, dtype=np.uint8)[(diagonal // stripe) % 2]


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


@dataclass(frozen=True)
class _Page:
    """What one picture shows, before anything is measured."""

    cells: Grid
    title: str
    details: list[str]
    x_title: str
    x_first: int
    steps: list[dict]
    stats: list[tuple[str, str]]  # (value, label)
    reasons: dict
    notice: str
    mixed_legend: bool  # whether the legend explains the corner of partly dense cells
    step: int | None = None  # the step of a frame, marked on the strip over the map; None: a heat map, whose columns are the strip's


def heat_map(run: dict) -> Image.Image:
    """Draws the whole run: steps on x, layers on y (layer 0 at the top), the density of each as a colour, over the columns each step's mean.

    Cells that ran dense are hatched grey, a hatched corner says that some of a cell's calls ran dense, pairs without a call are pale.
    Below the map stand the run's totals and the reasons of its dense calls, most frequent first.

    Returns
    -------
    PIL.Image.Image
        RGB, 1280 pixels wide, as high as the layers need; `image.info["plot_box"]` is (left, top, right, bottom) of the map in pixels, right and
        bottom excluded, and `image.info["strip_box"]` the same of the strip, where there is one.
    """
    cells = grid(run)
    page = _Page(
        cells=cells,
        title=f"{plain(run.get('model') or 'unknown model', 120)} \xb7 attention density by step and layer",
        details=[plain(part, 120) for part in details(run)],
        x_title="step",
        x_first=1,
        steps=step_totals(run),
        stats=stats(run["totals"]),
        reasons=run["reasons"],
        notice="" if run["cells"] else plain(run["note"] or NO_CALL),
        mixed_legend=bool(cells.mixed.any()),
    )
    return _picture(page)


def step_frame(run: dict, step: int) -> Image.Image:
    """Draws one step: heads on x, layers on y (layer 0 at the top), the density of each head as a colour; above it every step's mean density.

    Parameters
    ----------
    run : dict
        A run's numbers.
    step : int
        From 0; the picture counts from 1. A run of no steps has one frame, 0, that says so.

    Returns
    -------
    PIL.Image.Image
        RGB, `FRAME_SIZE`; `image.info` as for `heat_map`.
    """
    steps = step_totals(run)
    numbers = steps[step] if steps else {**run["totals"], "reasons": {}}
    called = numbers["sparse_calls"] + numbers["dense_calls"] > 0
    title = f"step {step + 1} of {run['steps']}" if steps else "no step"
    page = _Page(
        cells=head_grid(run, step),
        title=f"{title} (sigma {run['sigmas'][step]:.2f})" if step < len(run["sigmas"]) else title,
        details=[plain(part, 120) for part in (run.get("model") or "unknown model", *details(run))],
        x_title="head",
        x_first=0,
        steps=steps,
        stats=stats({key: value for key, value in numbers.items() if key not in ("seconds", "speedup")}),
        reasons=numbers["reasons"],
        notice="" if called else f"{NO_CALL} in this step" if run["cells"] else plain(run["note"] or NO_CALL),
        mixed_legend=any(cell["dense_calls"] and cell["sparse_calls"] for cell in run["cells"]),
        step=step,
    )
    return _picture(page)


def _picture(page: _Page) -> Image.Image:
    """Lays the page out from the top down and draws it. Only the map's height gives way: a frame's is fixed, a heat map's follows from its rows."""
    rows, columns = page.cells.density.shape
    is_frame = page.step is not None
    width, scale = (FRAME_SIZE[0], 0.75) if is_frame else (WIDTH, 1.0)

    def px(value: float) -> int:
        return round(value * scale)

    heading, big, body, small = (font(max(10, px(points))) for points in (25, 19, 14, 13))
    margin = px(32)
    inner = width - 2 * margin
    below = wrap(" \xb7 ".join(page.details), body, inner, 2, " \xb7 ")
    count_width = max([small.getlength("00"), *(small.getlength(f"{count:,}") for count in [sum(page.reasons.values())])]) + px(12)
    listed = 3 if is_frame else _REASON_LINES  # a frame keeps this room in any case, so that the map does not jump from step to step
    reasons = reason_lines(page.reasons, small, inner - count_width, listed)
    row_height = line_height(small) + px(4)
    strip = px(36) if page.steps else 0

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

    sheet = Sheet(width, height)
    y = margin
    sheet.text(margin, y, page.title, heading, width=inner)
    y += line_height(heading) + px(6)
    for line in below:
        sheet.text(margin, y, line, body, FADED, inner)
        y += line_height(body) + px(4)
    draw_legend(sheet, margin, legend_top, inner, px, small, ("dense", "partly dense", "no call") if page.mixed_legend else ("dense", "no call"))

    left = margin
    if rows and columns:
        left += line_height(body) + px(8) + math.ceil(max(small.getlength(str(rows - 1)), small.getlength("mean"))) + px(7)
    if rows and columns:
        cell = min((width - margin - left) / columns, px(300)), min(room / rows, px(96))
        cells = map_image(page.cells, cell, max(2, px(4)))
        box = (left, top, left + cells.width, top + cells.height)
        sheet.image.paste(cells, box[:2])
        _draw_axes(sheet, page, box, cell, px, body, small)
        _draw_numbers(sheet, page.cells, box, cell, px)
    else:
        box = (left, top, width - margin, top + room)
        sheet.draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=PANEL)
    if strip:
        right = width - margin if is_frame else box[2]
        gap = None if is_frame or not columns or not rows else gap_of(min(cell))
        sheet.image.paste(strip_image(page.steps, right - left, strip, gap), (left, strip_top))
        sheet.image.info["strip_box"] = (left, strip_top, right, strip_top + strip)
        ascent = small.getbbox("mean")
        sheet.text(left - px(7), strip_top + strip / 2 - (ascent[1] + ascent[3]) / 2, "steps" if is_frame else "mean", small, FADED, align=1.0)
        if is_frame:
            _draw_marker(sheet, page.step, len(page.steps), sheet.image.info["strip_box"], px)
    if page.notice:
        _draw_notice(sheet, page.notice, (left, top, width - margin, box[3]), px, body)

    y = top + room + axis
    sheet.draw.line((margin, y, width - margin - 1, y), fill=LINE)
    y += px(14)
    _draw_stats(sheet, page.stats, margin, y, inner, px, (big, body, small))
    y += line_height(big) + px(3) + line_height(small) + px(16)
    if reasons:
        sheet.text(margin, y, "dense calls by reason", small, FADED, inner)
        y += line_height(small) + px(6)
    count_width = max(small.getlength(count) for count, _ in [("00", ""), *reasons]) + px(12)
    for count, reason in reasons:
        sheet.text(margin + count_width - px(12), y, count, small, INK, align=1.0)
        sheet.text(margin + count_width, y, reason, small, INK, inner - count_width)
        y += row_height
    sheet.image.info["plot_box"] = box
    return sheet.image


def draw_legend(sheet: Sheet, left: int, top: int, inner: int, px, face, swatches: tuple[str, ...]) -> None:
    """The colour bar with its numbers, then `swatches` of "dense", "partly dense" and "no call"."""
    tall, wide = px(16), px(22)
    text_top = top + (tall - line_height(face)) / 2
    x = left + sheet.text(left, text_top, LEGEND, face) + px(12)
    bar = px(300)
    strip = np.broadcast_to(palette(np.linspace(0.0, 1.0, bar)), (tall, bar, 3))
    sheet.image.paste(Image.fromarray(np.ascontiguousarray(strip)), (round(x), top))
    for value in (0, 0.25, 0.5, 0.75, 1):
        at = round(x + value * (bar - 1))
        sheet.draw.line((at, top + tall, at, top + tall + px(3)), fill=FADED)
        sheet.text(at, top + tall + px(6), f"{value:g}", face, FADED, align=0.5)
    x += bar + px(28)
    for label in swatches:
        swatch = np.empty((tall, wide, 3), dtype=np.uint8)
        swatch[:] = PANEL if label == "no call" else palette(0.3)
        hatched = np.full((tall, wide), label == "dense")
        if label == "partly dense":
            hatched = np.arange(tall, 0, -1)[:, None] + np.arange(wide, 0, -1) <= 0.8 * tall
        swatch[hatched] = hatch(tall, wide, max(2, px(4)))[hatched]
        sheet.image.paste(Image.fromarray(swatch), (round(x), top))
        x += wide + px(6)
        x += sheet.text(x, text_top, label, face, INK, max(0.0, left + inner - x)) + px(20)


def ticks(count: int, first: int, cell: float, spacing: float) -> list[tuple[int, int]]:
    """(index, number) of the axis numbers: every 1st, 2nd, 5th, 10th, ... so that they stand at least `spacing` pixels apart."""
    stride = next(base * 10**power for power in range(12) for base in (1, 2, 5) if base * 10**power * cell >= spacing or base * 10**power >= count)
    ticks = [(index, index + first) for index in range(count) if (index + first) % stride == 0]
    if not ticks or ticks[0][0] * cell >= spacing:
        ticks.insert(0, (0, first))
    return ticks


def _draw_axes(sheet: Sheet, page: _Page, box, cell: tuple[float, float], px, body, small) -> None:
    """Numbers and titles of both axes; the gap after each cell is not part of it."""
    rows, columns = page.cells.density.shape
    gap = gap_of(min(cell))
    left, top, right, bottom = box
    spacing = small.getlength(str(columns - 1 + page.x_first)) + px(10)
    for index, number in ticks(columns, page.x_first, cell[0], spacing):
        sheet.text(left + (index + 0.5) * cell[0] - gap / 2, bottom + px(5), str(number), small, FADED, align=0.5)
    ascent = small.getbbox("0")
    for index, number in ticks(rows, 0, cell[1], line_height(small) + px(3)):
        middle = top + (index + 0.5) * cell[1] - gap / 2
        sheet.text(left - px(7), middle - (ascent[1] + ascent[3]) / 2, str(number), small, FADED, align=1.0)
    sheet.text((left + right - gap) / 2, bottom + px(5) + line_height(small) + px(4), page.x_title, body, INK, right - left + px(40), align=0.5)
    sheet.upright(px(32), (top + bottom - gap) / 2, "layer", body, INK)


def _draw_numbers(sheet: Sheet, cells: Grid, box, cell: tuple[float, float], px) -> None:
    """The densities inside the cells, where cells are big enough to read them."""
    gap = gap_of(min(cell))
    clear = (cell[0] - gap - px(8), 0.66 * (cell[1] - gap))
    face = next((face for face in (font(size) for size in range(max(10, px(14)), max(10, px(8)) - 1, -1)) if _number_fits(face, clear)), None)
    if face is None:
        return
    light = (palette(cells.density) / 255.0) ** 2.2 @ (0.2126, 0.7152, 0.0722) > 0.2  # dark ink has more contrast than white from here on
    for row, column in np.argwhere(~np.isnan(cells.density)).tolist():
        x, y = box[0] + (column + 0.5) * cell[0] - gap / 2, box[1] + (row + 0.5) * cell[1] - gap / 2
        sheet.centred(x, y, f"{cells.density[row, column]:.2f}", face, INK if light[row, column] else PAPER)


def _number_fits(face, room: tuple[float, float]) -> bool:
    left, top, right, bottom = face.getbbox("0.00")
    return right - left <= room[0] and bottom - top <= room[1]


def _draw_marker(sheet: Sheet, step: int, steps: int, box, px) -> None:
    """A bar under this step on the strip, wide enough to be seen among many."""
    left, _, right, bottom = box
    edges = _edges((right - left) / steps, steps)
    middle, half = left + (edges[step] + edges[step + 1]) / 2, max((edges[step + 1] - edges[step]) / 2 - 1, px(4))
    sheet.draw.rectangle((max(left, round(middle - half)), bottom + px(4), min(right, round(middle + half)) - 1, bottom + px(8) - 1), fill=INK)


def _draw_notice(sheet: Sheet, notice: str, box, px, face) -> None:
    """A sentence on a plate in the middle of the box."""
    lines = wrap(notice, face, box[2] - box[0] - px(60), 3)
    row = line_height(face) + px(4)
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    wide, tall = max(map(face.getlength, lines)) / 2 + px(16), len(lines) * row / 2 + px(9)
    sheet.draw.rounded_rectangle((x - wide, y - tall, x + wide, y + tall), radius=px(6), fill=PAPER, outline=LINE)
    for index, line in enumerate(lines):
        sheet.centred(x, y + (index + 0.5 - len(lines) / 2) * row, line, face, INK)


def _draw_stats(sheet: Sheet, shown: list[tuple[str, str]], x: float, y: float, inner: int, px, faces) -> None:
    """Values over their labels in one row, in the first face of `faces` that has room, squeezed where the last has none."""
    big, small = faces[0], faces[-1]
    for face in faces:
        wide = [max(face.getlength(value), small.getlength(label)) for value, label in shown]
        space = max(px(14), min(px(90), (inner - sum(wide)) / (len(wide) - 1)))
        squeeze = min(1.0, (inner - space * (len(wide) - 1)) / sum(wide))
        if squeeze == 1.0:
            break
    for (value, label), length in zip(shown, wide, strict=True):
        sheet.text(x, y + line_height(big) - line_height(face), value, face, width=length * squeeze + 1)
        sheet.text(x, y + line_height(big) + px(3), label, small, FADED, length * squeeze + 1)
        x += length * squeeze + space
