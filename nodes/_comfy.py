"""The one place that knows ComfyUI's own names and how its versions differ (0.3.75 to 0.38 were read or run)."""

from __future__ import annotations

import os

import comfy.patcher_extension
import folder_paths
from comfy_api.latest import ComfyExtension, io, ui

__all__ = ["ComfyExtension", "io", "ui"]

KEY = "optimized_attention_override"
"""The entry of transformer_options that ComfyUI calls for every attention call (since 0.3.59)."""

WRAPPERS = comfy.patcher_extension.WrappersMP


def add_wrapper(model, kind: str, key: str, function) -> None:
    model.add_wrapper_with_key(kind, key, function)


def wrappers_of(model, kind: str) -> list:
    """Every function that nodes have wrapped around `kind` on this model."""
    return [function for functions in model.wrappers.get(kind, {}).values() for function in functions]


def attention_override(model):
    """The attention override that is on top of the model now, or None."""
    return model.model_options.get("transformer_options", {}).get(KEY)


def set_attention_override(model, override) -> None:
    model.model_options.setdefault("transformer_options", {})[KEY] = override


def diffusion_model(base_model):
    return base_model.diffusion_model


def percent_to_sigma(model, percent: float) -> float:
    """The sigma of a fraction of the schedule; 0 is above, 1 below every sigma that is sampled."""
    return float(model.get_model_object("model_sampling").percent_to_sigma(percent))


def show_text(node_id: str | None, text: str) -> None:
    """Shows a line of text on a node in the browser, where there is one (the server may be absent: scripts, tests)."""
    if node_id is None:
        return
    try:
        from server import PromptServer
    except ImportError:
        return
    server = getattr(PromptServer, "instance", None)
    if server is not None and hasattr(server, "send_progress_text"):
        server.send_progress_text(text, node_id)


def output_path(prefix: str, extension: str) -> tuple[str, dict]:
    """A new file in ComfyUI's output folder, and how the browser is told about it."""
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory())
    file = f"{name}_{counter:05}_.{extension}"
    return os.path.join(folder, file), {"filename": file, "subfolder": subfolder, "type": "output"}
