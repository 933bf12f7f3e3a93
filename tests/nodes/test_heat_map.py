"""The pictures of a run: colours, patterns, bounds and sizes."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageFont

NODES = Path(__file__).resolve().parents[2] / "nodes"


@pytest.fixture(scope="module")
def draw(pack):
    """What `canvas` and `heat_map` have; `module` is the latter."""
    canvas, heat_map = (importlib.import_module(f"{pack.__name__}.nodes.pictures.{name}") for name in ("canvas", "heat_map"))
    return SimpleNamespace(**{**vars(canvas), **vars(heat_map)}, module=heat_map)


def make_run(steps: int, layers: int, heads: int, **changes) -> dict:
    """A run whose densities are all different; step 0 ran dense when there is more than one, and (step 1, layer 1) had no call."""
    cells = []
    for step in range(steps):
        for layer in range(layers):
            if (step, layer) == (1, 1):
                continue
            cell = {"step": step, "layer": layer, "sparse_calls": 2, "dense_calls": 0, "pv_skipped": 0.0, "sparse_ms": 4.25, "dense_ms": 0.0}
            if step == 0 and steps > 1:
                cell |= {"sparse_calls": 0, "dense_calls": 2, "density": None, "head_density": None, "sparse_ms": 0.0, "dense_ms": 9.5}
                cell["pv_skipped"] = None
                cell["reasons"] = {"outside the step window": 2}
            else:
                density = density_of(step, layer, steps, layers)
                cell |= {"density": density, "head_density": [head_density_of(density, head) for head in range(heads)], "reasons": {}}
            cells.append(cell)
    run = {
        "version": 1, "run": 12, "node": "5", "model": "WanModel", "family": "Wan", "backend": "torch", "device": "cpu",
        "steps": steps, "layers": layers, "heads": heads, "tokens": 8192, "settings": {"topk": 0.3, "pvthreshd": 15.0, "smooth_k": True},
        "sigmas": [1.0 - step / steps for step in range(steps + 1)] if steps else [], "cells": cells, "note": None,
        "reasons": {"cross-attention (keys are not the queries' own tokens)": 16, "outside the step window": 2 * layers},
        "totals": {
            "sparse_calls": 112, "dense_calls": 20, "density": 0.33, "pv_skipped": 0.1, "sparse_ms": 1234.5, "dense_ms": 222.0, "seconds": 5.6,
            "speedup": 2.1,
        },
    }  # fmt: skip
    return with_steps(json.loads(json.dumps(run | changes)))


def with_steps(run: dict) -> dict:
    """The run with the numbers of its steps, as they follow from its cells."""
    run["step_totals"], of_step = [], [[] for _ in range(run["steps"])]
    for cell in run["cells"]:
        of_step[cell["step"]].append(cell)
    for step, cells in enumerate(of_step):
        total = {name: sum(cell[name] for cell in cells) for name in ("sparse_calls", "dense_calls", "sparse_ms", "dense_ms")}
        for name in ("density", "pv_skipped"):
            whole = sum((cell[name] or 0) * cell["sparse_calls"] for cell in cells)
            total[name] = whole / total["sparse_calls"] if total["sparse_calls"] else None
        reasons = {reason: sum(cell["reasons"].get(reason, 0) for cell in cells) for cell in cells for reason in cell["reasons"]}
        run["step_totals"].append({"step": step, **total, "reasons": reasons})
    return run


def density_of(step: int, layer: int, steps: int, layers: int) -> float:
    return (step * layers + layer) / max(steps * layers - 1, 1)


def head_density_of(density: float, head: int) -> float:
    return (density + 0.13 * head) % 1.0


def long_run(steps: int = 4, layers: int = 30, heads: int = 12) -> dict:
    """Every string too long, one of them a single word, and more reasons than fit."""
    reasons = {("x" * 5000 if i == 1 else f"reason {i} " + "with many words " * 40): 100 - i for i in range(40)} | {"endless": 10**15}
    run = make_run(steps, layers, heads, model="M" * 3000, backend="b" * 999, reasons=reasons)
    run["settings"] = {f"setting_{i}\n\u00e9\u4e2d": "v" * 999 for i in range(50)}
    for cell in run["cells"]:
        cell["reasons"] = reasons
    with_steps(run)
    run["totals"] |= {"sparse_ms": 1e15, "dense_ms": 1e18, "sparse_calls": 10**15, "seconds": 1e12, "speedup": 1e9}
    return run


EMPTY = {
    "no steps": make_run(0, 0, 0, sigmas=[], model=None, settings={}, tokens=0, totals=dict.fromkeys(make_run(0, 0, 0)["totals"]) | {
        "sparse_calls": 0, "dense_calls": 0, "sparse_ms": 0.0, "dense_ms": 0.0}, reasons={}),
    "no cells": make_run(4, 30, 12, cells=[]),
}  # fmt: skip
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


def test_pictures_need_numpy_and_pillow_alone():
    code = f"""
