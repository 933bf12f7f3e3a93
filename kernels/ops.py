"""The package's torch.library operators: what torch.compile sees of a call, and the one place that hands calls to backends.

The operator namespace is `sparge_` and eight hex digits of the sha1 of the package's own name, so that two copies of the package (ComfyUI loads
the folder, a script imports the installed one) live in one process without touching each other.
"""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from .backends import TABLE, choose
from .block_mask import BLOCK_Q, num_blocks
from .selection import Rule

NAMESPACE = "sparge_" + hashlib.sha1(__package__.encode()).hexdigest()[:8]


@dataclass(frozen=True, eq=False)
class Call:
    """One attention call without its tensors' contents: what a backend decides by and what it needs besides q, k, v.

    The defaults describe a call that every backend takes as far as its own limits go, so that `Call(device)` asks for the device alone.
    """

    device: torch.device
    backend: str = "auto"
    scale: float = 1.0
    causal: bool = False
    causal_offset: int = 0
    smooth_k: bool = True
    pvthreshd: float | Tensor = 15.0
    compensate: bool = False
    want_lse: bool = False
    keep_q: tuple[int, ...] = ()
    keep_k: tuple[int, ...] = ()
    perm: Tensor | None = None
    masked: bool = False
    dtype: torch.dtype = torch.float16
    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    s_q: int = 1
    s_k: int = 1
    dim: int = 64

    @property
    def forced(self) -> bool:
        """Whether the caller named the backend."""
        return self.backend != "auto"


_RULE = "float? topk, float? cdf, float sim, str score, Tensor? topk_heads, Tensor? cdf_heads, Tensor? sim_heads"
_COMMON = "Tensor? key_mask, bool causal, int causal_offset, float scale, bool smooth_k, int[] keep_q, int[] keep_k, Tensor? perm, str backend"
_SCHEMAS = {
    "select": f"select(Tensor q, Tensor k, {_RULE}, {_COMMON}) -> (Tensor, Tensor, Tensor)",
    "attend": f"attend(Tensor q, Tensor k, Tensor v, Tensor? block_map, {_RULE}, float pvthreshd, Tensor? pv_heads, bool compensate, bool want_lse, "
    f"{_COMMON}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
}


def _select(q, k, topk, cdf, sim, score, topk_heads, cdf_heads, sim_heads, key_mask, causal, causal_offset, scale, smooth_k, keep_q, keep_k, perm,
            backend):  # fmt: skip
    call = _call(q, k, backend, scale, causal, causal_offset, smooth_k, 15.0, False, False, keep_q, keep_k, perm, key_mask)
    with _as_given(q):
        return TABLE[choose(call)].select(call, q, k, _rule(topk, cdf, sim, score, topk_heads, cdf_heads, sim_heads), key_mask)


def _attend(q, k, v, block_map, topk, cdf, sim, score, topk_heads, cdf_heads, sim_heads, pvthreshd, pv_heads, compensate, want_lse, key_mask, causal,
            causal_offset, scale, smooth_k, keep_q, keep_k, perm, backend):  # fmt: skip
    pv = pvthreshd if pv_heads is None else pv_heads
    call = _call(q, k, backend, scale, causal, causal_offset, smooth_k, pv, compensate, want_lse, keep_q, keep_k, perm, key_mask)
    rule = None if block_map is not None else _rule(topk, cdf, sim, score, topk_heads, cdf_heads, sim_heads)
    with _as_given(q):
        return TABLE[choose(call)].run(call, q, k, v, rule, block_map, key_mask)


def _as_given(q: Tensor):
    """A context in which autocast leaves the backends' fp32 products alone."""
    kind = q.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _call(q, k, backend, scale, causal, causal_offset, smooth_k, pvthreshd, compensate, want_lse, keep_q, keep_k, perm, key_mask) -> Call:
    batch, heads, s_q, dim = q.shape
    return Call(q.device, backend, scale, causal, causal_offset, smooth_k, pvthreshd, compensate, want_lse, tuple(keep_q), tuple(keep_k), perm,
                key_mask is not None, q.dtype, batch, heads, k.shape[1], s_q, k.shape[2], dim)  # fmt: skip


def _rule(topk, cdf, sim, score, topk_heads, cdf_heads, sim_heads) -> Rule:
    return Rule(*(plain if heads is None else heads for plain, heads in ((topk, topk_heads), (cdf, cdf_heads), (sim, sim_heads))), score)


def _select_fake(q, k, topk, cdf, sim, score, topk_heads, cdf_heads, sim_heads, key_mask, causal, causal_offset, scale, smooth_k, keep_q, keep_k,
                 perm, backend):  # fmt: skip
    call = _call(q, k, backend, scale, causal, causal_offset, smooth_k, 15.0, False, False, keep_q, keep_k, perm, key_mask)
    return _maps_fake(q, call, _rule(topk, cdf, sim, score, topk_heads, cdf_heads, sim_heads))


def _attend_fake(q, k, v, block_map, topk, cdf, sim, score, topk_heads, cdf_heads, sim_heads, pvthreshd, pv_heads, compensate, want_lse, key_mask,
                 causal, causal_offset, scale, smooth_k, keep_q, keep_k, perm, backend):  # fmt: skip
    call = _call(q, k, backend, scale, causal, causal_offset, smooth_k, pvthreshd, compensate, want_lse, keep_q, keep_k, perm, key_mask)
    rule = None if block_map is not None else _rule(topk, cdf, sim, score, topk_heads, cdf_heads, sim_heads)
    lse = q.new_empty(q.shape[:3] if want_lse else (0,), dtype=torch.float32)
    return torch.empty_like(q), lse, *_maps_fake(q, call, rule), q.new_empty((call.batch, call.heads, 2), dtype=torch.int32)


def _maps_fake(q: Tensor, call: Call, rule: Rule | None) -> tuple[Tensor, Tensor, Tensor]:
    shape, dtype = TABLE[choose(call)].blocks_form(call, rule)
    n_q = num_blocks(call.s_q, BLOCK_Q)
    counts = q.new_empty((call.batch, call.heads, n_q), dtype=torch.int32)
    return q.new_empty(shape, dtype=dtype), counts, q.new_empty((call.batch, 1, n_q), dtype=torch.int32)


def _register() -> None:
    namespace = getattr(torch.ops, NAMESPACE)
    if hasattr(namespace, "attend"):
        return  # this package was imported before in this process; its operators are as good as ours
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    for name, real, fake in (("select", _select, _select_fake), ("attend", _attend, _attend_fake)):
        library.define(_SCHEMAS[name])
        library.impl(name, real, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    _attend.library = library  # the dispatcher holds the function, the function the library: it outlives a re-import of this module


_register()
select = getattr(torch.ops, NAMESPACE).select
attend = getattr(torch.ops, NAMESPACE).attend
