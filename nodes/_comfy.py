"""The one place that knows ComfyUI's own names and how its versions differ (0.3.60 to 0.33 were run, of 0.38 single files were read)."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import threading
import unicodedata
from contextlib import ExitStack
from pathlib import Path

import comfy.model_management
import comfy.patcher_extension
import comfyui_version
import folder_paths
from comfy.ldm.modules import attention
from comfy_api.latest import ComfyExtension, io, ui

__all__ = ["ComfyExtension", "io", "ui"]

KEY = "optimized_attention_override"
"""The entry of transformer_options that ComfyUI calls for every attention call, since 0.3.60."""

MONITORS = "sparge_monitors"
"""The entry of transformer_options that names the monitors of a model."""

ANSWERS = "sparge_attention_answers"
"""The attribute of the server that holds the functions behind the pack's routes."""

MAX_ID = 64
"""The most letters that the input `id` of a node may have."""

MAX_NAME = 150
"""The most bytes of a name in a prefix of files; most file systems take 255, and a number, an ending and what encryption adds come on top."""

DEVICES = frozenset({"CON", "PRN", "AUX", "NUL", *(f"{port}{number}" for port in ("COM", "LPT") for number in range(1, 10))})
"""The names that are no files in Windows, whatever ending follows."""

TEXTS = Path(__file__).resolve().parents[1] / "locales" / "en" / "nodeDefs.json"
"""What people read of the nodes and of their inputs and outputs, in English; the browser takes other languages from its neighbours."""

WRAPPERS = comfy.patcher_extension.WrappersMP
CALLBACKS = comfy.patcher_extension.CallbacksMP
Interrupted = comfy.model_management.InterruptProcessingException
"""What ends a run that the user stops."""


def schema(node: str, inputs: list, outputs: list, **more) -> io.Schema:
    """A node's schema; its texts and those of its inputs and outputs stand in `TEXTS`."""
    texts = json.loads(TEXTS.read_text(encoding="utf-8"))[node]
    for entry in inputs:
        entry.tooltip = texts["inputs"][entry.id]["tooltip"]
    for entry, text in zip(outputs, texts["outputs"].values(), strict=True):
        entry.display_name, entry.tooltip = text["name"], text.get("tooltip")
    said = {"display_name": texts["display_name"], "description": texts["description"]}
    return io.Schema(node_id=node, category="model_patches/sparge", inputs=inputs, outputs=outputs, hidden=[io.Hidden.unique_id], **said, **more)


def pause_malloc_graph(until: ExitStack) -> str | None:
    """Stops ComfyUI from recording this thread's allocations until `until` closes; why it cannot be stopped, or None.

    Since 0.36 some models record what a block allocates, to do it again by themselves for every block. What is allocated then and outlives its block
    aborts the process, which nobody can catch. The pause came with 0.37.
    """
    prefetch = sys.modules.get("comfy.model_prefetch")  # models that record have imported it
    pause = getattr(prefetch, "pause_malloc_graph", None)
    if pause is None:
        return "this version cannot" if _records(prefetch) else None
    try:
        until.enter_context(pause())
    except Exception as error:
        return type(error).__name__
    return None


def _records(prefetch) -> bool:
    graphs = getattr(prefetch, "MALLOC_GRAPHS", None) or getattr(prefetch, "ACTIVE_MALLOC_GRAPHS", {})
    graph = graphs.get(threading.get_ident())
    return graph is not None and getattr(graph, "_comfy_active", True)


def check_model(model: object) -> None:
    if not hasattr(model, "model_options"):
        raise ValueError(f"model must be a ComfyUI model, got {model!r}; connect a loader's MODEL output")


def add_wrapper(model, kind: str, key: str, function) -> None:
    model.add_wrapper_with_key(kind, key, function)


def add_callback(model, kind: str, key: str, function) -> None:
    model.add_callback_with_key(kind, key, function)


def wrappers_of(model, kind: str) -> list:
    """Every function that nodes have wrapped around `kind` on this model."""
    return [function for functions in model.wrappers.get(kind, {}).values() for function in functions]


def attention_override(model):
    """The attention override that is on top of the model now, or None."""
    return model.model_options.get("transformer_options", {}).get(KEY)


def set_attention_override(model, override) -> None:
    if not hasattr(attention, "wrap_attn"):
        raise RuntimeError(f"ComfyUI must be 0.3.60 or newer, got {comfyui_version.__version__}; update it: older ones ask no node about attention")
    model.model_options.setdefault("transformer_options", {})[KEY] = override


def has_compile_wrapper(model) -> bool:
    """Whether ComfyUI's compile node, or one that works as it does, has compiled the model or parts of it for its model calls."""
    return bool(model.wrappers.get(WRAPPERS.APPLY_MODEL, {}).get("torch.compile"))


def object_patches(model) -> list:
    """What nodes have put in the place of modules of the model, for the time that it is loaded."""
    return list(getattr(model, "object_patches", {}).values())


def diffusion_model(base_model):
    return base_model.diffusion_model


def percent_to_sigma(model, percent: float) -> float:
    """The sigma of a fraction of the schedule; 0 is above, 1 below every sigma that is sampled."""
    return float(model.get_model_object("model_sampling").percent_to_sigma(percent))


