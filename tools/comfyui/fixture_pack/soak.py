"""What the soak needs inside the server: models that are built once, doubles of other nodes, a count of its own, and what the process holds.

The count does not go through the pack: a wrapper of ComfyUI's counts the calls of the model, and an override alone on a model how many attention
calls one of them makes.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import json
import sys
from collections import defaultdict, deque

import torch

KEY = "optimized_attention_override"
PLANNED = "planned failure of the soak"
"""How the message of every error begins that is thrown on purpose."""

_built: dict = {}  # (family, changes) -> comfy_models.TinyModel
_runs: dict[str, deque] = defaultdict(lambda: deque(maxlen=8))  # tag -> what its last sampler calls did
_numbers = itertools.count(1)
MAX_TAGS = 64


def tiny(family: str, changes: str):
    """One model a family for the whole life of the server, as one file that many prompts load."""
    import comfy_models

    if (family, changes) not in _built:
        _built[family, changes] = comfy_models.build(family, **json.loads(changes))
    return _built[family, changes]


FAMILY = ("STRING", {"tooltip": "A family of comfy_models."})
CHANGES = ("STRING", {"default": "{}", "tooltip": "JSON: entries of the model's configuration."})
TAG = ("STRING", {"tooltip": "Names the graph: another tag is another graph, which shares nothing with the others but the model."})


class _Node:
    CATEGORY, FUNCTION = "sparge test fixtures", "make"
    DESCRIPTION = "Test fixture: a part of the soak."


class SpargeSoakModel(_Node):
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"family": FAMILY, "tag": TAG, "changes": CHANGES}}

    def make(self, family: str, tag: str, changes: str):
        return (tiny(family, changes).patcher.clone(),)


class SpargeSoakLatent(_Node):
    """Zeros of the family's shape, smaller by `scale`, `batch` of them."""

    RETURN_TYPES = ("LATENT", "CONDITIONING", "CONDITIONING")

    @classmethod
    def INPUT_TYPES(cls):
        sizes = {"scale": ("FLOAT", {"default": 1.0, "min": 0.1, "max": 1.0}), "batch": ("INT", {"default": 1, "min": 1, "max": 4})}
        return {"required": {"family": FAMILY, "changes": CHANGES, **sizes}}

    def make(self, family: str, changes: str, scale: float, batch: int):
        model = tiny(family, changes)
        *front, height, width = model.latent.shape
        even = [2 * round(edge * scale / 2) for edge in (height, width)]  # not every class pads
        return {"samples": torch.zeros(batch, *front[1:], *even)}, model.positive, model.negative


class SpargeSoakOverride(_Node):
    """Another node's attention override.

    mode : "chain" passes calls on to what was on top before; "replace" forgets it; "count" is "chain" and counts the calls; "fail" throws in call
    `at`; "twice" calls what was on top a second time, which no node may do: counts are wrong then, and the soak must notice.
    """

    RETURN_TYPES = ("MODEL",)
    MODES = ("chain", "replace", "count", "fail", "twice")

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "tag": TAG, "mode": (cls.MODES, {}), "at": ("INT", {"default": 1, "min": 1, "max": 1 << 20})}}

    def make(self, model, tag: str, mode: str, at: int):
        clone = model.clone()
        options = clone.model_options.setdefault("transformer_options", {})
        options[KEY] = override(options.get(KEY), tag, mode, at)
        return (clone,)


def override(previous, tag: str, mode: str, at: int):
    """A closure, as other nodes' overrides are: ComfyUI copies model_options deeply with every clone, and functions come through that unchanged."""
    if mode == "replace":
        return lambda func, *args, **kwargs: func(*args, **kwargs)
    seen = [0]

    def chained(func, *args, **kwargs):
        seen[0] += 1
        if mode == "fail" and seen[0] == at:
            raise RuntimeError(f"{PLANNED}: attention call {at}")
        if mode == "count":
            _runs[tag][-1]["attention_calls"] += 1
        if mode == "twice" and previous is not None:
            previous(func, *args, **kwargs)
        return func(*args, **kwargs) if previous is None else previous(func, *args, **kwargs)

    return chained


class SpargeSoakCompile(_Node):
    """What ComfyUI's TorchCompileModel does, with a backend that needs no compiler; its newer versions ignore transformer_options in the guards."""

    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "backend": ("STRING", {"default": "eager"}), "filters": ("BOOLEAN", {"default": True})}}

    def make(self, model, backend: str, filters: bool):
        from comfy_api.torch_helpers import set_torch_compile_wrapper

        clone = model.clone()
        options = {"guard_filter_fn": without_transformer_options} if filters else None
        set_torch_compile_wrapper(model=clone, backend=backend, options=options)
        return (clone,)


def without_transformer_options(guards) -> list[bool]:
    return ["transformer_options" not in guard.name for guard in guards]


class SpargeSoakCount(_Node):
    """Counts the model's calls, sampler call by sampler call. Last before the sampler, so that no other node is below it."""

    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "tag": TAG}}

    def make(self, model, tag: str):
        from comfy.patcher_extension import WrappersMP

        def sampler_call(executor, *args, **kwargs):
            while len(_runs) >= MAX_TAGS and tag not in _runs:
                _runs.pop(next(iter(_runs)))
            _runs[tag].append({"number": next(_numbers), "model_calls": 0, "attention_calls": 0, "ended": False})
            out = executor(*args, **kwargs)
            _runs[tag][-1]["ended"] = True
            return out

        def model_call(executor, *args, **kwargs):
            _runs[tag][-1]["model_calls"] += 1
            return executor(*args, **kwargs)

        clone = model.clone()
        clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "sparge_soak", sampler_call)
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "sparge_soak", model_call)
        return (clone,)


def held() -> dict:
    """Bytes of memory and those of them in tensors, threads and open files of this process, once everything that nobody holds is given back."""
    import psutil

    for _ in range(2):
        gc.collect()
    if hasattr(ctypes, "CDLL") and sys.platform.startswith("linux"):
        ctypes.CDLL(None).malloc_trim(0)
    process = psutil.Process()
    files = process.num_fds() if hasattr(process, "num_fds") else process.num_handles()
    stored = {}
    for item in gc.get_objects():
        if type(item) in (torch.Tensor, torch.nn.Parameter):
            with contextlib.suppress(RuntimeError, NotImplementedError):  # what Dynamo traces with has no storage
                stored[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
    return {"bytes": process.memory_info().rss, "tensors": sum(stored.values()), "threads": process.num_threads(), "files": files}


def register() -> None:
    """GET /sparge_fixture/runs?tag=... and /sparge_fixture/held, where there is a server."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is None:
        return
    from aiohttp import web

    async def runs(request):
        return web.json_response({"runs": list(_runs.get(request.query["tag"], ()))})

    async def process(request):
        return web.json_response(held())

    server.routes.get("/sparge_fixture/runs")(runs)
    server.routes.get("/sparge_fixture/held")(process)


NODES = (SpargeSoakModel, SpargeSoakLatent, SpargeSoakOverride, SpargeSoakCompile, SpargeSoakCount)