import importlib, importlib.util, sys
spec = importlib.util.spec_from_file_location("alone", {str(NODES / "__init__.py")!r}, submodule_search_locations=[{str(NODES)!r}])
sys.modules["alone"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
importlib.import_module("alone.pictures.heat_map")
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
            found = np.array(probe(image, step, layer, steps, layers))  # in cells of one pixel a neighbour's, which differs by 1 of 255
            assert np.abs(found - expected).max() <= (1 if steps == 1000 else 0), (step, layer)


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
    heat_map, frame = draw.heat_map(run), draw.step_frame(run, shape[0] - 1)
    assert heat_map.width == 1280 and heat_map.height < 1450 and heat_map.height % 2 == 0 and frame.size == draw.FRAME_SIZE == (960, 720)
    for image in (heat_map, frame):
        assert image.mode == "RGB" and inside(draw, image)
        left, top, right, bottom = image.info["plot_box"]
        strip = image.info["strip_box"]
        assert 24 <= left < right <= image.width - 24 and strip[3] < top < bottom < image.height - 24
        assert left == strip[0] < strip[2] <= image.width - 24 and 24 < strip[1] < strip[3]
    assert heat_map.info["strip_box"][2] == heat_map.info["plot_box"][2]  # a bar stands over its column


def test_long_strings_and_large_numbers_stay_inside(draw):
    run = long_run()
    assert inside(draw, draw.heat_map(run))
    frames = [draw.step_frame(run, step) for step in range(4)]
    assert all(inside(draw, frame) for frame in frames) and len({frame.info["plot_box"] for frame in frames}) == 1


def test_a_long_run_is_drawn_in_bounded_time_and_size(draw):
    run, wide = make_run(4000, 60, 1), make_run(3, 60, 24)
    start = time.monotonic()
    image = draw.heat_map(run)
    draw.step_frame(run, 3999)
    draw.step_frame(wide, 2)
    assert time.monotonic() - start < 30 and image.size < (1281, 1450)


@pytest.mark.parametrize("steps", [4, 50])
def test_bars_of_the_strip(draw, steps):
    run = make_run(steps, 10, 3)
    for image in (draw.heat_map(run), draw.step_frame(run, 1)):
        left, top, right, bottom = image.info["strip_box"]
        cell, tall = (right - left) / steps, bottom - top
        assert has_hatch(draw, image, (left, top, round(left + cell), bottom))  # step 0 ran dense
        for step in (1, steps // 2, steps - 1):
            mean = run["step_totals"][step]["density"]
            x, height = round(left + (step + 0.4) * cell), round(mean * tall)
            assert image.getpixel((x, bottom - 1)) == image.getpixel((x, bottom - max(1, height - 1))) == tuple(draw.palette(mean).tolist())
            assert height > tall - 2 or image.getpixel((x, bottom - height - 2)) == draw.PANEL


def test_a_frame_marks_its_own_step(draw):
    run = make_run(20, 4, 3)
    for step in (0, 7, 19):
        image = draw.step_frame(run, step)
        left, _, right, bottom = image.info["strip_box"]
        below = np.asarray(image)[bottom : bottom + 8, left:right]
        marked = np.flatnonzero((below == draw.INK).all(axis=2).any(axis=0)) * 20 // (right - left)
        assert set(marked) == {step}


def test_reasons_are_ordered_wrapped_and_counted(draw):
    font = draw.font(13)
    reasons = {"few": 1, "most " + "words " * 100: 50, "some": 7, "w" * 5000: 20}
    lines = draw.reason_lines(reasons, font, 300, 6)
    assert [count for count, _ in lines if count] == ["50", "20", "7", "1"]  # two reasons of two lines, two of one
    assert len(lines) == 6 and all(font.getlength(text) <= 300 for _, text in lines)
    assert draw.reason_lines(reasons, font, 300, 3)[-1] == ("8", "+2 more reasons")
    assert draw.reason_lines(reasons, font, 300, 2)[-1] == ("28", "+3 more reasons")
    assert draw.reason_lines({}, font, 300, 6) == []


def test_reasons_change_the_picture(draw):
    run = make_run(4, 30, 12)
    other = make_run(4, 30, 12, reasons={"a reason of another kind": 16, "outside the step window": 60})
    assert draw.heat_map(run).tobytes() != draw.heat_map(other).tobytes()
    without = make_run(4, 30, 12)
    without["totals"]["speedup"] = None
    assert draw.heat_map(run).tobytes() != draw.heat_map(without).tobytes()


def test_statistics_under_the_picture(draw):
    """In the order of the table; calls with their milliseconds; nothing of what was not measured."""
    numbers = make_run(4, 30, 12)["totals"]
    assert draw.stats(numbers) == [
        ("0.33", "density"), ("0.10", "PV skipped"), ("112 calls, 1,234.5 ms", "sparse attention"), ("20 calls, 222.0 ms", "dense attention"),
        ("5.6 s", "run time"), ("2.10x", "measured speed-up"),
    ]  # fmt: skip
    nothing = {"density": None, "pv_skipped": None, "sparse_calls": 0, "sparse_ms": 0.0, "dense_calls": 1, "dense_ms": 0.0, "speedup": None}
    assert draw.stats(nothing) == [("-", "density"), ("0 calls", "sparse attention"), ("1 call", "dense attention")]


@pytest.mark.parametrize("text", ["", " ", "one", "a b c " * 200, "w" * 3000, "w" * 90 + " end", "a" * 30 + " " + "b" * 500])
@pytest.mark.parametrize("lines", [1, 2, 5])
def test_wrap_keeps_to_its_width_and_loses_only_the_end(draw, text, lines):
    font = draw.font(14)
    wrapped = draw.wrap(text, font, 200, lines)
    assert len(wrapped) <= lines and all(font.getlength(line) <= 200 for line in wrapped)
    joined = "".join(wrapped).replace(" ", "")
    assert text.replace(" ", "").startswith(joined.removesuffix("..."))
    assert joined.endswith("...") or joined == text.replace(" ", "")


@pytest.mark.parametrize("run", EMPTY.values(), ids=EMPTY.keys())
@pytest.mark.parametrize("note", [None, "a note of why " * 30])
def test_empty_run_says_so(draw, run, note, monkeypatch):
    run, written = run | {"note": note}, []
    notice = draw._draw_notice
    monkeypatch.setattr(draw.module, "_draw_notice", lambda sheet, text, *rest: (written.append(text), notice(sheet, text, *rest)))
    images = [draw.heat_map(run), *(draw.step_frame(run, step) for step in range(max(run["steps"], 1)))]
    assert written == [note or "no attention call was recorded"] * len(images)
    assert all(inside(draw, image) for image in images) and len({image.size for image in images[1:]}) == 1


def test_step_without_calls_says_so(draw, monkeypatch):
    run = make_run(4, 5, 3)
    run["cells"] = [cell for cell in run["cells"] if cell["step"] != 2]
    with_steps(run)
    written = []
    monkeypatch.setattr(draw.module, "_draw_notice", lambda sheet, text, *rest: written.append(text))
    for step in range(4):
        draw.step_frame(run, step)
    assert written == ["no attention call was recorded in this step"]


def test_missing_head_density_is_no_data(draw):
    run = make_run(3, 4, 2)
    for cell in run["cells"]:
        if cell["step"] == 2:
            cell |= {0: {"head_density": None}, 1: {"head_density": [1.0]}, 2: {"head_density": [0.0, 0.5]}}.get(cell["layer"], {})
    image = draw.step_frame(run, 2)
    top, bottom, middle = (tuple(draw.palette(value).tolist()) for value in (1.0, 0.0, 0.5))
    assert [corner(image, head, 0, 2, 4) for head in (0, 1)] == [draw.PANEL] * 2
    assert [corner(image, head, 1, 2, 4) for head in (0, 1)] == [top, draw.PANEL]
    assert [corner(image, head, 2, 2, 4) for head in (0, 1)] == [bottom, middle]


def test_frames_differ_and_have_one_layout(draw):
    run = make_run(5, 7, 3)
    images = [draw.step_frame(run, step) for step in range(5)]
    assert len({image.tobytes() for image in images}) == 5 and len({image.info["plot_box"] for image in images}) == 1


def test_the_run_is_not_changed(draw):
    run = make_run(3, 4, 2)
    before = json.dumps(run)
    draw.heat_map(run)
    draw.step_frame(run, 1)
    assert json.dumps(run) == before


@pytest.mark.parametrize("run", [make_run(4, 30, 12), long_run(), EMPTY["no steps"]], ids=["typical", "long", "empty"])
def test_bitmap_font_when_the_scalable_one_fails(draw, run, monkeypatch):
    def refuse(size=None):
        raise OSError("no FreeType")

    draw.font.cache_clear()
    monkeypatch.setattr(ImageFont, "load_default", refuse)
    try:
        assert inside(draw, draw.heat_map(run)) and inside(draw, draw.step_frame(run, 0))
    finally:
        draw.font.cache_clear()
