"""The node SpargeReport: what was skipped, as pictures, an animation, numbers and a page, after the sampler."""

from __future__ import annotations

import base64
import time
from pathlib import Path

import numpy as np
import torch

from . import _comfy, animation, draw, draw_maps, export, telemetry, transport
from ._comfy import io, ui
from .patch import patches_of

DATA_TOOLTIP = (
    "The sampler's latent or the decoded images; passed through. It makes the report wait for the sampler; images lie under the maps' colours."
)
MAX_FRAMES = 100  # of all runs shown; longer runs show every second, third, ... step
MAX_PICTURE = 512  # pixels of the longer edge of the images that lie under the maps
NO_RUN = "no run since the last report"


class SpargeReport(io.ComfyNode):
    """Shows every run since its last report as heat maps, one picture a step, an animation, numbers and a page."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpargeReport",
            display_name="Sparge Report",
            category="model_patches/sparge",
            description="Put it behind the sampler. Draws which steps and layers ran sparse and how much they kept, with the reasons of every dense "
            "call, and saves to the output folder: the heat map (PNG), an animation (GIF, WebP, MP4), the numbers (JSON, CSV) and a page with "
            "everything (HTML). Connect the model that went into the sampler; a model without Sparge Attention reports on all runs.",
            inputs=[
                io.Model.Input("model", tooltip="The model that was sampled."),
                io.MultiType.Input("data", types=[io.Latent, io.Image], tooltip=DATA_TOOLTIP),
            ],
            outputs=[
                io.AnyType.Output("data_out", display_name="data", tooltip="What came in as data."),
                io.Image.Output("heat_map", display_name="heat_map", tooltip="Steps by layers, one picture a run."),
                io.Image.Output("frames", display_name="frames", tooltip="Heads by layers, one picture a step."),
                io.String.Output("json", display_name="json", tooltip="All numbers."),
                io.Image.Output("maps", display_name="maps", tooltip="Which blocks some layers kept, one picture a run. Needs a Sparge Monitor."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, **_) -> int:
        return telemetry.runs.latest

    @classmethod
    def execute(cls, model, data) -> io.NodeOutput:
        node = str(cls.hidden.unique_id) if cls.hidden is not None else "script"
        last = telemetry.runs.last_shown(node)
        found = telemetry.runs.for_report(node, [patch.key for patch in patches_of(model)])
        is_new = bool(found) and found[-1].number > last
        shown = [run.to_dict() for run in found] or [empty_run()]
        if not is_new:  # the sampler was cached, or ran without Sparge Attention: the same numbers again, and no second set of files
            shown = [{**run, "note": "; ".join(filter(None, (run["note"], NO_RUN)))} if found else run for run in shown]
        text = export.to_json(shown)
        heat_maps = [draw.heat_map(run) for run in shown]
        frames = [frame for run in shown for frame in step_frames(run, max(1, MAX_FRAMES // len(shown)))]
        kept = [block_maps(run, pictures_of(data)) for run in found] or [[]]
        sheets = [
            draw_maps.sheet(f"{run.get('model') or 'no run'} \xb7 blocks kept, run {run['run']}", of) for run, of in zip(shown, kept, strict=True)
        ]
        files = save(frames, heat_maps, kept, shown, text) if is_new else []
        heat_map = batch(heat_maps)
        preview = ui.PreviewImage(heat_map, cls=cls).as_dict()
        return io.NodeOutput(data, heat_map, batch(frames), text, batch(sheets), ui={**preview, "sparge_files": files})


def empty_run() -> dict:
    """What is shown where there is no run."""
    return {**telemetry.Run(0, node="", owner="", facts={}, sigmas=[]).to_dict(), "note": NO_RUN}


def step_frames(run: dict, most: int = MAX_FRAMES) -> list:
    """One picture a step, evenly thinned to `most`."""
    every = -(-max(1, run["steps"]) // most)
    return [draw.step_frame(run, step) for step in range(0, max(1, run["steps"]), every)]


def block_maps(run: telemetry.Run, pictures: np.ndarray | None) -> list[draw_maps.Maps]:
    """The block maps of some layers in the last step that has any, and their frames; empty where the run kept none."""
    last = max((step for step, _ in run.maps), default=None)
    layers = sorted(layer for step, layer in run.maps if step == last)
    result = []
    for layer in (layers[i] for i in draw_maps.spread(len(layers), draw_maps.MAX_LAYERS)):
        picture = run.maps[last, layer]
        result.append(draw_maps.maps(last, layer, picture.values, frame_shares(picture), pictures))
    return result


def frame_shares(picture: telemetry.Picture) -> tuple[np.ndarray, np.ndarray] | None:
    """What the queries kept and how often the keys were kept, uint8 (T, h, w) each; None where the layout is not known."""
    frames = transport.frames(picture.values, picture)
    if frames is None:
        return None
    shape = frames["t"], frames["h"], frames["w"]
    return tuple(np.frombuffer(base64.b64decode(frames[name]), dtype=np.uint8).reshape(shape) for name in ("queries", "keys"))


def pictures_of(data) -> np.ndarray | None:
    """The decoded images (N, H, W, 3), not more and not larger than the maps show; None for a latent."""
    if not isinstance(data, torch.Tensor):
        return None
    every = max(1, -(-max(data.shape[1:3]) // MAX_PICTURE))
    return data[:, ::every, ::every, :3].float().cpu().numpy()


def save(frames: list, heat_maps: list, maps: list, runs: list[dict], text: str) -> list[dict]:
    """Writes every file of the report under one number to the output folder; returns how the browser finds them."""
    files = []
    first, told = _comfy.output_path("sparge_report", "gif")
    written = time.strftime("%Y-%m-%d %H:%M")
    for extension, write in {
        "gif": lambda path: animation.write_gif(frames, path),
        "mp4": lambda path: animation.write_mp4(frames, path),
        "json": lambda path: path.write_text(text, encoding="utf-8"),
        "webp": lambda path: animation.write_webp(frames, path),
        "png": lambda path: path.write_bytes(export.to_png(heat_maps, runs)),
        "csv": lambda path: path.write_text(export.to_csv(runs), encoding="utf-8", newline=""),
        "html": lambda path: path.write_text(export.to_html(runs, maps, written), encoding="utf-8"),
    }.items():
        path = Path(first).with_suffix(f".{extension}")
        write(path)
        files.append({**told, "filename": path.name})
    return files


def batch(images: list) -> torch.Tensor:
    """Pillow images as ComfyUI's IMAGE: fp32 (N, H, W, 3) in 0..1, smaller ones padded with the paper's colour."""
    height, width = max(i.height for i in images), max(i.width for i in images)
    paper = np.asarray(draw.PAPER, dtype=np.float32) / 255
    sheet = np.tile(paper, (len(images), height, width, 1))
    for target, image in zip(sheet, images, strict=True):
        target[: image.height, : image.width] = animation.to_array(image)
    return torch.from_numpy(sheet)
