"""The node SpargeAttention: checks its values, clones the model and hangs the attention override and its wrappers on the clone."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields, replace

from . import _comfy, _kernels, reasons
from ._comfy import io
from .override import AttentionOverride
from .presets import Preset, preset_for
from .run_state import Patch

TOKEN_ORDERS = ("auto", *_kernels.ORDER_KINDS)
BACKENDS = _kernels.BACKEND_NAMES  # the same list on every machine: a saved workflow must load anywhere
PRESET_CHOICES = ("auto", "off")
PRESET_INPUTS = ("start_percent", "end_percent", "dense_blocks")  # what a preset may fill in
WRAPPER_KEY = "sparge_attention"

RARELY_CHANGED = ("pvthreshd", "simthreshd1", "cdfthreshd", "token_order", "compensate", "protect_references", "backend")

LIMITS = {
    "topk": (0.05, 1.0, "use 1 for dense attention, 0.5 to keep half of the blocks"),
    "pvthreshd": (1.0, 50.0, "15 is a good start, 50 is off in practice"),
    "start_percent": (0.0, 1.0, "0 starts with the first step"),
    "end_percent": (0.0, 1.0, "1 ends with the last step"),
    "min_tokens": (0, 1 << 24, "4096 is a good start"),
    "simthreshd1": (-1.0, 1.0, "-0.1 switches the judge off"),
    "cdfthreshd": (0.0, 1.0, "0 switches it off"),
}

TOOLTIPS = {
    "model": "The model from the loader, after any LoRA.",
    "topk": "Share of the key blocks that each block of queries keeps. Lower is faster and less exact; 1 is dense.",
    "pvthreshd": "Also skips the value half of tiles whose scores lie this far (log2 units) below the running maximum. Lower skips more; 50 is off. "
    "Has no effect on the CPU (torch) backend.",
    "start_percent": "Sparse from this share of the schedule on; earlier steps, which settle the composition, stay dense.",
    "end_percent": "Dense again after this share of the schedule.",
    "dense_blocks": "Blocks that always stay dense, in call order from 0: '0, 3-5, -1'. Negative numbers count from the end.",
    "min_tokens": "Calls with fewer tokens than this stay dense: short sequences gain nothing.",
    "simthreshd1": "A block whose tokens are less alike than this is never skipped. Negative: off.",
    "cdfthreshd": "Also keep blocks until this share of the predicted attention is covered, so that hard heads keep more. 0: off.",
    "token_order": "How tokens are grouped into blocks. auto: 3-D tiles up to topk 0.15, rows above.",
    "compensate": "Let skipped blocks count with their average instead of not at all.",
    "protect_references": "Never skip reference images (Kontext, Qwen-Image-Edit).",
    "backend": "auto takes the fastest one that runs here, or leaves the call dense and says so. torch works everywhere and is faster than dense "
    "attention on a CPU only. cuda needs an NVIDIA GPU (RTX 30 series, A100 or newer).",
    "policy": "A policy that sets the density by step and block.",
    "block_mask": "A fixed pattern instead of the selection.",
    "preset": "auto: start_percent, end_percent and dense_blocks take what is published for the model, each where it is left at its default; in "
    "schedules of 8 steps or fewer (at denoise 1) at most the first step stays dense. off: everything as it is set here.",
}


@dataclass(frozen=True)
class Settings:
    """The node's values, checked. `dense_blocks` holds (first, last) ranges, negative numbers counted from the end.

    preset : the row in force, or None; from_preset : the inputs whose values are the row's.
    """

    topk: float = 0.5
    pvthreshd: float = 15.0
    start_percent: float = 0.0
    end_percent: float = 1.0
    dense_blocks: tuple[tuple[int, int], ...] = ()
    min_tokens: int = 4096
    simthreshd1: float = -0.1
    cdfthreshd: float = 0.0
    token_order: str = "auto"
    compensate: bool = False
    protect_references: bool = False
    backend: str = "auto"
    policy: object = None
    block_mask: object = None
    preset: Preset | None = None
    from_preset: tuple[str, ...] = ()

    def density(self, run, layer: int) -> _kernels.Density | None:
        """What block `layer` keeps at this point of `run`; None: dense. A policy's `topk(run, layer)` wins over the slider."""
        topk = self.topk
        if self.policy is not None:
            topk = self.policy.topk(run, layer)
            if topk is None:
                return None
        return _kernels.Density(topk, self.cdfthreshd or None, self.simthreshd1, self.pvthreshd, self.compensate)

    def masked(self, density: _kernels.Density, plan) -> _kernels.Density:
        """`density` with the fixed mask that the block_mask input builds for this order plan."""
        return replace(density, block_mask=self.block_mask.build(plan))

    def shown(self) -> dict:
        """The plain values, for reports."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("policy", "block_mask", "from_preset")}
        return plain | {"dense_blocks": blocks_text(self.dense_blocks), "preset": self.preset.label if self.preset else "none"}

    def with_preset(self, row: Preset) -> Settings:
        """These settings with the row's values where they are at their defaults; the user's own win."""
        default, given = Settings(), row_values(row)
        taken = [name for name in PRESET_INPUTS if getattr(self, name) == getattr(default, name) != given[name]]
        if "start_percent" in taken and given["start_percent"] >= self.end_percent:
            taken.remove("start_percent")  # the user's end_percent would leave no window at all
        return replace(self, preset=row, from_preset=tuple(taken), **{name: given[name] for name in taken})

    def preset_line(self, few_steps: bool = False) -> str:
        """The preset and the values in force: "preset Mochi 1: start_percent 0.24"; a value of the user's beside the preset's. Without one: ""."""
        if self.preset is None:
            return ""
        given, parts = row_values(self.preset), []
        for name in PRESET_INPUTS:
            mine, rows = getattr(self, name), given[name]
            if mine != getattr(Settings, name) or mine != rows:
                few = f" ({reasons.FEW_STEPS})" if few_steps and name == "start_percent" else ""
                parts.append(f"{name} {_told(mine)}{few}" + ("" if mine == rows else f" (yours; preset: {_told(rows)})"))
        return f"preset {self.preset.label}: {', '.join(parts)}"


def row_values(row: Preset) -> dict:
    """What a preset decides, in the form of `Settings`."""
    return {"start_percent": row.start_percent, "end_percent": row.end_percent, "dense_blocks": parse_blocks(row.dense_blocks)}


def blocks_text(ranges: tuple[tuple[int, int], ...]) -> str:
    """The inverse of `parse_blocks`."""
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


def _told(value) -> str:
    return f"{value:g}" if isinstance(value, float) else blocks_text(value) or "empty"


def parse_blocks(text: str) -> tuple[tuple[int, int], ...]:
    """ "0, 3-5, -1" -> ((0, 0), (3, 5), (-1, -1)); commas, spaces and semicolons separate.

    Raises
    ------
    ValueError
        For anything that is not a block number or a range of them.
    """
    ranges = []
    for entry in re.split(r"[,;\s]+", text.strip()):
        if not entry:
            continue
        match = re.fullmatch(r"(-?\d+)(?:-(-?\d+))?", entry)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not match or ((first < 0) == (last < 0) and first > last):
            raise ValueError(f"dense_blocks must hold block numbers and ranges such as '0, 3-5, -1', got {entry!r}; correct it or leave it empty")
        ranges.append((first, last))
    return tuple(ranges)


def check(values: dict) -> str | None:
    """What is wrong with the node's plain values, as a sentence; None when nothing is. Values that come over a link are absent or None."""
    for name, (low, high, remedy) in LIMITS.items():
        value = values.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not low <= value <= high:
            return f"{name} must be {low:.10g} to {high:.10g}, got {value!r}; {remedy}"
    if isinstance(values.get("min_tokens"), float):
        return f"min_tokens must be a whole number, got {values['min_tokens']!r}; round it"
    for name in ("compensate", "protect_references"):
        if not isinstance(values.get(name, False), bool):
            return f"{name} must be true or false, got {values[name]!r}; connect a boolean"
    for name, choices in (("token_order", TOKEN_ORDERS), ("backend", BACKENDS), ("preset", PRESET_CHOICES)):
        if values.get(name) is not None and values[name] not in choices:
            return f"{name} must be one of {', '.join(choices)}, got {values[name]!r}"
    start, end = values.get("start_percent"), values.get("end_percent")
    if start is not None and end is not None and start > end:
        return f"start_percent must not be above end_percent, got {start:g} and {end:g}; swap them"
    blocks = values.get("dense_blocks") or ""
    if not isinstance(blocks, str):
        return f"dense_blocks must be text such as '0, 3-5, -1', got {blocks!r}; convert it to a string"
    try:
        parse_blocks(blocks)
    except ValueError as error:
        return str(error)
    return None


