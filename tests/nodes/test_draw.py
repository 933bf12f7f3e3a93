"""The pictures of a run: colours, patterns, bounds, sizes and damaged data."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

SOURCE = Path(__file__).resolve().parents[2] / "nodes" / "draw.py"


@pytest.fixture(scope="module")
def draw():
    """The module under a name of its own: `nodes` is also the name of a ComfyUI module."""
    name = "sparge_draw_under_test"
    spec = importlib.util.spec_from_file_location(name, SOURCE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[name]


def make_run(steps: int, layers: int, heads: int, **changes) -> dict:
    """A run whose densities are all different; step 0 ran dense when there is more than one, and (step 1, layer 1) had no call."""
    cells = []
    for step in range(steps):
        for layer in range(layers):
            if (step, layer) == (1, 1):
                continue
            cell = {"step": step, "layer": layer, "sparse_calls": 2, "dense_calls": 0, "pv_skipped": 0.0, "sparse_ms": 4.25, "dense_ms": 0.0}
            if step == 0 and steps > 1:
                cell |= {"sparse_calls": 0, "dense_calls": 2, "density": None, "head_density": [], "sparse_ms": 0.0, "dense_ms": 9.5}
                cell["reasons"] = {"outside the step window": 2}
            else:
                density = density_of(step, layer, steps, layers)
                cell |= {"density": density, "head_density": [head_density_of(density, head) for head in range(heads)], "reasons": {}}
            cells.append(cell)
    run = {
        "version": 1, "run": 12, "node": "5", "model": "WanModel", "family": "Wan", "backend": "torch", "device": "cpu",
        "steps": steps, "layers": layers, "heads": heads, "tokens": 8192, "settings": {"topk": 0.3, "pvthreshd": 15.0, "smooth_k": True},
        "sigmas": [1.0 - step / steps for step in range(steps + 1)] if steps else [], "cells": cells,
        "reasons": {"cross-attention (keys are not the queries' own tokens)": 16, "outside the step window": 2 * layers},
        "totals": {
            "sparse_calls": 112, "dense_calls": 20, "density": 0.33, "pv_skipped": 0.1, "sparse_ms": 1234.5, "dense_ms": 222.0, "seconds": 5.6,
            "speedup": 2.1,
        },
    }  # fmt: skip
    return json.loads(json.dumps(run | changes))


def density_of(step: int, layer: int, steps: int, layers: int) -> float:
    return (step * layers + layer) / max(steps * layers - 1, 1)


def head_density_of(density: float, head: int) -> float:
    return (density + 0.13 * head) % 1.0


def long_run(steps: int = 4, layers: int = 30, heads: int = 12) -> dict:
    """Every string too long, one of them a single word, and more reasons than fit."""
    reasons = {("x" * 5000 if i == 1 else f"reason {i} " + "with many words " * 40): 100 - i for i in range(40)} | {"endless": 1e300}
    run = make_run(steps, layers, heads, model="M" * 3000, backend="b" * 999, reasons=reasons)
    run["settings"] = {f"setting_{i}\n\u00e9\u4e2d": "v" * 999 for i in range(50)}
    for cell in run["cells"]:
        cell["reasons"] = reasons
    run["totals"] |= {"sparse_ms": 1e15, "dense_ms": 1e300, "sparse_calls": 10**15, "seconds": 1e12, "speedup": 1e9}
    return run


EMPTY = {
    "nothing": {},
    "no steps": {"version": 1, "model": "WanModel", "steps": 0, "layers": 0, "heads": 0, "cells": [], "totals": {}, "reasons": {}, "sigmas": []},
    "no cells": make_run(4, 30, 12, cells=[]),
    "all None": {key: None for key in make_run(1, 1, 1)},
}
SHAPES = [(1, 1, 1), (4, 30, 12), (50, 60, 24), (1000, 200, 2)]


def inside(draw, image: Image.Image, border: int = 6) -> bool:
    """Whether nothing but paper is within `border` pixels of the picture's edge."""
    pixels = np.asarray(image)
    frame = np.ones(pixels.shape[:2], dtype=bool)
    frame[border:-border, border:-border] = False
    return bool((pixels[frame] == draw.PAPER).all())


def cell_box(image: Image.Image, column: int, row: int, columns: int, rows: int) -> tuple[int, int, int, int]:
    left, top, right, bottom = image.info["plot_box"]
    wide, tall = (right - left) / columns, (bottom - top) / rows
    return (round(left + column * wide), round(top + row * tall), round(left + (column + 1) * wide), round(top + (row + 1) * tall))


