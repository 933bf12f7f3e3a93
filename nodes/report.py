"""The node SpargeReport: what was skipped, as pictures, an animation and numbers, after the sampler."""

from __future__ import annotations

import json

import numpy as np
import torch

from . import _comfy, animation, draw
from ._comfy import io, ui
from .patch import patches_of
from .telemetry import runs

DATA_TOOLTIP = "The sampler's latent or the decoded images; passed through. It makes the report wait for the sampler."
FRAME_SIZE = (960, 720)  # an IMAGE frame of this size takes 8 MB
MAX_FRAMES = 100  # of all runs shown; longer runs show every second, third, ... step


class SpargeReport(io.ComfyNode):
    """Shows every run since its last report as heat maps, one picture a step, an animation and JSON."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpargeReport",
            display_name="Sparge Report",
            category="model_patches/sparge",
            description="Put it behind the sampler. Draws which steps and layers ran sparse and how much they kept, with the reasons of every dense "
            "call, and saves an animation (GIF, MP4) and the numbers (JSON) to the output folder. Connect the model that went into the sampler; a "
            "model without Sparge Attention reports on all runs.",
            inputs=[
                io.Model.Input("model", tooltip="The model that was sampled."),
                io.MultiType.Input("data", types=[io.Latent, io.Image], tooltip=DATA_TOOLTIP),
            ],
            outputs=[
                io.AnyType.Output("data_out", display_name="data"),
                io.Image.Output("heat_map", display_name="heat_map"),
                io.Image.Output("frames", display_name="frames"),
                io.String.Output("json", display_name="json"),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, **_) -> int:
        return runs.latest

    @classmethod
    def execute(cls, model, data) -> io.NodeOutput:
        node = str(cls.hidden.unique_id) if cls.hidden is not None else "script"
        shown = [run.to_dict() for run in runs.for_report(node, [patch.key for patch in patches_of(model)])] or [EMPTY_RUN]
        text = json.dumps({"version": 1, "runs": shown}, indent=1)
        maps = [draw.heat_map(run) for run in shown]
        frames = [frame for run in shown for frame in step_frames(run, max(1, MAX_FRAMES // len(shown)))]
        files = save(frames, text) if shown[0] is not EMPTY_RUN else []
        heat_map = batch(maps)
        preview = ui.PreviewImage(heat_map, cls=cls).as_dict()
        return io.NodeOutput(data, heat_map, batch(frames), text, ui={**preview, "sparge_files": files})


EMPTY_RUN = {"version": 1, "steps": 0, "layers": 0, "cells": [], "reasons": {}, "totals": {}, "note": "no run since the last report"}


def step_frames(run: dict, most: int = MAX_FRAMES) -> list:
    """One picture a step, evenly thinned to `most`."""
    every = -(-max(1, run["steps"]) // most)
    return [draw.step_frame(run, step, FRAME_SIZE) for step in range(0, max(1, run["steps"]), every)]


def save(frames: list, text: str) -> list[dict]:
    """Writes the animation (GIF and MP4) and the numbers to the output folder; returns how the browser finds them."""
    files = []
    for extension, write in (("gif", animation.write_gif), ("mp4", animation.write_mp4), ("json", None)):
        path, entry = _comfy.output_path("sparge_report", extension)
        if write is None:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
        else:
            write(frames, path)
        files.append(entry)
    return files


def batch(images: list) -> torch.Tensor:
    """Pillow images as ComfyUI's IMAGE: fp32 (N, H, W, 3) in 0..1, smaller ones padded with the paper's colour."""
    height, width = max(i.height for i in images), max(i.width for i in images)
    paper = np.asarray(draw.PAPER, dtype=np.float32) / 255
    sheet = np.tile(paper, (len(images), height, width, 1))
    for target, image in zip(sheet, images, strict=True):
        target[: image.height, : image.width] = animation.to_array(image)
    return torch.from_numpy(sheet)
