"""Pictures of which blocks one layer kept in one step: the block map, and on the frames how much each region kept.

Pure functions over arrays; numpy and Pillow only. Shares are uint8, 0..255 for 0..1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from ..maps import Frames
from . import canvas
from .heat_map import WIDTH

MAX_LAYERS = 3  # of one run, from the first to the last
MAX_FRAMES = 5  # of one layer, from the first to the last
_BLOCKS = 256  # pixels of a block map's edges on a sheet: whole pixels for 64 rows
_FRAME_HEIGHT = 106  # two rows of frames with their labels are as tall as the block map
_FADED = 0.35  # how much of a picture is left under the colours of its overlay


@dataclass(frozen=True)
class LayerMaps:
    """One layer's pictures in one step. `queries` and `keys` have one picture for each of `frames` (numbers from 1), or none at all."""

    step: int
    layer: int
    blocks: Image.Image
    frames: list[int] = field(default_factory=list)
    queries: list[Image.Image] = field(default_factory=list)
    keys: list[Image.Image] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"step {self.step + 1}, layer {self.layer}: queries down, keys across"

    @property
    def rows(self) -> list[tuple[str, list[Image.Image]]]:
        """The rows of frames that there are, each under its label."""
        rows = [("what each region's queries kept", self.queries), ("how often each region's keys were kept", self.keys)]
        return [row for row in rows if row[1]]


def block_map(shares: np.ndarray) -> Image.Image:
    """The picture of a pooled map, one pixel a cell: `shares` is uint8 (rows, columns), queries down, keys across."""
    return Image.fromarray(canvas.palette(shares / 255))


def spread(count: int, most: int) -> list[int]:
    """At most `most` of 0..count - 1, evenly, the first and the last among them."""
    return sorted({round(i * (count - 1) / max(1, min(count, most) - 1)) for i in range(min(count, most))})


def overlay(shares: np.ndarray, images: np.ndarray | None, chosen: list[int], height: int) -> list[Image.Image]:
    """The `chosen` frames of `shares`, uint8 (T, h, w), coloured, each `height` pixels tall; the width follows from the images, or else the regions.

    images : any (N, H, W, 3) in 0..1, the decoded video; its frames, spread over the T of `shares`, show grey through the colours.
    """
    tall, wide = shares.shape[1:] if images is None else images.shape[1:3]
    size = (max(1, min(round(height * wide / tall), 4 * height)), height)
    result = []
    for frame in chosen:
        coloured = Image.fromarray(canvas.palette(shares[frame] / 255)).resize(size, Image.Resampling.NEAREST)
        if images is not None:
            at = round(frame * (len(images) - 1) / max(1, len(shares) - 1))
            grey = Image.fromarray(np.uint8(np.clip(images[at], 0, 1) * 255)).convert("L").resize(size).convert("RGB")
            coloured = Image.blend(coloured, grey, _FADED)
        result.append(coloured)
    return result


def layer_maps(step: int, layer: int, shares: np.ndarray, frames: Frames | None, images: np.ndarray | None = None) -> LayerMaps:
    """One layer's pictures: `shares` as in `block_map`, `images` as in `overlay`."""
    if frames is None:
        return LayerMaps(step, layer, block_map(shares))
    chosen = spread(len(frames.queries), MAX_FRAMES)
    drawn = [overlay(of, images, chosen, _FRAME_HEIGHT) for of in frames]
    return LayerMaps(step, layer, block_map(shares), [frame + 1 for frame in chosen], *drawn)


def sheet(title: str, shown: list[LayerMaps]) -> Image.Image:
    """One picture, 1280 pixels wide: every layer's block map and, beside it, its frames, above coloured by queries, below by keys.

    Where no layer has frames, the block maps stand side by side.
    """
    style = canvas.Style()
    heading, small = style.heading, style.small
    margin, line = 32, canvas.line_height(small) + 7
    top = margin + canvas.line_height(heading) + 18
    below = top + 16 + line + 24
    row = line + _BLOCKS + 28
    in_rows = any(layer.frames for layer in shown)
    page = canvas.Sheet(WIDTH, below + row * (len(shown) if in_rows else 1), style)
    page.text((margin, margin), canvas.plain(title), heading, width=WIDTH - 2 * margin)
    canvas.draw_legend(page, margin, top, WIDTH - 2 * margin, ())
    for index, layer in enumerate(shown):
        x, y = (margin, below + index * row) if in_rows else (margin + index * (_BLOCKS + 40), below)
        page.text((x, y), layer.title, small)
        page.image.paste(layer.blocks.resize((_BLOCKS, _BLOCKS), Image.Resampling.NEAREST), (x, y + line))
        for label, pictures in layer.rows:
            y = _frames_row(page, label, layer.frames, pictures, (margin + _BLOCKS + 28, y))
    if not shown:
        page.text((margin, below), "no block map was kept", small, canvas.FADED)
    return page.image


def _frames_row(page: canvas.Sheet, label: str, numbers: list[int], pictures: list[Image.Image], at: tuple[int, int]) -> int:
    """Writes a label and, under it, the frames with their numbers; returns where the next row begins."""
    face = page.style.small
    (left, y), gap, line = at, 12, canvas.line_height(face) + 7
    page.text((left, y), label, face)
    room = (WIDTH - 32 - left - gap * (len(pictures) - 1)) // len(pictures)
    for index, (number, picture) in enumerate(zip(numbers, pictures, strict=True)):
        if picture.width > room:
            picture = picture.resize((room, max(1, picture.height * room // picture.width)))
        x = left + index * (min(room, picture.width) + gap)
        page.image.paste(picture, (x, y + line))
        page.text((x, y + line + picture.height + 3), f"frame {number}", face, canvas.FADED)
    return y + line + _FRAME_HEIGHT + line
