"""Models that torch.compile has compiled.

Dynamo runs the code of an earlier trace wherever its guards hold. ComfyUI's compile node and others give it a filter that drops every guard on
transformer_options, which is where an attention override stands: code traced while none of ours was there would run on when ours is, and
never call it. What such a filter leaves is the guard on PyTorch's global state (every torch that has guard filters guards on the part of it used
here). So our model calls run under a setting of that state which others do not use, `own_code`, and Dynamo keeps two sets of code side by side.
Nothing has to be thrown away, and switching the node off and on compiles nothing a second time.

Within our set the code must fit every patch. So transformer_options has one name and one type for all of them (`open_call`), and what is on top
of the attention hook is called without being looked into (`Outside`). Each such call is a break between two compiled parts: kernels and
statistics run in no compiled code and in no CUDA graph of "reduce-overhead".
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from . import _comfy, reasons
from .recorder import Run

CALLS = "sparge_calls"
"""The entry of transformer_options with the `OpenCalls` of the model call."""

_here = threading.local()


class FullgraphError(RuntimeError):
    """The model was compiled with fullgraph, which allows no break for the override."""


@contextmanager
def own_code() -> Iterator[None]:
    """Around a model call of a patched model, on its own thread: compiled code that runs in it was traced in it.

    The setting is autocast's cache of cast weights, which is idle unless autocast is on: where a model switches that on for a part of itself, weights
    that are used twice in it are cast twice. Raises `FullgraphError` where Dynamo refuses the override because fullgraph is on.
    """
    if getattr(_here, "is_own", False):  # the wrapper of a second node on the same model
        yield
        return
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(not cached)
    _here.is_own = True
    try:
        yield
    except RuntimeError as error:
        if type(error).__name__ == "Unsupported" and any(f"{name}." in str(error) for name in ("AttentionOverride", "Outside")):
            raise FullgraphError(reasons.FULLGRAPH) from error
        raise
    finally:
        _here.is_own = False
        torch.set_autocast_cache_enabled(cached)


class OpenCalls:
    """The context of the model call for each patch, by the patch's key: an object of its own, for Dynamo guards on the keys of a dict."""

    def __init__(self, contexts: dict[str, Any]):
        self.contexts = contexts


def open_call(options: dict, key: str, context: Any) -> None:
    """Enters the context of a model call for the patch of this key in transformer_options."""
    earlier = options.get(CALLS)
    options[CALLS] = OpenCalls({**({} if earlier is None else earlier.contexts), key: context})


def call_of(options: Mapping, key: str) -> Any:
    """The context of the model call for the patch of this key, or None where there is none."""
    calls = options.get(CALLS)
    return None if calls is None else calls.contexts.get(key)


def calls_in(options: Mapping) -> list:
    """The contexts of the model call for every patch that has entered one, outermost wrapper first."""
    calls = options.get(CALLS)
    return [] if calls is None else list(calls.contexts.values())


def without_calls(options: Mapping) -> dict:
    """transformer_options in which no patch finds a model call, so that none decides or counts."""
    return {name: value for name, value in options.items() if name != CALLS}


class Outside:
    """Another node's override that leads to ours: compiled code calls it and does not look into it, as it does with ours."""

    def __init__(self, override: Callable):
        self.override = override
        self.calls = 0
        if hasattr(override, "container_function"):  # newer ComfyUI asks whether it takes tensors in containers
            self.container_function = self._in_containers

    @torch.compiler.disable
    def __call__(self, func, *args, **kwargs):
        self.calls += 1
        return self.override(func, *args, **kwargs)

    @torch.compiler.disable
    def _in_containers(self, *args, **kwargs):
        self.calls += 1
        return self.override.container_function(*args, **kwargs)


class Watch:
    """One sampler run: whether its model is compiled, and what that means for calls that never came."""

    def __init__(self, patcher: Any):
        module = _comfy.diffusion_model(patcher.model)
        held = [*_comfy.object_patches(patcher), *(module.modules() if isinstance(module, torch.nn.Module) else ())]
        self.is_compiled = _comfy.has_compile_wrapper(patcher) or any(map(_is_compiled, held))
        self.layers = 0  # the most that a model call of this run has numbered
        self._outside: Outside | None = None

    def on_top(self, found: Callable, ours: Callable) -> Callable:
        """What stands on top of the hook in a model call: `found`, which is ours or leads to it."""
        if not self.is_compiled or isinstance(found, type(ours) | Outside):
            return found
        if self._outside is None or self._outside.override is not found:
            self._outside = Outside(found)
        return self._outside

    def note(self, run: Run, total: int) -> str | None:
        """What to say of a closed run of a model with `total` layers (0: not known) where calls are missing that the compiled model has left out."""
        if not self.is_compiled or (self._outside is not None and self._outside.calls):
            return None
        if not run.calls and not run.answered_above:
            return reasons.TRACED_WITHOUT
        return reasons.LAYERS_MISSING.format(seen=self.layers, total=total) if self.layers < total else None


def _is_compiled(held: object) -> bool:
    """Whether torch.compile made this module or function, or compiled the module in place or its `forward`."""
    known = getattr(held, "__dict__", {})
    marked = any(hasattr(function, "_torchdynamo_orig_callable") for function in (held, known.get("forward")))
    return marked or "_orig_mod" in known.get("_modules", ()) or known.get("_compiled_call_impl") is not None