def add_monitor(model, node: str, measures: bool) -> None:
    """Notes a monitor on the model: plain data, for every clone copies it."""
    options = model.model_options.setdefault("transformer_options", {})
    options[MONITORS] = {**options.get(MONITORS, {}), node: measures}


def monitors_of(model) -> dict[str, bool]:
    """The ids of the monitors on the model, first to last, and whether each wants dense attention timed."""
    return dict(model.model_options.get("transformer_options", {}).get(MONITORS, {}))


def id_input():
    """The input `id` of a node (see `name_of`). The browser fills it in and shows no widget for it.

    An input, not a property of the node: so it is in what ComfyUI compares before it hands out a cached output, which names the node that made it.
    """
    made = io.String.Input("id", default="", optional=True)
    made.extra_dict = {**(made.extra_dict or {}), "hidden": True}
    return made


def mark_advanced(widget):
    """Marks an input that few need: since 0.10 front ends show those on demand. Before, inputs know no such mark and all are shown."""
    if hasattr(widget, "advanced"):
        widget.advanced = True
    return widget


def prompt_server():
    """The running server, or None (scripts, tests). Its module is not imported for this: whoever runs the server has done that."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def name_of(hidden, own: str = "") -> str | None:
    """The name under which the browser looks for what an executed node says; web/js/lib/ids.js makes the same. None in scripts.

    hidden : what ComfyUI tells the node beside its inputs, among it the number in the graph, after those of the subgraph nodes around it: two
    instances of a subgraph differ in it alone. own : the input `id`, which the browser draws by chance once for each node, as numbers are the same in
    every workflow. Without it (a prompt made by a program, or before there was the input) the number stands alone.
    """
    if not isinstance(own, str) or len(own) > MAX_ID:
        raise ValueError(f"id must be text of up to {MAX_ID} characters, got {own!r:.80}; leave it empty, or to the browser")
    if hidden is None:
        return None
    return f"{own}/{hidden.unique_id}" if own else str(hidden.unique_id)


def clients() -> set[str]:
    """The browser tab whose prompt is executed now; an empty set where none queued it (a program that names no client, a script)."""
    client = getattr(prompt_server(), "client_id", None)
    return {client} if client and isinstance(client, str) else set()


def is_connected(client: str) -> bool:
    """Whether a browser tab of this name holds a connection now."""
    return client in getattr(prompt_server(), "sockets", {})


def send(event: str, data: dict, client: str | None = None) -> None:
    """Sends an event to one browser tab, or to all for None, from any thread."""
    server = prompt_server()
    if server is not None:
        server.send_sync(event, data, client)


def serve(answers: dict) -> None:
    """Answers GET requests: path -> a function of the query that gives (status, JSON data), called in a thread of its own.

    Of two copies of the pack ComfyUI keeps the nodes of the last one, so the last one answers; a path cannot be registered twice.
    """
    server = prompt_server()
    if server is None:
        return
    known = getattr(server, ANSWERS, {})
    setattr(server, ANSWERS, {**known, **answers})
    for path in (path for path in answers if path not in known):
        server.routes.get(path)(_handler(server, path))


def _handler(server, path: str):
    from aiohttp import web

    async def handle(request):
        status, data = await asyncio.to_thread(getattr(server, ANSWERS)[path], dict(request.query))
        return web.json_response(data, status=status)

    return handle


def user_folder() -> Path | None:
    """ComfyUI's folder for what users keep between sessions, or None in a version without one."""
    get = getattr(folder_paths, "get_user_directory", None)
    return None if get is None else Path(get())


def refused_prefix(prefix: str) -> str | None:
    """Why files cannot be named after `prefix`, the end of a sentence that begins with the input's name; None when they can."""
    if not os.path.basename(prefix).strip():
        return f"must end with a name for the files, got {prefix!r}; write a subfolder and a name, such as sparge/report"
    root = os.path.abspath(folder_paths.get_output_directory())
    path = os.path.abspath(os.path.join(root, prefix))
    try:
        inside = path != root == os.path.commonpath([root, path])
    except ValueError:  # another drive
        inside = False
    if not inside:
        return f"must stay inside ComfyUI's output folder, got {prefix!r}; leave out '..' and what stands before the subfolder"
    wrong = next((letter for letter in prefix if letter in '<>:"|?*' or unicodedata.category(letter) in ("Cc", "Cs")), None)
    if wrong is not None:
        return f"must be a name that every system can write, got {wrong!r} in {prefix!r:.200}; leave that character out"
    for part in re.split(r"[/\\]", prefix):
        if part.partition(".")[0].rstrip().upper() in DEVICES:
            return f"must be a name that every system can write, got {part!r:.200}, a device of Windows; write another name"
        if len(part.encode()) > MAX_NAME:
            return f"must have names of up to {MAX_NAME} bytes, got {part!r:.40}... of {len(part.encode())}; write a shorter one"
    return None


def output_path(prefix: str) -> tuple[str, dict]:
    """The path of a new file in ComfyUI's output folder, without its ending, and how the browser is told about it.

    prefix : subfolder and name as ComfyUI's save nodes take them, %year% and the like filled in; the next free number follows it.
    """
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory())
    file = f"{name}_{counter:05}_"
    return os.path.join(folder, file), {"filename": file, "subfolder": subfolder, "type": "output"}
