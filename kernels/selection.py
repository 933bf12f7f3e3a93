"""Stage 1: which key blocks each query block keeps. Pure functions q, k -> bool map; nothing here is as large as S_q x S_k.

Blocks are scored from pooled q and k (mean, and mean of squares for the variance term), then the best ones are kept by count (`topk`), by
predicted softmax mass (`cdf`), or by either. See `select` for the rules; the device code follows the same ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .block_mask import BLOCK_K, BLOCK_Q, num_blocks
from .quantize import key_centre

POOL_Q = 32
VARIANCE_CAP = 8.0
MASKED_BIAS = -1e4
"""An additive mask value at or below this excludes the key."""
_CHUNK_ELEMENTS = 1 << 20  # fp32 elements of q or k, or of the score map, that are worked on at a time at least
_CHUNKS = 16  # and at most this share of q


@dataclass(frozen=True, eq=False)
class Rule:
    """What to keep; each value is a number, or a per-head tensor (H,) of any dtype, which counts as fp32.

    `topk` and `cdf` None = not used; both given: the union. `sim` < 0 = judge off.
    """

    topk: float | Tensor | None
    cdf: float | Tensor | None
    sim: float | Tensor
    score: str = "subblock"


@dataclass(frozen=True, eq=False)
class Keys:
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
            return cls(key_mask, key_mask.float(), torch.zeros(key_mask.shape[0], device=key_mask.device))
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


def visibility(
    batch: int, s_q: int, s_k: int, *, causal: bool, causal_offset: int, keys: Keys | None, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Which blocks any row may see, and which of them only partly because of the causal edge.

    Returns
    -------
    visible : bool (B or 1, N_q or 1, N_k)
        False where every key is masked or lies behind the causal edge of the block's last row.
    partial : bool (N_q, N_k) or None
        Blocks that the causal edge cuts.
    """
    n_q, n_k = num_blocks(s_q, BLOCK_Q), num_blocks(s_k, BLOCK_K)
    visible = torch.ones(1, 1, n_k, dtype=torch.bool, device=device)
    if keys is not None:
        visible = _blocks(keys.valid, BLOCK_K).any(-1)[:, None]
    if not causal:
        return visible, None
    first_row = torch.arange(n_q, device=device)[:, None] * BLOCK_Q
    last_row = (first_row + BLOCK_Q - 1).clamp_max(s_q - 1)
    first_key = torch.arange(n_k, device=device)[None] * BLOCK_K
    last_key = (first_key + BLOCK_K - 1).clamp_max(s_k - 1)
    reachable = first_key <= last_row + causal_offset
    return visible & reachable, reachable & (last_key > first_row + causal_offset)


