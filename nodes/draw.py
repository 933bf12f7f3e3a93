"""Pictures of one run's telemetry: a (step x layer) heat map, and one (head x layer) frame per step.

Pure functions over a plain dict; standard library, numpy and Pillow only. The run's keys that are read:

- `model`, `tokens`, `heads`, `backend`, `device`, `run`, `settings` (dict): the title lines;
- `steps`, `layers`, `sigmas`: the axes and the frame titles;
- `cells`: a list of `{"step", "layer", "sparse_calls", "dense_calls", "density", "head_density", "pv_skipped", "sparse_ms", "dense_ms", "reasons"}`,
  step, layer and head from 0, density 0..1 (kept / visible blocks), ms in milliseconds, reasons a dict of dense calls by reason;
- `note`: a sentence that explains a run without any call;
- `totals` and `reasons`: the same numbers for the whole run, with `seconds` and `speedup` (None where it was not measured).

Any of them may be missing or None. On the pictures steps count from 1, as ComfyUI's progress bar does; layers and heads count from 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Every 15th of the 256 colours of viridis (S. van der Walt, N. Smith, E. Firing, CC0): matplotlib, lib/matplotlib/_cm_listed.py.
_VIRIDIS = "440154 481769 472a7a 433d84 3d4e8a 355e8d 2e6d8e 297b8e 23898e 1f978b 21a585 2eb37c 46c06f 65cb5e 89d548 b0dd2f d8e219 fde725"
_ANCHORS = np.array([tuple(bytes.fromhex(colour)) for colour in _VIRIDIS.split()], dtype=np.float64)

PAPER, PANEL, LINE = (255, 255, 255), (234, 237, 241), (214, 218, 224)  # background; a cell without a call; rules
INK, FADED, WHITE = (24, 28, 36), (98, 106, 120), (255, 255, 255)  # text; secondary text; text on a dark cell
HATCH = ((220, 223, 228), (164, 170, 180))  # the two greys of a cell that ran dense
ACCENT = (53, 94, 141)

NO_CALL = "no attention call was recorded"
LEGEND = "density (kept / visible blocks)"
MIN_SIZE, MAX_SIZE = (480, 360), (8192, 8192)
_WIDTH = 1280  # the default width in pixels, and the width at which type has its nominal size
_MOST = 4096  # steps, layers or heads that are drawn; a larger number is damaged data, not a run


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


def _number(value) -> float | None:
    """The value as a finite float, or None."""
    if type(value) is float:
        return value if math.isfinite(value) else None
    if isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            return None
        return value if math.isfinite(value) else None
    return None


def _count(value) -> int:
    """The value as a number of things; more than 10^15 is damaged data and would not fit on a line."""
    return int(min(max(_number(value) or 0, 0), 10**15))


def _list(value) -> list | tuple:
    return value if isinstance(value, (list, tuple)) else []


def _dict(value) -> dict:
    return value if isinstance(value, dict) else {}


def _index(value) -> int:
    """A step, layer or head as it is, or -1 where the value is none."""
    number = _number(value)
    return int(number) if number is not None and 0 <= number < _MOST and number == int(number) else -1


def _ran_dense(cell: dict) -> bool:
    """Whether the cell made attention calls and none of them was sparse."""
    sparse, dense = _number(cell.get("sparse_calls")), _number(cell.get("dense_calls"))
    if sparse is None:
        return _number(cell.get("density")) is None and bool(dense)
    return sparse == 0 and dense != 0


@dataclass(frozen=True)
class _Cells:
    """The cells that say which step and layer they are of, and the extent of the axes: what the run says, or more where its cells hold more."""

    steps: int
    layers: int
    heads: int
    by_step: dict[int, list[tuple[int, dict]]]  # step -> (layer, cell)
    reasons: bool  # some cell ran dense for a reason
    mixed: bool  # some cell made both sparse and dense calls


def _read(run: dict) -> _Cells:
    by_step: dict[int, list[tuple[int, dict]]] = {}
    steps, layers, heads = (min(_count(run.get(key)), _MOST) for key in ("steps", "layers", "heads"))
    reasons = mixed = False
    for cell in _list(run.get("cells")):
        step, layer = (_index(cell.get("step")), _index(cell.get("layer"))) if isinstance(cell, dict) else (-1, -1)
        if step < 0 or layer < 0:
            continue
        by_step.setdefault(step, []).append((layer, cell))
        steps, layers, heads = max(steps, step + 1), max(layers, layer + 1), max(heads, min(len(_list(cell.get("head_density"))), _MOST))
        reasons = reasons or bool(_dict(cell.get("reasons")))
        mixed = mixed or (_count(cell.get("dense_calls")) > 0 and not _ran_dense(cell))
    return _Cells(steps, layers, heads, by_step, reasons, mixed)


def _density_text(value) -> str:
    number = _number(value)
    return "-" if number is None else f"{number:.2f}"


def _calls_text(calls, ms) -> str:
    milliseconds = _number(ms)
    text = f"{_count(calls):,} call{'' if _count(calls) == 1 else 's'}"
    return text if milliseconds is None else f"{text}, {milliseconds:,.1f} ms"


@lru_cache(maxsize=64)
def _font(pixels: int):
    """Pillow's built-in font: scalable where Pillow >= 10.1 was built with FreeType, else its one bitmap size."""
    try:
        return ImageFont.load_default(pixels)
    except (TypeError, ImportError, OSError, ValueError):
        return getattr(ImageFont, "load_default_imagefont", ImageFont.load_default)()


