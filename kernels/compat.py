"""The five functions of thu-ml/SpargeAttn by name and signature, doing what their documentation says, on any device.

Code written for that package runs unchanged: `from sparge_kernels.compat import spas_sage2_attn_meansim_topk_cuda`, or `compat.install()` once
and `import spas_sage_attn` as before. Arguments that the original ignored work here or are refused with a sentence.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import torch
from torch import Tensor

from .attention import block_sparse_attention, sparse_attention
from .block_mask import BLOCK_K, BLOCK_Q, num_blocks


def _finish(result, output_dtype, return_sparsity: bool):
    out, info = result
    if output_dtype is not None:
        out = out.to(output_dtype)
    return (out, 1.0 - float(info.density.mean())) if return_sparsity else out


def _key_mask(attn_mask, batch: int, s_k: int):
    """An SDPA-style mask that is the same for every head and query, as (B, S_k); anything else is refused."""
    if attn_mask is None:
        return None
    if not isinstance(attn_mask, Tensor) or attn_mask.dim() not in (2, 4):
        got = tuple(attn_mask.shape) if isinstance(attn_mask, Tensor) else type(attn_mask).__name__
        raise ValueError(f"attn_mask must be a tensor (B, 1, 1, S_k) or (B, S_k), the same for every query, got {got}; use dense attention otherwise")
    mask = attn_mask
    if mask.dim() == 4:
        if mask.shape[1] != 1 or mask.shape[2] != 1:
            raise ValueError(
                f"attn_mask must be the same for every head and query, shape (B, 1, 1, S_k), got {tuple(mask.shape)}; use dense attention"
            )
        mask = mask[:, 0, 0]
    if mask.shape[0] not in (1, batch) or mask.shape[1] != s_k:
        raise ValueError(
            f"attn_mask must have the shape (B, 1, 1, S_k) with B={batch}, S_k={s_k}, got {tuple(attn_mask.shape)}; use one row per batch"
        )
    return mask.expand(batch, s_k)


def _refuse_dropout(dropout_p) -> None:
    if dropout_p != 0:
        raise ValueError(f"dropout_p must be 0: there is no dropout at inference, got {dropout_p!r}")


def spas_sage2_attn_meansim_topk_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    smooth_k: bool = True,
    simthreshd1: float = -0.1,
    cdfthreshd: float | None = None,
    topk: float = 0.5,
    pvthreshd: float = 15,
    attention_sink: bool = False,
    tensor_layout: str = "HND",
    output_dtype: torch.dtype | None = None,
    return_sparsity: bool = False,
):
    """Top-k block-sparse attention (`sparse_attention` with score="mean"); return_sparsity gives (out, 1 - density as a float)."""
    _refuse_dropout(dropout_p)
    s_k = k.shape[1] if tensor_layout == "NHD" else k.shape[-2]
    sink = {"k": [(0, min(BLOCK_K, s_k))]} if attention_sink else None  # the first key block, kept by every row
    rule: dict[str, Any] = dict(topk=topk, cdfthreshd=cdfthreshd, simthreshd1=simthreshd1, score="mean", always_keep=sink)
    given: dict[str, Any] = dict(pvthreshd=pvthreshd, causal=is_causal, scale=scale, smooth_k=smooth_k, layout=tensor_layout)
    result = sparse_attention(q, k, v, **rule, **given, key_mask=_key_mask(attn_mask, k.shape[0], s_k), return_info=True)
    return _finish(result, output_dtype, return_sparsity)


def spas_sage2_attn_meansim_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    smooth_k: bool = True,
    simthreshd1: float = 0.6,
    cdfthreshd: float = 0.98,
    pvthreshd: float = 50,
    attention_sink: bool = False,
    tensor_layout: str = "HND",
    output_dtype: torch.dtype | None = None,
    return_sparsity: bool = False,
):
    """Cumulative-mass block-sparse attention with the self-similarity judge; return_sparsity gives (out, 1 - density as a float)."""
    return spas_sage2_attn_meansim_topk_cuda(**{**locals(), "topk": None})  # the same arguments, and no topk


spas_sage_attn_meansim_topk_cuda = spas_sage2_attn_meansim_topk_cuda
spas_sage_attn_meansim_cuda = spas_sage2_attn_meansim_cuda


def block_sparse_sage2_attn_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask_id: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    smooth_k: bool = True,
    pvthreshd: float = 50,
    attention_sink: bool = False,
    tensor_layout: str = "HND",
    output_dtype: torch.dtype | None = None,
    return_sparsity: bool = False,
):
    """Attention under a block map mask_id (B, H, ceil(S_q/128), ceil(S_k/64)), non-zero = kept, on every device; None = everything."""
    _refuse_dropout(dropout_p)
    s_q, s_k = (x.shape[1] if tensor_layout == "NHD" else x.shape[-2] for x in (q, k))
    if mask_id is None:
        mask_id = torch.ones(1, 1, num_blocks(s_q, BLOCK_Q), num_blocks(s_k, BLOCK_K), dtype=torch.bool, device=q.device)
    mask = mask_id != 0
    if attention_sink:
        mask = torch.cat([torch.ones_like(mask[..., :1]), mask[..., 1:]], -1)
    result = block_sparse_attention(q, k, v, mask, pvthreshd=pvthreshd, scale=scale, smooth_k=smooth_k, layout=tensor_layout, return_info=True)
    return _finish(result, output_dtype, return_sparsity)


def install() -> None:
    """Registers this module as `spas_sage_attn` when the real package is absent; never runs by itself."""
    if "spas_sage_attn" not in sys.modules and importlib.util.find_spec("spas_sage_attn") is None:
        sys.modules["spas_sage_attn"] = sys.modules[__name__]
