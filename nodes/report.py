"""The node SpargeReport: what was kept, as pictures, an animation, numbers and a page, after the sampler."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch

from . import _comfy, export, maps, telemetry
from ._comfy import io, ui
from .patch import patches_of
from .pictures import animation, block_maps, canvas, heat_map
from .recorder import Run

MAX_FRAMES = 100  # of all runs shown; longer runs show every second, third, ... step
MAX_IMAGE = 512  # pixels of the longer edge of the images that lie under the maps
NO_RUN = "no run since the last report"


class SpargeReport(io.ComfyNode):
    """Shows every run since its last report as heat maps, one picture a step, an animation, numbers and a page."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [io.Model.Input("model"), io.MultiType.Input("data", types=[io.Latent, io.Image])]
        outputs = [
            io.AnyType.Output("data_out"),
            io.Image.Output("heat_map"),
            io.Image.Output("frames"),
            io.String.Output("json"),
            io.Image.Output("maps"),
        ]
        return _comfy.schema("SpargeReport", inputs, outputs, is_output_node=True)

    @classmethod
    def fingerprint_inputs(cls, **_) -> int:
        return telemetry.runs.latest

    @classmethod
    def execute(cls, model, data) -> io.NodeOutput:
        _comfy.check_model(model)
        node = str(cls.hidden.unique_id) if cls.hidden is not None else "script"
        last = telemetry.runs.last_shown(node)
        found = telemetry.runs.for_report(node, [patch.key for patch in patches_of(model)])
        is_new = bool(found) and found[-1].number > last
        shown = [run.to_dict() for run in found] or [empty_run()]
        if not is_new:  # the sampler was cached, or ran without Sparge Attention: the same numbers again, and no second set of files
            shown = [{**run, "note": "; ".join(filter(None, (run["note"], NO_RUN)))} if found else run for run in shown]
        heat_maps = [heat_map.heat_map(run) for run in shown]
        frames = [frame for run in shown for frame in step_frames(run, max(1, MAX_FRAMES // len(shown)))]
        layers = [layer_maps(run, images_of(data)) for run in found] or [[]]
        titles = [f"{run.get('model') or 'no run'} \xb7 blocks kept, run {run['run']}" for run in shown]
        sheets = [block_maps.sheet(title, of) for title, of in zip(titles, layers, strict=True)]
        files = save(frames, heat_maps, layers, shown) if is_new else []
        drawn = batch(heat_maps)
        preview = ui.PreviewImage(drawn, cls=cls).as_dict()
        outputs = data, drawn, batch(frames), export.to_json(shown), batch(sheets)
        telemetry.runs.mark_shown(node, found)  # last: a report that failed shows them the next time
        return io.NodeOutput(*outputs, ui={**preview, "sparge_files": files})


def empty_run() -> dict:
    """What is shown where there is no run."""
    return {**Run(0, node="", owner="", metadata={}, sigmas=[]).to_dict(), "note": NO_RUN}


def step_frames(run: dict, most: int = MAX_FRAMES) -> list:
    """One picture a step, evenly thinned to `most`."""
    every = -(-max(1, run["steps"]) // most)
    return [heat_map.step_frame(run, step) for step in range(0, max(1, run["steps"]), every)]


def layer_maps(run: Run, images: np.ndarray | None) -> list[block_maps.LayerMaps]:
    """The block maps of some layers in the last step that has any, and their frames; empty where the run kept none."""
    kept = run.maps.kept
    last = max((step for step, _ in kept), default=None)
    layers = sorted(layer for step, layer in kept if step == last)
    chosen = {layers[i]: kept[maps.At(last, layers[i])] for i in block_maps.spread(len(layers), block_maps.MAX_LAYERS)}
    return [block_maps.layer_maps(last, layer, pooled.values, maps.frames(pooled), images) for layer, pooled in chosen.items()]


def images_of(data) -> np.ndarray | None:
    """The decoded images (N, H, W, 3), not larger than the maps show them; None for a latent."""
    if not isinstance(data, torch.Tensor):
        return None
    every = max(1, -(-max(data.shape[1:3]) // MAX_IMAGE))
    channels = [0, 1, 2] if data.shape[-1] >= 3 else [0, 0, 0]  # a mask has one
    return data[:, ::every, ::every, channels].float().cpu().numpy()


def save(frames: list, heat_maps: list, layers: list[list[block_maps.LayerMaps]], runs: list[dict]) -> list[dict]:
    """Writes every file of the report under one number to the output folder; returns how the browser finds them."""
    files = []
    first, entry = _comfy.output_path("sparge_report", "gif")
    written = time.strftime("%Y-%m-%d %H:%M")
    contents = {
        "gif": None,
        "mp4": None,
        "json": export.to_json(runs).encode(),
        "webp": None,
        "png": export.to_png(heat_maps, runs),
        "csv": export.to_csv(runs).encode(),
        "html": export.to_html(runs, layers, written).encode(),
    }
    for extension, content in contents.items():
        path = Path(first).with_suffix(f".{extension}")
        animation.write(frames, path) if content is None else path.write_bytes(content)
        files.append({**entry, "filename": path.name})
    return files


def batch(images: list) -> torch.Tensor:
    """Pillow images as ComfyUI's IMAGE: fp32 (N, H, W, 3) in 0..1, smaller ones padded with the paper's colour."""
    height, width = max(i.height for i in images), max(i.width for i in images)
    paper = np.asarray(canvas.PAPER, dtype=np.float32) / 255
    sheet = np.tile(paper, (len(images), height, width, 1))
    for target, image in zip(sheet, images, strict=True):
        target[: image.height, : image.width] = animation.to_array(image)
    return torch.from_numpy(sheet)
