"""What every picture is drawn with: colours, letters that never leave their room, hatching, the legend and the numbers of an axis.

Standard library, numpy and Pillow only.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Every 15th of the 256 colours of viridis (S. van der Walt, N. Smith, E. Firing, CC0): matplotlib, lib/matplotlib/_cm_listed.py.
_VIRIDIS = "440154 481769 472a7a 433d84 3d4e8a 355e8d 2e6d8e 297b8e 23898e 1f978b 21a585 2eb37c 46c06f 65cb5e 89d548 b0dd2f d8e219 fde725"
_ANCHORS = np.array([tuple(bytes.fromhex(colour)) for colour in _VIRIDIS.split()], dtype=np.float64)

PAPER, PANEL, LINE = (255, 255, 255), (234, 237, 241), (214, 218, 224)  # background; a cell without a call; rules
INK, FADED = (24, 28, 36), (98, 106, 120)  # text; secondary text
HATCH = ((220, 223, 228), (164, 170, 180))  # the two greys of what ran dense

LEGEND = "density (kept / visible blocks)"


def palette(density) -> np.ndarray:
    """The colours (..., 3), uint8 RGB, of densities of any shape, clipped to 0..1; a NaN gives the colour of 0.

    Viridis: perceptually uniform, and safe for the common kinds of colour blindness.
    """
    position = np.clip(np.nan_to_num(np.asarray(density, dtype=np.float64)), 0.0, 1.0) * (len(_ANCHORS) - 1)
    index = np.minimum(position.astype(np.int64), len(_ANCHORS) - 2)
    part = (position - index)[..., None]
    return np.rint(_ANCHORS[index] * (1.0 - part) + _ANCHORS[index + 1] * part).astype(np.uint8)


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
    lines: list[str] = []
    words = text.split(separator)
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


class Style:
    """The sizes of one kind of picture, as parts of those of a heat map, and its faces."""

    def __init__(self, scale: float = 1.0):
        self.scale = scale
        self.heading, self.big, self.body, self.small = (font(max(10, self.px(points))) for points in (25, 19, 14, 13))

    def px(self, value: float) -> int:
        return round(value * self.scale)


class Sheet:
    """An RGB image with helpers that never write past a given width."""

    def __init__(self, width: int, height: int, style: Style):
        self.image = Image.new("RGB", (width, height), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.style = style

    def text(self, at: tuple[float, float], text: str, face, fill=INK, width: float | None = None, align: float = 0.0) -> float:
        """Writes one line with its top at y of `at` = (x, y); returns its width. `align` 0 starts at x, 0.5 is centred on x, 1 ends at x."""
        text = fit(text, face, self.image.width if width is None else width)
        length = face.getlength(text)
        self.draw.text((round(at[0] - align * length), round(at[1])), text, font=face, fill=fill)
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


def draw_legend(sheet: Sheet, left: int, top: int, inner: int, swatches: tuple[str, ...]) -> None:
    """The colour bar with its numbers, then `swatches` of "dense", "partly dense" and "no call", all `inner` pixels wide at most."""
    px, face = sheet.style.px, sheet.style.small
    tall, wide = px(16), px(22)
    text_top = top + (tall - line_height(face)) / 2
    x = left + sheet.text((left, text_top), LEGEND, face) + px(12)
    bar = px(300)
    strip = np.broadcast_to(palette(np.linspace(0.0, 1.0, bar)), (tall, bar, 3))
    sheet.image.paste(Image.fromarray(np.ascontiguousarray(strip)), (round(x), top))
    for value in (0, 0.25, 0.5, 0.75, 1):
        at = round(x + value * (bar - 1))
        sheet.draw.line((at, top + tall, at, top + tall + px(3)), fill=FADED)
        sheet.text((at, top + tall + px(6)), f"{value:g}", face, FADED, align=0.5)
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
        x += sheet.text((x, text_top), label, face, INK, max(0.0, left + inner - x)) + px(20)


def ticks(count: int, first: int, cell: float, spacing: float) -> list[tuple[int, int]]:
    """(index, number) of the axis numbers: every 1st, 2nd, 5th, 10th, ... so that they stand at least `spacing` pixels apart."""
    stride = next(base * 10**power for power in range(12) for base in (1, 2, 5) if base * 10**power * cell >= spacing or base * 10**power >= count)
    ticks = [(index, index + first) for index in range(count) if (index + first) % stride == 0]
    if not ticks or ticks[0][0] * cell >= spacing:
        ticks.insert(0, (0, first))
    return ticks
