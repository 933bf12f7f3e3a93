"""What PyTorch's own operators do in a call of the CUDA backend: they write into the workspace, in place or through `out`, and return nothing new.

`view(name)` is a buffer of the workspace everywhere here. An operator that converts while it computes (mixed dtypes) or that multiplies matrices of
more than three dimensions may take memory of its own, so each does one thing at a time. Numbers reach them as Python numbers, never as new tensors.
On a GPU PyTorch still has cuBLAS's workspace, which it keeps, and room for the partial results of a long reduction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..block_mask import BLOCK_K, BLOCK_Q, num_blocks
from ..call import Call, Form, Rule
from ..selection import masked_bias, touch

View = Callable[[str], Tensor]


class Inputs(NamedTuple):
    """q, k and v of a call; without v, a selection alone."""

    q: Tensor
    k: Tensor
    v: Tensor | None


class Given(NamedTuple):
    """The caller's tensors of bools or of a number per head, by field of the structs: what kernels read where it lies, and what they read copied."""

    readable: dict[str, Tensor]
    copied: dict[str, Tensor]


def given(call: Call, rule: Rule) -> Given:
    """What of a call's tensors the kernels can read as they lie."""
    numbers = {"pv_heads": call.pvthreshd, "topk_heads": rule.topk, "cdf_heads": rule.cdf, "sim_heads": rule.sim}
    found = {name: value for name, value in numbers.items() if isinstance(value, Tensor)}
    readable = {name: x for name, x in found.items() if x.dtype == torch.float32 and x.is_contiguous()}
    block_map, key_mask = rule.block_map, call.key_mask
    if block_map is not None:
        found["block_map"] = block_map
        if block_map.stride()[2:] == (block_map.shape[3], 1):  # over batch and heads any strides do
            readable["block_map"] = block_map
    if key_mask is not None and key_mask.dtype == torch.bool:
        found["key_valid"] = key_mask
        if key_mask.is_contiguous():
            readable["key_valid"] = key_mask
    return Given(readable, {name: x for name, x in found.items() if name not in readable})


def buffers(call: Call, copied: dict[str, Tensor]) -> dict[str, Form]:
    """The buffers for what the kernels read in another form than the caller's: copies, the key bias, the forced blocks."""
    wanted = {name: Form(tuple(x.shape), torch.bool if name in ("block_map", "key_valid") else torch.float32) for name, x in copied.items()}
    if _biased(call):
        shape = (call.batch, call.s_k)
        wanted |= {"key_bias": Form(shape, torch.float32), "hidden": Form(shape, torch.bool), "top": Form(shape[:1], torch.float32)}
    forced = {name: Form((num_blocks(length, block),), torch.bool) for name, _, length, block in _forced(call)}
    if forced and call.perm is not None:
        forced |= {"tokens": Form((call.s_q,), torch.bool), "tokens_in_order": Form((num_blocks(call.s_q, BLOCK_Q) * BLOCK_Q,), torch.bool)}
    return wanted | forced


def fill(call: Call, copied: dict[str, Tensor], view: View) -> None:
    """Writes what `buffers` asks for."""
    for name, x in copied.items():
        view(name).copy_(x)
    if _biased(call):
        _key_bias(call.key_mask, view)
    for name, ranges, _, block in _forced(call):
        tokens, placed = (None, None) if call.perm is None else (view("tokens"), view("tokens_in_order"))
        touch(view(name), ranges, block, call.perm, tokens, placed)


def _biased(call: Call) -> bool:
    return call.key_mask is not None and call.key_mask.dtype != torch.bool


class _Forced(NamedTuple):
    """Token ranges that force blocks: the field that says which, the ranges, and what they are ranges of."""

    name: str
    ranges: tuple[int, ...]
    length: int
    block: int


def _forced(call: Call) -> Iterator[_Forced]:
    if call.keep_q:
        yield _Forced("forced_q", call.keep_q, call.s_q, BLOCK_Q)
    if call.keep_k:
        yield _Forced("forced_k", call.keep_k, call.s_k, BLOCK_K)


def _key_bias(key_mask: Tensor, view: View) -> None:
    """`key_bias`, relative to its largest value in `top`, which is 0 where everything is masked; the same numbers as `selection.Keys`."""
    bias, hidden, top = view("key_bias"), view("hidden"), view("top")
    bias.copy_(key_mask)
    torch.gt(key_mask, masked_bias(key_mask.dtype), out=hidden)
    bias.masked_fill_(hidden.logical_not_(), -math.inf)
    torch.amax(bias, -1, out=top)
    bias.sub_(top.nan_to_num_(0.0, math.inf, 0.0)[:, None])