def select(
    q: Tensor,
    k: Tensor,
    rule: Rule,
    *,
    scale: float,
    causal: bool = False,
    causal_offset: int = 0,
    keys: Keys | None = None,
    keep_q: tuple[int, ...] = (),
    keep_k: tuple[int, ...] = (),
    perm: Tensor | None = None,
    smooth_k: bool = True,
) -> tuple[Tensor, Tensor]:
    """Chooses the key blocks of every query block.

    Parameters
    ----------
    q : (B, H, S_q, D); k : (B, H_kv, S_k, D)
        Any float dtype and strides, in the caller's order.
    rule : Rule
        Forced blocks (`keep_q`, `keep_k`, the causal edge, the judge) come on top of `topk`, which counts the visible unforced blocks of a
        row; for `cdf` their mass counts towards the threshold.
    scale : float
        Softmax scale.
    keys : Keys or None
        Key mask, in the caller's order.
    keep_q, keep_k : flat (start, end, start, end, ...)
        Token ranges in the caller's order whose blocks attend to everything visible, or are kept by every row.
    perm : int64 (S,) or None
        Order plan: `perm[p]` is the caller's token at plan position p; the result is in plan order.

    Returns
    -------
    kept : bool (B, H, N_q, N_k)
    visible : int32 (B or 1, 1, N_q)
        Visible blocks of each row; density = kept.sum / visible.sum.
    """
    batch, heads, s_q, dim = q.shape
    kv_heads, s_k = k.shape[1], k.shape[2]
    group, device = heads // kv_heads, q.device
    n_q, n_k = num_blocks(s_q, BLOCK_Q), num_blocks(s_k, BLOCK_K)
    centre = key_centre(k, None if keys is None else keys.valid) if smooth_k else None
    plan_keys = None if keys is None else keys.on_plan(perm)
    visible, partial = visibility(batch, s_q, s_k, causal=causal, causal_offset=causal_offset, keys=plan_keys, device=device)
    visible = visible.expand(batch, n_q, n_k)
    forced = torch.zeros(n_q, n_k, dtype=torch.bool, device=device)
    forced |= touched(keep_q, s_q, BLOCK_Q, perm, device)[:, None] | touched(keep_k, s_k, BLOCK_K, perm, device)[None]
    if partial is not None:
        forced |= partial
    log_count = _log_count(plan_keys, batch, s_k, n_q, causal, causal_offset, s_q, device)

    kept = torch.empty(batch, heads, n_q, n_k, dtype=torch.bool, device=device)
    judge = isinstance(rule.sim, Tensor) or rule.sim > 0
    variance = rule.score == "subblock"
    pools = BLOCK_Q // POOL_Q if variance else 1
    per_head = max(s_q * dim * group, s_k * dim, pools * n_q * n_k * group)
    step = max(1, max(_CHUNK_ELEMENTS, heads * s_q * dim // _CHUNKS) // per_head)
    for b in range(batch):
        weight = None if plan_keys is None else plan_keys.weight[b]
        for g in range(0, kv_heads, step):
            kv, hs = slice(g, g + step), slice(g * group, (g + step) * group)
            k_pool = _pool(k[b, kv], perm, BLOCK_K, weight, None if centre is None else centre[b, kv], variance, judge)
            q_pool = _pool(q[b, hs], perm, POOL_Q, None, None, False, judge)
            scores = _scores(q_pool, k_pool, group, log_count[b], scale, rule.score, visible[b])
            forced_here = (forced & visible[b]).expand_as(scores)
            if judge:
                forced_here = forced_here | _judged(q_pool, k_pool, group, _of_heads(rule.sim, hs), visible[b])
            kept[b, hs] = _choose(scores, forced_here, visible[b], rule, hs)
    return kept, visible[:, None].sum(-1, dtype=torch.int32)


@dataclass(frozen=True, eq=False)
class _Pool:
    """Weighted moments of blocks of rows: mean and, where asked for, mean square and mean unit row (H, N, D); weight (N,)."""

    mean: Tensor
    square: Tensor | None
    weight: Tensor
    unit: Tensor | None


def _pool(x: Tensor, perm: Tensor | None, block: int, weight: Tensor | None, centre: Tensor | None, square: bool, unit: bool) -> _Pool:
    """x (H, S, D) in the caller's order; weight (S,) in plan order. Rows past the end and rows of weight 0 count nowhere."""
    x = (x if perm is None else x.index_select(-2, perm)).float()
    if centre is not None:
        x = x - centre
    root = None
    if weight is None:
        total = _blocks(torch.ones(x.shape[-2], device=x.device), block).sum(-1)
    else:
        x = torch.where(weight[:, None] > 0, x, 0)
        total = _blocks(weight, block).sum(-1)
        root = _blocks(weight.sqrt(), block)[:, :, None]
    per_row = 1 / total.clamp_min(1e-30)[:, None]
    rows = _blocks(x, block, -2)
    weighted = rows if root is None else rows * root
    mean = (weighted if root is None else weighted * root).sum(-2) * per_row
    mean_square = torch.linalg.vector_norm(weighted, dim=-2).square() * per_row if square else None
    mean_unit = None
    if unit:
        norm = rows.square().sum(-1, keepdim=True)
        directions = torch.where(norm > 0, rows * norm.rsqrt(), 0)
        mean_unit = (directions if root is None else directions * root.square()).sum(-2) * per_row
    return _Pool(mean, mean_square, total, mean_unit)


def _blocks(x: Tensor, block: int, dim: int = -1) -> Tensor:
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


def _log_count(keys: Keys | None, batch: int, s_k: int, n_q: int, causal: bool, offset: int, s_q: int, device: torch.device) -> Tensor:
    """ln(n / 64) per (batch, query block or 1, key block), n = sum of exp(bias) over the keys that the block's last row may see."""
    weight = torch.ones(1, s_k, device=device) if keys is None else keys.weight
    n_k = num_blocks(s_k, BLOCK_K)
    if not causal:
        count = _blocks(weight, BLOCK_K).sum(-1)[:, None]
    else:
        running = torch.nn.functional.pad(weight.double().cumsum(-1), (1, 0))
        edge = ((torch.arange(n_q, device=device) + 1) * BLOCK_Q).clamp_max(s_q) + offset
        start = torch.arange(n_k, device=device) * BLOCK_K
        end = torch.minimum((start + BLOCK_K)[None].clamp_max(s_k), edge[:, None].clamp(0, s_k))
        count = (running[:, end] - running[:, start][:, None]).clamp_min(0).float()
    return (count / BLOCK_K).log().expand(batch, -1, -1)


def block_scores(q_mean: Tensor, k_mean: Tensor, k_square: Tensor | None, scale: float) -> tuple[Tensor, Tensor | None]:
    """Pooled scores and half the diagonal score variance inside each key block.

    Parameters
    ----------
    q_mean : fp32 (H, P, D); k_mean, k_square : fp32 (H, N_k, D) with the query heads' count H; k_square None: no variance.

    Returns
    -------
    fp32 (H, P, N_k) twice; the second None when k_square is.
    """
    scores = scale * (q_mean @ k_mean.mT)
    if k_square is None:
        return scores, None
    variance = (k_square - k_mean.square()).clamp_min(0)
    return scores, 0.5 * scale * scale * (q_mean.square() @ variance.mT)


def _scores(q: _Pool, k: _Pool, group: int, log_count: Tensor, scale: float, form: str, visible: Tensor) -> Tensor:
    """Rank values (H, N_q, N_k), larger is better: scaled scores ("mean") or averaged probabilities ("subblock")."""
    k_mean = k.mean.repeat_interleave(group, 0)
    if form == "mean":
        s, _ = block_scores(_full_blocks(q, q.mean), k_mean, None, scale)
        return torch.where(visible, s + log_count, -math.inf)
    s, half_variance = block_scores(q.mean, k_mean, k.square.repeat_interleave(group, 0), scale)
    s = _blocks(s + half_variance.clamp_max(VARIANCE_CAP), BLOCK_Q // POOL_Q, -2) + log_count[:, None]
    s = torch.where(visible[:, None], s, -math.inf)
    used = _blocks((q.weight > 0).float(), BLOCK_Q // POOL_Q)
    p = _softmax(s) * used[:, :, None]
    return p.sum(-2) / used.sum(-1)[:, None]


def _full_blocks(q: _Pool, values: Tensor) -> Tensor:
    """Weighted mean of the 32-row pools of each 128-row block: (H, N_pools, D) -> (H, N_q, D)."""
    weight = _blocks(q.weight, BLOCK_Q // POOL_Q)
    share = weight / weight.sum(-1, keepdim=True)
    return (_blocks(values, BLOCK_Q // POOL_Q, -2) * share[..., None]).sum(-2)


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
    threshold = cdf[:, None, None] if isinstance(cdf, Tensor) else torch.full((), cdf, device=p.device)
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
