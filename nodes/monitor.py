"""The node SpargeMonitor: names itself on the model, so that every run of it sends the browser what happens, step by step."""

from __future__ import annotations

from . import _comfy, reasons, transport
from ._comfy import io
from .patch import patches_of
from .telemetry import runs

WRAPPER_KEY = "sparge_monitor"


class Watch:
    """One SpargeMonitor on one model; shared by all clones of that model.

    Messages come from the runs that Sparge Attention opens (`Patch.outer_sample`). On a model without that node none is opened, and the panel would
    wait for ever: the first monitor then sends one message that says so.
    """

    def __init__(self, node: str):
        self.node = node

    def outer_sample(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        """Wrapper around one sampler call."""
        patcher = executor.class_obj.model_patcher
        monitors = _comfy.monitors_of(patcher)
        if self.node == next(iter(monitors), None) and not patches_of(patcher):
            run = runs.open_unpatched(node=self.node, owner=self.node, metadata={}, sigmas=[], monitors=monitors)  # its steps are not followed
            run.warning, run.state, run.clients = reasons.NO_NODE, "done", _comfy.clients()
            transport.publish(run)
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)


class SpargeMonitor(io.ComfyNode):
    """Passes the model through and shows live what Sparge Attention does to it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [io.Model.Input("model"), io.Boolean.Input("measure_dense", default=True), _comfy.id_input()]
        # ComfyUI's cache gives two nodes of one class and equal inputs the same output. Here that output names the node that made it: the second
        # monitor would get a model that names the first, and never a message of its own.
        return _comfy.schema("SpargeMonitor", inputs, [io.Model.Output()], not_idempotent=True)

    @classmethod
    def execute(cls, model, measure_dense=True, id="") -> io.NodeOutput:
        _comfy.check_model(model)
        if not isinstance(measure_dense, bool):
            raise ValueError(f"measure_dense must be true or false, got {measure_dense!r}; connect a boolean")
        return io.NodeOutput(watched(model, _comfy.name_of(cls.hidden, id) or "script", measure_dense))


def watched(model, node: str, measures: bool = True):
    """A clone of `model` (a ModelPatcher) whose runs send their messages to the monitor of the name `node` (`_comfy.name_of`)."""
    clone = model.clone()
    _comfy.add_monitor(clone, node, measures)
    _comfy.add_wrapper(clone, _comfy.WRAPPERS.OUTER_SAMPLE, WRAPPER_KEY, Watch(node).outer_sample)
    return clone
