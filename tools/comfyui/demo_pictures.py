"""The pictures of the documents that come from `make demo`: `.venv/bin/python tools/comfyui/demo_pictures.py`, after it.

From the demo's videos: frames of the dense and the sparse one side by side, with their difference. The heat map is copied as it is.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import imageio.v3 as imageio
import install
import numpy as np
from PIL import Image, ImageDraw, ImageFont

FRAMES = (20, 50)  # of 61
WIDTH, HEIGHT, GAP, TITLE = 240, 185, 6, 24
AMPLIFIED = 4
INK, PAPER = (24, 28, 36), (255, 255, 255)
LARGEST = 300_000  # bytes


def side_by_side(dense: np.ndarray, sparse: np.ndarray, density: float) -> Image.Image:
    """A row an instant: dense, sparse, and how far they are apart. Frames are uint8 (N, H, W, 3)."""
    difference = (255 - AMPLIFIED * np.abs(dense.astype(np.int16) - sparse)).clip(0, 255).astype(np.uint8)
    columns = {"dense": dense, f"sparse, density {density:.2f}": sparse, f"difference, {AMPLIFIED} times (white: none)": difference}
    sheet = Image.new("RGB", (len(columns) * (WIDTH + GAP) - GAP, TITLE + len(FRAMES) * (HEIGHT + GAP) - GAP), PAPER)
    write = ImageDraw.Draw(sheet)
    for column, (title, frames) in enumerate(columns.items()):
        left = column * (WIDTH + GAP)
        write.text((left, 2), title, fill=INK, font=ImageFont.load_default(14))
        for row, frame in enumerate(FRAMES):
            picture = Image.fromarray(frames[frame]).resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
            sheet.paste(picture, (left, TITLE + row * (HEIGHT + GAP)))
    return sheet


def main(results: Path) -> int:
    docs = install.ROOT / "web" / "docs"
    dense, sparse = (imageio.imread(results / f"{name}.mp4") for name in ("dense", "sparse"))
    density = json.loads((results / "report.json").read_text(encoding="utf-8"))["sparse"]["totals"]["density"]
    side_by_side(dense, sparse, density).save(docs / "frames.png", optimize=True)
    shutil.copyfile(results / "heat_map.png", docs / "heat_map.png")
    too_large = [name for name in ("frames.png", "heat_map.png") if (docs / name).stat().st_size > LARGEST]
    if too_large:
        print(f"{', '.join(too_large)}: more than {LARGEST:,} bytes; make WIDTH and HEIGHT smaller", file=sys.stderr)
    return len(too_large)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else install.ROOT / "demo_output"))
