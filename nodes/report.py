"""The node SpargeReport: what was kept, as pictures, an animation, numbers and a page, after the sampler."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from . import _comfy, export, maps, telemetry
from ._comfy import io, ui
from .patch import patches_of
from .pictures import animation, block_maps, canvas, heat_map
from .recorder import Run

MAX_FRAMES = 100  # of all runs shown; longer runs show every second, third, ... step
MAX_IMAGE = 512  # pixels of the longer edge of the images that lie under the maps
NO_RUN = "no run since the last report"
UNSAVED = "the report's {formats} could not be written: {error}; make room on the disk or choose another filename_prefix, and queue again"
NO_PREVIEW = "the picture on the report could not be written: {error}; make room on the disk of ComfyUI's temp folder"

logger = logging.getLogger("sparge_attention")


@dataclass(frozen=True, eq=False)
class Report:
    """What the files are made of: the runs as `Run.to_dict` gives them, a heat map of each, the frames of all, and the block maps of each."""

    runs: list[dict]
    heat_maps: list[Image.Image]
    frames: list[Image.Image]
    layers: list[list[block_maps.LayerMaps]]

    def write_page(self, path: Path) -> None:
        path.write_bytes(export.to_html(self.runs, self.layers, time.strftime("%Y-%m-%d %H:%M")).encode())

    def write_animation(self, path: Path) -> None:
        animation.write(self.frames, path)


FORMATS: dict[str, Callable[[Report, Path], object]] = {
    "png": lambda report, path: path.write_bytes(export.to_png(report.heat_maps, report.runs)),
    "html": Report.write_page,
    "json": lambda report, path: path.write_bytes(export.to_json(report.runs).encode()),
    "csv": lambda report, path: path.write_bytes(export.to_csv(report.runs).encode()),
    "gif": Report.write_animation,
    "webp": Report.write_animation,
    "mp4": Report.write_animation,
}
"""What a report can be saved as: the ending of the file, and who writes it."""

DEFAULT_FORMATS = "png, html"
PREFIX = "sparge/report"  # a subfolder of its own, so that reports do not lie between the pictures


def names_in(formats: str) -> list[str]:
    return [name.lower().removeprefix(".") for name in re.split(r"[,;\s]+", formats) if name]


def formats_of(text: str) -> list[str]:
    """The formats that a checked text asks for, each once and in the table's order: "html, png", "all", or "none" for no file at all."""
    names = names_in(text)
    return [name for name in FORMATS if name in names or "all" in names]


def refusal(formats: str, prefix: str) -> str | None:
    """What is wrong with the two inputs, as a sentence; None when nothing is."""
    for name, value in (("formats", formats), ("filename_prefix", prefix)):
        if not isinstance(value, str):
            return f"{name} must be text, got {value!r}; convert it to a string"
    names = names_in(formats)
    wrong = next((name for name in names if name not in (*FORMATS, "all", "none")), None)
    if wrong is not None or not names or ("none" in names and set(names) != {"none"}):
        got = repr(formats if wrong is None else wrong)
        return f"formats must list some of {', '.join(FORMATS)}, or be all or none, got {got}; '{DEFAULT_FORMATS}' saves the picture and the page"
    no = _comfy.refused_prefix(prefix)
    return None if no is None else f"filename_prefix {no}"