def centre(image: Image.Image, column: int, row: int, columns: int, rows: int) -> tuple[int, int, int]:
    left, top, right, bottom = cell_box(image, column, row, columns, rows)
    return image.getpixel(((left + right - 1) // 2, (top + bottom - 1) // 2))


def corner(image: Image.Image, column: int, row: int, columns: int, rows: int) -> tuple[int, int, int]:
    """A pixel in the upper left of the cell, where no number is written."""
    left, top, _, _ = cell_box(image, column, row, columns, rows)
    return image.getpixel((left + 2, top + 2))


def has_hatch(draw, image: Image.Image, box: tuple[int, int, int, int]) -> bool:
    colours = {colour for _, colour in image.crop(box).getcolors(maxcolors=1 << 16)}
    return set(draw.HATCH) <= colours and colours <= {*draw.HATCH, draw.PAPER}


def test_imports_nothing_of_the_pack():
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("alone", {str(SOURCE)!r})
sys.modules["alone"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(sorted(name for name in ("torch", "comfy", "nodes", "kernels", "imageio", "av", "matplotlib") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("index", "colour"),
    [(0, (68, 1, 84)), (38, (70, 52, 128)), (64, (59, 82, 139)), (100, (42, 118, 142)), (222, (168, 219, 52)), (255, (253, 231, 37))],
)
def test_palette_is_viridis(draw, index, colour):
    # matplotlib's own table, most of the places between two anchors; over the whole table the largest distance is 5 of 255
    assert np.abs(draw.palette(index / 255).astype(int) - colour).max() <= 3


def test_palette_gets_lighter_and_clips(draw):
    linear = (draw.palette(np.linspace(0, 1, 64)) / 255.0) ** 2.2 @ (0.2126, 0.7152, 0.0722)
    lightness = 116 * np.cbrt(linear) - 16
    assert (np.diff(lightness) > 0).all()
    assert np.diff(lightness).max() < 4 * np.diff(lightness).mean()  # no jump that would look like an edge
    assert (draw.palette([-3.0, 2.0, math.nan]) == draw.palette([0.0, 1.0, 0.0])).all()
    assert draw.palette(np.zeros((2, 3))).shape == (2, 3, 3) and draw.palette(0.5).dtype == np.uint8


def test_patterns_are_no_palette_colour(draw):
    colours = draw.palette(np.linspace(0, 1, 4001)).astype(int)
    for other in (*draw.HATCH, draw.PANEL, draw.PAPER):
        assert np.abs(colours - other).max(axis=1).min() >= 40, other


@pytest.mark.parametrize(("steps", "layers"), [(50, 60), (1000, 200), (7, 33)])
def test_heat_map_colour_at_every_centre(draw, steps, layers):
    image = draw.heat_map(make_run(steps, layers, 2))
    probe = corner if steps == 7 else centre  # numbers stand in the middle of large cells
    for step in {1, 2, steps // 2, steps - 1}:
        for layer in {0, 2, layers // 2, layers - 1}:
            expected = tuple(draw.palette(density_of(step, layer, steps, layers)).tolist())
            assert probe(image, step, layer, steps, layers) == expected, (step, layer)


def test_heat_map_dense_and_empty_cells(draw):
    image = draw.heat_map(make_run(4, 30, 12))
    for layer in (0, 1, 29):
        assert has_hatch(draw, image, cell_box(image, 0, layer, 4, 30))
    assert corner(image, 1, 1, 4, 30) == centre(image, 1, 1, 4, 30) == draw.PANEL


def test_numbers_are_written_in_large_cells_only(draw):
    large, small = draw.heat_map(make_run(4, 30, 2)), draw.heat_map(make_run(50, 60, 2))
    assert len(large.crop(cell_box(large, 2, 3, 4, 30)).getcolors()) > 4  # the colour, the gap, and the shades of digits
    assert len(small.crop(cell_box(small, 2, 3, 50, 60)).getcolors()) <= 2


def test_partly_dense_cell_has_a_hatched_corner(draw):
    run = make_run(4, 30, 12)
    next(cell for cell in run["cells"] if (cell["step"], cell["layer"]) == (2, 3))["dense_calls"] = 1
    image = draw.heat_map(run)
    left, top, right, bottom = cell_box(image, 2, 3, 4, 30)
    assert image.getpixel((right - 4, bottom - 4)) in draw.HATCH
    assert image.getpixel((left + 2, top + 2)) == tuple(draw.palette(density_of(2, 3, 4, 30)).tolist())
    assert not has_hatch(draw, image, cell_box(image, 2, 4, 4, 30))


def test_step_frame_colour_of_each_head(draw):
    run = make_run(4, 30, 12)
    image = draw.step_frame(run, 2)
    for layer in (0, 7, 29):
        for head in (0, 5, 11):
            expected = tuple(draw.palette(head_density_of(density_of(2, layer, 4, 30), head)).tolist())
            assert corner(image, head, layer, 12, 30) == expected, (layer, head)
    dense = draw.step_frame(run, 0)
    assert all(has_hatch(draw, dense, cell_box(dense, head, layer, 12, 30)) for head in (0, 11) for layer in (0, 29))
    assert corner(draw.step_frame(run, 1), 4, 1, 12, 30) == draw.PANEL


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_everything_is_inside_the_picture(draw, shape):
    run = make_run(*shape)
    for size in [None, (480, 360), (640, 1600), (2001, 701)][: 2 if shape[0] == 1000 else 4]:
        for image in (draw.heat_map(run, size), draw.step_frame(run, shape[0] - 1, size)):
            assert image.mode == "RGB" and image.width % 2 == 0 and image.height % 2 == 0
            if size is None:
                assert image.width == 1280 and image.height < 1400
            else:
                assert image.size == (size[0] + size[0] % 2, size[1] + size[1] % 2)
            assert inside(draw, image)
            left, top, right, bottom = image.info["plot_box"]
            assert 32 * 0.7 <= left < right <= image.width - 22 and 22 < top < bottom < image.height - 22


@pytest.mark.parametrize("size", [None, (480, 360), (1280, 720), (3840, 2160)], ids=str)
def test_long_strings_and_large_numbers_stay_inside(draw, size):
    run = long_run()
    assert inside(draw, draw.heat_map(run, size))
    sizes = {draw.step_frame(run, step, size).size for step in range(4)}
    assert len(sizes) == 1 and all(inside(draw, draw.step_frame(run, step, size)) for step in (0, 3))


def test_reasons_are_ordered_wrapped_and_counted(draw):
    font = draw._font(13)
    reasons = {"few": 1, "most " + "words " * 100: 50, "some": 7, "none": 0, "w" * 5000: 20}
    lines = draw._reason_lines(reasons, font, 300, 6)
    assert [count for count, _ in lines if count] == ["50", "20", "7", "1"]  # two reasons of two lines, two of one
    assert len(lines) == 6 and all(font.getlength(text) <= 300 for _, text in lines)
    assert draw._reason_lines(reasons, font, 300, 3)[-1] == ("8", "+2 more reasons")
    assert draw._reason_lines(reasons, font, 300, 2)[-1] == ("28", "+3 more reasons")
    assert draw._reason_lines(None, font, 300, 6) == draw._reason_lines({}, font, 300, 6) == []


def test_reasons_change_the_picture(draw):
    run = make_run(4, 30, 12)
    other = make_run(4, 30, 12, reasons={"a reason of another kind": 16, "outside the step window": 60})
    assert draw.heat_map(run).tobytes() != draw.heat_map(other).tobytes()
    without = make_run(4, 30, 12)
    without["totals"]["speedup"] = None
    assert draw.heat_map(run).tobytes() != draw.heat_map(without).tobytes()


@pytest.mark.parametrize("text", ["", " ", "one", "a b c " * 200, "w" * 3000, "w" * 90 + " end", "a" * 30 + " " + "b" * 500])
@pytest.mark.parametrize("lines", [1, 2, 5])
def test_wrap_keeps_to_its_width_and_loses_only_the_end(draw, text, lines):
    font = draw._font(14)
    wrapped = draw._wrap(text, font, 200, lines)
    assert len(wrapped) <= lines and all(font.getlength(line) <= 200 for line in wrapped)
    joined = "".join(wrapped).replace(" ", "")
    assert text.replace(" ", "").startswith(joined.removesuffix("..."))
    assert joined.endswith("...") or joined == text.replace(" ", "")


@pytest.mark.parametrize("run", EMPTY.values(), ids=EMPTY.keys())
@pytest.mark.parametrize("size", [None, (480, 360)], ids=str)
def test_empty_run_says_so(draw, run, size, monkeypatch):
    written = []
    notice = draw._draw_notice
    monkeypatch.setattr(draw, "_draw_notice", lambda sheet, text, *rest: (written.append(text), notice(sheet, text, *rest)))
    images = [draw.heat_map(run, size), *draw.frames(run, size)]
    assert len(images) == 1 + max(run.get("steps") or 0, 1)
    assert written == ["no attention call was recorded"] * len(images)
    assert all(inside(draw, image) for image in images) and len({image.size for image in images[1:]}) == 1


def test_step_without_calls_says_so(draw, monkeypatch):
    run = make_run(4, 5, 3)
    run["cells"] = [cell for cell in run["cells"] if cell["step"] != 2]
    written = []
    monkeypatch.setattr(draw, "_draw_notice", lambda sheet, text, *rest: written.append(text))
    draw.frames(run)
    assert written == ["no attention call was recorded in this step"]


@pytest.mark.parametrize("key", sorted(make_run(2, 2, 2)))
@pytest.mark.parametrize("value", [None, "text", -1, math.nan, math.inf, 1e12, True, [], {}, [None, "x", {}], {"a": None}], ids=repr)
def test_damaged_run_is_drawn(draw, key, value):
    if value == 1e12 and key in ("steps", "layers", "heads"):
        value = 3.0  # the limit of an axis has a test of its own
    run = make_run(2, 2, 2, sigmas=[1.0]) | {key: value}
    assert inside(draw, draw.heat_map(run)) and inside(draw, draw.step_frame(run, 0))


@pytest.mark.parametrize("key", sorted(make_run(1, 1, 1)["cells"][0]))
@pytest.mark.parametrize(
    "value", ["missing", None, "text", -1, math.nan, 10**400, 1.5, [], [None, math.nan, "x", 7.0, -2]], ids=lambda value: str(value)[:12]
)
def test_damaged_cell_is_drawn(draw, key, value):
    run = make_run(3, 3, 2)
    for cell in run["cells"]:
        cell[key] = value
        if value == "missing":
            del cell[key]
    assert inside(draw, draw.heat_map(run))
    images = draw.frames(run)
    assert len(images) == 3 and len({image.size for image in images}) == 1 and all(inside(draw, image) for image in images)


def test_axes_have_a_limit_and_grow_with_the_cells(draw):
    assert draw._read({"steps": 10**12, "layers": 5, "cells": [{"step": 10**9, "layer": 0}]}).steps == 4096
    read = draw._read({"steps": 1, "cells": [{"step": 6, "layer": 2, "head_density": [0.5] * 9}, {"step": 1.5, "layer": 0}, {"layer": 9}, None]})
    assert (read.steps, read.layers, read.heads) == (7, 3, 9)


def test_missing_head_density_is_no_data_and_densities_are_clipped(draw):
    run = make_run(3, 4, 2)
    for cell in run["cells"]:
        if cell["step"] == 2:
            cell |= {0: {"head_density": None}, 1: {"head_density": [None, 4.0]}, 2: {"head_density": [-1.0, 0.5]}}.get(cell["layer"], {})
    image = draw.step_frame(run, 2)
    top, bottom, middle = (tuple(draw.palette(value).tolist()) for value in (1.0, 0.0, 0.5))
    assert [corner(image, head, 0, 2, 4) for head in (0, 1)] == [draw.PANEL] * 2
    assert [corner(image, head, 1, 2, 4) for head in (0, 1)] == [draw.PANEL, top]
    assert [corner(image, head, 2, 2, 4) for head in (0, 1)] == [bottom, middle]


def test_frames_are_one_per_step_of_one_even_size(draw):
    run = make_run(5, 7, 3)
    images = draw.frames(run)
    assert len(images) == 5 and len({image.size for image in images}) == 1
    assert all(edge % 2 == 0 for edge in images[0].size)
    assert len({image.tobytes() for image in images}) == 5
    assert images[3].tobytes() == draw.step_frame(run, 3).tobytes()
    assert [image.tobytes() for image in draw.each_frame(run)] == [image.tobytes() for image in images]
    assert {image.size for image in draw.frames(run, (641, 481))} == {(642, 482)}


def test_the_run_is_not_changed(draw):
    run = make_run(3, 4, 2)
    before = json.dumps(run)
    draw.heat_map(run)
    draw.frames(run)
    assert json.dumps(run) == before


@pytest.mark.parametrize(
    ("size", "error", "words"),
    [
        ((479, 360), ValueError, "size must be 480x360 to 8192x8192 pixels, got 479x360"),
        ((480, 9000), ValueError, "got 480x9000"),
        ((800,), TypeError, "size must be two whole numbers"),
        (800, TypeError, "size must be two whole numbers"),
        ((800.5, 600), TypeError, "size must be two whole numbers"),
        (("800", 600), TypeError, "size must be two whole numbers"),
    ],
)
def test_bad_size(draw, size, error, words):
    with pytest.raises(error, match=words):
        draw.heat_map(make_run(2, 2, 2), size)


@pytest.mark.parametrize(
    ("step", "error", "words"),
    [(4, ValueError, r"step must be 0\.\.3, got 4"), (-1, ValueError, "got -1"), (1.0, TypeError, "whole number"), (True, TypeError, "got True")],
)
def test_bad_step(draw, step, error, words):
    with pytest.raises(error, match=words):
        draw.step_frame(make_run(4, 2, 2), step)


@pytest.mark.parametrize("run", [make_run(4, 30, 12), long_run(), EMPTY["nothing"]], ids=["typical", "long", "empty"])
def test_bitmap_font_when_the_scalable_one_fails(draw, run, monkeypatch):
    def refuse(size=None):
        raise OSError("no FreeType")

    draw._font.cache_clear()
    monkeypatch.setattr(ImageFont, "load_default", refuse)
    try:
        for size in (None, (480, 360)):
            assert inside(draw, draw.heat_map(run, size)) and inside(draw, draw.step_frame(run, 0, size))
    finally:
        draw._font.cache_clear()
