"""Images as arrays, and as GIF, WebP and MP4 files. numpy and Pillow; imageio inside the writers."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image


def to_array(image: Image.Image) -> np.ndarray:
    """The image as float32 (height, width, 3), RGB, 0..1: one element of a ComfyUI IMAGE batch."""
    return np.asarray(image.convert("RGB"), dtype=np.float32) / np.float32(255.0)


def _checked(images: Iterable[Image.Image], fps: float) -> Iterator[np.ndarray]:
    """The images as uint8 (height, width, 3) after a check of both arguments; the first image is drawn at once."""
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0.01 <= fps <= 60:
        raise ValueError(f"fps must be 0.01..60 frames a second, got {fps!r}")
    remaining = iter(images)
    first = next(remaining, None)
    if first is None:
        raise ValueError("images must hold at least one image, got none")

    def arrays() -> Iterator[np.ndarray]:
        for index, image in enumerate(chain([first], remaining)):
            if image.size != first.size:
                raise ValueError(f"images must have one size, got {image.size} for image {index} after {first.size}")
            yield np.asarray(image.convert("RGB"))

    return arrays()


@contextmanager
def _replacing(path, suffix: str) -> Iterator[Path]:
    """Yields a temporary name beside `path`; the file becomes `path` when the block ends well and is removed when it does not."""
    path = Path(path)
    temporary = path.with_name(f".{secrets.token_hex(8)}{suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_gif(images: Iterable[Image.Image], path: str | os.PathLike, fps: float = 2.0) -> None:
    """Writes the images as a GIF that loops for ever; the file appears whole or not at all.

    Parameters
    ----------
    images : iterable of PIL.Image.Image
        At least one, all of one size. Equal neighbours become one longer frame.
    path : path-like
        The file to make or replace; its folder must exist.
    fps : float
        Frames a second, 0.01..60 (GIF rounds a frame to 1/100 s).

    Raises
    ------
    ValueError
        For no image, images of several sizes, or fps out of range.
    """
    import imageio.v3 as iio

    arrays = _checked(images, fps)
    with _replacing(path, ".gif") as temporary, iio.imopen(temporary, "w", plugin="pillow") as file:
        for array in arrays:
            # Median cut, Pillow's default when it saves a GIF, gives the many greys of the letters too much and turns the legend's yellow
            # beige (128 of 255 off); maximum coverage is 10 off at most, and its 256 colours then pass through median cut unchanged.
            coloured = Image.fromarray(array).quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).convert("RGB")
            file.write(np.asarray(coloured), is_batch=False, duration=round(1000 / fps), loop=0)


def write_webp(images: Iterable[Image.Image], path: str | os.PathLike, fps: float = 2.0) -> None:
    """Writes the images as an animated WebP without loss that loops for ever; the file appears whole or not at all.

    Parameters
    ----------
    images : iterable of PIL.Image.Image
        At least one, all of one size. Equal neighbours become one longer frame.
    path : path-like
        The file to make or replace; its folder must exist.
    fps : float
        Frames a second, 0.01..60 (WebP rounds a frame to 1/1000 s).

    Raises
    ------
    ValueError
        For no image, images of several sizes, or fps out of range.
    """
    import imageio.v3 as iio

    arrays = _checked(images, fps)
    with _replacing(path, ".webp") as temporary, iio.imopen(temporary, "w", plugin="pillow") as file:
        for array in arrays:
            file.write(array, is_batch=False, duration=round(1000 / fps), loop=0, lossless=True, method=4, quality=80)


def write_mp4(images: Iterable[Image.Image], path: str | os.PathLike, fps: float = 2.0) -> None:
    """Writes the images as an MP4 (h264, yuv420p); the file appears whole or not at all.

    Parameters
    ----------
    images : iterable of PIL.Image.Image
        At least one, all of one size; an odd width or height gains one repeated row or column, because yuv420p needs even ones.
    path : path-like
        The file to make or replace; its folder must exist.
    fps : float
        Frames a second, 0.01..60.

    Raises
    ------
    ImportError
        Without the `av` package (ComfyUI has it).
    ValueError
        For no image, images of several sizes, or fps out of range.
    """
    import imageio.v3 as iio

    arrays = _checked(images, fps)
    with _replacing(path, ".mp4") as temporary, iio.imopen(temporary, "w", plugin="pyav") as file:
        file.init_video_stream("h264", fps=float(fps), pixel_format="yuv420p")
        for array in arrays:
            file.write_frame(np.pad(array, ((0, array.shape[0] % 2), (0, array.shape[1] % 2), (0, 0)), mode="edge"))
