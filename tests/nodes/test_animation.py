"""Images as arrays and as animation files, read back."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import av
import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def animation(pack):
    return importlib.import_module(pack.__name__ + ".nodes.pictures.animation")


@pytest.fixture(scope="module")
def pictures(pack):
    """A number of report frames of 640 x 480."""
    draw = importlib.import_module(pack.__name__ + ".nodes.pictures.heat_map")

    def make(steps: int) -> list:
        cells = [
            dict(step=s, layer=i, sparse_calls=1, dense_calls=0, density=d, head_density=[d, d / 2, 1 - d], pv_skipped=0.0, sparse_ms=1.0,
                 dense_ms=0.0, reasons={})
            for s in range(steps) for i in range(7) for d in [((s * 7 + i) % 35) / 35]
        ]  # fmt: skip
        run = {"steps": steps, "layers": 7, "heads": 3, "tokens": 4096, "cells": cells, "sigmas": [], "note": None, "totals": {}, "reasons": {},
               "step_totals": [dict(cells[7 * s], step=s) for s in range(steps)]}  # fmt: skip
        return [draw.step_frame(run, step).resize((640, 480)) for step in range(steps)]

    return make


def test_to_array(animation, pictures):
    image = Image.new("RGB", (3, 2), (255, 0, 51))
    array = animation.to_array(image)
    assert array.shape == (2, 3, 3) and array.dtype == np.float32
    np.testing.assert_allclose(array[1, 2], [1.0, 0.0, 0.2], rtol=0, atol=1e-7)
    assert animation.to_array(Image.new("L", (3, 2), 255)).shape == (2, 3, 3)
    picture = pictures(1)[0]
    assert (np.rint(animation.to_array(picture) * 255).astype(np.uint8) == np.asarray(picture)).all()


def test_gif_read_back(animation, pictures, tmp_path):
    images = pictures(5)
    colours = len(images[1].getcolors(maxcolors=1 << 20))
    assert colours > 512  # more than a GIF frame holds
    animation.write(images, tmp_path / "run.gif")
    read = iio.imread(tmp_path / "run.gif", index=None, plugin="pillow", mode="RGB")
    assert read.shape == (5, 480, 640, 3)
    for frame, image in zip(read, images, strict=True):
        assert np.abs(frame.astype(int) - np.asarray(image)).max() <= 24  # in the legend too: median cut is 100 and more off in its yellow
    with Image.open(tmp_path / "run.gif") as file:
        assert file.info["loop"] == 0 and file.info["duration"] == 500 and file.n_frames == 5
    assert os.listdir(tmp_path) == ["run.gif"]


def test_webp_read_back(animation, pictures, tmp_path):
    images = pictures(5)
    animation.write(images, tmp_path / "run.webp")
    with Image.open(tmp_path / "run.webp") as file:
        assert file.format == "WEBP" and file.n_frames == 5 and file.info["loop"] == 0
        for index, image in enumerate(images):
            file.seek(index)
            assert np.array_equal(np.asarray(file.convert("RGB")), np.asarray(image)), "a frame is not as it was drawn"
            assert file.info["duration"] == 500
    assert os.listdir(tmp_path) == ["run.webp"]


@pytest.mark.parametrize("size", [(640, 480), (641, 481)], ids=str)
def test_mp4_read_back(animation, pictures, tmp_path, size):
    images = [image.resize(size) for image in pictures(5)]
    animation.write(images, str(tmp_path / "run.mp4"))
    with av.open(str(tmp_path / "run.mp4")) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt, float(stream.average_rate)) == ("h264", "yuv420p", 2.0)
        read = [frame.to_ndarray(format="rgb24") for frame in file.decode(stream)]
    even = (size[1] + size[1] % 2, size[0] + size[0] % 2, 3)
    assert len(read) == 5 and all(frame.shape == even for frame in read)
    for frame, image in zip(read, images, strict=True):
        assert np.abs(frame[: size[1], : size[0]].astype(int) - np.asarray(image)).mean() < 6
    assert os.listdir(tmp_path) == ["run.mp4"]


@pytest.mark.parametrize("kind", ["gif", "webp", "mp4"])
def test_failed_write_leaves_the_folder_as_it_was(animation, tmp_path, kind, monkeypatch):
    write, path = animation.write, tmp_path / f"run.{kind}"
    path.write_bytes(b"older")
    images = [Image.new("RGB", (64, 48), (i, 0, 0)) for i in range(3)]

    def check(error, words, values):
        with pytest.raises(error, match=words):
            write(values, path)
        assert os.listdir(tmp_path) == [path.name] and path.read_bytes() == b"older"

    check(ValueError, r"images must be at least one, and all of one size, got 0 of \[\]", [])
    check(ValueError, r"got 3 of \[\(32, 48\), \(64, 48\)\]", [*images[:2], Image.new("RGB", (32, 48))])
    closed = Image.new("RGB", (64, 48))
    closed.close()
    check(ValueError, "closed image", [*images, closed])  # after three frames were written
    with pytest.raises(FileNotFoundError):
        write(images, tmp_path / "no folder" / path.name)

    def refuse(source, target):
        assert Path(source).parent == tmp_path and Path(source).stat().st_size > 0  # written whole, beside the target
        raise OSError("disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        check(OSError, "disk is gone", images)
    write(images, path)
    assert os.listdir(tmp_path) == [path.name] and path.read_bytes() != b"older"
