"""Models that torch.compile has compiled, as nodes do it."""

from __future__ import annotations

import torch

HAS_FILTERS = "guard_filter_fn" in (torch.compile.__doc__ or "")
BLOCKS = ("double_blocks", "single_blocks", "transformer_blocks", "blocks")


class Backend:
    """A backend of torch.compile that counts the graphs it compiles and those that run."""

    def __init__(self, name: str):
        from torch._dynamo.backends.registry import lookup_backend

        self.compile = lookup_backend(name)
        self.graphs = self.ran = 0

    def __call__(self, graph, inputs):
        compiled = self.compile(graph, inputs)
        self.graphs += 1

        def run(*arguments):
            self.ran += 1
            return compiled(*arguments)

        return run


def no_options(guards):
    """What compile nodes drop: guards on transformer_options."""
    return ["transformer_options" not in guard.name for guard in guards]


def compiled(patcher, backend, way: str, guard_filter=no_options, **how):
    """A clone that runs compiled: as ComfyUI's compile node does it ("whole"), as others do it ("blocks"), each also by object patches."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    how |= {"backend": backend, "options": {"guard_filter_fn": guard_filter} if HAS_FILTERS and guard_filter is not None else None}
    clone, keys = patcher.clone(), ["diffusion_model"]
    if "blocks" in way:
        model = clone.get_model_object("diffusion_model")
        keys = [f"diffusion_model.{name}.{at}" for name in BLOCKS for at in range(len(getattr(model, name, ())))]
    if "object" not in way:
        set_torch_compile_wrapper(model=clone, keys=keys, **how)
        return clone
    for key in keys:
        clone.add_object_patch(key, torch.compile(clone.get_model_object(key), **how))
    return clone
