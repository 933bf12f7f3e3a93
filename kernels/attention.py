"""The door to the package: sparse attention, attention under a given block mask, block selection, and merging of partial results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, ops
from .backends import TABLE, BackendChoice, choose
from .block_mask import BLOCK_K, BlockMask, num_blocks
from .errors import UnsupportedCall
from .order import OrderPlan


@dataclass(frozen=True, eq=False)
class AttentionInfo:
    """What a call did, as the backend left it; what is told beyond that is worked out when read, on the device of the call.

    Attributes
    ----------
    density : fp32 (B, H)
        Kept / visible blocks, 0..1 (visible: not excluded by causal or a fully masked block).
    pv_skipped : fp32 (B, H)
        Share of the kept tiles whose PV half was skipped, 0..1.
    backend : str
        The backend that ran.
    block_mask : BlockMask
        The kept blocks, in plan order when an order was given.
    kept : bool (B, H, N_q, N_k)
        The same as a map.
    visible : int32 (B, 1, N_q)
        The visible blocks per row.
    blocks, counts : bool (B, H, N_q, N_k) or int16 (B, H, N_q, capacity), and int32 (B, H, N_q)
        The backend's own form of the map: a bool map, or ascending key block numbers (unsigned) of which the first `counts` of a row hold.
    skips : int32 (B, H, 2)
        Dropped tiles, and the tiles of kept blocks in all.
    key_blocks : int
        N_k.
    """

    backend: str
    blocks: Tensor
    counts: Tensor
    visible: Tensor
    skips: Tensor
    key_blocks: int

    @property
    def density(self) -> Tensor:
        return self.counts.sum(-1, dtype=torch.float32) / self.visible.sum(-1, dtype=torch.float32).clamp_min(1)

    @property
    def pv_skipped(self) -> Tensor:
        return self.skips[..., 0] / self.skips[..., 1].clamp_min(1)

    @property
    def kept(self) -> Tensor:
        return _as_map(self.blocks, self.counts, self.key_blocks)

    @property
    def block_mask(self) -> BlockMask:
        return BlockMask.from_dense(self.kept, self.visible)

    def pooled(self, most: int = 64) -> Tensor:
        """A small picture of the kept blocks: uint8 (H, R, C) with R = min(most, N_q), C = min(most, N_k), without waiting for the device.

        0..255 is the share that is kept of the blocks in a cell, over the batch. Of n blocks pooled to r cells, cell i holds the blocks
        i * n // r up to (i + 1) * n // r.
        """
        batch, heads, n_q = self.counts.shape
        q_edges, k_edges = (_edges(n, min(n, most), self.counts.device) for n in (n_q, self.key_blocks))
        per_chunk = max(1, _POOLED_AT_ONCE // max(1, self.blocks[:, :1].numel()))
        chunks = range(0, heads, per_chunk)
        below = torch.cat([self._kept_below(k_edges, slice(h, h + per_chunk)) for h in chunks])  # (H, N_q, C + 1)
        kept = F.pad(below.cumsum(1), (0, 0, 1, 0))[:, q_edges].diff(dim=1).diff(dim=2)
        blocks = q_edges.diff()[:, None] * k_edges.diff() * batch
        return (kept * 255 / blocks + 0.5).to(torch.uint8)

    def _kept_below(self, edges: Tensor, heads: slice) -> Tensor:
        """How many of the blocks in front of each edge a row of these heads keeps, summed over the batch: (heads, N_q, edges)."""
        blocks = self.blocks[:, heads]
        if blocks.dtype == torch.bool:
            return F.pad(blocks.sum(0).cumsum(-1), (1, 0))[..., edges]
        within = torch.arange(blocks.shape[-1], device=blocks.device) < self.counts[:, heads, :, None]
        ids = torch.where(within, blocks.int() & 0xFFFF, self.key_blocks)
        return torch.searchsorted(ids, edges.int().expand(*ids.shape[:-1], -1).contiguous()).sum(0)


_POOLED_AT_ONCE = 1 << 22
"""Entries of the kept blocks that `AttentionInfo.pooled` widens at once: some 50 MB, or what one head needs."""


def _edges(blocks: int, cells: int, device: torch.device) -> Tensor:
    """Where each of `cells` begins, and the end: int64 (cells + 1,); made on the device, for a copy from the host would wait."""
    return torch.arange(cells + 1, device=device) * blocks // cells


def _as_map(blocks: Tensor, counts: Tensor, key_blocks: int) -> Tensor:
    """The bool map (B, H, N_q, N_k) of either form of the kept blocks."""
    if blocks.dtype == torch.bool:
        return blocks
    within = torch.arange(blocks.shape[-1], device=blocks.device) < counts[..., None]
    ids = torch.where(within, blocks.long() & 0xFFFF, key_blocks)  # what lies behind a row's count goes to a column that is cut off
    kept = torch.zeros((*blocks.shape[:-1], key_blocks + 1), dtype=torch.bool, device=blocks.device)
    return kept.scatter_(-1, ids, True)[..., :key_blocks].contiguous()


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    topk: float | Tensor | None = None,
    cdfthreshd: float | Tensor | None = None,
    simthreshd1: float | Tensor = -0.1,
    pvthreshd: float | Tensor = 15.0,
    causal: bool = False,
    causal_offset: int = 0,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    always_keep: Sequence | dict | None = None,
    order: OrderPlan | None = None,
    score: str = "subblock",
    compensate: bool = False,
    smooth_k: bool = True,
    layout: str = "HND",
    backend: str = "auto",
    return_lse: bool = False,
    return_info: bool = False,
):
    """Softmax attention over the key blocks that matter to each block of queries, chosen on the fly.

    Parameters
    ----------
    q : (B, H, S_q, D) for layout "HND", (B, S_q, H, D) for "NHD"
        fp16, bf16 or fp32; any strides with a contiguous last dimension; D 1..256 (1..128 on the fast kernels).
    k, v : (B, H_kv, S_k, D) or (B, S_k, H_kv, D)
        Same dtype and device; H a multiple of H_kv.
    topk : in (0, 1], number or per-head tensor (H,)
        Of the n visible, not forced key blocks of a row keep max(1, floor(topk * n + 0.5)). 1 = dense. Default 0.5 when `cdfthreshd` is None.
    cdfthreshd : in (0, 1], number or per-head tensor, or None
        Keep the smallest set of blocks whose predicted softmax mass reaches it. With `topk` too: the union.
    simthreshd1 : in [-1, 1], number or per-head tensor
        A block whose tokens are less self-similar than this is always kept (key block) or attends densely (query block). Negative: off.
    pvthreshd : > 0, log2 units, number or per-head tensor
        Permission to skip the value half of a tile whose scores are all this far below the running maximum; lower skips more. Backends that
        gain nothing (torch) never do.
    causal, causal_offset : bool, int
        Query i sees keys j <= i + causal_offset (top-left, as in PyTorch). Partly visible blocks are always kept.
    scale : finite, > 0
        Default D ** -0.5.
    key_mask : bool (B, S_k), True = attend; or additive float (B, S_k)
        Float values are finite, or <= -1e4 (-inf too) for a masked key. Fully masked blocks are not visited.
    always_keep : [(start, end), ...] or {"q": [...], "k": [...]}
        Token ranges, in the caller's indices: key blocks they touch are kept by every row, query blocks they touch attend to everything visible.
    order : OrderPlan
        From `order.plan`; results are in the caller's order all the same. Not with causal.
    score : "subblock" | "mean"
        How blocks are ranked; "mean" is the published rule.
    compensate : bool
        Let skipped blocks enter the softmax as a pooled term.
    smooth_k : bool
        Centre K before pooling and quantising.
    layout : "HND" | "NHD"
    backend : "auto" | "cuda" | "torch"
    return_lse : bool
        Also return the natural-log log-sum-exp of the true scores, fp32 (B, H, S_q); see `merge_lse`.
    return_info : bool
        Also return an `AttentionInfo`.

    Returns
    -------
    out, or (out[, lse][, info])
        out has q's shape, dtype and layout. A row that sees nothing gives zeros and lse = -inf.

    Raises
    ------
    ValueError, TypeError
        For a bad argument, with its rule, value and remedy.
    UnsupportedCall
        When no backend takes the call, with every backend's reason.

    Source: Zhang et al., SpargeAttention, ICML 2025 (PMLR 267); the selection rules are this project's form of it.
    """
    q, k, v = checks.tensors(q, k, v, layout)
    arguments = _selection_arguments(q, k, topk, cdfthreshd, simthreshd1, causal, causal_offset, scale, key_mask, always_keep, order, score, smooth_k,
                                     backend)  # fmt: skip
    return _attend(q, k, v, None, arguments, pvthreshd, compensate, layout, return_lse, return_info)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask | Tensor,
    *,
    pvthreshd: float | Tensor = 15.0,
    causal: bool = False,
    causal_offset: int = 0,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    order: OrderPlan | None = None,
    compensate: bool = False,
    smooth_k: bool = True,
    layout: str = "HND",
    backend: str = "auto",
    return_lse: bool = False,
    return_info: bool = False,
):
    """Softmax attention over the key blocks that `block_mask` keeps.

    Parameters
    ----------
    block_mask : BlockMask, or bool (B|1, H|1, N_q, N_k)
        N_q = ceil(S_q / 128), N_k = ceil(S_k / 64); in plan order when `order` is given. Blocks outside what causal and key_mask leave visible
        are dropped; nothing is added. Rows with no kept block give zeros and lse = -inf. A BlockMask keeps its map on q's device for later calls.

    The other parameters, the returns and the errors are those of `sparse_attention`.
    """
    q, k, v = checks.tensors(q, k, v, layout)
    block_map = checks.block_mask(block_mask, q, k)
    arguments = _selection_arguments(q, k, None, None, -0.1, causal, causal_offset, scale, key_mask, None, order, "mean", smooth_k, backend)
    return _attend(q, k, v, block_map, arguments, pvthreshd, compensate, layout, return_lse, return_info)


def select_blocks(
    q: Tensor,
    k: Tensor,
    *,
    topk: float | Tensor | None = None,
    cdfthreshd: float | Tensor | None = None,
    simthreshd1: float | Tensor = -0.1,
    causal: bool = False,
    causal_offset: int = 0,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    always_keep: Sequence | dict | None = None,
    order: OrderPlan | None = None,
    score: str = "subblock",
    smooth_k: bool = True,
    layout: str = "HND",
    backend: str = "auto",
) -> BlockMask:
    """The block mask that `sparse_attention` would use; in plan order when `order` is given.

    Parameters, errors: as for `sparse_attention`.
    """
    q, k, _ = checks.tensors(q, k, None, layout)
    arguments = _selection_arguments(q, k, topk, cdfthreshd, simthreshd1, causal, causal_offset, scale, key_mask, always_keep, order, score, smooth_k,
                                     backend)  # fmt: skip
    blocks, counts, visible = ops.select(q, k, *arguments.rule, *arguments.common)
    return BlockMask.from_dense(_as_map(blocks, counts, num_blocks(k.shape[2], BLOCK_K)), visible)


def merge_lse(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, layout: str = "HND") -> tuple[Tensor, Tensor]:
    """Joins attention over two disjoint key ranges into attention over both.

    Parameters
    ----------
    out_a, out_b : (B, H, S_q, D) for layout "HND", (B, S_q, H, D) for "NHD"
    lse_a, lse_b : fp32 (B, H, S_q)
        Natural-log log-sum-exp of the true scores, as `return_lse` gives it. -inf where a range holds nothing for a row.

    Returns
    -------
    out in out_a's dtype, lse fp32
    """
    checks.choice("layout", layout, ("HND", "NHD"))
    for name, x in {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {x!r}; pass what a call with return_lse=True returned")
    rows = out_a.shape[:3] if layout == "HND" else (out_a.shape[0], out_a.shape[2], out_a.shape[1])
    if out_a.dim() != 4 or out_a.shape != out_b.shape or lse_a.shape != rows or lse_b.shape != rows:
        raise ValueError(
            f"out_a and out_b must have one 4-D shape ({layout}), lse_a and lse_b the shape (B, H, S_q) of it, got {tuple(out_a.shape)}, "
            f"{tuple(out_b.shape)}, {tuple(lse_a.shape)}, {tuple(lse_b.shape)}; pass what one call returned together"
        )
    lse = torch.logaddexp(lse_a, lse_b)
    finite = torch.where(lse == -math.inf, 0.0, lse)
    a, b = ((x - finite).exp()[..., None] for x in (lse_a, lse_b))
    if layout == "NHD":
        a, b = a.transpose(1, 2), b.transpose(1, 2)
    return (out_a.float() * a + out_b.float() * b).to(out_a.dtype), lse


def can_run(
    device: torch.device | str, *, backend: str = "auto", head_dim: int = 64, dtype: torch.dtype = torch.float16, masked: bool = False
) -> BackendChoice:
    """Which backend runs calls of a kind on a device, asked without tensors; the first such question may load kernels there.

    Parameters
    ----------
    device : torch.device or str
        Where q, k and v will be.
    backend : "auto" | "cuda" | "torch"
        As the call will name it.
    head_dim, dtype
        Of q, k and v: 1..256; float16, bfloat16 or float32. Others, which every call refuses, are not looked for here.
    masked : bool
        Whether the call has a `key_mask`.

    Returns
    -------
    BackendChoice
        A refusal is not for ever: during the capture of a CUDA graph no kernels are loaded, after it they are.
    """
    call = ops.Call(torch.device(device), checks.backend(backend), dim=head_dim, dtype=dtype, masked=masked)
    try:
        name = choose(call)
    except UnsupportedCall as refusal:
        return BackendChoice(None, "; ".join(f"{name}: {why}" for name, why in refusal.reasons.items()), False, False)
    return BackendChoice(name, None, TABLE[name].quantised, TABLE[name].skips_pv)


@dataclass(frozen=True, eq=False)
class _Arguments:
    """Checked arguments in the operators' order."""

    rule: tuple
    common: tuple


