"""Stage 1: which key blocks each query block keeps. Pure functions q, k -> block map; nothing here is as large as S_q x S_k.

Blocks are scored from pooled q and k (mean, and mean of squares for the variance term), then the best ones are kept by count (`topk`), by
predicted softmax mass (`cdf`), or by either. See `select` for the rules; the device code follows the same ones.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .block_mask import BLOCK_K, BLOCK_Q, KeptBlocks, num_blocks
from .call import Call, Rule
from .centring import key_centre

POOL_Q = 32
VARIANCE_CAP = 8.0
MASKED_BIAS = -1e4
"""An additive mask value at or below this excludes the key."""
_CHUNK_ELEMENTS = 1 << 20  # fp32 elements of q or k, or of the score map, that are worked on at a time at least
_CHUNKS = 16  # and at most this share of q


class Keys(NamedTuple):
    """A key mask in the forms the package works with.

    valid : bool (B, S_k)
    weight : fp32 (B, S_k)
        exp(bias - top), 0 where masked: relative to the largest bias of the batch element, so that it stays finite.
    top : fp32 (B,)
        That largest bias; 0 for a bool mask and where everything is masked.
    """

    valid: Tensor
    weight: Tensor
    top: Tensor

    @classmethod
    def from_mask(cls, key_mask: Tensor | None) -> Keys | None:
        """From a bool (True = attend) or additive float mask (B, S_k); values <= -1e4 count as masked."""
        if key_mask is None:
            return None
        if key_mask.dtype == torch.bool:
            return cls(key_mask, key_mask.float(), torch.zeros(key_mask.shape[0], dtype=torch.float32, device=key_mask.device))
        bias = key_mask.float()
        valid = key_mask > masked_bias(key_mask.dtype)
        top = torch.where(valid, bias, -math.inf).amax(-1)
        top = torch.where(top > -math.inf, top, 0)
        return cls(valid, torch.where(valid, (bias - top[:, None]).exp(), 0), top)

    def on_plan(self, perm: Tensor | None) -> Keys:
        return self if perm is None else Keys(self.valid[:, perm], self.weight[:, perm], self.top)


@lru_cache(maxsize=8)
def masked_bias(dtype: torch.dtype) -> float:
    """MASKED_BIAS as `dtype` has it: -9984 in bfloat16."""
    return torch.tensor(MASKED_BIAS, dtype=dtype, device="cpu").item()


class Visibility(NamedTuple):
    """Which blocks a row may see.

    visible : bool (B or 1, N_q or 1, N_k)
        False where every key is masked or lies after the causal edge of the block's last row.
    partial : bool (N_q, N_k) or None
        Blocks that the causal edge cuts.
    """

    visible: Tensor
    partial: Tensor | None


def visibility(call: Call, keys: Keys | None) -> Visibility:
    """Which blocks any row of a call may see, and which of them only partly because of the causal edge; `keys` in plan order."""
    n_q, n_k, device = num_blocks(call.s_q, BLOCK_Q), num_blocks(call.s_k, BLOCK_K), call.device
    visible = torch.ones(1, 1, n_k, dtype=torch.bool, device=device)
    if keys is not None:
        visible = in_blocks(keys.valid, BLOCK_K).any(-1)[:, None]
    if not call.causal:
        return Visibility(visible, None)
    first_row = torch.arange(n_q, device=device)[:, None] * BLOCK_Q
    last_row = (first_row + BLOCK_Q - 1).clamp_max(call.s_q - 1)
    first_key = torch.arange(n_k, device=device)[None] * BLOCK_K
    last_key = (first_key + BLOCK_K - 1).clamp_max(call.s_k - 1)
    reachable = first_key <= last_row + call.causal_offset
    return Visibility(visible & reachable, reachable & (last_key > first_row + call.causal_offset))


def select(call: Call, rule: Rule, q: Tensor, k: Tensor) -> KeptBlocks:
    """Chooses the key blocks of every query block.

    Forced blocks (`keep_q`, `keep_k`, the causal edge, the judge) come on top of `topk`, which counts the visible unforced blocks of a row; for
    `cdf` their mass counts towards the threshold.

    Parameters
    ----------
    q : (B, H, S_q, D); k : (B, H_kv, S_k, D)
        Any float dtype and strides, in the caller's order.

    Returns
    -------
    KeptBlocks
        A block map, in plan order.
    """
    batch, heads, s_q, dim, s_k, device, perm = call.batch, call.heads, call.s_q, call.dim, call.s_k, call.device, call.perm
    group = heads // call.kv_heads
    n_q, n_k = num_blocks(s_q, BLOCK_Q), num_blocks(s_k, BLOCK_K)
    keys = Keys.from_mask(call.key_mask)
    centre = key_centre(k, None if keys is None else keys.valid) if call.smooth_k else None
    plan_keys = None if keys is None else keys.on_plan(perm)
    visible, partial = visibility(call, plan_keys)
    visible = visible.expand(batch, n_q, n_k)
    forced = touched(call.keep_q, s_q, BLOCK_Q, perm, device)[:, None] | touched(call.keep_k, s_k, BLOCK_K, perm, device)[None]
    if partial is not None:
        forced |= partial
    log_count = _log_count(call, plan_keys)

    kept = torch.empty(batch, heads, n_q, n_k, dtype=torch.bool, device=device)
    variance = rule.score == "subblock"
    pools = BLOCK_Q // POOL_Q if variance else 1
    per_head = max(s_q * dim * group, s_k * dim, pools * n_q * n_k * group)
    step = max(1, max(_CHUNK_ELEMENTS, heads * s_q * dim // _CHUNKS) // per_head)
    for b in range(batch):
        weight = None if plan_keys is None else plan_keys.weight[b]
        for g in range(0, call.kv_heads, step):
            kv, hs = slice(g, g + step), slice(g * group, (g + step) * group)
            k_pool = _pool(_rows(k[b, kv], perm, None if centre is None else centre[b, kv]), BLOCK_K, weight, variance, rule.judged)
            q_pool = _pool(_rows(q[b, hs], perm, None), POOL_Q, None, False, rule.judged)
            scores = _scores(call, rule.score, q_pool, k_pool, log_count[b], visible[b])
            forced_here = (forced & visible[b]).expand_as(scores)
            if rule.judged:
                forced_here = forced_here | _judged(q_pool, k_pool, group, _of_heads(rule.sim, hs), visible[b])
            kept[b, hs] = _choose(scores, forced_here, visible[b], rule, hs)
    return KeptBlocks(kept, kept.sum(-1, dtype=torch.int32), visible[:, None].sum(-1, dtype=torch.int32), n_k)


class _Pool(NamedTuple):
    """Weighted moments of blocks of rows: mean and, where asked for, mean square and mean unit row (H, N, D); weight (N,)."""

    mean: Tensor
    square: Tensor | None
    weight: Tensor
    unit: Tensor | None


def _rows(x: Tensor, perm: Tensor | None, centre: Tensor | None) -> Tensor:
    """x (H, S, D) less its centre, as fp32, in plan order."""
    x = (x if perm is None else x.index_select(-2, perm)).float()
    return x if centre is None else x - centre


def _pool(x: Tensor, block: int, weight: Tensor | None, square: bool, unit: bool) -> _Pool:
    """x fp32 (H, S, D) and weight (S,), in plan order. Rows past the end and rows of weight 0 count nowhere."""
    root = None
    if weight is None:
        total = in_blocks(torch.ones(x.shape[-2], dtype=torch.float32, device=x.device), block).sum(-1)
    else:
        x = torch.where(weight[:, None] > 0, x, 0)
        total = in_blocks(weight, block).sum(-1)
        root = in_blocks(weight.sqrt(), block)[:, :, None]
    per_row = 1 / total.clamp_min(1e-30)[:, None]
    rows = in_blocks(x, block, -2)
    weighted = rows if root is None else rows * root
    mean = (weighted if root is None else weighted * root).sum(-2) * per_row
    mean_square = torch.linalg.vector_norm(weighted, dim=-2).square() * per_row if square else None
    mean_unit = None
    if unit:
        norm = rows.square().sum(-1, keepdim=True)
        directions = torch.where(norm > 0, rows * norm.rsqrt(), 0)
        mean_unit = (directions if root is None else directions * root.square()).sum(-2) * per_row
    return _Pool(mean, mean_square, total, mean_unit)


def in_blocks(x: Tensor, block: int, dim: int = -1) -> Tensor:
    """Splits dimension `dim` into (N, block), zero-padding the tail."""
    dim = dim % x.dim()
    length = x.shape[dim]
    n = num_blocks(length, block)
    if n * block != length:
        pad = [0, 0] * (x.dim() - dim - 1) + [0, n * block - length]
        x = torch.nn.functional.pad(x, pad)
    return x.unflatten(dim, (n, block))


def touched(ranges: tuple[int, ...], length: int, block: int, perm: Tensor | None, device: torch.device) -> Tensor:
    """bool (N,): blocks, in plan order, that hold a token of one of the ranges."""
    blocks = num_blocks(length, block)
    found = torch.empty(blocks, dtype=torch.bool, device=device)
    tokens, placed = (None, None) if perm is None else (torch.empty(n, dtype=torch.bool, device=device) for n in (length, blocks * block))
    touch(found, ranges, block, perm, tokens, placed)
    return found


def touch(found: Tensor, ranges: tuple[int, ...], block: int, perm: Tensor | None, tokens: Tensor | None, placed: Tensor | None) -> None:
    """Writes what `touched` returns into `found`; `tokens` (S,) and `placed` (at least N * block,), bool, are written over where there is a plan."""
    if perm is None:
        found.zero_()
        for start, end in zip(ranges[::2], ranges[1::2], strict=True):
            found[start // block : num_blocks(end, block) if end > start else 0].fill_(True)
        return
    tokens.zero_()
    for start, end in zip(ranges[::2], ranges[1::2], strict=True):
        tokens[start:end].fill_(True)
    placed = placed[: found.numel() * block]
    placed[tokens.numel() :].zero_()
    torch.index_select(tokens, 0, perm, out=placed[: tokens.numel()])
    torch.any(placed.view(-1, block), -1, out=found)


def _log_count(call: Call, keys: Keys | None) -> Tensor:
    """ln(n / 64) per (batch, query block or 1, key block), n = sum of exp(bias) over the keys that the block's last row may see."""
    s_k, device = call.s_k, call.device
    weight = torch.ones(1, s_k, dtype=torch.float32, device=device) if keys is None else keys.weight
    n_q, n_k = num_blocks(call.s_q, BLOCK_Q), num_blocks(s_k, BLOCK_K)
    if not call.causal:
        count = in_blocks(weight, BLOCK_K).sum(-1)[:, None]
    else:
        running = torch.nn.functional.pad(weight.double().cumsum(-1), (1, 0))
        edge = ((torch.arange(n_q, device=device) + 1) * BLOCK_Q).clamp_max(call.s_q) + call.causal_offset
        start = torch.arange(n_k, device=device) * BLOCK_K
        end = torch.minimum((start + BLOCK_K)[None].clamp_max(s_k), edge[:, None].clamp(0, s_k))
        count = (running[:, end] - running[:, start][:, None]).clamp_min(0).float()
    return (count / BLOCK_K).log().expand(call.batch, -1, -1)