def _height(font) -> int:
    """Height of a line: from the top of the tallest letter to below the deepest."""
    return math.ceil(font.getbbox("Ag(j|")[3])


def _plain(value, limit: int = 400) -> str:
    """The value as one line of the characters that the built-in font has, `limit` at most."""
    text = str(value)[: 4 * limit].translate({0xD7: "x", 0x2013: "-", 0x2014: "-", 0x2026: "..."})
    text = " ".join(text.split())
    text = "".join(letter if " " <= letter <= "~" or letter == "\xb7" else "?" for letter in text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _fit(text: str, font, width: float, tail: str = "...") -> str:
    """The longest beginning of the text, with `tail` after it when something was cut, that is at most `width` pixels wide."""
    if font.getlength(text) <= width:
        return text
    low, high = -1, len(text)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if font.getlength(text[:middle].rstrip() + tail) <= width else (low, middle)
    return text[:low].rstrip() + tail if low >= 0 else ""


def _wrap(text: str, font, width: float, max_lines: int, separator: str = " ") -> list[str]:
    """The text in lines of at most `width` pixels, broken at separators, inside a word only where it is wider than a line."""
    lines, words = [], text.split(separator)
    while words and len(lines) < max_lines:
        if len(lines) == max_lines - 1:
            return [*lines, _fit(separator.join(words), font, width)]
        taken = 1
        while taken < len(words) and font.getlength(separator.join(words[: taken + 1])) <= width:
            taken += 1
        line = separator.join(words[:taken])
        piece = _fit(line, font, width, tail="")
        lines.append(piece)
        words = [line[len(piece) :].lstrip(), *words[taken:]] if piece and piece != line else words[taken:]
    return lines


def _reason_lines(reasons, font, width: float, max_lines: int) -> list[tuple[str, str]]:
    """(count, text) lines, most frequent first, "+N more reasons" where lines run out; the count is "" on the second line of a reason."""
    counted = sorted(((_count(count), _plain(reason)) for reason, count in _dict(reasons).items()), key=lambda pair: (-pair[0], pair[1]))
    counted = [(count, reason) for count, reason in counted if count > 0]
    lines: list[tuple[str, str]] = []
    for index, (count, reason) in enumerate(counted):
        wrapped = _wrap(reason, font, width, 2 if max_lines >= 4 else 1)
        if len(lines) + len(wrapped) + (index + 1 < len(counted)) > max_lines:
            left = counted[index:]
            more = f"+{len(left)} more reason{'' if len(left) == 1 else 's'}"
            return [*lines, (f"{sum(number for number, _ in left):,}", _fit(more, font, width))][:max_lines]
        lines += [(f"{count:,}" if line == 0 else "", part) for line, part in enumerate(wrapped)]
    return lines


@dataclass(frozen=True)
class _Page:
    """What one picture shows, before anything is measured."""

    density: np.ndarray  # (rows, columns), NaN where nothing is known
    dense: np.ndarray  # (rows, columns) bool: every call ran dense
    mixed: np.ndarray  # (rows, columns) bool: some calls ran dense
    title: str
    details: list[str]
    x_title: str
    x_first: int
    stats: list[tuple[str, str]]  # (value, label)
    reasons: dict
    notice: str = ""
    progress: tuple[int, int] | None = None  # (this step from 1, steps)
    reason_lines: int | None = None  # room to keep for the reasons; None: as many lines as they need, six at most
    mixed_legend: bool = False  # whether the legend explains the corner of `mixed`


class _Sheet:
    """An RGB image with helpers that never write past a given width."""

    def __init__(self, width: int, height: int):
        self.image = Image.new("RGB", (width, height), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def text(self, x: float, y: float, text: str, font, fill=INK, width: float | None = None, align: float = 0.0) -> float:
        """Writes one line with its top at y and returns its width; `align` 0 starts at x, 0.5 is centred on x, 1 ends at x."""
        text = _fit(text, font, self.image.width if width is None else width)
        length = font.getlength(text)
        self.draw.text((round(x - align * length), round(y)), text, font=font, fill=fill)
        return length

    def number(self, x: float, y: float, text: str, font, fill) -> None:
        """Writes digits centred on (x, y) by their own height."""
        left, top, right, bottom = font.getbbox(text)
        self.draw.text((round(x - (left + right) / 2), round(y - (top + bottom) / 2)), text, font=font, fill=fill)

    def upright(self, x: int, y: float, text: str, font, fill, length: int) -> None:
        """Writes a line that reads upwards, its left edge at x, centred on y, at most `length` pixels long."""
        text = _fit(text, font, length)
        if not text:
            return
        strip = Image.new("L", (max(1, math.ceil(font.getlength(text))), _height(font)), 0)
        ImageDraw.Draw(strip).text((0, 0), text, font=font, fill=255)
        strip = strip.rotate(90, expand=True)
        self.image.paste(fill, (x, round(y - strip.height / 2)), strip)


def _check_size(size) -> tuple[int, int]:
    """The size in whole, even pixels."""
    if not isinstance(size, (tuple, list)) or len(size) != 2 or any(_number(edge) is None or edge != int(edge) for edge in size):
        raise TypeError(f"size must be two whole numbers (width, height) or None, got {size!r}")
    if any(not low <= edge <= high for edge, low, high in zip(size, MIN_SIZE, MAX_SIZE, strict=True)):
        raise ValueError(f"size must be {MIN_SIZE[0]}x{MIN_SIZE[1]} to {MAX_SIZE[0]}x{MAX_SIZE[1]} pixels, got {size[0]}x{size[1]}; None chooses one")
    return int(size[0]) + int(size[0]) % 2, int(size[1]) + int(size[1]) % 2


def _edges(cell: float, count: int) -> np.ndarray:
    """The pixel at which each cell begins, and the end of the last."""
    return np.rint(np.arange(count + 1) * cell).astype(np.int64)


def _hatch(height: int, width: int, stripe: int) -> np.ndarray:
    """(height, width, 3) diagonal stripes, the pattern of dense attention."""
    diagonal = np.arange(height)[:, None] + np.arange(width)
    return np.array(HATCH, dtype=np.uint8)[(diagonal // stripe) % 2]


def _map_image(page: _Page, cell: tuple[float, float], stripe: int) -> tuple[Image.Image, int]:
    """The cells as an image (every pixel takes its cell's colour, no loop over cells), and the gap after each cell in pixels."""
    rows, columns = page.density.shape
    colours = palette(page.density)
    colours[np.isnan(page.density)] = PANEL
    x_edges, y_edges = _edges(cell[0], columns), _edges(cell[1], rows)
    x, y = np.arange(max(x_edges[-1], 1)), np.arange(max(y_edges[-1], 1))
    column, row = np.searchsorted(x_edges[1:-1], x, side="right"), np.searchsorted(y_edges[1:-1], y, side="right")
    pixels = colours[row[:, None], column]
    hatched = page.dense[row[:, None], column]
    if page.mixed.any():  # the lower right corner of a cell
        corner = (y_edges[row + 1] - y)[:, None] + (x_edges[column + 1] - x) <= 0.7 * min(cell) + 1
        hatched = hatched | (page.mixed[row[:, None], column] & corner)
    pixels[hatched] = _hatch(len(y), len(x), stripe)[hatched]
    gap = 0 if min(cell) < 5 else 1 if min(cell) < 20 else 2
    if gap:
        pixels[y >= y_edges[row + 1] - gap] = PAPER
        pixels[:, x >= x_edges[column + 1] - gap] = PAPER
    return Image.fromarray(pixels), gap


def _ticks(count: int, first: int, cell: float, spacing: float) -> list[tuple[int, int]]:
    """(index, number) of the axis numbers: every 1st, 2nd, 5th, 10th, ... so that they stand at least `spacing` pixels apart."""
    stride = next(base * 10**power for power in range(12) for base in (1, 2, 5) if base * 10**power * cell >= spacing or base * 10**power >= count)
    ticks = [(index, index + first) for index in range(count) if (index + first) % stride == 0]
    if not ticks or ticks[0][0] * cell >= spacing:
        ticks.insert(0, (0, first))
    return ticks


def _picture(page: _Page, size) -> Image.Image:
    """Lays the page out and draws it; `image.info["plot_box"]` is the map's (left, top, right, bottom)."""
    rows, columns = page.density.shape
    if size is None:
        width, height, scale = _WIDTH, None, 1.0
    else:
        width, height = _check_size(size)
        scale = min(4.0, max(0.7, min(width / _WIDTH, height / 720)))

    def px(value: float) -> int:
        return round(value * scale)

    heading, big, body, small = (_font(max(10, px(points))) for points in (25, 19, 14, 13))
    margin = px(32)
    inner = width - 2 * margin
    details = _wrap(" \xb7 ".join(page.details), body, inner, 2 if height is None or height >= 600 else 1, " \xb7 ")
    number_width = max(small.getlength(str(max(rows - 1, 0))), small.getlength("00"))
    count_width = small.getlength(f"{sum(map(_count, page.reasons.values())):,}") + px(12)
    wanted = 6 if page.reason_lines is None else page.reason_lines
    reasons = _reason_lines(page.reasons, small, inner - count_width, wanted)

    # heights from the top down: header, legend, map with its axis, stats, reasons
    head = margin + _height(heading) + px(6) + len(details) * (_height(body) + px(4)) + px(12) + (px(12) if page.progress else 0)
    legend = px(16) + px(6) + _height(small) + px(18)
    axis = px(5) + _height(small) + px(4) + _height(body) + px(20)
    stats = px(14) + _height(big) + px(3) + _height(small)
    row_height = _height(small) + px(4)
    room = None if height is None else height - head - legend - axis - stats - margin

    def reasons_height(lines: int) -> int:
        return px(16) + _height(small) + px(6) + lines * row_height if lines else 0

    kept = len(reasons) if page.reason_lines is None else page.reason_lines
    if room is not None:
        while kept and room - reasons_height(kept) < px(170):
            kept = kept - 1 if kept > 2 else 0
        reasons = _reason_lines(page.reasons, small, inner - count_width, kept) if kept else []
        room -= reasons_height(kept)
    else:
        room = 220 if not rows or not columns else 780 if rows > 100 else rows * min(780 // rows, 64, max(26, 240 // rows))
        height = head + legend + room + axis + stats + reasons_height(kept) + margin
        height += height % 2

    sheet = _Sheet(width, height)
    y = margin
    sheet.text(margin, y, page.title, heading, width=inner)
    y += _height(heading) + px(6)
    for line in details:
        sheet.text(margin, y, line, body, FADED, inner)
        y += _height(body) + px(4)
    if page.progress:
        done, whole = page.progress
        y += px(8)
        sheet.draw.rectangle((margin, y, width - margin - 1, y + px(4) - 1), fill=PANEL)
        sheet.draw.rectangle((margin, y, margin + max(1, round(inner * min(done / max(whole, 1), 1.0))) - 1, y + px(4) - 1), fill=ACCENT)
    _draw_legend(sheet, page.mixed_legend, margin, head, inner, px, small)

    left = margin + (_height(body) + px(8) + math.ceil(number_width) + px(7) if rows and columns else 0)
    top, plot_width = head + legend, width - margin - left
    if rows and columns:
        cell = min(plot_width / columns, px(300)), min(room / rows, px(96))
        cells, gap = _map_image(page, cell, max(2, px(4)))
        box = (left, top, left + cells.width, top + cells.height)
        sheet.image.paste(cells, box[:2])
        _draw_axes(sheet, page, box, cell, gap, px, body, small)
        _draw_numbers(sheet, page, box, cell, gap, px)
    else:
        box = (left, top, width - margin, top + room)
        sheet.draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=PANEL)
    if page.notice:
        _draw_notice(sheet, page.notice, (left, top, width - margin, box[3]), px, body)

    y = top + room + axis
    sheet.draw.line((margin, y, width - margin - 1, y), fill=LINE)
    y += px(14)
    for font in (big, body, small):
        wide = [max(font.getlength(value), small.getlength(label)) for value, label in page.stats]
        space = max(px(14), min(px(90), (inner - sum(wide)) / max(len(wide) - 1, 1)))
        squeeze = min(1.0, (inner - space * (len(wide) - 1)) / sum(wide))
        if squeeze == 1.0:
            break
    x = margin
    for (value, label), length in zip(page.stats, wide, strict=True):
        sheet.text(x, y + _height(big) - _height(font), value, font, width=length * squeeze + 1)
        sheet.text(x, y + _height(big) + px(3), label, small, FADED, length * squeeze + 1)
        x += length * squeeze + space
    y += _height(big) + px(3) + _height(small) + px(16)
    if reasons:
        sheet.text(margin, y, "dense calls by reason", small, FADED, inner)
        y += _height(small) + px(6)
    count_width = max([small.getlength("00"), *(small.getlength(count) for count, _ in reasons)]) + px(12)
    for count, reason in reasons:
        sheet.text(margin + count_width - px(12), y, count, small, INK, align=1.0)
        sheet.text(margin + count_width, y, reason, small, INK, inner - count_width)
        y += row_height
    sheet.image.info["plot_box"] = box
    return sheet.image


def _draw_legend(sheet: _Sheet, mixed: bool, left: int, top: int, inner: int, px, font) -> None:
    """The colour bar with its numbers, then one swatch for every pattern."""
    swatches = [("dense", "dense"), *([("mixed", "partly dense")] if mixed else []), ("empty", "no call")]
    tall = px(16)
    text_top = top + (tall - _height(font)) / 2
    reserved = sum(px(22) + px(6) + font.getlength(label) + px(20) for _, label in swatches)
    x = left + sheet.text(left, text_top, LEGEND, font, INK, max(0.0, inner - reserved - px(100))) + px(12)
    bar = int(max(px(60), min(px(300), left + inner - x - reserved - px(12))))
    strip = np.broadcast_to(palette(np.linspace(0.0, 1.0, bar)), (tall, bar, 3))
    sheet.image.paste(Image.fromarray(np.ascontiguousarray(strip)), (round(x), top))
    for value in (0, 0.25, 0.5, 0.75, 1) if bar >= px(200) else (0, 0.5, 1):
        at = round(x + value * (bar - 1))
        sheet.draw.line((at, top + tall, at, top + tall + px(3)), fill=FADED)
        sheet.text(at, top + tall + px(6), f"{value:g}", font, FADED, align=0.5)
    x += bar + px(28)
    for kind, label in swatches:
        wide = px(22)
        swatch = np.empty((tall, wide, 3), dtype=np.uint8)
        swatch[:] = PANEL if kind == "empty" else palette(0.3)
        if kind == "dense":
            swatch[:] = _hatch(tall, wide, max(2, px(4)))
        elif kind == "mixed":
            corner = np.arange(tall, 0, -1)[:, None] + np.arange(wide, 0, -1) <= 0.8 * tall
            swatch[corner] = _hatch(tall, wide, max(2, px(4)))[corner]
        sheet.image.paste(Image.fromarray(swatch), (round(x), top))
        x += wide + px(6)
        x += sheet.text(x, text_top, label, font, INK, max(0.0, left + inner - x)) + px(20)


def _draw_axes(sheet: _Sheet, page: _Page, box, cell: tuple[float, float], gap: int, px, body, small) -> None:
    """Numbers and titles of both axes; the gap after each cell is not part of it."""
    rows, columns = page.density.shape
    left, top, right, bottom = box
    spacing = small.getlength(str(columns - 1 + page.x_first)) + px(10)
    for index, number in _ticks(columns, page.x_first, cell[0], spacing):
        sheet.text(left + (index + 0.5) * cell[0] - gap / 2, bottom + px(5), str(number), small, FADED, align=0.5)
    ascent = small.getbbox("0")
    for index, number in _ticks(rows, 0, cell[1], _height(small) + px(3)):
        middle = top + (index + 0.5) * cell[1] - gap / 2
        sheet.text(left - px(7), middle - (ascent[1] + ascent[3]) / 2, str(number), small, FADED, align=1.0)
    sheet.text((left + right - gap) / 2, bottom + px(5) + _height(small) + px(4), page.x_title, body, INK, right - left + px(40), align=0.5)
    sheet.upright(px(32), (top + bottom - gap) / 2, "layer", body, INK, max(bottom - top, 2 * px(24)))


def _draw_numbers(sheet: _Sheet, page: _Page, box, cell: tuple[float, float], gap: int, px) -> None:
    """The densities inside the cells, where cells are big enough to read them."""
    clear = (cell[0] - gap - px(8), 0.66 * (cell[1] - gap))
    font = next((font for font in (_font(size) for size in range(max(10, px(14)), max(10, px(8)) - 1, -1)) if _number_fits(font, clear)), None)
    if font is None:
        return
    light = (palette(page.density) / 255.0) ** 2.2 @ (0.2126, 0.7152, 0.0722) > 0.2  # dark ink has more contrast than white from here on
    for row, column in np.argwhere(~np.isnan(page.density)).tolist():
        x, y = box[0] + (column + 0.5) * cell[0] - gap / 2, box[1] + (row + 0.5) * cell[1] - gap / 2
        sheet.number(x, y, f"{page.density[row, column]:.2f}", font, INK if light[row, column] else WHITE)


def _number_fits(font, room: tuple[float, float]) -> bool:
    left, top, right, bottom = font.getbbox("0.00")
    return right - left <= room[0] and bottom - top <= room[1]


def _draw_notice(sheet: _Sheet, notice: str, box, px, font) -> None:
    """A sentence on a plate in the middle of the box."""
    text = _fit(notice, font, box[2] - box[0] - px(40))
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    wide, tall = font.getlength(text) / 2 + px(16), _height(font) / 2 + px(9)
    sheet.draw.rounded_rectangle((x - wide, y - tall, x + wide, y + tall), radius=px(6), fill=PAPER, outline=LINE)
    sheet.number(x, y, text, font, INK)


def _details(run: dict, *, title: bool) -> list[str]:
    """What the run was, in short parts for the line under the title; `title`: the model's name is in the title already."""
    parts = [] if title else [_plain(run.get("model") or "unknown model", 60)]
    parts += [f"{_count(run[key]):,} {key if _count(run[key]) > 1 else key[:-1]}" for key in ("tokens", "heads") if _count(run.get(key))]
    parts += [f"{key} {_plain(run[key], 60)}" for key in ("backend", "device", "run") if run.get(key) is not None]
    for name, value in _dict(run.get("settings")).items():
        if value == "":
            continue
        number = _number(value)
        shown = "on" if value is True else "off" if value is False else _plain(value, 60) if number is None else f"{number:g}"
        parts.append(f"{_plain(name, 60)} {shown}")
    return parts


def _stats(numbers: dict) -> list[tuple[str, str]]:
    get = numbers.get
    stats = [
        (_density_text(get("density")), "density"),
        (_calls_text(get("sparse_calls"), get("sparse_ms")), "sparse attention"),
        (_calls_text(get("dense_calls"), get("dense_ms")), "dense attention"),
    ]
    return [*stats, (_density_text(get("pv_skipped")), "PV skipped")] if _number(get("pv_skipped")) else stats


def heat_map(run: dict, size: tuple[int, int] | None = None) -> Image.Image:
    """Draws the whole run: steps on x, layers on y (layer 0 at the top), the density of each as a colour.

    Cells that ran dense are hatched grey, a hatched corner says that some of a cell's calls ran dense, pairs without a call are pale.
    Below the map stand the run's totals and the reasons of its dense calls, most frequent first.

    Parameters
    ----------
    run : dict
        One run's telemetry (see the module's text). Without cells the picture says so.
    size : tuple of int, optional
        (width, height) in pixels, 480x360 to 8192x8192, odd numbers rounded up to even. Default: 1280 wide, as high as the layers need.

    Returns
    -------
    PIL.Image.Image
        RGB; `image.info["plot_box"]` is (left, top, right, bottom) of the map in pixels, right and bottom excluded.

    Raises
    ------
    TypeError, ValueError
        For a size that is not two whole numbers in that range.
    """
    cells = _read(run)
    density = np.full((cells.layers, cells.steps), np.nan)
    dense, mixed = np.zeros((2, *density.shape), dtype=bool)
    for step, layer, cell in ((step, layer, cell) for step, row in cells.by_step.items() for layer, cell in row):
        value = _number(cell.get("density"))
        dense[layer, step] = _ran_dense(cell)
        density[layer, step] = np.nan if dense[layer, step] or value is None else min(max(value, 0.0), 1.0)
        mixed[layer, step] = not np.isnan(density[layer, step]) and _count(cell.get("dense_calls")) > 0
    totals = _dict(run.get("totals"))
    stats = _stats(totals)
    if _number(totals.get("seconds")) is not None:
        stats.append((f"{_number(totals['seconds']):,.1f} s", "run time"))
    if _number(totals.get("speedup")) is not None:
        stats.append((f"{_number(totals['speedup']):.2f}x", "measured speed-up"))
    page = _Page(
        density=density,
        dense=dense,
        mixed=mixed,
        title=f"{_plain(run.get('model') or 'unknown model', 120)} \xb7 attention density by step and layer",
        details=_details(run, title=True),
        x_title="step",
        x_first=1,
        stats=stats,
        reasons=_dict(run.get("reasons")),
        notice="" if cells.by_step else run.get("note") or NO_CALL,
        mixed_legend=cells.mixed,
    )
    return _picture(page, size)


def step_frame(run: dict, step: int, size: tuple[int, int] | None = None) -> Image.Image:
    """Draws one step: heads on x, layers on y (layer 0 at the top), the density of each head as a colour.

    All frames of one run have the same size, even in width and height, for video.

    Parameters
    ----------
    run : dict
        One run's telemetry (see the module's text).
    step : int
        From 0; the picture counts from 1. A run of no steps has one frame, 0, that says so.
    size : tuple of int, optional
        As for `heat_map`.

    Returns
    -------
    PIL.Image.Image
        RGB; `image.info["plot_box"]` as for `heat_map`.

    Raises
    ------
    TypeError, ValueError
        For a step that the run does not have, or a size as for `heat_map`.
    """
    return _step_picture(run, _read(run), step, size)


def _step_picture(run: dict, cells: _Cells, step: int, size) -> Image.Image:
    if isinstance(step, bool) or not isinstance(step, (int, np.integer)):
        raise TypeError(f"step must be a whole number, got {step!r}")
    if not 0 <= step < max(cells.steps, 1):
        raise ValueError(f"step must be 0..{max(cells.steps, 1) - 1}, got {step}")
    row = cells.by_step.get(step, [])
    density = np.full((cells.layers, cells.heads), np.nan)
    dense, mixed = np.zeros((2, *density.shape), dtype=bool)
    for layer, cell in row:
        if _ran_dense(cell):
            dense[layer] = True
            continue
        values = [_number(value) for value in _list(cell.get("head_density"))[:_MOST]]
        density[layer, : len(values)] = [np.nan if value is None else min(max(value, 0.0), 1.0) for value in values]
        mixed[layer] = ~np.isnan(density[layer]) & (_count(cell.get("dense_calls")) > 0)

    numbers = {key: sum(_number(cell.get(key)) or 0 for _, cell in row) for key in ("sparse_calls", "dense_calls", "sparse_ms", "dense_ms")}
    for key in ("density", "pv_skipped"):  # means over the sparse calls
        known = [(_number(cell.get(key)), _count(cell.get("sparse_calls"))) for _, cell in row]
        known = [(value, calls) for value, calls in known if value is not None and calls]
        numbers[key] = sum(value * calls for value, calls in known) / sum(calls for _, calls in known) if known else None
    reasons: dict[str, int] = {}
    for _, cell in row:
        for reason, count in _dict(cell.get("reasons")).items():
            reasons[reason] = reasons.get(reason, 0) + _count(count)
    sigmas = _list(run.get("sigmas"))
    sigma = _number(sigmas[step]) if step < len(sigmas) else None
    title = f"step {step + 1} of {cells.steps}" if cells.steps else "no step"
    page = _Page(
        density=density,
        dense=dense,
        mixed=mixed,
        title=title if sigma is None else f"{title} (sigma {sigma:.2f})",
        details=_details(run, title=False),
        x_title="head",
        x_first=0,
        stats=_stats(numbers),
        reasons=reasons,
        notice="" if row else f"{NO_CALL} in this step" if cells.by_step else run.get("note") or NO_CALL,
        progress=(step + 1, cells.steps) if cells.steps else (0, 1),
        reason_lines=3 if cells.reasons else 0,
        mixed_legend=cells.mixed,
    )
    return _picture(page, size)


def each_frame(run: dict, size: tuple[int, int] | None = None) -> Iterator[Image.Image]:
    """Draws `step_frame` of every step, one at a time.

    `write_mp4` then never holds them all (about 4 MB each at the default size); a GIF is collected before it is written.
    """
    cells = _read(run)
    return (_step_picture(run, cells, step, size) for step in range(max(cells.steps, 1)))


def frames(run: dict, size: tuple[int, int] | None = None) -> list[Image.Image]:
    """Draws `step_frame` of every step, in order, all of one size; a run of no steps gives the one frame that says so."""
    return list(each_frame(run, size))
