"""Images as arrays, and as GIF, WebP and MP4 files. numpy and Pillow; imageio inside the writers."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import numpy as np
from PIL import Image

FPS = 2


def to_array(image: Image.Image) -> np.ndarray:
    """The image as float32 (height, width, 3), RGB, 0..1: one element of a ComfyUI IMAGE batch."""
    return np.asarray(image.convert("RGB"), dtype=np.float32) / np.float32(255.0)


def write(images: list[Image.Image], path: str | os.PathLike) -> None:
    """Writes RGB images, at least one and all of one size, as an animation, which the suffix of `path` names; the file appears whole or not at all.

    .gif and .webp (without loss) loop for ever and make equal neighbours one longer frame. .mp4 is h264 in yuv420p, which needs even sizes: an odd
    width or height gains one repeated row or column.

    Raises ValueError for no image or images of several sizes, ImportError for an MP4 without the `av` package (ComfyUI has it).
    """
    if len(sizes := {image.size for image in images}) != 1:
        raise ValueError(f"images must be at least one, and all of one size, got {len(images)} of {sorted(sizes)}")
    path = Path(path)
    temporary = path.with_name(f".{secrets.token_hex(8)}{path.suffix}")
    try:
        {".gif": _write_loop, ".webp": _write_loop, ".mp4": _write_mp4}[path.suffix](images, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_loop(images: list[Image.Image], path: Path) -> None:
    import imageio.v3 as iio

    how = {} if path.suffix == ".gif" else {"lossless": True, "method": 4, "quality": 80}
    with iio.imopen(path, "w", plugin="pillow") as file:
        for image in images:
            if path.suffix == ".gif":
                # Median cut, Pillow's default when it saves a GIF, gives the many greys of the letters too much and turns the legend's yellow
                # beige (128 of 255 off); maximum coverage is 10 off at most, and its 256 colours then pass through median cut unchanged.
                image = image.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).convert("RGB")
            # imageio's stubs know the base class alone, not the writer that `plugin` names.
            file.write(np.asarray(image), is_batch=False, duration=1000 // FPS, loop=0, **how)  # type: ignore[call-arg]


def _write_mp4(images: list[Image.Image], path: Path) -> None:
    import imageio.v3 as iio

    with iio.imopen(path, "w", plugin="pyav") as file:
        file.init_video_stream("h264", fps=float(FPS), pixel_format="yuv420p")
        for image in images:
            file.write_frame(np.pad(np.asarray(image), ((0, image.height % 2), (0, image.width % 2), (0, 0)), mode="edge"))