class SpargeReport(io.ComfyNode):
    """Shows every run since its last report as heat maps, one picture a step, numbers and a page, and saves what is asked for."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [
            io.Model.Input("model"),
            io.MultiType.Input("data", types=[io.Latent, io.Image]),
            io.String.Input("formats", default=DEFAULT_FORMATS, optional=True),  # optional: prompts of the time before it run
            io.String.Input("filename_prefix", default=PREFIX, optional=True),
        ]
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
        """Another number after every run, and after files that could not be written: ComfyUI would not execute the node again to write them."""
        return telemetry.runs.latest + telemetry.runs.unsaved

    @classmethod
    def validate_inputs(cls, formats=None, filename_prefix=None) -> bool | str:
        """Before anything is sampled, so that a wrong name does not end a prompt after all its work. What comes over a link is absent or None."""
        return refusal(DEFAULT_FORMATS if formats is None else formats, PREFIX if filename_prefix is None else filename_prefix) or True

    @classmethod
    def execute(cls, model, data, formats=DEFAULT_FORMATS, filename_prefix=PREFIX) -> io.NodeOutput:
        _comfy.check_model(model)
        wrong = refusal(formats, filename_prefix)
        if wrong is not None:
            raise ValueError(wrong)
        node = str(cls.hidden.unique_id) if cls.hidden is not None else "script"
        found = telemetry.runs.for_report(node, [patch.key for patch in patches_of(model)])
        before = telemetry.runs.saved(node, found)
        shown = [run.to_dict() for run in found]
        if before is not None:  # the sampler was cached, or ran without Sparge Attention: the same numbers again
            shown = [noted(run, NO_RUN) for run in shown]
        shown = shown or [empty_run()]
        frames = [frame for run in shown for frame in step_frames(run, max(1, MAX_FRAMES // len(shown)))]
        layers = [layer_maps(run, images_of(data)) for run in found] or [[]]
        report = Report(shown, [heat_map.heat_map(run) for run in shown], frames, layers)
        titles = [f"{run.get('model') or 'no run'} \xb7 blocks kept, run {run['run']}" for run in shown]
        sheets = [block_maps.sheet(title, of) for title, of in zip(titles, layers, strict=True)]
        files = save(report, [name for name in formats_of(formats) if found and name not in (before or ())], filename_prefix)  # no file twice
        drawn = batch(report.heat_maps)
        if files.problem is not None:
            shown = [noted(run, files.problem) for run in shown]
            drawn = batch([captioned(picture, files.problem) for picture in report.heat_maps])
        outputs = data, drawn, batch(frames), export.to_json(shown), batch(sheets)
        shown_files = {**preview_of(cls, drawn), "sparge_files": files.entries}
        telemetry.runs.mark_shown(node, found, files.formats)  # last: a report that failed shows them the next time
        telemetry.runs.unsaved += files.problem is not None
        return io.NodeOutput(*outputs, ui=shown_files)


def empty_run() -> dict:
    """What is shown where there is no run."""
    return {**Run(0, node="", owner="", metadata={}, sigmas=[]).to_dict(), "note": NO_RUN}


def noted(run: dict, text: str) -> dict:
    """The run with one more note."""
    return {**run, "note": "; ".join(filter(None, (run["note"], text)))}


def captioned(picture: Image.Image, text: str) -> Image.Image:
    """The picture with a text below it."""
    style = canvas.Style()
    margin, row = style.px(32), canvas.line_height(style.body) + style.px(4)
    lines = canvas.wrap(canvas.plain(text), style.body, picture.width - 2 * margin, 4)
    sheet = Image.new("RGB", (picture.width, picture.height + len(lines) * row + margin), canvas.PAPER)
    sheet.paste(picture)
    for index, line in enumerate(lines):
        ImageDraw.Draw(sheet).text((margin, picture.height + index * row), line, canvas.INK, style.body)
    return sheet


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


@dataclass(frozen=True)
class Files:
    """What was written of a report: the formats, how the browser finds each file, and why others are missing, as a sentence."""

    formats: list[str]
    entries: list[dict]
    problem: str | None


def save(report: Report, formats: list[str], prefix: str) -> Files:
    """Writes the report in each of `formats` under one number. What cannot be written ends no prompt: everything is sampled by then."""
    written, errors = [], {}
    try:
        path, entry = _comfy.output_path(prefix) if formats else ("", {})
    except (OSError, ValueError) as error:
        return Files([], [], problem_of(dict.fromkeys(formats, error)))
    for name in formats:
        file = Path(f"{path}.{name}")
        try:
            FORMATS[name](report, file)
            written.append(name)
        except (OSError, ValueError, ImportError) as error:  # ImportError: an MP4 without its package
            errors[name] = error
            with suppress(OSError):
                file.unlink(missing_ok=True)  # half a file passes for a whole one
    return Files(written, [{**entry, "filename": f"{entry['filename']}.{name}"} for name in written], problem_of(errors))


def problem_of(errors: Mapping[str, Exception]) -> str | None:
    """Why these formats are missing, as a sentence, which the log has then too; None for no format."""
    if not errors:
        return None
    problem = UNSAVED.format(formats=", ".join(errors), error=reason_of(next(iter(errors.values()))))
    logger.warning("%s", problem)
    return problem


def reason_of(error: Exception) -> str:
    """What the system says, without the path: it is nobody's business in a report passed on."""
    return getattr(error, "strerror", None) or str(error)


def preview_of(node: type, images: torch.Tensor) -> dict:
    """The picture on the node, or nothing where ComfyUI's folder for it cannot be written."""
    try:
        return ui.PreviewImage(images, cls=node).as_dict()
    except OSError as error:
        logger.warning("%s", NO_PREVIEW.format(error=reason_of(error)))
        return {}


def batch(images: list) -> torch.Tensor:
    """Pillow images as ComfyUI's IMAGE: fp32 (N, H, W, 3) in 0..1, smaller ones padded with the paper's colour."""
    height, width = max(i.height for i in images), max(i.width for i in images)
    paper = np.asarray(canvas.PAPER, dtype=np.float32) / 255
    sheet = np.tile(paper, (len(images), height, width, 1))
    for target, image in zip(sheet, images, strict=True):
        target[: image.height, : image.width] = animation.to_array(image)
    return torch.from_numpy(sheet)
