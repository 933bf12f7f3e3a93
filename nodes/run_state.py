"""What a patched model remembers while it is sampled: the open run, its step, and one context for every model call.

The wrappers here open and close a run around each sampler call and hand what is known of every model call to the attention override.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, NamedTuple

from . import _comfy, _kernels, compiled, geometry, reasons, remarks, schedule, telemetry, transport
from .chain import leads_to
from .pace import Pace
from .settings import Settings, listing_none, parse_blocks
from .speedup import Instead, Plan

logger = logging.getLogger("sparge_attention")


class Patch:
    """One SpargeAttention node on one model; shared by all clones of that model.

    settings : the node's; node : its name (`_comfy.name_of`), or None; override : the `AttentionOverride` on the model, which knows of no run by
    itself: it finds the model call that it is in under its `key` in transformer_options.
    """

    def __init__(self, settings: Settings, node: str | None, override: Any):
        self.settings = settings
        self.node = node
        self.override = override
        self.key: str = override.key
        self.runs: list[RunState] = []  # open runs, innermost last
        self.total_layers: int | None = None

    def __deepcopy__(self, memo):
        """Nodes copy transformer_options deeply, in which our wrappers stand: every copy counts in the same run."""
        return self

    @property
    def run(self) -> RunState | None:
        return self.runs[-1] if self.runs else None

    def outer_sample(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        """Wrapper around one sampler call."""
        state = RunState(self, executor.class_obj.model_patcher, sigmas.tolist())
        self.runs.append(state)
        transport.publish(state.telemetry)
        try:
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        except BaseException as error:
            stopped = isinstance(error, _comfy.Interrupted)
            state.telemetry.note = reasons.STOPPED if stopped else reasons.ENDED_EARLY.format(error=type(error).__name__)
            state.telemetry.state = "failed"
            raise
        finally:
            self.runs.remove(state)
            state.close()

    def pre_run(self, patcher) -> None:
        """ComfyUI calls this for a model that it is going to sample. Of a guider's two models the first one's wrappers alone are called: the second
        has no run of ours then."""
        if self.run is None:
            logger.info("Sparge Attention: %s", reasons.SECOND_MODEL)
            transport.show(self.node, reasons.SECOND_MODEL, _comfy.clients())

    def apply_model(self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **conds):
        """Wrapper around one model call: makes the context that the override reads, and puts the override back on top where it was replaced."""
        options = dict(transformer_options or {})
        if self.run is None:
            with compiled.own_code():
                return executor(x, t, c_concat, c_crossattn, control, options, **conds)
        sigma = options.get("sigmas")
        moment = self.run.at(t if sigma is None else sigma)
        model = _comfy.diffusion_model(executor.class_obj)
        context = 0 if c_crossattn is None else c_crossattn.shape[1]
        call = CallContext(self.run, geometry.ModelCall(model, _latent_shape(x, conds), context, conds, options), moment)
        compiled.open_call(options, self.key, call)
        found = options.get(_comfy.KEY)
        if not leads_to(found, self.override):
            call.adopted = found
            self.run.telemetry.warning = reasons.REPLACED
            found = self.override
        options[_comfy.KEY] = self.run.compiled.on_top(found, self.override)
        call.find_below()
        with compiled.own_code():
            out = executor(x, t, c_concat, c_crossattn, control, options, **conds)
        call.finish()  # not where it failed: the last layer that it came to is not the model's last
        return out


class Moment(NamedTuple):
    """Where in its schedule a model call is."""

    step: int
    sigma: float


def _latent_shape(x, conds) -> tuple[int, ...]:
    """Newer versions pack several latents into one; the first is the picture or video."""
    packed = conds.get("latent_shapes")
    if packed is not None and len(packed) and not isinstance(packed[0], int):
        return tuple(packed[0])
    return tuple(x.shape)


def patches_of(model) -> list[Patch]:
    """The patches that SpargeAttention nodes have put on a model, first to last."""
    owners = (getattr(function, "__self__", None) for function in _comfy.wrappers_of(model, _comfy.WRAPPERS.OUTER_SAMPLE))
    return [owner for owner in owners if isinstance(owner, Patch)]


class RunState:
    """One sampler call: where in the schedule it is, and the telemetry it fills.

    The sigma of a model call says its step. It is read from the device once a model call (not once an attention call): samplers that evaluate
    the model between two steps, or call back in the middle of one, leave nothing else to go by.
    """

    def __init__(self, patch: Patch, patcher, sigmas: list[float]):
        self.patch = patch
        self.settings = patch.settings
        self.dense_layers = parse_blocks(self.settings.dense_blocks)
        self.step = 0
        self.sigma = sigmas[0] if sigmas else 0.0
        self.sigmas = sigmas

        def percent_to_sigma(percent: float) -> float:
            return _comfy.percent_to_sigma(patcher, percent)

        self.window = schedule.window(self.settings.start_percent, self.settings.end_percent, percent_to_sigma)
        few = schedule.few_steps_window(self.window, sigmas, percent_to_sigma) if "start_percent" in self.settings.own else None
        self.few_steps, self.window = few is not None, few or self.window
        model = _comfy.diffusion_model(patcher.model)
        self.family = geometry.family_of(model)
        device = getattr(patcher, "load_device", None)
        shown = self.settings.shown()
        self.telemetry = telemetry.runs.open(
            node=str(patch.node),
            owner=patch.key,
            sigmas=sigmas,
            monitors=_comfy.monitors_of(patcher),
            metadata={
                "model": type(getattr(model, "_orig_mod", model)).__name__,
                "family": self.family.name if self.family else None,
                "backend": _kernels.backend_for(getattr(device, "type", "cpu"), self.settings.backend).backend,
                "device": str(device),
                "settings": shown | ({"preset": f"{shown['preset']} ({reasons.FEW_STEPS})"} if self.few_steps else {}),
            },
        )
        self.telemetry.total_layers = patch.total_layers or 0
        self.compiled = compiled.Watch(patcher)
        self.telemetry.clients = _comfy.clients()
        alone = all(other is patch for other in patches_of(patcher))
        self.reference = (reasons.REFERENCE if alone else reasons.DENSE_HERE) if self.settings.is_reference else None
        self.telemetry.note = self.reference
        self.pace = Pace(self.settings, self.telemetry.monitors)
        self.telemetry.plan = Plan([step for step, sigma in enumerate(sigmas[:-1]) if self.window.holds(sigma)])

    def at(self, sigma) -> Moment:
        """A model call at `sigma`, a tensor with a value per batch element. Of threads that come to a step together the first ends the one before."""
        highest = float(sigma.max())
        moment = self.step, self.sigma = Moment(schedule.step_at(highest, self.sigmas), highest)
        if self.telemetry.reach(moment.step):
            self.telemetry.end_step()
            transport.publish(self.telemetry)
        return moment

    def close(self) -> None:
        sampled, failure = self.telemetry.state != "failed", None
        try:
            self.telemetry.close()
            if sampled and (slower := self.pace.learn(self.telemetry.against_dense)):
                self.telemetry.say(reasons.SLOWER_FROM_NOW, what=slower)
        except RuntimeError as error:
            failure = error
            self.telemetry.abandon(reasons.ENDED_EARLY.format(error=type(error).__name__))
        if self.telemetry.state == "failed":
            pass  # it ended early, which says nothing about who answers the model's calls
        elif self.family is not None and self.family.parts is None:
            self.telemetry.note = reasons.NEVER_ROUTED.format(family=self.family.name)
        elif len(self.sigmas) > 1 and (missing := self.compiled.note(self.telemetry, self.patch.total_layers or 0)):
            self._add_note(missing)
        elif self.telemetry.calls == 0 and len(self.sigmas) > 1:
            self.telemetry.note = reasons.NOTHING_SEEN
        if self.telemetry.answered_above:
            self._add_note(reasons.ANSWERED_ABOVE.format(n=self.telemetry.answered_above))
        total = self.patch.total_layers
        if total and self.telemetry.sparse_calls and (entries := listing_none(self.settings.dense_blocks, total)):
            self._add_note(reasons.LISTS_NONE.format(entries=entries, total=total))
        if self.telemetry.state == "done":
            self.telemetry.finished = self.telemetry.steps
        telemetry.runs.add(self.telemetry)
        transport.publish(self.telemetry)
        said = remarks.summary(self.telemetry), self.window.dense_steps(self.sigmas), self.settings.preset_line(self.few_steps)
        summary = "; ".join(part for part in said if part)
        logger.info("Sparge Attention, run %d: %s", self.telemetry.number, summary)
        transport.show(self.patch.node, summary, self.telemetry.clients)
        try:
            if failure is not None and sampled:  # else the sampler's own error is on its way, and is the one to see
                raise failure
        finally:
            failure = None  # its traceback leads to this frame: the two would keep the model until Python looks for such circles

    def _add_note(self, note: str) -> None:
        self.telemetry.note = "; ".join(filter(None, (self.telemetry.note, note)))


class CallContext:
    """One model call: numbers its layers, finds the spans of its sequences, and guards against overrides that call each other in a circle.

    step, sigma : its own; threads that sample together are not always at the same one. instead : what answers its dense calls, once asked.
    """

    def __init__(self, run: RunState, model_call: geometry.ModelCall, moment: Moment | None = None):
        self.run = run
        self.step, self.sigma = moment or (run.step, run.sigma)
        self.instead: Instead | None = None
        self.model_call = model_call
        self.depth = 0
        self.adopted = None
        self.layers = 0
        self.below: list[CallContext] = []
        self._blocks = geometry.numbered_blocks(model_call.model)
        self._unnumbered = 0
        self._spans: dict = {}

    def __deepcopy__(self, memo):
        """Nodes copy transformer_options deeply; every copy counts in the same run, and the model is not copied with it."""
        return self

    def find_below(self) -> None:
        """Finds the other nodes of ours that get what this one leaves: their wrappers have made their contexts already."""
        for other in compiled.calls_in(self.model_call.options):
            if other is self:
                continue
            if self._leaves_to(other):  # first: of two that put themselves back on top this one did so last
                self.below.append(other)
            elif other._leaves_to(self):
                other.below.append(self)

    def _leaves_to(self, other: CallContext) -> bool:
        ours = self.run.patch.override
        return any(leads_to(next_one, other.run.patch.override) for next_one in (self.adopted, ours.previous))

    def answered_above(self, tokens: int, options) -> None:
        """Another node of ours has run this call of one of the model's layers, which keeps its number here."""
        self.next_layer(tokens, options)
        self.run.telemetry.count_above()

    def spans(self, tokens: int, options) -> geometry.Spans | None:
        key = (tokens, tuple(options.get("activations_shape") or ()))
        if key not in self._spans:
            self._spans[key] = geometry.spans(self.run.family, self._with(options), tokens)
        return self._spans[key]

    def next_layer(self, tokens: int, options) -> int | None:
        """The number of the layer whose attention call this is; None for a call that is not a layer's (a text refiner's).

        The number of the model's block where ComfyUI says it (`geometry.block_number`); what has none is numbered after those, in the order of the
        calls.
        """
        grid = geometry.grid_tokens(self.run.family, self._with(options))
        if grid is not None and tokens < grid and self.spans(tokens, options) is None:
            return None
        layer = geometry.block_number(self.model_call.model, options)
        if layer is None:
            layer = self._blocks + self._unnumbered
            self._unnumbered += 1
        self.layers = max(self.layers, layer + 1)
        return layer

    def _with(self, options) -> geometry.ModelCall:
        return replace(self.model_call, options=options)

    def finish(self) -> None:
        if self.layers:  # a later model call may run fewer: layers that it leaves out count all the same
            patch, telemetry = self.run.patch, self.run.telemetry
            counted = min(self.layers, self._blocks) or self.layers  # negative numbers are of blocks
            patch.total_layers = max(patch.total_layers or 0, counted)
            telemetry.total_layers = max(telemetry.total_layers, patch.total_layers, self.layers)
            self.run.compiled.layers = max(self.run.compiled.layers, self.layers)
