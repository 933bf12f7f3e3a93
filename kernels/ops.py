"""The package's torch.library operators: what torch.compile sees of a call, and the one place that hands calls to backends.

The operator namespace is `sparge_` and eight hex digits of the sha1 of the package's own name, so that two copies of the package (ComfyUI loads
the folder, a script imports the installed one) live in one process without touching each other.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .backends import TABLE, choose
from .block_mask import BLOCK_K, BLOCK_Q, num_blocks
from .selection import Keys, Rule, visibility

NAMESPACE = "sparge_" + hashlib.sha1(__package__.encode()).hexdigest()[:8]


@dataclass(frozen=True, eq=False)
class Call:
    """One attention call without its tensors' contents: what a backend decides by and what it needs besides q, k, v."""

    device_type: str
    backend: str
    scale: float
    causal: bool = False
    causal_offset: int = 0
    smooth_k: bool = True
    pvthreshd: float | Tensor = 15.0
    compensate: bool = False
    want_lse: bool = False
    keep_q: tuple[int, ...] = ()
    keep_k: tuple[int, ...] = ()
    perm: Tensor | None = None

    @property
    def forced(self) -> bool:
        """Whether the caller named the backend."""
        return self.backend != "auto"


_RULE = "float? topk, float? cdf, float sim, str score, Tensor? topk_heads, Tensor? cdf_heads, Tensor? sim_heads"
_COMMON = "Tensor? key_mask, bool causal, int causal_offset, float scale, bool smooth_k, int[] keep_q, int[] keep_k, Tensor? perm, str backend"
_SCHEMAS = {
    "select": f"select(Tensor q, Tensor k, {_RULE}, {_COMMON}) -> (Tensor, Tensor)",
    "attend": f"attend(Tensor q, Tensor k, Tensor v, Tensor? block_map, {_RULE}, float pvthreshd, Tensor? pv_heads, bool compensate, bool want_lse, "
    f"{_COMMON}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
}


def _select(q, k, topk, cdf, sim, score, topk_heads, cdf_heads, sim_heads, key_mask, causal, causal_offset, scale, smooth_k, keep_q, keep_k, perm,
            backend):  # fmt: skip
    call = Call(q.device.type, backend, scale, causal, causal_offset, smooth_k, keep_q=tuple(keep_q), keep_k=tuple(keep_k), perm=perm)
    rule = _rule(topk, cdf, sim, score, topk_heads, cdf_heads, sim_heads)
    return TABLE[choose(call)].select(call, q, k, rule, Keys.from_mask(key_mask))


def _attend(q, k, v, block_map, topk, cdf, sim, score, topk_heads, cdf_heads, sim_heads, pvthreshd, pv_heads, compensate, want_lse, key_mask, causal,
            causal_offset, scale, smooth_k, keep_q, keep_k, perm, backend):  # fmt: skip
    call = Call(q.device.type, backend, scale, causal, causal_offset, smooth_k, pvthreshd if pv_heads is None else pv_heads, compensate, want_lse,
                tuple(keep_q), tuple(keep_k), perm)  # fmt: skip
    chosen = TABLE[choose(call)]
    keys = Keys.from_mask(key_mask)
    if block_map is None:
        kept, visible = chosen.select(call, q, k, _rule(topk, cdf, sim, score, topk_heads, cdf_heads, sim_heads), keys)
    else:
        kept, visible = _visible_part(call, q, k, block_map, keys)
    bias = None
    if key_mask is not None:
        bias = torch.where(keys.valid, 0.0 if key_mask.dtype == torch.bool else key_mask.float() - keys.top[:, None], -math.inf)
    out, lse, pv_skipped = chosen.attend(call, q, k, v, kept, keys, bias)
    return out, lse, kept, visible, pv_skipped


def _rule(topk, cdf, sim, score, topk_heads, cdf_heads, sim_heads) -> Rule:
    return Rule(
        *(plain if heads is None else heads.to(torch.float32) for plain, heads in ((topk, topk_heads), (cdf, cdf_heads), (sim, sim_heads))), score
    )


def _visible_part(call: Call, q: Tensor, k: Tensor, block_map: Tensor, keys: Keys | None) -> tuple[Tensor, Tensor]:
    """A caller's block map (B|1, H|1, N_q, N_k) cut down to what is visible, for every head; and the visible blocks per row."""
    batch, heads, s_q, _ = q.shape
    keys = None if keys is None else keys.on_plan(call.perm)
    visible, _ = visibility(batch, s_q, k.shape[2], causal=call.causal, causal_offset=call.causal_offset, keys=keys, device=q.device)
    visible = visible.expand(batch, *block_map.shape[2:])[:, None]
    return (block_map & visible).expand(batch, heads, -1, -1).contiguous(), visible.sum(-1, dtype=torch.int32)


def _select_fake(q, k, *_):
    return _maps_fake(q, k)


def _attend_fake(q, k, v, block_map, topk, cdf, sim, score, topk_heads, cdf_heads, sim_heads, pvthreshd, pv_heads, compensate, want_lse, *_):
    lse = q.new_empty(q.shape[:3] if want_lse else (0,), dtype=torch.float32)
    return torch.empty_like(q), lse, *_maps_fake(q, k), q.new_empty(q.shape[:2], dtype=torch.float32)


def _maps_fake(q, k):
    n_q, n_k = num_blocks(q.shape[2], BLOCK_Q), num_blocks(k.shape[2], BLOCK_K)
    return q.new_empty((q.shape[0], q.shape[1], n_q, n_k), dtype=torch.bool), q.new_empty((q.shape[0], 1, n_q), dtype=torch.int32)


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
