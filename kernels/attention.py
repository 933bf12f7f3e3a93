"""The door to the package: sparse attention, attention under a given block mask, block selection, and merging of partial results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import checks, ops
from .backends import NAMES, TABLE, BackendChoice, choose
from .block_mask import BlockMask, KeptBlocks
from .call import Call, Kind, Result, Rule
from .errors import UnsupportedCall
from .order import OrderPlan


@dataclass(frozen=True, eq=False)
class AttentionInfo:
    """What a call did, as its backend left it; numbers are worked out when read, on the device of the call, without waiting for it.

    Attributes
    ----------
    backend : str
        The backend that ran.
    kept : KeptBlocks
        The kept blocks, in plan order when an order was given.
    pv_tiles : int32 (B, H, 2)
        The tiles of kept blocks whose PV half was skipped, and the tiles of kept blocks in all.
    """

    backend: str
    kept: KeptBlocks
    pv_tiles: Tensor

    @property
    def density(self) -> Tensor:
        """Kept / visible blocks: fp32 (B, H), 0..1 (visible: not excluded by causal or a fully masked block)."""
        return self.kept.density

    @property
    def pv_skipped(self) -> Tensor:
        """Share of the tiles of kept blocks whose PV half was skipped: fp32 (B, H), 0..1."""
        return self.pv_tiles[..., 0] / self.pv_tiles[..., 1].clamp_min(1)

    @property
    def block_mask(self) -> BlockMask:
        """The kept blocks as a mask for other calls."""
        return BlockMask(self.kept.to_map(), self.kept.visible)

    def pooled(self, most: int = 64) -> Tensor:
        """The pooled map of the kept blocks: uint8 (H, min(most, N_q), min(most, N_k)), 0..255; see `KeptBlocks.pooled`."""
        return self.kept.pooled(most)


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
        Let the blocks that are not kept enter the softmax as a pooled term.
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
    rule = _rule(q, topk, cdfthreshd, simthreshd1, score)
    given = dict(causal=causal, causal_offset=causal_offset, scale=scale, key_mask=key_mask, order=order, smooth_k=smooth_k, backend=backend)
    wanted = dict(always_keep=always_keep, pvthreshd=pvthreshd, compensate=compensate, return_lse=return_lse, return_info=return_info)
    call = _call(q, k, given | wanted)
    return _returned(call, ops.attend(call, rule, q, k, v), layout)


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
        are not kept; nothing is added. Rows with no kept block give zeros and lse = -inf. A BlockMask keeps its map on q's device for later calls.

    The other parameters, the returns and the errors are those of `sparse_attention`.
    """
    q, k, v = checks.tensors(q, k, v, layout)
    rule = Rule(block_map=checks.block_mask(block_mask, q, k))
    given = dict(causal=causal, causal_offset=causal_offset, scale=scale, key_mask=key_mask, order=order, smooth_k=smooth_k, backend=backend)
    call = _call(q, k, given | dict(pvthreshd=pvthreshd, compensate=compensate, return_lse=return_lse, return_info=return_info))
    return _returned(call, ops.attend(call, rule, q, k, v), layout)


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
    rule = _rule(q, topk, cdfthreshd, simthreshd1, score)
    given = dict(causal=causal, causal_offset=causal_offset, scale=scale, key_mask=key_mask, order=order, smooth_k=smooth_k, backend=backend)
    call = _call(q, k, given | dict(always_keep=always_keep))
    kept = ops.select(call, rule, q, k)
    return BlockMask(kept.to_map(), kept.visible)


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
    rows = out_a.shape[:3] if layout == "HND" or out_a.dim() < 3 else (out_a.shape[0], out_a.shape[2], out_a.shape[1])
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
    kind = Kind(torch.device(device), checks.choice("backend", backend, NAMES), dtype, head_dim, masked=masked)
    try:
        name = choose(kind)
    except UnsupportedCall as refusal:
        return BackendChoice(None, "; ".join(f"{name}: {why}" for name, why in refusal.reasons.items()), False, False)
    return BackendChoice(name, None, TABLE[name].quantised, TABLE[name].skips_pv)


def _rule(q: Tensor, topk, cdfthreshd, simthreshd1, score) -> Rule:
    """The rule of a selection, from the caller's arguments."""
    if topk is None and cdfthreshd is None:
        topk = 0.5
    topk = None if topk is None else checks.number("topk", topk, checks.TOPK, q)
    cdf = None if cdfthreshd is None else checks.number("cdfthreshd", cdfthreshd, checks.CDF, q)
    return Rule(topk, cdf, checks.number("simthreshd1", simthreshd1, checks.SIM, q), checks.choice("score", score, ("subblock", "mean")))


def _call(q: Tensor, k: Tensor, given: dict) -> Call:
    """The call of q and k, from the caller's arguments by name; those that a function does not have are as if left out."""
    device, s_q, s_k, dim = q.device, q.shape[2], k.shape[2], q.shape[3]
    causal = checks.flag("causal", given["causal"])
    offset = checks.causal_offset(causal, given["causal_offset"])
    order = checks.order(given["order"], s_q, s_k, causal)
    keep_q, keep_k = checks.always_keep(given.get("always_keep"), s_q, s_k)
    key_mask = checks.key_mask(given["key_mask"], k)
    backend = choose(Kind(device, checks.choice("backend", given["backend"], NAMES), q.dtype, dim, s_k, key_mask is not None))
    return Call.of(
        q,
        k,
        backend,
        checks.scale(given["scale"], dim),
        causal,
        offset,
        smooth_k=checks.flag("smooth_k", given["smooth_k"]),
        pvthreshd=checks.number("pvthreshd", given.get("pvthreshd", 15.0), checks.PV, q),
        compensate=checks.flag("compensate", given.get("compensate", False)),
        want_lse=checks.flag("return_lse", given.get("return_lse", False)),
        want_info=checks.flag("return_info", given.get("return_info", False)),
        keep_q=keep_q,
        keep_k=keep_k,
        perm=None if order is None else order.on(device),
        key_mask=key_mask,
    )


def _returned(call: Call, result: Result, layout: str):
    """What the public functions return: the output in the caller's layout, and what else was asked for."""
    out = result.out.transpose(1, 2) if layout == "NHD" else result.out
    if not call.want_lse and not call.want_info:
        return out
    lse = (result.lse,) if call.want_lse else ()
    info = (AttentionInfo(call.backend, result.kept, result.pv_tiles),) if call.want_info else ()
    return (out, *lse, *info)
