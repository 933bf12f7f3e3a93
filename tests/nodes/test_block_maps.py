"""The pictures of which blocks were kept: colours, frames, the pictures under them, and the sheet."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def modules(pack):
    return SimpleNamespace(
        **{
            name.rpartition(".")[2]: importlib.import_module(f"{pack.__name__}.nodes.{name}")
            for name in ("maps", "pictures.canvas", "pictures.block_maps")
        }
    )


def shares(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_block_map_has_a_pixel_a_cell(modules):
    values = shares(64, 50)
    picture = modules.block_maps.block_map(values)
    assert picture.size == (50, 64)  # queries down, keys across
    assert np.array_equal(np.asarray(picture), modules.canvas.palette(values / 255))


@pytest.mark.parametrize(
    ("count", "most", "chosen"), [(0, 5, []), (1, 5, [0]), (3, 5, [0, 1, 2]), (9, 5, [0, 2, 4, 6, 8]), (40, 3, [0, 20, 39]), (7, 1, [0])]
)
def test_spread(modules, count, most, chosen):
    assert modules.block_maps.spread(count, most) == chosen


def test_overlay_without_pictures_shows_the_regions(modules):
    values = shares(4, 5, 10)
    (picture,) = modules.block_maps.overlay(values, None, [2], 50)
    assert picture.size == (100, 50)
    assert np.array_equal(np.asarray(picture)[5::10, 5::10], modules.canvas.palette(values[2] / 255))


def test_overlay_shows_the_frame_that_belongs_to_it(modules):
    values = np.full((3, 4, 4), 128, dtype=np.uint8)
    pictures = np.linspace(0, 1, 9, dtype=np.float32)[:, None, None, None] * np.ones((1, 40, 60, 3), dtype=np.float32)
    drawn = modules.block_maps.overlay(values, pictures, [0, 1, 2], 40)
    colour = modules.canvas.palette(128 / 255)
    for picture, grey in zip(drawn, (0, 127, 255), strict=True):  # latent frames 0, 1, 2 of pictures 0, 4, 8
        assert picture.size == (60, 40)
        assert np.abs(np.asarray(picture) - (0.65 * colour + 0.35 * grey)).max() <= 2


@pytest.mark.parametrize("pictures", [None, np.zeros((17, 48, 80, 3), dtype=np.float32)], ids=["latent", "images"])
def test_maps_choose_frames_of_queries_and_keys(modules, pictures):
    found = modules.block_maps.layer_maps(3, 7, shares(64, 64), modules.maps.Frames(shares(9, 12, 20), shares(9, 12, 20)[::-1]), pictures)
    assert (found.step, found.layer, found.frames) == (3, 7, [1, 3, 5, 7, 9])
    assert len(found.queries) == len(found.keys) == 5 and found.queries[0].tobytes() != found.keys[0].tobytes()
    assert found.queries[0].tobytes() == found.keys[4].tobytes()
    alone = modules.block_maps.layer_maps(3, 7, shares(64, 64), None, pictures)
    assert alone.frames == alone.queries == alone.keys == []


@pytest.mark.parametrize("grid", [(1, 64, 64), (32, 64, 64), (5, 64, 8), (5, 1, 64), (2, 1, 1)], ids=str)
@pytest.mark.parametrize("size", [None, (90, 160), (160, 90), (8, 2000)], ids=str)
def test_sheet_keeps_everything_inside(modules, grid, size):
    pictures = None if size is None else np.ones((3, *size, 3), dtype=np.float32)
    layers = [
        modules.block_maps.layer_maps(0, layer, shares(7, 64), modules.maps.Frames(shares(*grid), shares(*grid)), pictures) for layer in range(3)
    ]
    picture = modules.block_maps.sheet("M" * 500, layers)
    assert picture.width == 1280 and picture.height < 1100
    pixels = np.asarray(picture)
    for edge in (pixels[:8], pixels[-8:], pixels[:, :8], pixels[:, -8:]):
        assert (edge == 255).all()


def test_sheet_shows_every_block_map(modules):
    maps = [modules.block_maps.layer_maps(0, layer, np.full((4, 4), 80 * layer, dtype=np.uint8), None) for layer in (1, 2, 3)]
    beside = modules.block_maps.sheet("model", maps)
    colours = {colour for count, colour in beside.getcolors(1 << 16) if count >= 256 * 256}
    assert {tuple(modules.canvas.palette(80 * layer / 255).tolist()) for layer in (1, 2, 3)} <= colours
    framed = modules.block_maps.sheet(
        "model", [modules.block_maps.layer_maps(0, 1, shares(4, 4), modules.maps.Frames(shares(2, 3, 3), shares(2, 3, 3)))] * 3
    )
    assert framed.height > 2 * beside.height  # a row for each layer


def test_sheet_of_nothing_says_so(modules):
    picture = modules.block_maps.sheet("model", [])
    assert isinstance(picture, Image.Image) and picture.tobytes() != modules.block_maps.sheet("", []).tobytes()
