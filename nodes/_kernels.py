"""The one crossing from the nodes into `kernels/`: one eligible attention call, in ComfyUI's terms, carried out sparsely."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..kernels import AttentionInfo, BlockMask, UnsupportedCall, block_sparse_attention, order, sparse_attention
from ..kernels.backends import TABLE, choose
from ..kernels.call import Kind

__all__ = ["BACKEND_NAMES", "ORDER_KINDS", "AttentionInfo", "BlockMask", "Density", "attend", "backend_for", "backend_facts", "order_plan"]

BACKEND_NAMES = ("auto", "torch", "cuda")
"""In the order of the node's list, which only grows at its end."""
ORDER_KINDS = order.KINDS
order_plan = order.plan


@dataclass(frozen=True, eq=False)
class Density:
    """What decides the kept blocks of a call: the values of `sparse_attention`, or a fixed mask that replaces the selection."""

    topk: float | Tensor | None
    cdfthreshd: float | None
    simthreshd1: float
    pvthreshd: float
    compensate: bool
    block_mask: BlockMask | None = None


def backend_for(device: torch.device | str, wanted: str, dim: int = 64, dtype: torch.dtype = torch.float16, masked: bool = False):
    """(backend name, None), or (None, why no backend runs calls like this on the device). A refusal is asked for anew: some end with their cause."""
    try:
        return _chosen(torch.device(device), wanted, dim, dtype, masked), None
    except UnsupportedCall as refusal:
        return None, "; ".join(f"{name}: {why}" for name, why in refusal.reasons.items())


@lru_cache(maxsize=64)
def _chosen(device: torch.device, wanted: str, dim: int, dtype: torch.dtype, masked: bool) -> str:
    return choose(Kind(device, wanted, dtype, dim, masked=masked))


def backend_facts(name: str):
    """What a backend is: `quantised`, `skips_pv`."""
    return TABLE[name]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    density: Density,
    *,
    layout: str,
    scale: float | None,
    key_mask: Tensor | None,
    protected: tuple[tuple[int, int], ...],
    plan,
    backend: str,
) -> tuple[Tensor, AttentionInfo]:
    """Sparse attention over (B, H, S, D) ("HND") or (B, S, H, D) ("NHD") views; the output has q's layout."""
    common = dict(
        pvthreshd=density.pvthreshd, scale=scale, key_mask=key_mask, order=plan, compensate=density.compensate, layout=layout, backend=backend,
        return_info=True,
    )  # fmt: skip
    if density.block_mask is not None:
        mask = density.block_mask
        if protected:
            ranges = [(start, end) for start, end in protected]
            s_q, s_k = (x.shape[2 if layout == "HND" else 1] for x in (q, k))
            if plan is not None and not plan.is_identity:
                moved = plan.inverse
                ranges = [(int(moved[a:b].min()), int(moved[a:b].max()) + 1) for a, b in ranges]
            mask = mask | BlockMask.global_tokens(s_q, s_k, ranges)
        return block_sparse_attention(q, k, v, mask, **common)
    return sparse_attention(
        q, k, v, topk=density.topk, cdfthreshd=density.cdfthreshd, simthreshd1=density.simthreshd1, always_keep=list(protected), **common
    )
