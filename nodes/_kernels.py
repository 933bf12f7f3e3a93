"""The one crossing from the nodes into `kernels/`, through its public door."""

from __future__ import annotations

from functools import lru_cache

import torch

from ..kernels import BACKEND_NAMES, AttentionInfo, BackendChoice, can_run, order
from ..kernels import __version__ as VERSION
from ..kernels import sparse_attention as attend

__all__ = ["BACKEND_NAMES", "ORDER_KINDS", "VERSION", "AttentionInfo", "BackendChoice", "OrderPlan", "attend", "backend_for", "order_plan"]

ORDER_KINDS = order.KINDS
OrderPlan = order.OrderPlan
order_plan = order.plan


def backend_for(
    device: torch.device | str, wanted: str, head_dim: int = 64, dtype: torch.dtype = torch.float16, masked: bool = False
) -> BackendChoice:
    """Which backend runs calls of this kind on the device, or why none does."""
    choice = _asked(torch.device(device), wanted, head_dim, dtype, masked)
    if choice.backend is None:
        _asked.cache_clear()  # else a refusal would stay when its cause has gone
    return choice


@lru_cache(maxsize=64)
def _asked(device: torch.device, wanted: str, head_dim: int, dtype: torch.dtype, masked: bool) -> BackendChoice:
    return can_run(device, backend=wanted, head_dim=head_dim, dtype=dtype, masked=masked)
