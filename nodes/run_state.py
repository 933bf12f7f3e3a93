"""What a patched model remembers while it is sampled: the open run, its step, and one context for every model call.

The wrappers here open and close a run around each sampler call and hand every model call's facts to the attention override.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable

from . import _comfy, _kernels, geometry, presets, reasons, telemetry, transport

logger = logging.getLogger("sparge_attention")
_numbers = itertools.count(1)

SAME = 1 + 1e-5
"""Sigmas this close are one: schedules are float32, percentages of them are not, and a step may begin just where the window does."""


class Patch:
    """One SpargeAttention node on one model; shared by all clones of that model.

    settings : the frozen `Settings` of the node; node : its id in the graph, or None.
    """

    def __init__(self, settings, node: str | None):
        self.settings = settings
        self.node = node
        self.key = f"sparge_{next(_numbers)}"
        self.override = None  # set by patch.install
        self.runs: list[RunState] = []  # open runs, innermost last
        self.total_layers: int | None = None

    @property
    def run(self) -> RunState | None:
        return self.runs[-1] if self.runs else None

    def outer_sample(self, executor, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, *args, **kwargs):
        """Wrapper around one sampler call."""
        state = RunState(self, executor.class_obj.model_patcher, sigmas.tolist())
        self.runs.append(state)
        transport.publish(state.telemetry)
        try:
            return executor(noise, latent_image, sampler, sigmas, denoise_mask, callback, *args, **kwargs)
        except BaseException as error:
            state.telemetry.note = reasons.ENDED_EARLY.format(error=type(error).__name__)
            state.telemetry.state = "failed"
            raise
        finally:
            self.runs.remove(state)
            state.close()

    def apply_model(self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **conds):
        """Wrapper around one model call: makes the context that the override reads, and puts the override back on top where it was replaced."""
        options = dict(transformer_options or {})
        if self.run is not None:
            sigma = options.get("sigmas")
            self.run.at(t if sigma is None else sigma)
            model = _comfy.diffusion_model(executor.class_obj)
            shape = _latent_shape(x, conds)
            context = 0 if c_crossattn is None else c_crossattn.shape[1]
            call = CallContext(self.run, geometry.ModelCall(model, shape, context, conds, options))
            options[self.key] = call
            found = options.get(_comfy.KEY)
            if not leads_to(found, self.override):
                call.adopted = found
                self.run.telemetry.warning = reasons.REPLACED
                options[_comfy.KEY] = self.override
            try:
                return executor(x, t, c_concat, c_crossattn, control, options, **conds)
            finally:
                call.finish()
        return executor(x, t, c_concat, c_crossattn, control, options, **conds)


def _latent_shape(x, conds) -> tuple[int, ...]:
    """Newer versions pack several latents into one; the first is the picture or video."""
    packed = conds.get("latent_shapes")
    if packed is not None and len(packed) and not isinstance(packed[0], int):
        return tuple(packed[0])
    return tuple(x.shape)


class RunState:
    """One sampler call: where in the schedule it is, and the telemetry it fills.

    The sigma of a model call says its step. It is read from the device once a model call (not once an attention call): samplers that evaluate
    the model between two steps, or call back in the middle of one, leave nothing else to go by.
    """

    def __init__(self, patch: Patch, patcher, sigmas: list[float]):
        self.patch = patch
        self.settings = patch.settings
        self.step = 0
        self.sigma = sigmas[0] if sigmas else 0.0
        self.sigmas = sigmas
        self.start_sigma = _comfy.percent_to_sigma(patcher, self.settings.start_percent)
        self.few_steps = False
        if "start_percent" in self.settings.from_preset:
            latest = few_steps_sigma(sigmas, lambda percent: _comfy.percent_to_sigma(patcher, percent))
            self.few_steps = latest is not None and any(self.start_sigma * SAME < sigma < latest for sigma in sigmas[:-1])
            self.start_sigma = latest if self.few_steps else self.start_sigma
        # To the end means to the end: a rising schedule has model calls at sigma 0, which no percentage of a falling one is below.
        self.end_sigma = _comfy.percent_to_sigma(patcher, self.settings.end_percent) if self.settings.end_percent < 1 else -math.inf
        model = _comfy.diffusion_model(patcher.model)
        self.family = geometry.family_of(model)
        device = getattr(patcher, "load_device", None)
        self.telemetry = telemetry.runs.open(
            node=str(patch.node), owner=patch.key, sigmas=sigmas, monitors=_comfy.monitors_of(patcher),
            facts={
                "model": type(getattr(model, "_orig_mod", model)).__name__,
                "family": self.family.name if self.family else None,
                "backend": _kernels.backend_for(getattr(device, "type", "cpu"), self.settings.backend)[0],
                "device": str(device),
                "settings": self.settings.shown() | ({"preset": f"{self.settings.preset.label} ({reasons.FEW_STEPS})"} if self.few_steps else {}),
            },
        )  # fmt: skip
        self.telemetry.total_layers = patch.total_layers or 0

    @property
    def steps(self) -> int:
        return max(1, len(self.sigmas) - 1)

    @property
    def percent(self) -> float:
        """How much of this run's schedule is done, 0..1."""
        return min(1.0, self.step / self.steps)

    def in_window(self) -> bool:
        return self.end_sigma * SAME < self.sigma <= self.start_sigma * SAME

    def at(self, sigma) -> None:
        """A model call at `sigma` (number, or tensor with a value per batch element): the last step that starts at it or above."""
        self.sigma = float(sigma.max())
        near = 1e-3 * max(self.sigmas, default=0.0)  # some samplers move the first and last sigma by a little
        falling = not self.sigmas or self.sigmas[0] >= self.sigmas[-1]  # "unsampling" schedules rise
        begun = (start >= self.sigma - near if falling else start <= self.sigma + near for start in self.sigmas[:-1])
        step = max((i for i, has_begun in enumerate(begun) if has_begun), default=0)
        if step != self.step:
            self.telemetry.end_step()
            self.telemetry.finished = max(self.telemetry.finished, step)
            transport.publish(self.telemetry)
        self.step = step

    def close(self) -> None:
        sampled, failure = self.telemetry.state != "failed", None
        try:
            self.telemetry.close()
        except RuntimeError as error:
            failure = error
            self.telemetry.abandon(reasons.ENDED_EARLY.format(error=type(error).__name__))
        if self.telemetry.note is not None:
            pass  # it ended early, which says nothing about who answers the model's calls
        elif self.family is not None and self.family.parts is None:
            self.telemetry.note = reasons.NEVER_ROUTED.format(family=self.family.name)
        elif self.telemetry.calls == 0 and self.sigmas:
            self.telemetry.note = reasons.NOTHING_SEEN
        if self.telemetry.state == "done":
            self.telemetry.finished = self.telemetry.steps
        telemetry.runs.add(self.telemetry)
        transport.publish(self.telemetry)
        summary = "; ".join(part for part in (self.telemetry.summary(), self.settings.preset_line(self.few_steps)) if part)
        logger.info("Sparge Attention, run %d: %s", self.telemetry.number, summary)
        _comfy.show_text(self.patch.node, summary)
        if failure is not None and sampled:  # else the sampler's own error is on its way, and is the one to see
            raise failure