def _selection_arguments(q, k, topk, cdfthreshd, simthreshd1, causal, causal_offset, scale, key_mask, always_keep, order, score, smooth_k, backend):
    heads = q.shape[1]
    if topk is None and cdfthreshd is None:
        topk = 0.5
    if topk is not None:
        topk = checks.number("topk", topk, 0, 1, heads, low_open=True, remedy="use 1 for dense attention, 0.5 for half of the blocks")
    if cdfthreshd is not None:
        cdfthreshd = checks.number("cdfthreshd", cdfthreshd, 0, 1, heads, low_open=True, remedy="leave it out to select by topk alone")
    sim = checks.number("simthreshd1", simthreshd1, -1, 1, heads, low_open=False, remedy="use -0.1 to switch the judge off")
    causal = checks.flag("causal", causal)
    offset = checks.causal_offset(causal, causal_offset)
    plan = checks.order(order, q.shape[2], k.shape[2], causal)
    keep_q, keep_k = checks.always_keep(always_keep, q.shape[2], k.shape[2])
    numbers, tensors = [], []
    for value in (topk, cdfthreshd, sim):
        per_head = isinstance(value, Tensor)
        numbers.append(None if per_head else value)
        tensors.append(value.to(q.device) if per_head else None)
    numbers[2] = -1.0 if numbers[2] is None else numbers[2]
    rule = (*numbers, checks.choice("score", score, ("subblock", "mean")), *tensors)
    common = (checks.key_mask(key_mask, k), causal, offset, checks.scale(scale, q.shape[3]), checks.flag("smooth_k", smooth_k), keep_q, keep_k,
              None if plan is None else plan.on(q.device), checks.backend(backend))  # fmt: skip
    return _Arguments(rule, common)


def _attend(q, k, v, block_map, arguments: _Arguments, pvthreshd, compensate, layout, return_lse, return_info):
    pv = checks.number("pvthreshd", pvthreshd, 0, math.inf, q.shape[1], low_open=True, remedy="15 is a good start, 50 is off in practice")
    flags = (checks.flag("compensate", compensate), checks.flag("return_lse", return_lse))
    return_info = checks.flag("return_info", return_info)
    pv_arguments = (50.0, pv.to(q.device)) if isinstance(pv, Tensor) else (pv, None)
    out, lse, *did = ops.attend(q, k, v, block_map, *arguments.rule, *pv_arguments, *flags, *arguments.common)
    if layout == "NHD":
        out = out.transpose(1, 2)
    result = (out,)
    if return_lse:
        result += (lse,)
    if return_info:
        call = ops.Call(q.device, arguments.common[-1], dtype=q.dtype, s_q=q.shape[2], s_k=k.shape[2], dim=q.shape[3])
        result += (AttentionInfo(choose(call), *did, num_blocks(k.shape[2], BLOCK_K)),)
    return result if len(result) > 1 else out