def row_shift(call: Call, inputs: Inputs, view: View) -> None:
    """Writes scale * C q per row into `row_shift`, with C the mean covariance of v and k inside the key blocks (see compensation.py).

    It comes after the selection, which is the last to read `v_mean` and `key_bias`: both are changed here.
    """
    q, k, v = inputs
    dim, group, kv_heads = call.dim, call.heads // call.kv_heads, call.kv_heads
    centre = _centre(view) if call.smooth_k else None
    hidden, weight = (None, None) if call.key_mask is None else _hidden_keys(call.key_mask, view)
    scale = _scale_by_weight(call, view)
    v_mean = view("v_mean").mul_(view("k_weight")[:, None, :, None]).flatten(0, 1)
    k_mean, k_pool_scale = view("k_mean").flatten(0, 1), view("k_pool_scale").flatten(0, 1)
    shift, rows, values = view("row_shift").flatten(0, 1), view("shift_rows"), view("shift_values")
    (high, low), covariance, of_head = view("shift_pools"), view("covariance"), view("covariance_of_head")

    for start in range(0, call.batch * kv_heads, values.shape[0]):
        part = slice(start, min(start + values.shape[0], call.batch * kv_heads))
        n = part.stop - start
        keys = rows[: n * call.s_k * dim].view(n, call.s_k, dim)
        for b, heads, here in _pieces(part, kv_heads):
            some, others = keys[here].copy_(k[b, heads]), values[here].copy_(v[b, heads])
            if centre is not None:
                some.sub_(centre[b, heads, None, :dim])
            if hidden is not None:
                some.masked_fill_(hidden[b, :, None], 0)
                others.masked_fill_(hidden[b, :, None], 0)
            if weight is not None:
                others.mul_(weight[b, :, None])
        torch.bmm(values[:n].mT, keys, out=covariance[:n])

        high[:n].copy_(k_mean[part, :, 0])
        high[:n].add_(low[:n].copy_(k_mean[part, :, 1])).mul_(k_pool_scale[part, :, :1])
        torch.bmm(v_mean[part, :, :dim].mT, high[:n, :, :dim], out=of_head[:n])
        covariance[:n].sub_(of_head[:n]).mul_(scale[part, None, None])

        queries = rows[: n * group * call.s_q * dim].view(n * group, call.s_q, dim)  # over the keys, which are done with
        for b, heads, here in _pieces(part, kv_heads):
            queries[group * here.start : group * here.stop].copy_(q[b, group * heads.start : group * heads.stop])
        of_head[: n * group].view(n, group, dim, dim).copy_(covariance[:n, None].mT)
        torch.bmm(queries, of_head[: n * group], out=shift[group * start : group * part.stop])


def _centre(view: View) -> Tensor:
    """The mean of the sampled keys, fp32 (B, H_kv, D padded)."""
    count = torch.sum(view("k_count"), 2, keepdim=True, out=view("shift_count"))
    return torch.sum(view("k_sum"), 2, out=view("shift_centre")).div_(count.clamp_min_(1))


def _scale_by_weight(call: Call, view: View) -> Tensor:
    """The softmax scale over the weight of all keys, fp32 (B * H_kv,)."""
    weight = torch.sum(view("k_weight"), 1, keepdim=True, out=view("shift_weight"))
    return view("shift_scale").copy_(weight.clamp_min_(1e-30).reciprocal_().mul_(call.scale)).flatten()


def _hidden_keys(key_mask: Tensor, view: View) -> tuple[Tensor, Tensor | None]:
    """The keys without weight, bool (B, S_k), and the weight of the others, fp32 (B, S_k), or None for 1."""
    if key_mask.dtype == torch.bool:
        return torch.logical_not(key_mask, out=view("hidden")), None
    weight = view("key_bias").exp_()
    return torch.gt(weight, 0, out=view("hidden")).logical_not_(), weight


class _Piece(NamedTuple):
    """A batch element, some of its kv heads, and where these lie in a range of the kv heads of all batch elements."""

    batch: int
    heads: slice
    here: slice


def _pieces(part: slice, kv_heads: int) -> Iterator[_Piece]:
    """A range of the kv heads of all batch elements, cut at these."""
    for b in range(part.start // kv_heads, (part.stop - 1) // kv_heads + 1):
        first, last = max(part.start, b * kv_heads), min(part.stop, (b + 1) * kv_heads)
        yield _Piece(b, slice(first - b * kv_heads, last - b * kv_heads), slice(first - part.start, last - part.start))