def install(model, settings: Settings, node: str | None = None):
    """A clone of `model` (a ModelPatcher) whose attention goes through the kernels while it is sampled."""
    patched = model.clone()
    patch = Patch(settings, node)
    patch.override = AttentionOverride(patch, _comfy.attention_override(patched))
    _comfy.set_attention_override(patched, patch.override)
    _comfy.add_wrapper(patched, _comfy.WRAPPERS.OUTER_SAMPLE, WRAPPER_KEY, patch.outer_sample)
    _comfy.add_wrapper(patched, _comfy.WRAPPERS.APPLY_MODEL, WRAPPER_KEY, patch.apply_model)
    return patched


def patches_of(model) -> list[Patch]:
    """The patches that SpargeAttention nodes have put on a model, first to last."""
    owners = (getattr(function, "__self__", None) for function in _comfy.wrappers_of(model, _comfy.WRAPPERS.OUTER_SAMPLE))
    return [owner for owner in owners if isinstance(owner, Patch)]


class SpargeAttention(io.ComfyNode):
    """Patches a model so that it attends only to the blocks that matter."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        slider = io.NumberDisplay.slider
        return io.Schema(
            node_id="SpargeAttention",
            display_name="Sparge Attention",
            category="model_patches/sparge",
            description="Speeds up sampling: the model attends only to the blocks of tokens that matter, chosen anew in every call. Put it between "
            "the loader (and LoRAs) and the sampler. It says after each run what it skipped and why anything stayed dense.",
            inputs=_comfy.mark_advanced([
                io.Model.Input("model", tooltip=TOOLTIPS["model"]),
                io.Float.Input("topk", default=0.5, min=0.05, max=1.0, step=0.01, display_mode=slider, tooltip=TOOLTIPS["topk"]),
                io.Float.Input("pvthreshd", default=15.0, min=1.0, max=50.0, step=0.5, display_mode=slider, tooltip=TOOLTIPS["pvthreshd"]),
                io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.01, tooltip=TOOLTIPS["start_percent"]),
                io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=TOOLTIPS["end_percent"]),
                io.String.Input("dense_blocks", default="", tooltip=TOOLTIPS["dense_blocks"]),
                io.Int.Input("min_tokens", default=4096, min=0, max=1 << 24, step=256, tooltip=TOOLTIPS["min_tokens"]),
                io.Float.Input("simthreshd1", default=-0.1, min=-1.0, max=1.0, step=0.05, tooltip=TOOLTIPS["simthreshd1"]),
                io.Float.Input("cdfthreshd", default=0.0, min=0.0, max=1.0, step=0.01, tooltip=TOOLTIPS["cdfthreshd"]),
                io.Combo.Input("token_order", options=list(TOKEN_ORDERS), default="auto", tooltip=TOOLTIPS["token_order"]),
                io.Boolean.Input("compensate", default=False, tooltip=TOOLTIPS["compensate"]),
                io.Boolean.Input("protect_references", default=False, tooltip=TOOLTIPS["protect_references"]),
                io.Combo.Input("backend", options=list(BACKENDS), default="auto", tooltip=TOOLTIPS["backend"]),
                io.Custom("SPARGE_POLICY").Input("policy", optional=True, tooltip=TOOLTIPS["policy"]),
                io.Custom("SPARGE_BLOCK_MASK").Input("block_mask", optional=True, tooltip=TOOLTIPS["block_mask"]),
                # Optional: prompts saved before it was there run as they did.
                io.Combo.Input("preset", options=list(PRESET_CHOICES), default="auto", optional=True, tooltip=TOOLTIPS["preset"]),
            ], RARELY_CHANGED),
            outputs=[io.Model.Output(display_name="model")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, dense_blocks=None) -> bool | str:
        """Only what ComfyUI cannot check by itself: it repeats the answer for every input named here, and drops its own checks of them."""
        return check({"dense_blocks": dense_blocks}) or True

    @classmethod
    def execute(cls, model, dense_blocks="", preset="off", **values) -> io.NodeOutput:
        absent = [name for name, value in (values | {"preset": preset}).items() if value is None and name not in ("policy", "block_mask")]
        if absent:
            raise ValueError(f"{absent[0]} must have a value, got None; set it on the node or connect it")
        for name, method in (("policy", "topk"), ("block_mask", "build")):
            if values.get(name) is not None and not hasattr(values[name], method):
                raise ValueError(f"{name} must come from a node that makes one, got {values[name]!r}; connect such a node or leave it out")
        if not hasattr(model, "model_options"):
            raise ValueError(f"model must be a ComfyUI model, got {model!r}; connect a loader's MODEL output")
        wrong = check(values | {"dense_blocks": dense_blocks, "preset": preset})
        if wrong is not None:
            raise ValueError(wrong)
        settings = Settings(dense_blocks=parse_blocks(dense_blocks), **values)
        row = preset_for(_comfy.diffusion_model(model.model))
        if row is not None and preset == "auto":
            settings = settings.with_preset(row)
        node = cls.hidden.unique_id if cls.hidden is not None else None
        _comfy.show_text(node, describe(settings, getattr(model.load_device, "type", "cpu"), row))
        return io.NodeOutput(install(model, settings, node))


def describe(settings: Settings, device_type: str, row: Preset | None = None) -> str:
    """What the node says before the first run: the backend, what it cannot profit from, and the preset in force or on offer."""
    return "; ".join(part for part in (_backend_line(settings, device_type), settings.preset_line() or _offer(settings, row)) if part)


def _offer(settings: Settings, row: Preset | None) -> str:
    if row is None or all(getattr(settings, name) == value for name, value in row_values(row).items()):
        return ""
    return f"{Settings().with_preset(row).preset_line().replace('preset', 'preset for', 1)} (choose auto)"


def _backend_line(settings: Settings, device_type: str) -> str:
    backend, why = _kernels.backend_for(device_type, settings.backend)
    if backend is None:
        return f"stays dense on this device: {why}"
    if not _kernels.backend_facts(backend).skips_pv:
        return f"backend {backend}: pvthreshd has no effect here (whole blocks are skipped, never half of one)"
    return f"backend {backend}"