class CallContext:
    """One model call: numbers its blocks, finds its layouts, and guards against overrides that call each other in a circle."""

    def __init__(self, run: RunState, model_call: geometry.ModelCall):
        self.run = run
        self.model_call = model_call
        self.depth = 0
        self.adopted = None
        self.layers = 0
        self._layouts: dict = {}

    def layout(self, tokens: int, options) -> geometry.Layout | None:
        key = (tokens, tuple(options.get("activations_shape") or ()))
        if key not in self._layouts:
            self._layouts[key] = geometry.layout(self.run.family, self._with(options), tokens)
        return self._layouts[key]

    def next_layer(self, tokens: int, options) -> int | None:
        """The number of the block whose attention call this is, in call order; None for a call that is not a block's (a text refiner's)."""
        grid = geometry.grid_tokens(self.run.family, self._with(options))
        if grid is not None and tokens < grid and self.layout(tokens, options) is None:
            return None
        self.layers += 1
        return self.layers - 1

    def _with(self, options) -> geometry.ModelCall:
        call = self.model_call
        return geometry.ModelCall(call.model, call.x_shape, call.context_tokens, call.conds, options)

    def finish(self) -> None:
        if self.layers:
            patch = self.run.patch
            patch.total_layers = self.layers if patch.total_layers is None else max(patch.total_layers, self.layers)
            self.run.telemetry.total_layers = patch.total_layers


def few_steps_sigma(sigmas: list[float], percent_to_sigma: Callable[[float], float]) -> float | None:
    """The sigma from which a few-step run is sparse at the latest: past its schedule's first step. None for longer schedules.

    A run may be a part of its schedule (the samplers of a two-stage workflow, denoise below 1): 5 steps over a quarter of it are a part of 20, and
    only the part that begins the schedule has its first step. Schedules whose steps are no even shares of it are judged by the part that is seen.
    """
    called = sorted(sigmas[:-1], reverse=True)
    if not called:
        return None

    def share(sigma: float) -> float:  # the inverse of percent_to_sigma, which falls
        low, high = 0.0, 1.0
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (middle, high) if percent_to_sigma(middle) > sigma else (low, middle)
        return (low + high) / 2

    before, covered = share(max(sigmas)), share(min(sigmas)) - share(max(sigmas))
    steps = round(len(called) / max(covered, 1e-6))
    if steps > presets.FEW_STEPS:
        return None
    dense = 1 if steps > 1 and before * steps < 0.5 else 0
    # Above the sigma of the first step that is to be sparse, by as little as samplers move the first and last ones.
    return called[dense] + 1e-3 * called[0] if dense < len(called) else 0.0


def leads_to(override, ours) -> bool:
    """Whether calling `override` may reach `ours`: it is ours, or it holds ours in an attribute or a closure, a few links deep."""
    seen, front = set(), [override]
    for _ in range(6):
        following = []
        for item in front:
            if item is ours:
                return True
            if item is None or id(item) in seen or not callable(item):
                continue
            seen.add(id(item))
            following += _held_by(item)
        front = following
    return any(item is ours for item in front)


def _held_by(item) -> list:
    held = [content for cell in getattr(item, "__closure__", None) or () for content in _contents(cell)]
    held += [*(getattr(item, "__defaults__", None) or ()), *(getattr(item, "__kwdefaults__", None) or {}).values()]
    held += [getattr(item, "func", None), *getattr(item, "args", ())] if type(item).__name__ == "partial" else []
    owner = getattr(item, "__self__", item)
    held += list(getattr(owner, "__dict__", {}).values())
    return held


def _contents(cell) -> tuple:
    try:
        return (cell.cell_contents,)
    except ValueError:  # a name that its function has not set yet
        return ()


def layer_listed(layer: int, listed: tuple[tuple[int, int], ...], total: int | None) -> bool | None:
    """Whether a block is in dense_blocks ranges; None when that hangs on negative numbers and the total is not known yet."""
    unknown = False
    for first, last in listed:
        if (first < 0 or last < 0) and total is None:
            unknown = True
            continue
        low, high = (n + total if n < 0 else n for n in (first, last))
        if low <= layer <= high:
            return True
    return None if unknown else False
