"""The written truth: attention under a block map, row by row in fp64 (or fp32), with simulated quantisation and the PV skip. Slow and plain.

It shares no code with the backends but the block sizes. Kernels are held to it: with PV skip off, to plain block-sparse attention; with PV skip
on, to the same rule with the kernel's own row group and key tile.
"""

from __future__ import annotations

import math

import torch
from sparge_kernels.block_mask import BLOCK_K, BLOCK_Q, BlockMask
from torch import Tensor

LOG2E = math.log2(math.e)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: BlockMask | Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    causal_offset: int = 0,
    key_mask: Tensor | None = None,
    pvthreshd: float | None = None,
    row_group: int = 64,
    key_tile: int = 64,
    qk: str = "exact",
    pv: str = "exact",
    smooth_k: bool = True,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over the kept blocks.

    Parameters
    ----------
    q (B, H, S_q, D); k, v (B, H_kv, S_k, D)
    kept : BlockMask, bool (B|1, H|1, N_q, N_k) or None
        None keeps everything.
    key_mask : bool (True = attend) or additive float (B, S_k), values <= -1e4 masked.
    pvthreshd : float or None
        log2 units. The value half of a tile is skipped, denominator included, for a group of rows when every row's maximum in it lies at least
        this far below the row's running maximum; only tiles that were not skipped move the running maximum. None: never.
    row_group : 16, 64 or 128; key_tile : 64 or 128
        The granularity of that rule. A 128-key tile is two kept blocks that follow each other in the row's list (an odd last one stays alone).
    qk : "exact" | "int8"
        int8: K centred (when `smooth_k`), Q rounded per row, K per 64 rows.
    pv : "exact" | "int8" | "fp8" | "fp16"
        int8: P unsigned 8-bit against the row's tile maximum, V per channel; fp8: both e4m3, row sum of the rounded P; fp16: both half precision.

    Returns
    -------
    out in `dtype` like q; lse (B, H, S_q) natural log, of the true scores; pv_skipped (B, H): the share of tiles skipped so, counted per row group.
    """
    batch, heads, s_q, dim = q.shape
    group, s_k = heads // k.shape[1], k.shape[2]
    n_q, n_k = -(-s_q // BLOCK_Q), -(-s_k // BLOCK_K)
    scale = dim**-0.5 if scale is None else scale
    kept = torch.ones(1, 1, n_q, n_k, dtype=torch.bool) if kept is None else kept.to_dense() if isinstance(kept, BlockMask) else kept
    kept = kept.expand(batch, heads, n_q, n_k).cpu()
    out = torch.zeros(batch, heads, s_q, dim, dtype=dtype)
    lse = torch.full((batch, heads, s_q), -math.inf, dtype=dtype)
    pv_skipped = torch.zeros(batch, heads)
    for b in range(batch):
        bias = torch.zeros(s_k, dtype=dtype)
        if key_mask is not None:
            given = key_mask[b].cpu()
            bias = torch.where(given, 0.0, -math.inf).to(dtype) if given.dtype == torch.bool else given.to(dtype)
            limit = -1e4 if given.dtype == torch.bool else float(torch.tensor(-1e4, dtype=given.dtype))
            bias = torch.where(bias <= limit, -math.inf, bias)
        seen = bias > -math.inf
        for h in range(heads):
            qh, kh, vh = q[b, h].cpu().to(dtype), k[b, h // group].cpu().to(dtype), v[b, h // group].cpu().to(dtype)
            kh, vh = torch.where(seen[:, None], kh, 0), torch.where(seen[:, None], vh, 0)
            scores, lost = _scores(qh, kh, seen, scale, qk, smooth_k)
            v_values, v_scale = _value_grid(vh, pv)
            skipped = tiles = 0
            for i in range(n_q):
                blocks = kept[b, h, i].nonzero()[:, 0].tolist()
                for first in range(i * BLOCK_Q, min((i + 1) * BLOCK_Q, s_q), row_group):
                    rows = torch.arange(first, min(first + row_group, (i + 1) * BLOCK_Q, s_q))
                    s = scores[rows] + bias
                    if causal:
                        s = torch.where(torch.arange(s_k) <= rows[:, None] + causal_offset, s, -math.inf)
                    tile_list = _tiles(blocks, key_tile, s_k)
                    o, l, skipped_here = _online_softmax(s, tile_list, v_values, pvthreshd, pv, dtype)
                    out[b, h, rows], lse[b, h, rows] = o * v_scale, l + lost[rows]
                    skipped, tiles = skipped + skipped_here, tiles + len(tile_list)
            pv_skipped[b, h] = skipped / max(tiles, 1)
    return out, lse, pv_skipped


def _tiles(blocks: list[int], key_tile: int, s_k: int) -> list[Tensor]:
    """Key indices of each tile: one kept block, or two that follow each other in the list."""
    step = key_tile // BLOCK_K
    keys = [torch.arange(j * BLOCK_K, min((j + 1) * BLOCK_K, s_k)) for j in blocks]
    return [torch.cat(keys[i : i + step]) for i in range(0, len(keys), step)]


def _online_softmax(s: Tensor, tiles: list[Tensor], v: Tensor, pvthreshd: float | None, pv: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    rows = s.shape[0]
    o = torch.zeros(rows, v.shape[1], dtype=dtype)
    total = torch.zeros(rows, dtype=dtype)
    top = torch.full((rows,), -math.inf, dtype=dtype)
    skipped = 0
    for keys in tiles:
        tile = s[:, keys]
        tile_top = tile.amax(-1)
        if pvthreshd is not None:
            below = (top - tile_top) * LOG2E  # NaN where both are -inf: such a row sees nothing in either and does not object
            if bool(((below >= pvthreshd) | (tile_top == -math.inf)).all()):
                skipped += 1
                continue
        new_top = torch.maximum(top, tile_top)
        finite = torch.where(new_top == -math.inf, 0.0, new_top)
        p = (tile - finite[:, None]).exp()
        alpha = (top - finite).exp()
        weights, row_sum = _round_p(p, tile_top, finite, pv)
        o = o * alpha[:, None] + weights @ v[keys]
        total = total * alpha + row_sum
        top = new_top
    seen = total > 0
    out = torch.where(seen[:, None], o / torch.where(seen, total, 1.0)[:, None], 0.0)
    return out, torch.where(seen, top + total.log(), -math.inf), skipped


def _round_p(p: Tensor, tile_top: Tensor, top: Tensor, pv: str) -> tuple[Tensor, Tensor]:
    """P as the kernel would hold it, and the row sum that the kernel would take."""
    if pv == "int8":  # unsigned, against the row's maximum in this tile; the fp32 row sum is that of the unrounded P
        unit = torch.where(tile_top == -math.inf, 1.0, (tile_top - top).exp()) / 255
        return (p / torch.where(unit > 0, unit, 1.0)[:, None]).round() * unit[:, None], p.sum(-1)
    if pv == "fp8":  # offset by 2**8 so that e4m3's range is used; the row sum is that of the rounded P
        rounded = (p.float() * 256).to(torch.float8_e4m3fn).to(p.dtype) / 256
        return rounded, rounded.sum(-1)
    if pv == "fp16":
        return p.half().to(p.dtype), p.sum(-1)
    return p, p.sum(-1)


def _scores(q: Tensor, k: Tensor, seen: Tensor, scale: float, qk: str, smooth_k: bool) -> tuple[Tensor, Tensor]:
    """scale * q k^T as the kernel would compute it, and the constant per row that centring K took from the true scores."""
    lost = torch.zeros(q.shape[0], dtype=q.dtype)
    if qk == "exact":
        return scale * (q @ k.mT), lost
    if smooth_k:
        # One key of 16, at a place that changes with the square of the group's number.
        chosen = [t for t in (16 * g + g * g * 1126333 // 2**20 % 16 for g in range(-(-len(k) // 16))) if t < len(k) and bool(seen[t])]
        centre = (k[chosen].mean(0) if chosen else torch.zeros_like(k[0]))[None]
        k, lost = torch.where(seen[:, None], k - centre, 0), scale * (q @ centre[0])
    q_unit = q.abs().amax(-1, keepdim=True) / 127
    k_unit = torch.cat([block.abs().amax().expand(len(block), 1) for block in k.split(BLOCK_K)]) / 127
    q8, k8 = ((x / torch.where(unit > 0, unit, 1)).round() for x, unit in ((q, q_unit), (k, k_unit)))
    return scale * (q8 @ k8.mT) * q_unit * k_unit.mT, lost


def _value_grid(v: Tensor, pv: str) -> tuple[Tensor, Tensor]:
    """V on the kernel's grid, and the factor per channel that it is still to be multiplied by."""
    if pv in ("int8", "fp8"):
        unit = v.abs().amax(0) / (127 if pv == "int8" else 448)
        safe = torch.where(unit > 0, unit, 1)
        grid = (v / safe).round() if pv == "int8" else (v / safe).float().to(torch.float8_e4m3fn).to(v.dtype)
        return grid, unit
    return (v.half().to(v.dtype) if pv == "fp16" else v), torch.ones_like(v[0])
