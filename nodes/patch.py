"""The node SpargeAttention: checks its values, clones the model and hangs the attention override and its wrappers on the clone."""

from __future__ import annotations

from . import _comfy, _kernels, reasons, transport
from ._comfy import io
from .override import AttentionOverride
from .presets import Preset, preset_for
from .run_state import Patch, patches_of
from .settings import BY_PRESET, INPUTS, Input, Settings, check, parse

WRAPPER_KEY = "sparge_attention"


def install(model, settings: Settings, node: str | None = None):
    """A clone of `model` (a ModelPatcher) whose attention goes through the kernels while it is sampled."""
    patched = model.clone()
    patch = Patch(settings, node, AttentionOverride(_comfy.attention_override(patched)))
    _comfy.set_attention_override(patched, patch.override)
    _comfy.add_wrapper(patched, _comfy.WRAPPERS.OUTER_SAMPLE, WRAPPER_KEY, patch.outer_sample)
    _comfy.add_wrapper(patched, _comfy.WRAPPERS.APPLY_MODEL, WRAPPER_KEY, patch.apply_model)
    _comfy.add_callback(patched, _comfy.CALLBACKS.ON_PRE_RUN, WRAPPER_KEY, patch.pre_run)
    return patched


class SpargeAttention(io.ComfyNode):
    """Patches a model so that it attends only to the blocks that matter."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        widgets = [_widget(name, row) for name, row in INPUTS.items()]
        inputs = [io.Model.Input("model"), *widgets, io.Custom("SPARGE_POLICY").Input("policy", optional=True), _comfy.id_input()]
        return _comfy.schema("SpargeAttention", inputs, [io.Model.Output()])

    @classmethod
    def validate_inputs(cls, dense_blocks=None) -> bool | str:
        """Only what ComfyUI cannot check by itself: it repeats the answer for every input named here, and drops its own checks of them."""
        return check({"dense_blocks": dense_blocks}) or True

    @classmethod
    def execute(cls, model, policy=None, id="", **values) -> io.NodeOutput:
        if policy is not None and not hasattr(policy, "topk"):
            raise ValueError(f"policy must come from a node that makes one, got {policy!r}; connect such a node or leave it out")
        _comfy.check_model(model)
        row = preset_for(_comfy.diffusion_model(model.model))
        settings = parse(values | {"policy": policy}).for_model(row)
        node = _comfy.name_of(cls.hidden, id)
        before = describe(settings, getattr(model.load_device, "type", "cpu"), row, alone=not patches_of(model))
        transport.show(node, before, _comfy.clients())
        return io.NodeOutput(install(model, settings, node))


def _widget(name: str, row: Input):
    """An entry of the schema. All widgets are optional, so that a prompt saved before one was there runs as it did, and so that the front end, which
    puts optional inputs after the others, keeps their order."""
    options = {"default": row.default if row.new is None else row.new, "optional": True}
    if row.choices:
        widget = io.Combo.Input(name, options=list(row.choices), **options)
    elif row.limits is not None:
        low, high, step, _ = row.limits
        kind = io.Float if isinstance(row.default, float) else io.Int
        widget = kind.Input(name, min=low, max=high, step=step, display_mode=io.NumberDisplay.slider if row.slider else None, **options)
    else:
        widget = (io.Boolean if isinstance(row.default, bool) else io.String).Input(name, **options)
    return _comfy.mark_advanced(widget) if row.advanced else widget


def describe(settings: Settings, device_type: str, row: Preset | None = None, alone: bool = True) -> str:
    """What the node says before the first run: the backend, what it cannot profit from, and the preset in force or on offer."""
    if settings.is_reference:
        return reasons.REFERENCE if alone else reasons.DENSE_HERE
    choice, preset = _kernels.backend_for(device_type, settings.backend), settings.preset_line() or _offer(settings, row)
    line = f"backend {choice.backend}" if choice.backend else f"stays dense on this device: {choice.why_not}"
    if choice.backend and not choice.skips_pv:
        line += ": pvthreshd has no effect here (of a kept block everything is computed)"
    return f"{line}; {preset}" if preset else line


def _offer(settings: Settings, row: Preset | None) -> str:
    if row is None or all(getattr(settings, name) == getattr(row, name) for name in BY_PRESET if name != "topk"):
        return ""
    return f"{Settings(preset='auto').for_model(row).preset_line().replace('preset', 'preset for', 1)} (choose auto)"