def _scores(call: Call, form: str, q: _Pool, k: _Pool, log_count: Tensor, visible: Tensor) -> Tensor:
    """Rank values (H, N_q, N_k), larger is better: scaled scores ("mean") or averaged probabilities ("subblock")."""
    group, scale = call.heads // call.kv_heads, call.scale
    k_mean = k.mean.repeat_interleave(group, 0)
    if form == "mean":
        s = scale * (_full_blocks(q, q.mean) @ k_mean.mT)
        return torch.where(visible, s + log_count, -math.inf)
    s = scale * (q.mean @ k_mean.mT)
    variance = (k.square.repeat_interleave(group, 0) - k_mean.square()).clamp_min(0)
    half_variance = 0.5 * scale * scale * (q.mean.square() @ variance.mT)  # of the scores inside a key block
    s = in_blocks(s + half_variance.clamp_max(VARIANCE_CAP), BLOCK_Q // POOL_Q, -2) + log_count[:, None]
    s = torch.where(visible[:, None], s, -math.inf)
    used = in_blocks((q.weight > 0).float(), BLOCK_Q // POOL_Q)
    p = _softmax(s) * used[:, :, None]
    return p.sum(-2) / used.sum(-1)[:, None]


def _full_blocks(q: _Pool, values: Tensor) -> Tensor:
    """Weighted mean of the 32-row pools of each 128-row block: (H, N_pools, D) -> (H, N_q, D)."""
    weight = in_blocks(q.weight, BLOCK_Q // POOL_Q)
    share = weight / weight.sum(-1, keepdim=True)
    return (in_blocks(values, BLOCK_Q // POOL_Q, -2) * share[..., None]).sum(-2)


def _judged(q: _Pool, k: _Pool, group: int, sim: float | Tensor, visible: Tensor) -> Tensor:
    """Blocks forced because their tokens differ too much among themselves for a pooled score to mean anything."""
    sim = sim[:, None] if isinstance(sim, Tensor) else sim
    mixed_q = _full_blocks(q, q.unit).square().sum(-1) < sim
    mixed_k = k.unit.square().sum(-1).repeat_interleave(group, 0) < sim
    return (mixed_q[:, :, None] | mixed_k[:, None, :]) & visible


def _choose(scores: Tensor, forced: Tensor, visible: Tensor, rule: Rule, heads: slice) -> Tensor:
    free = visible & ~forced
    topk, cdf = _of_heads(rule.topk, heads), _of_heads(rule.cdf, heads)
    kept = forced
    if topk is not None:
        kept = kept | _best_by_count(scores, free, topk)
    if cdf is not None:
        p = scores if rule.score == "subblock" else _softmax(scores)
        kept = kept | _best_by_mass(p, forced, free, cdf)
    return kept


def _best_by_count(scores: Tensor, free: Tensor, topk: float | Tensor) -> Tensor:
    n_free = free.sum(-1, dtype=torch.float32)
    share = topk[:, None] if isinstance(topk, Tensor) else topk
    count = torch.where(n_free > 0, (share * n_free + 0.5).floor().clamp_min(1), 0)
    n_k = scores.shape[-1]
    most = n_k if isinstance(topk, Tensor) else min(n_k, max(1, math.floor(topk * n_k + 0.5)) + 1)
    ranked = torch.where(free, scores.clamp_min(-1e30), -math.inf).topk(most, dim=-1).indices
    within = torch.arange(most, device=scores.device) < count[..., None]
    return torch.zeros_like(free).scatter_(-1, ranked, within) & free


def _best_by_mass(p: Tensor, forced: Tensor, free: Tensor, cdf: float | Tensor) -> Tensor:
    threshold = cdf[:, None, None] if isinstance(cdf, Tensor) else torch.full((), cdf, dtype=torch.float32, device=p.device)
    forced_mass = torch.where(forced, p, 0).sum(-1, keepdim=True)
    mass, ranked = torch.where(free, p, -1.0).sort(dim=-1, descending=True)
    mass = mass.clamp_min(0)
    before = forced_mass + mass.cumsum(-1) - mass
    within = (before < threshold) | (threshold >= 1)
    within[..., 0] |= ~forced.any(-1)  # at least one visible block a row
    return torch.zeros_like(free).scatter_(-1, ranked, within) & free


def _softmax(s: Tensor) -> Tensor:
    """Softmax over the last dimension; rows of -inf alone give zeros."""
    return torch.where(s.amax(-1, keepdim=True) > -math.inf, s, 0.0).softmax(-1) * (s > -math.inf)


def _of_heads(value: float | Tensor | None, heads: slice) -> float | Tensor | None:
    return value[heads].to(torch.float32) if isinstance(value, Tensor) else value
