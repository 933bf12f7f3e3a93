"""ComfyUI's attention call -> eligible, or a counted reason -> the kernels, or the earlier override, or ComfyUI's own attention."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import _comfy, _kernels, compiled, geometry, reasons
from .maps import Pooled
from .recorder import Run, Timed, Timer, check_device
from .run_state import CallContext
from .settings import Rule, Settings, layer_listed
from .speedup import CallKind, instead_of

SHORT_TEXT = 1024
TILES_BELOW = 0.15  # density up to which compact blocks beat row-major ones on small trained models (docs/design/decisions.md)
_numbers = itertools.count(1)


@dataclass(frozen=True, eq=False)
class Request:
    """One attention call of ComfyUI by name. q, k, v are (B, H, S, D) when `skip_reshape`, else (B, S, H * D), or (B, S, H, D) as SD3's v is."""

    q: Tensor
    k: Tensor
    v: Tensor
    heads: int
    mask: Tensor | None
    attn_precision: torch.dtype | None
    skip_reshape: bool
    skip_output_reshape: bool
    options: dict
    scale: float | None
    full_precision: bool

    @classmethod
    def bind(cls, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **others) -> Request:
        """From the arguments of ComfyUI's attention functions; newer versions add more, by name."""
        options = others.get("transformer_options")
        options = options if isinstance(options, dict) else {}
        full_precision = others.get("low_precision_attention", True) is False
        return cls(q, k, v, heads, mask, attn_precision, skip_reshape, skip_output_reshape, options, others.get("scale"), full_precision)

    @property
    def head_dim(self) -> int:
        return self.q.shape[-1] if self.q.dim() == 4 else self.q.shape[-1] // self.heads

    @property
    def s_q(self) -> int:
        return self.q.shape[2 if self.skip_reshape else 1]

    @property
    def s_k(self) -> int:
        return self.k.shape[2 if self.skip_reshape else 1]

    @property
    def shape(self) -> geometry.CallShape:
        return geometry.CallShape(tuple(self.q.shape), self.heads, self.s_k, self.mask is not None)

    @property
    def layout(self) -> str:
        return "HND" if self.skip_reshape else "NHD"

    def views(self) -> list[Tensor]:
        """q, k, v with a head dimension, in the request's layout; no copies but where the last dimension is not contiguous."""
        tensors = [x if x.stride(-1) == 1 else x.contiguous() for x in (self.q, self.k, self.v)]
        return [x if x.dim() == 4 else x.unflatten(-1, (-1, self.head_dim)) for x in tensors]

    def shaped(self, out: Tensor) -> Tensor:
        """The kernels' output as ComfyUI wants it: (B, S, H * D), or (B, H, S, D) when `skip_output_reshape`."""
        if self.skip_reshape:
            return out if self.skip_output_reshape else out.transpose(1, 2).flatten(2)
        return out.transpose(1, 2) if self.skip_output_reshape else out.flatten(2)


