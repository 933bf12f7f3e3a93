"""Pictures of which blocks one layer kept in one step: the block map, and on the frames how much each region kept.

Pure functions over arrays; numpy and Pillow only. Shares travel as uint8, 0..255 for 0..1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from . import draw

MAX_LAYERS = 3  # of one run, from the first to the last
MAX_FRAMES = 5  # of one layer, from the first to the last
_BLOCKS = 256  # pixels of a block map's edges on a sheet: whole pixels for 64 rows
_FRAME_HEIGHT = 106  # two rows of frames with their labels are as tall as the block map
_FADED = 0.35  # how much of a picture is left under the colours of its overlay


@dataclass(frozen=True)
class Maps:
    """One layer's pictures in one step. `queries` and `keys` have one picture for each of `frames` (numbers from 1), or none at all."""

    step: int
    layer: int
    blocks: Image.Image
    frames: list[int] = field(default_factory=list)
    queries: list[Image.Image] = field(default_factory=list)
    keys: list[Image.Image] = field(default_factory=list)


def block_map(shares: np.ndarray) -> Image.Image:
    """The picture of a block map, one pixel a cell: `shares` is uint8 (rows, columns), queries down, keys across."""
    return Image.fromarray(draw.palette(shares / 255))


def spread(count: int, most: int) -> list[int]:
    """At most `most` of 0..count - 1, evenly, the first and the last among them."""
    return sorted({round(i * (count - 1) / max(1, min(count, most) - 1)) for i in range(min(count, most))})


def overlay(shares: np.ndarray, pictures: np.ndarray | None, chosen: list[int], height: int) -> list[Image.Image]:
    """The chosen frames coloured by their shares, each `height` pixels tall.

    Parameters
    ----------
    shares : np.ndarray
        uint8 (T, h, w): what each region of each frame kept.
    pictures : np.ndarray, optional
        Any (N, H, W, 3) in 0..1, the decoded video; its frames, spread over the T of `shares`, show grey through the colours.
    chosen : list of int
        Frames of `shares` to draw.
    height : int
        Of the result in pixels; its width follows from the pictures, or from the regions where there is none.
    """
    tall, wide = shares.shape[1:] if pictures is None else pictures.shape[1:3]
    size = (max(1, min(round(height * wide / tall), 4 * height)), height)
    result = []
    for frame in chosen:
        coloured = Image.fromarray(draw.palette(shares[frame] / 255)).resize(size, Image.Resampling.NEAREST)
        if pictures is not None:
            at = round(frame * (len(pictures) - 1) / max(1, len(shares) - 1))
            grey = Image.fromarray(np.uint8(np.clip(pictures[at], 0, 1) * 255)).convert("L").resize(size).convert("RGB")
            coloured = Image.blend(coloured, grey, _FADED)
        result.append(coloured)
    return result


def maps(step: int, layer: int, shares: np.ndarray, frames: tuple[np.ndarray, np.ndarray] | None, pictures: np.ndarray | None = None) -> Maps:
    """One layer's pictures: `shares` as in `block_map`; `frames` the (T, h, w) shares of queries and of keys, where the layout is known."""
    if frames is None:
        return Maps(step, layer, block_map(shares))
    queries, keys = frames
    chosen = spread(len(queries), MAX_FRAMES)
    drawn = [overlay(of, pictures, chosen, _FRAME_HEIGHT) for of in (queries, keys)]
    return Maps(step, layer, block_map(shares), [frame + 1 for frame in chosen], *drawn)


def sheet(title: str, shown: list[Maps]) -> Image.Image:
    """One picture, 1280 pixels wide: every layer's block map and, beside it, its frames, above coloured by queries, below by keys.

    Where no layer has frames, the block maps stand side by side.
    """
    heading, small = draw.font(25), draw.font(13)
    margin, line = 32, draw.line_height(small) + 7
    top = margin + draw.line_height(heading) + 18
    below = top + 16 + line + 24
    row = line + _BLOCKS + 28
    in_rows = any(layer.frames for layer in shown)
    page = draw.Sheet(draw.WIDTH, below + row * (len(shown) if in_rows else 1))
    page.text(margin, margin, draw.plain(title), heading, width=draw.WIDTH - 2 * margin)
    draw.draw_legend(page, margin, top, draw.WIDTH - 2 * margin, round, small, ())
    for index, layer in enumerate(shown):
        x, y = (margin, below + index * row) if in_rows else (margin + index * (_BLOCKS + 40), below)
        page.text(x, y, f"step {layer.step + 1}, layer {layer.layer}: queries down, keys across", small)
        page.image.paste(layer.blocks.resize((_BLOCKS, _BLOCKS), Image.Resampling.NEAREST), (x, y + line))
        for label, pictures in (("what each region's queries kept", layer.queries), ("how often each region's keys were kept", layer.keys)):
            y = _frames_row(page, label, layer.frames, pictures, (margin + _BLOCKS + 28, y), small)
    if not shown:
        page.text(margin, below, "no block map was kept", small, draw.FADED)
    return page.image


def _frames_row(page: draw.Sheet, label: str, numbers: list[int], pictures: list[Image.Image], at: tuple[int, int], face) -> int:
    """Writes a label and, under it, the frames with their numbers; returns where the next row begins."""
    (left, y), gap, line = at, 12, draw.line_height(face) + 7
    if pictures:
        page.text(left, y, label, face)
        room = (draw.WIDTH - 32 - left - gap * (len(pictures) - 1)) // len(pictures)
    for index, (number, picture) in enumerate(zip(numbers, pictures, strict=True) if pictures else ()):
        if picture.width > room:
            picture = picture.resize((room, max(1, picture.height * room // picture.width)))
        x = left + index * (min(room, picture.width) + gap)
        page.image.paste(picture, (x, y + line))
        page.text(x, y + line + picture.height + 3, f"frame {number}", face, draw.FADED)
    return y + line + _FRAME_HEIGHT + line
