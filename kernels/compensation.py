"""The pooled state of the blocks that were not kept, merged into the attention of the kept ones, so that they do not vanish.

Inside a block the keys that score high carry values unlike the block's mean, so a pooled mass with a mean value repairs little; the first-order
shift of the value (one D x D covariance per head) is what makes it work. Off by default: on whole sampling runs of the models tried so far the
gain is small.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .block_mask import BLOCK_K, BLOCK_Q
from .selection import POOL_Q, VARIANCE_CAP, in_blocks

NOTHING_POOLED = -1e30


class Heads(NamedTuple):
    """Heads of one batch element in plan order, and which of their blocks are pooled.

    q : (H, S_q, D); k, v : (H, S_k, D), any float dtype
        K already centred, kv heads repeated to H.
    weight : fp32 (S_k,) or None
        exp(key bias), 0 for masked keys.
    pooled : bool (H, N_q, N_k)
        Blocks that are wholly visible and were not kept.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    weight: Tensor | None
    pooled: Tensor


class PooledState(NamedTuple):
    """What the pooled blocks of each query block contribute, in the frame of the centred K.

    m0, l0, shift_weight : fp32 (H, N_q); u : fp32 (H, N_q, D); covariance : fp32 (H, D, D), value rows, key columns.
    m0 is NOTHING_POOLED (finite) and the rest zero where nothing is pooled.
    """

    m0: Tensor
    l0: Tensor
    u: Tensor
    shift_weight: Tensor
    covariance: Tensor


def pooled_state(heads: Heads, scale: float, *, shift: bool = True) -> PooledState:
    """Pools the blocks of `heads` that were not kept.

    A pooled block's score comes from the mean of the query block's rows. Half the variance of that score inside the key block is taken with the
    squared means of the query block's 32-row pools, averaged over its rows: what the selection's variance term has at hand.

    Parameters
    ----------
    heads : Heads
    scale : float
        Softmax scale.
    shift : bool
        False leaves out the value shift, and with it the variance: for causal attention, where one covariance over all keys would show every
        row its future.
    """
    q, k, v, weight, pooled = heads
    w = torch.ones(k.shape[-2], dtype=torch.float32, device=k.device) if weight is None else weight
    kf = torch.where(w[:, None] > 0, k.float(), 0)
    vf = torch.where(w[:, None] > 0, v.float(), 0)
    blocks = in_blocks(w, BLOCK_K)[:, :, None]
    n = blocks.sum(1)
    share = blocks / n.clamp_min(1e-30)[:, None]
    k_blocks, v_blocks = in_blocks(kf, BLOCK_K, -2), in_blocks(vf, BLOCK_K, -2)
    k_mean, k_square, v_mean = (k_blocks * share).sum(-2), (k_blocks.square() * share).sum(-2), (v_blocks * share).sum(-2)
    if shift:
        covariance = ((vf * w[:, None]).mT @ kf - (v_mean * n).mT @ k_mean) / w.sum().clamp_min(1e-30)
    else:
        covariance, k_square = kf.new_zeros(kf.shape[0], kf.shape[-1], kf.shape[-1]), k_mean.square()  # no variance without the shift

    n_q, pools = pooled.shape[-2], BLOCK_Q // POOL_Q
    rows = (q.shape[-2] - torch.arange(n_q * pools, device=q.device) * POOL_Q).clamp(0, POOL_Q).float()[:, None]
    means = in_blocks(q.float(), BLOCK_Q, -2).unflatten(-2, (pools, POOL_Q)).sum(-2).flatten(-3, -2) / rows.clamp_min(1)
    of_block = rows.unflatten(0, (n_q, pools))
    of_block = of_block / of_block.sum(1, keepdim=True)
    q_mean, q_square = ((x.unflatten(-2, (n_q, pools)) * of_block).sum(-2) for x in (means, means.square()))
    scores = scale * (q_mean @ k_mean.mT)
    half_variance = 0.5 * scale * scale * (q_square @ (k_square - k_mean.square()).clamp_min(0).mT)
    exponent = torch.where(pooled, scores + half_variance.clamp_max(VARIANCE_CAP) + n.squeeze(-1).log(), -math.inf)
    m0 = exponent.amax(-1).clamp_min(NOTHING_POOLED)
    mass = (exponent - m0[..., None]).exp()
    shrink = (VARIANCE_CAP / half_variance.clamp_min(VARIANCE_CAP)).sqrt()
    return PooledState(m0, mass.sum(-1), mass @ v_mean, (mass * shrink).sum(-1), covariance)


def merge(out: Tensor, lse: Tensor, q: Tensor, state: PooledState, scale: float) -> tuple[Tensor, Tensor]:
    """Adds the pooled blocks to the attention of the kept ones, row by row.

    Parameters
    ----------
    out : fp32 (H, S_q, D); lse : fp32 (H, S_q)
        Attention over the kept blocks and its log-sum-exp in the frame of the centred K (natural log).
    q : (H, S_q, D)

    Returns
    -------
    out, lse of the whole, in the same frame.
    """
    row = torch.arange(q.shape[-2], device=q.device) // BLOCK_Q
    shift = scale * (q.float() @ state.covariance.mT)
    o0 = state.u[:, row] + state.shift_weight[:, row, None] * shift
    m0, l0 = state.m0[:, row], state.l0[:, row]
    top = torch.maximum(lse, m0)
    kept, pooled = (lse - top).exp(), (m0 - top).exp()
    total = kept + l0 * pooled
    return (out * kept[..., None] + o0 * pooled[..., None]) / total[..., None].clamp_min(1e-38), top + total.log()