class AttentionOverride:
    """What ComfyUI calls for every attention call of a patched model. It has no `container_function`, so it always gets plain tensors.

    key : under which it finds the `CallContext` of the model call (`compiled.call_of`). previous : the override that was on top before, or None.
    """

    def __init__(self, previous):
        self.key = f"sparge_{next(_numbers)}"
        self.previous = previous

    def __deepcopy__(self, memo):
        """ComfyUI copies model_options deeply with every clone of the model; the override, and what it leads to, is shared by all of them."""
        return self

    @torch.compiler.disable
    def __call__(self, func, *args, **kwargs):
        request = Request.bind(*args, **kwargs)
        call = compiled.call_of(request.options, self.key)
        if call is None:  # no model call of a sampler run: nothing is known, nothing is counted
            return (self.previous or _plain)(func, *args, **kwargs)
        if call.depth:  # an override below ours called us again: this call is decided already
            return self._earlier(call, func, args, kwargs)
        run = call.run.telemetry
        with ExitStack() as paused:  # a dense call is ComfyUI's, and recorded as it always is
            decision = _not_now(request, call, paused) or self._paced(decide(request, call), request, call, func)
            if isinstance(decision, Sparse):
                out, timed = self._sparse(request, call, decision, func)
        if isinstance(decision, Dense):
            timer = None if decision.layer is None else Timer(request.q.device)
            out = self._earlier(call, func, args, kwargs)
            kind = self._kind(request, call, func) if timer is not None and _answers_for_sparse(request, call) else None
            run.dense(Timed(call.step, decision.layer, request.s_q, None if timer is None else timer.stop(), kind), decision.reason)
            return out
        for other in call.below:
            other.answered_above(request.s_q, request.options)
        if run.wants_dense(timed):
            _time_dense(run, timed, request.q.device, lambda: self._instead(call, func, args, kwargs))
        return out

    def _sparse(self, request: Request, call: CallContext, decision: Sparse, func) -> tuple[Tensor, Timed]:
        """Runs the call through the kernels and records it."""
        run, (q, k, v) = call.run.telemetry, request.views()
        how: dict[str, Any] = {"layout": request.layout, "scale": request.scale, "backend": call.run.settings.backend, "return_info": True}
        timer = Timer(q.device)
        out, info = _kernels.attend(q, k, v, **decision.arguments(), **how)
        timer.stop()
        pooled = _pooled(run, info, decision) if run.monitors else None
        timed = Timed(call.step, decision.layer, request.s_q, timer, self._kind(request, call, func))
        run.sparse(timed, {"density": info.density, "pv_skipped": info.pv_skipped}, pooled)
        return request.shaped(out), timed

    def _paced(self, decision: Dense | Sparse, request: Request, call: CallContext, func) -> Dense | Sparse:
        """The decision, unless it is for a call that an earlier run measured to be slower sparse."""
        if isinstance(decision, Dense) or not call.run.pace.knows_any:
            return decision
        slower = call.run.pace.reason(self._kind(request, call, func))
        return decision if slower is None else Dense(decision.layer, slower)

    def _kind(self, request: Request, call: CallContext, func) -> CallKind:
        """What the call is timed as; func: ComfyUI's attention function, which answers it in the end, or where another node's does not.

        Nodes of ours further down are no other attention: `_instead` passes them by.
        """
        if call.instead is None:
            call.instead = instead_of(self._other(call))
        name, key = call.instead
        own = getattr(func, "__name__", type(func).__name__)
        return CallKind(request.shape, request.q.dtype, request.q.device, name, f"{own} {key}".strip())

    def _instead(self, call: CallContext, func, args, kwargs):
        """What would have answered the call without any Sparge Attention. None of ours finds its model call, so none decides or counts this one."""
        options = compiled.without_calls(kwargs["transformer_options"])
        return (self._other(call) or _plain)(func, *args, **{**kwargs, "transformer_options": options})

    def _other(self, call: CallContext):
        """The override of another node that would answer without any of ours; None: ComfyUI's own attention."""
        first = self.previous if call.adopted is None or isinstance(call.adopted, AttentionOverride) else call.adopted
        while isinstance(first, AttentionOverride):
            first = first.previous
        return first

    def _earlier(self, call: CallContext, func, args, kwargs):
        """The override that was on top, once; called again from below, the one of patch time; then ComfyUI's own attention."""
        chain = [call.adopted, self.previous] if call.adopted is not None and call.adopted is not self.previous else [self.previous]
        target = chain[call.depth] if call.depth < len(chain) else None
        call.depth += 1
        try:
            return (target or _plain)(func, *args, **kwargs)
        finally:
            call.depth -= 1


def _plain(func, *args, **kwargs):
    return func(*args, **kwargs)


def _answers_for_sparse(request: Request, call: CallContext) -> bool:
    """Whether what answers this dense call would answer a sparse one of its shape alike: in the same precision, and by no other node of ours."""
    full_precision = request.full_precision or request.attn_precision == torch.float32 != request.q.dtype
    return not full_precision and all(other is call for other in compiled.calls_in(request.options))


def _not_now(request: Request, call: CallContext, paused: ExitStack) -> Dense | None:
    """Why nothing of ours may run at this moment, whatever the call; else None, and what ComfyUI records pauses until `paused` closes."""
    if request.q.is_cuda and torch.cuda.is_current_stream_capturing():  # not even an event for the time may be recorded
        call.next_layer(request.s_q, request.options)
        return Dense(None, reasons.CAPTURED)
    why = _comfy.pause_malloc_graph(paused)
    return None if why is None else Dense(call.next_layer(request.s_q, request.options), reasons.RECORDED.format(why=why))


def _pooled(run: Run, info: _kernels.AttentionInfo, decision: Sparse) -> Pooled | None:
    """The call's pooled map for the monitor, or None where there is no room for it: sampling goes on without."""
    try:
        return Pooled(info.pooled(), info.kept.counts.shape[-1], info.kept.key_blocks, decision.place)
    except RuntimeError as error:
        check_device(info.kept.counts.device)
        run.say(reasons.NO_MAP, error=type(error).__name__)
        return None


def _time_dense(run: Run, call: Timed, device: torch.device, attention: Callable[[], object]) -> None:
    """Runs what would have answered a sparse call for its time alone."""
    cost = Timer(device)
    try:
        timer = Timer(device)
        attention()
        timer.stop()
    except _comfy.Interrupted:
        raise
    except Exception as error:  # no room for the dense call, or a dense backend that refuses it: the sparse one, which is the run's, went well
        check_device(device)
        run.measures = False
        run.say(reasons.NOT_TIMED, error=type(error).__name__)
        return
    run.measured(replace(call, timer=timer), cost.stop())


@dataclass(frozen=True)
class Dense:
    """The call stays dense for `reason`; `layer` None for calls that are not a layer's own self-attention."""

    layer: int | None
    reason: str


@dataclass(frozen=True, eq=False)
class Sparse:
    """The call runs sparse. key_mask: (B, S_k) or None; protected: token ranges that are always kept; place: where its block map lies."""

    layer: int
    rule: Rule
    key_mask: Tensor | None
    protected: Sequence[tuple[int, int]] = ()
    order: _kernels.OrderPlan | None = None
    place: geometry.Place | None = None

    def arguments(self) -> dict:
        """What `sparse_attention` is told of the decision."""
        return {**vars(self.rule), "key_mask": self.key_mask, "always_keep": list(self.protected), "order": self.order}


def decide(request: Request, call: CallContext) -> Dense | Sparse:
    """The fixed order of questions; the first "no" names the reason."""
    run, settings, tokens = call.run, call.run.settings, request.s_q
    if request.s_q != request.s_k and (request.s_k <= SHORT_TEXT or request.s_k == call.model_call.context_tokens):
        return Dense(None, reasons.CROSS_ATTENTION.format(keys=request.s_k))
    layer = call.next_layer(tokens, request.options)
    if run.reference is not None:
        return Dense(layer, run.reference)
    no = _unfit(request, settings)
    if no is not None:
        return Dense(layer, no)
    if not run.window.holds(call.sigma):
        return Dense(layer, reasons.WINDOW)
    listed = False if layer is None else layer_listed(layer, run.dense_layers, run.patch.total_layers)
    if listed is not False:
        return Dense(layer, reasons.DENSE_LAYER if listed else reasons.COUNTING_LAYERS)
    shortest = min(request.s_q, request.s_k)
    if shortest < settings.min_tokens:
        return Dense(layer, reasons.TOO_SHORT.format(tokens=shortest, limit=settings.min_tokens))
    if layer is None:
        return Dense(None, reasons.NOT_A_LAYER.format(tokens=tokens))
    if request.s_k <= 64:
        return Dense(layer, reasons.ONE_BLOCK.format(tokens=request.s_k))
    key_mask, no = key_mask_of(request.mask, request.q.shape[0], request.s_k)
    if no is not None:
        return Dense(layer, no)
    rule = settings.rule(run, layer)
    if rule is None or rule.is_dense:
        return Dense(layer, reasons.POLICY_DENSE)
    if request.s_q != request.s_k:
        return Sparse(layer, rule, key_mask)
    spans = call.spans(tokens, request.options)
    if spans is None:
        return Sparse(layer, rule, key_mask, geometry.fallback_protected(tokens, call.model_call.context_tokens))
    protected = spans.protected + (spans.references if settings.protect_references else ())
    kind = order_kind(settings.token_order, rule)
    order = None if kind == "row_major" else _kernels.order_plan(kind, spans.segments)
    return Sparse(layer, rule, key_mask, protected, order, spans.place(kind))


def order_kind(wanted: str, rule: Rule) -> str:
    """The token order of a call; "auto" takes tiles where few blocks are kept, if topk alone decides how many."""
    if wanted != "auto":
        return wanted
    share = rule.topk if isinstance(rule.topk, float) else 1.0
    return "tiles" if share <= TILES_BELOW and rule.cdfthreshd is None else "row_major"


def _unfit(request: Request, settings: Settings) -> str | None:
    """Why the tensors themselves rule the kernels out."""
    choice = _kernels.backend_for(request.q.device, settings.backend, request.head_dim, request.q.dtype, request.mask is not None)
    if choice.backend is None:
        return reasons.NO_BACKEND.format(why=choice.why_not)
    wants_fp32 = request.attn_precision == torch.float32 and request.q.dtype != torch.float32
    if (request.full_precision or wants_fp32) and choice.quantised:
        return reasons.OPTED_OUT
    dtypes = {request.q.dtype, request.k.dtype, request.v.dtype}
    if len(dtypes) > 1 or request.q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return reasons.DTYPE.format(dtype=", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes)))
    if request.head_dim > 256:
        return reasons.HEAD_DIM.format(dim=request.head_dim)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (request.q, request.k, request.v, request.mask)):
        return reasons.GRADIENTS
    return None


def key_mask_of(mask: Tensor | None, batch: int, s_k: int) -> tuple[Tensor | None, str | None]:
    """ComfyUI's mask as (B, S_k), or why it is not one: (key mask, None) or (None, reason).

    2-D masks are [S_q, S_k], 3-D [B, S_q or 1, S_k], 4-D [B, H or 1, S_q or 1, S_k]; a mask expanded over its queries is one row.
    """
    if mask is None:
        return None, None
    shape = tuple(mask.shape)
    if mask.dim() not in (2, 3, 4) or shape[-1] != s_k or (mask.dtype != torch.bool and not mask.is_floating_point()):
        return None, reasons.MASK_SHAPE.format(shape=f"{list(shape)} ({str(mask.dtype).removeprefix('torch.')})")
    full = mask[None, None] if mask.dim() == 2 else mask[:, None] if mask.dim() == 3 else mask
    for axis, reason in ((1, reasons.MASK_PER_HEAD), (2, reasons.MASK_PER_QUERY)):
        if full.shape[axis] != 1 and full.stride(axis) != 0:
            return None, reason
    if full.shape[0] not in (1, batch):
        return None, reasons.MASK_SHAPE.format(shape=f"{list(shape)} for a batch of {batch}")
    return full[:, 0, 0].expand(batch, s_k), None
